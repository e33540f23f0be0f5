"""Models on disk: their tensors, where they are found, and the one that needs no download."""
