"""One generation on several machines: how they exchange arrays, and how they share a stage's work and the decoder's."""
