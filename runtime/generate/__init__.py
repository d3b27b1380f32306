"""One run: options become phases, phases make a clip."""
