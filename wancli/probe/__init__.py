"""Measured block maps: which block's text matters."""
