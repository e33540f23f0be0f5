"""Vectors on stock vLLM: a plugin that makes an adapter of any strength from a model's name. It imports no torch."""
