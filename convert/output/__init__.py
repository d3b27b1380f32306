"""Writing a plan's files: in pieces, hashed, resumable."""
