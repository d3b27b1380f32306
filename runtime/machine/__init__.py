"""What this computer is, what it may be given at once, and what this process takes of it."""
