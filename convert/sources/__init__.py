"""Published files, recognised by their content."""
