"""Reports on a batch and its videos, for people and for programs."""
