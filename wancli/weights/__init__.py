"""Checkpoint files to named tensors, and where the weights live (offload)."""
