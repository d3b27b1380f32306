"""Tiny random checkpoints in Lightricks' own file layout: the embedded demo model's names, shapes and configuration
(2.0 architecture) filled with seeded random values, so that parity tests do not depend on trained weights."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from ltx2.convert.plan.entries import Options, Plan, make_plan
from ltx2.convert.sources.checkpoint import open_sources
from ltx2.runtime.files.tensors import TensorFile, open_tensorfile

FOLDER = Path(__file__).parent.parent.parent / "ltx2" / "demo" / "model"
MONOLITH = FOLDER / "ltx-2-demo.safetensors"
UPSCALER = FOLDER / "ltx-2-demo-spatial-upscaler-x2.safetensors"
GEMMA = FOLDER / "gemma-3-demo"
DEMO = (MONOLITH, UPSCALER, GEMMA)


@dataclass(frozen=True)
class Official:
    """Paths of a checkpoint set in the official layout."""

    monolith: Path
    upscaler: Path
    gemma: Path

    @property
    def sources(self) -> list[Path]:
        return [self.monolith, self.upscaler, self.gemma]

    def tensors(self, path: Path) -> dict[str, np.ndarray]:
        """All tensors of one file, float32, by their official names."""
        file = open_tensorfile(path)
        return {name: np.array(file.array(name)) for name in file.tensors}

    def section(self, prefix: str) -> dict[str, np.ndarray]:
        """The monolith's tensors whose names begin with `prefix`, without it."""
        tensors = self.tensors(self.monolith)
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    def config(self, path: Path) -> dict[str, Any]:
        return dict(json.loads(open_tensorfile(path).metadata["config"]))


def plan_of(*sources: Path, **options: Any) -> Plan:
    """The plan for these sources."""
    return make_plan(open_sources(sources), Options(**options))


def random_values(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Values that keep activations near 1: norms and statistics around 1, small biases, fan-in scaled weights."""
    x = rng.standard_normal(shape).astype(np.float32)
    if name.endswith("std-of-means"):
        return 1 + 0.3 * np.tanh(x)
    if name.endswith("mean-of-means") or name.endswith("bias"):
        return 0.1 * x
    if "norm" in name and len(shape) == 1:
        gemma_style = "layernorm" in name or "model.norm" in name or "self_attn" in name
        return (0.0 if gemma_style else 1.0) + 0.2 * x
    if "scale_shift_table" in name:
        return 0.3 * x
    if len(shape) <= 1 or "learnable_registers" in name or "embed_tokens" in name:
        return x
    return x / np.float32(np.sqrt(np.prod(shape[1:])))


def randomize(source: Path, target: Path, seed: int) -> Path:
    """Write `source`'s names, shapes and metadata with random float32 values to `target`."""
    file: TensorFile = open_tensorfile(source)
    rng = np.random.default_rng(seed)
    tensors = {name: random_values(name, file.tensors[name].shape, rng) for name in sorted(file.tensors)}
    save_file(tensors, target, metadata=dict(file.metadata))
    return target


def random_official(folder: Path, seed: int = 0) -> Official:
    """A complete random checkpoint set (monolith, spatial upscaler, Gemma folder) in `folder`."""
    gemma = folder / "gemma"
    shutil.copytree(GEMMA, gemma)
    return Official(
        randomize(MONOLITH, folder / "ltx-2-random-distilled.safetensors", seed),
        randomize(UPSCALER, folder / "upscaler.safetensors", seed + 1),
        randomize(GEMMA / "model.safetensors", gemma / "model.safetensors", seed + 2).parent,
    )
