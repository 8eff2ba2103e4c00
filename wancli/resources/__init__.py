"""What a machine has, what a phase needs by formula, what was measured."""
