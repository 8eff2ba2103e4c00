"""Files that survive a crash: atomic writes, the cache, manifests, claims, safe names."""
