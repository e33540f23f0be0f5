"""Models behind a server (vLLM, llama.cpp, or our own) as the place where measurements run."""
