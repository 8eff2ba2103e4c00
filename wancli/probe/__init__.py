"""Measured block maps: which block's text or picture matters."""
