"""LoRA files: parsed, matched with a model's weights, added to them."""
