"""File formats of checkpoints: headers, tensors, quantization."""
