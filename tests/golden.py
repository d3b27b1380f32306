"""Golden tensors: what Lightricks' own modules computed with the demo model for the prompts `a` and `b`."""

from pathlib import Path

from ltx2.runtime.tensorfile import Array, open_tensorfile

FILE = open_tensorfile(Path(__file__).with_name("golden.safetensors"))
PROMPTS = {name: FILE.metadata[f"{name}.prompt"] for name in "ab"}


def golden(name: str) -> Array:
    """One tensor, e.g. `a.stage1.video_latent`."""
    return FILE.array(name)
