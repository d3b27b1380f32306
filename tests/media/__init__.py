"""Pictures, sounds and clips."""
