"""Plans before a download: memory, streaming and disk of every published model in every preset."""
