"""From noise to latents: tensors only, no file and no event."""
