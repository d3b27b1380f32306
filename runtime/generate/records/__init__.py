"""What a run leaves, and where: the clip, its record, its state, and the files that it exchanges with others."""
