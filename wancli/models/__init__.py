"""The networks: tensors in, tensors out. No files, no jobs, no features."""
