"""An OpenAI-compatible server for a model and its vectors, with one k for each row of a batch."""
