"""The command line, Python, the README."""
