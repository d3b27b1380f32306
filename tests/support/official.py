"""Tiny random checkpoints in Lightricks' own file layout: the embedded demo models' names, shapes and configurations
(2.0 and 2.5; 2.3 is put together from them) filled with seeded random values, so that parity tests do not depend on
trained weights."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from ltx2.convert.plan.entries import Plan
from ltx2.convert.plan.make import SIZES, Options, make_plan
from ltx2.convert.sources.checkpoint import open_sources
from ltx2.runtime.files.tensors import TensorFile, open_tensorfile, to_float32
from ltx2.runtime.networks.load import parameter_shapes
from ltx2.runtime.networks.upsampler import build

FOLDER = Path(__file__).parent.parent.parent / "ltx2" / "demo" / "model"
MONOLITH = FOLDER / "ltx-2-demo.safetensors"
UPSCALER = FOLDER / "ltx-2-demo-spatial-upscaler-x2.safetensors"
GEMMA = FOLDER / "gemma-3-demo"
DEMO = (MONOLITH, UPSCALER, GEMMA)
FOLDER_25 = FOLDER.with_name("model-2.5")
LORA_25 = FOLDER_25 / "ltx-2.5-demo-lora-green-bf16.safetensors"
DEMO_25 = tuple(path for path in sorted(FOLDER_25.glob("*.safetensors")) if path != LORA_25)
TEMPORAL = {
    "_class_name": "LatentUpsampler", "in_channels": 32, "mid_channels": 32, "num_blocks_per_stage": 1, "dims": 3,
    "spatial_upsample": False, "temporal_upsample": True,
}  # fmt: skip
# Constants that a file holds among its weights.
BUFFERS = re.compile(r".*(\.filter|_basis|blur_down\.kernel)")


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
        return tensors_of(path)

    def section(self, prefix: str) -> dict[str, np.ndarray]:
        """The monolith's tensors whose names begin with `prefix`, without it."""
        tensors = self.tensors(self.monolith)
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    def config(self, path: Path) -> dict[str, Any]:
        return dict(json.loads(open_tensorfile(path).metadata["config"]))


@dataclass(frozen=True)
class Split:
    """A checkpoint set in one file per network, as 2.5 is published. A part is a word of its file's name: transformer,
    gemma4, video-vae, audio-vae, upscaler, duration-head."""

    folder: Path

    @property
    def sources(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))

    def path(self, part: str) -> Path:
        (path,) = (path for path in self.sources if part in path.name)
        return path

    def tensors(self, part: str) -> dict[str, np.ndarray]:
        """All tensors of one file by their official names, weights in float32."""
        return tensors_of(self.path(part))

    def config(self, part: str) -> dict[str, Any]:
        metadata = open_tensorfile(self.path(part)).metadata
        return dict(json.loads(metadata.get("config") or metadata["gemma_config"]))


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    """All tensors of one file by their official names, weights in float32."""
    file = open_tensorfile(path)
    return {name: array_of(file, name) for name in file.tensors}


def array_of(file: TensorFile, name: str) -> np.ndarray:
    """One tensor, a copy; floats as float32."""
    dtype = file.tensors[name].dtype
    return np.array(to_float32(file.array(name), dtype) if dtype in ("BF16", "F16", "F32") else file.array(name))


def plan_of(*sources: Path, **options: Any) -> Plan:
    """The plan for these sources."""
    return make_plan(open_sources(sources), Options(**options))


def random_values(name: str, shape: tuple[int, ...], rng: np.random.Generator, gemma3: bool = True) -> np.ndarray:
    """Values that keep activations near 1: norms and statistics around 1, small biases, fan-in scaled weights.
    `gemma3`: a language model's norms multiply by 1 + weight."""
    x = rng.standard_normal(shape).astype(np.float32)
    if name.endswith(("std-of-means", "layer_scalar")):
        return 1 + 0.3 * np.tanh(x)
    if name.endswith(("mean-of-means", "bias")):
        return 0.1 * x
    if name.endswith((".alpha", ".beta")):  # of an activation, as logarithms
        return 0.3 * x
    if "norm" in name and len(shape) == 1:
        gemma_style = "layernorm" in name or "model.norm" in name or "self_attn" in name
        return (0.0 if gemma_style and gemma3 else 1.0) + 0.2 * x
    if "scale_shift_table" in name:
        return 0.3 * x
    if len(shape) <= 1 or "learnable_registers" in name or "embed_tokens" in name:
        return x
    return x / np.float32(np.sqrt(np.prod(shape[1:])))


