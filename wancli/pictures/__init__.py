"""Pictures for image-to-video models: files to pixels, and pixels to the tensors that a model takes."""
