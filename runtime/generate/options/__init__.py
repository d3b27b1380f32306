"""The options: their one table, their kinds and values, a request, and defaults as data."""
