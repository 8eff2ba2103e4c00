"""Memory and arithmetic: what the machine has, what a phase needs by formula, what it took."""
