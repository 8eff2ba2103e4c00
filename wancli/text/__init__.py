"""Prompts to tokens to cached embeddings, and the distance between two prompts."""
