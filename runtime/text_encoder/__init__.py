"""Text encoders: a prompt to token ids, and those to the hidden states of every layer."""
