"""Will it run, before anything is downloaded: memory, streaming and disk of every published model in every preset."""
