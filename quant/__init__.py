"""Smaller model folders: affine group quantization as MLX stores it; recipes say which layers get which bits."""
