"""The command line, Python, the documents."""
