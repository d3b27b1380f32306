"""What can be asked for: the one table of options, their kinds and values, a request, and defaults as data."""