def random_temporal(path: Path, **config: Any) -> Path:
    """A random temporal upscaler for the demo models, float32, with the keys that later releases have too."""
    rng = np.random.default_rng(3)
    tensors = {}
    for name, shape in sorted(parameter_shapes(build(TEMPORAL)).items()):
        theirs = (shape[0], shape[-1], *shape[1:-1]) if len(shape) > 1 else shape
        tensors[name] = random_values(name, theirs, rng)
    save_file(tensors, path, metadata={"config": json.dumps(TEMPORAL | config)})
    return path


def randomize(source: Path, target: Path, seed: int) -> Path:
    """Write `source`'s names, shapes and metadata with random float32 values to `target`; constants and the bytes of
    files stay."""
    file: TensorFile = open_tensorfile(source)
    rng = np.random.default_rng(seed)
    gemma3 = "gemma_config" not in file.metadata
    tensors = {
        name: array_of(file, name)
        if file.tensors[name].dtype == "U8" or BUFFERS.fullmatch(name)
        else random_values(name, file.tensors[name].shape, rng, gemma3)
        for name in sorted(file.tensors)
    }
    metadata = {key: value for key, value in file.metadata.items() if key != SIZES}  # random weights are for no size
    save_file(tensors, target, metadata=metadata)
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


def random_25(folder: Path, seed: int = 0) -> Split:
    """A complete random checkpoint set in the layout of 2.5 in `folder`, float32."""
    for number, path in enumerate(DEMO_25):
        randomize(path, folder / path.name, seed + number)
    return Split(folder)


def random_23(folder: Path, seed: int = 0) -> Official:
    """A complete random checkpoint set in the layout of 2.3 in `folder`, float32: the networks of 2.5, but with biases
    in the video's feed-forward networks and without keyframe marker, in one file, and Gemma 3."""
    parts = folder / "parts"
    parts.mkdir()
    split = random_25(parts, seed)
    transformer, text = split.tensors("transformer"), split.tensors("gemma4")
    del transformer["model.diffusion_model.keyframes_abs_pos_embedding"]
    rng = np.random.default_rng(seed + 100)
    for name in [
        name for name in transformer if re.search(r"\.transformer_blocks\..*\.ff\.net\.(0\.proj|2)\.weight", name)
    ]:
        bias = name.replace("weight", "bias")
        transformer[bias] = random_values(bias, transformer[name].shape[:1], rng)
    tensors = transformer | {k: v for k, v in text.items() if k.startswith("text_embedding_projection.")}
    tensors |= {f"vae.{name}": value for name, value in split.tensors("video-vae").items()}
    tensors |= split.tensors("audio-vae")
    config = split.config("transformer") | split.config("video-vae") | split.config("audio-vae")
    for key in ("ff_bias", "use_keyframes_abs_pos_embedding"):
        del config["transformer"][key]
    monolith = folder / "ltx-2.3-random-distilled.safetensors"
    save_file(tensors, monolith, metadata={"config": json.dumps(config), "model_version": "2.3.0"})
    upscaler_config = split.config("upscaler")
    for key in ("spatial_scale", "rational_resampler"):  # what tells 2.3's from 2.5's
        del upscaler_config[key]
    upscaler = folder / "upscaler.safetensors"
    save_file(split.tensors("upscaler"), upscaler, metadata={"config": json.dumps(upscaler_config)})
    gemma = folder / "gemma"
    shutil.copytree(GEMMA, gemma)
    return Official(
        monolith, upscaler, randomize(GEMMA / "model.safetensors", gemma / "model.safetensors", seed + 2).parent
    )
