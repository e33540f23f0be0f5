"""D+ and D-: sampled from a model, and checked for what would leak into the vector."""
