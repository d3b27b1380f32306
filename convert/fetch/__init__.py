"""From the catalogue of published files to files on disk; used by no other folder of convert."""
