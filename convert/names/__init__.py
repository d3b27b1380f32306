"""Names: of tensors, networks, LoRA targets and releases, as data."""
