"""LoRA files: read, matched with a model's weights, added to them."""
