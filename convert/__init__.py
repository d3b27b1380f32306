"""From published checkpoints to a model folder: recognise, plan, stream, verify, inspect."""
