"""Published files to model folders."""
