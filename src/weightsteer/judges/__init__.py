"""Models that score replies: a local one, or one behind an OpenAI-compatible url."""
