"""This computer, the work it may be given at once, and what this process takes of it."""
