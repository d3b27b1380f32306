"""LTX-2 audio-video models on Apple Silicon with MLX: convert, quantize, generate, bench."""

__version__ = "0.1.0"
