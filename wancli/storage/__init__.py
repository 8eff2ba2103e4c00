"""Bytes that survive: atomic files, the cache, manifests, claims, safe names."""
