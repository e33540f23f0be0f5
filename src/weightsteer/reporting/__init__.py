"""Charts and self-contained pages of what was measured."""
