"""Pictures and sound in files, by the bundled ffmpeg."""
