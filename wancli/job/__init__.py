"""What the user wrote, with line numbers."""
