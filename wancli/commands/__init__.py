"""One file per command: parse the options, call, print. No logic, no torch."""
