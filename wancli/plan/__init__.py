"""Everything decided before a model is loaded, with predicted memory, time and disk space."""
