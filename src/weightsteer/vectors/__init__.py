"""The weight vector: its parts, where it comes from, its algebra, and how it is added to a model."""
