"""Training of wan-mini: a procedural world, and the stages that teach it to the networks of wancli."""
