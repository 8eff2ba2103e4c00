"""Weights by name: repositories of the Hugging Face hub, in its cache or fetched."""
