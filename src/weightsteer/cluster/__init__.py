"""Jobs of one or many runs, done by models on many processes or machines at once (by Ray)."""
