"""The ways to steer, each with a strength k: weights, activations, prompts, trained checkpoints."""
