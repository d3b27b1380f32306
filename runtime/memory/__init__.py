"""What a phase takes of memory, and keeping it within a limit."""
