"""A model of random weights in the published shapes."""
