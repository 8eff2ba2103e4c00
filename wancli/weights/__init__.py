"""Checkpoint files to named tensors, whatever the layout they come in."""
