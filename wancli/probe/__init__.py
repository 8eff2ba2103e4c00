"""Which block matters: measured block maps."""
