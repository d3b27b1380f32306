"""The networks: each in one file or folder with its configuration and `build`; `load` makes one from a model folder."""
