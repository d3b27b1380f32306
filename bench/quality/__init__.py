"""The cost of quantizing: a quantized model against its original."""
