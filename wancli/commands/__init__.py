"""The commands, which `wancli.cli` offers: parse, call, show. No logic, no torch."""
