"""The second prompt as data: the table of a shot, block maps, measured effects."""
