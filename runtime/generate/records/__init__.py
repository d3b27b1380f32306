"""The files of a run and their places: the clip, its record, its state, and tensor files for other tools."""
