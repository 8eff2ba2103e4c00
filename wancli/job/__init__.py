"""The job file as the user wrote it: strict YAML with line numbers, layers, sweeps."""
