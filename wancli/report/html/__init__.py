"""The page of a batch: one JSON document and the scripts that draw it."""
