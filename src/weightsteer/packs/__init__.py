"""Vectors to share: to and from the Hugging Face Hub, or a folder."""
