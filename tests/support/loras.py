"""LoRA files in tests."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

Factors = Mapping[str, tuple[np.ndarray, np.ndarray]]  # path in a model folder's transformer -> down, up


def random_factors(shapes: Mapping[str, tuple[int, ...]], rank: int = 3, seed: int = 0) -> Factors:
    """Of weights (outputs, inputs): down (rank, inputs), up (outputs, rank), float32, for changes about as large as
    random weights."""
    draw = np.random.default_rng(seed).standard_normal
    return {
        path: (
            (draw((rank, inputs)) / np.sqrt(inputs)).astype(np.float32),
            (draw((outputs, rank)) / np.sqrt(rank)).astype(np.float32),
        )
        for path, (outputs, inputs) in shapes.items()
    }


def write_lora(path: Path, factors: Factors, alpha: float | None = None) -> Path:
    """A file as Lightricks publishes them; with an `alpha` for every module as others do."""
    tensors: dict[str, np.ndarray] = {}
    for layer, (down, up) in factors.items():
        name = f"diffusion_model.{_published(layer)}"
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        tensors |= {} if alpha is None else {f"{name}.alpha": np.array(alpha, np.float32)}
    save_file(tensors, path)
    return path


def _published(layer: str) -> str:
    """A layer's path as Lightricks publishes it."""
    for ours, theirs in ((r"to_out$", "to_out.0"), (r"ff\.proj_in$", "ff.net.0.proj"), (r"ff\.proj_out$", "ff.net.2")):
        layer = re.sub(ours, theirs, layer)
    return layer
