"""LTX-2 audio-video models on Apple Silicon with MLX: convert, quantize, generate, bench."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Sub-packages on first use; `ltx2.convert` is a package and can be called."""
    if name == "convert":
        return import_module("ltx2.convert")
    if name == "quantize":
        return import_module("ltx2.api").quantize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
