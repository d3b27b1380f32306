"""The lean runtime: networks, model folders, sampling and media. Imports nothing from convert, quant or bench."""
