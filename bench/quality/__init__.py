"""What quantizing costs: a quantized model against its original."""
