"""Batch renderer for the Wan text-to-video models, with a second prompt injected into chosen blocks."""

__version__ = "0.1.0"
