"""Video VAE: configuration, encoder, decoder, and decoding in tiles."""
