"""Which source tensor becomes which tensor of the model folder, from headers alone."""
