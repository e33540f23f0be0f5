"""The vector as other engines take it: merged checkpoints and llama.cpp's control vectors."""
