"""A LoRA without a published file: random factors of any rank on all layers of a model's transformer. A step's time
does not depend on their values."""

import json
from pathlib import Path
from zlib import crc32

import mlx.core as mx

from ltx2.runtime.model.layout import CONFIG, TRANSFORMER, ModelFolder
from ltx2.runtime.model.names import DOWN, UP
from ltx2.runtime.networks.load import build_component, parameter_shapes

SIZE = 1e-3  # of values: small enough to leave the network's outputs finite


def random_lora(folder: ModelFolder, rank: int, parent: Path) -> Path:
    """Write a converted loras/<name> folder in bf16 into `parent`, unless it is there already; returns its path."""
    shapes = parameter_shapes(build_component(folder, TRANSFORMER, {}))
    layers = {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2
    }
    path = parent / f"rank-{rank}-{crc32(repr(layers).encode())}"
    if not path.exists():
        made: dict[tuple[int, ...], mx.array] = {}  # one for all layers of a shape: the file repeats it

        def values(*shape: int) -> mx.array:
            normal = mx.random.normal(shape, key=mx.random.key(0)) * SIZE
            return made.setdefault(shape, normal.astype(mx.bfloat16))

        tensors = {}
        for name, (outputs, inputs) in layers.items():
            tensors[f"{TRANSFORMER}.{name}.{DOWN}"] = values(rank, inputs)
            tensors[f"{TRANSFORMER}.{name}.{UP}"] = values(outputs, rank)
        path.mkdir()
        mx.save_safetensors(str(path / "model.safetensors"), tensors, {"format": "mlx"})
        (path / CONFIG).write_text(json.dumps({"rank": rank, "scale": 1.0, "modules": len(layers)}))
    return path
