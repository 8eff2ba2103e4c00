"""The networks, tensors in and tensors out. No files, no jobs, no features."""
