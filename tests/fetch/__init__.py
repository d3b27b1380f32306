"""Downloads, ranges, hostile files."""
