"""How large a transformer may be on a Mac with a given memory, if the usual clip is to be made with it.

No other network is in memory at the same time, and none is nearly as large: the text encoder is read layer by layer, so
only the disk limits it."""

from dataclasses import asdict, dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from ltx2.convert.plan.entries import Plan
from ltx2.quant.recipes.recipe import BITS, EVERY, load_recipe
from ltx2.runtime.errors import InputError, UsageError
from ltx2.runtime.files.jsonfile import read_object
from ltx2.runtime.files.tensors import FLOATS
from ltx2.runtime.generate.options.preset import load_preset
from ltx2.runtime.memory.activations import denoise_step
from ltx2.runtime.model.layout import DIFFUSION_VAE, TRANSFORMER, VIDEO_VAE
from ltx2.runtime.networks.audio.config import AudioVAEConfig
from ltx2.runtime.networks.transformer.config import TransformerConfig
from ltx2.runtime.networks.video_vae.encode import VIDEO_VAES
from ltx2.runtime.sampling.latents import Grid, Scales, Sizes

NEEDED = (TRANSFORMER, VIDEO_VAE, "audio_vae")  # a clip's memory follows from their configurations
GIB = 1 << 30
MOST_GB = 4096


@dataclass(frozen=True)
class Budget:
    """A Mac of `memory_gb` GB: the bytes that its GPU may use, those that a denoise step of the clip takes beside the
    weights, and those that stay free."""

    memory_gb: int
    clip: str
    gpu: int
    activations: int
    free: int

    @property
    def weights(self) -> int:
        """Bytes left for the transformer."""
        return self.gpu - self.activations - self.free

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self) | {"weights": self.weights}


def mac_budget(plan: Plan, memory_gb: int) -> Budget:
    """The budget for a plan's model. Raises InputError if the plan lacks one of NEEDED, UsageError for an impossible
    memory, UnsupportedError for a release that cannot generate yet, whose needs are not known."""
    if not 0 < memory_gb <= MOST_GB:
        raise UsageError(f"--fit {memory_gb} is not possible", "it is a Mac's memory in GB", "use --fit 24")
    for name in NEEDED:
        if name not in plan.components and not (name == VIDEO_VAE and DIFFUSION_VAE in plan.components):
            why = "the memory that a clip takes follows from its configuration"
            raise InputError(f"--fit needs the model's {name}", why, "fit a whole model, or choose --bits")
    data = _macs()
    sizes = Sizes(**data["clip"])
    clip = f"{sizes.frames} frames of {sizes.width}x{sizes.height}"
    return Budget(memory_gb, clip, gpu_bytes(memory_gb), _activations(plan, sizes), int(data["free_bytes"]))


def gpu_bytes(memory_gb: float) -> int:
    """Bytes that the GPU of a Mac with this memory may use."""
    rows = [row for row in _macs()["shares"] if row["from"] <= memory_gb]
    return int(max(rows, key=lambda row: int(row["from"]))["share"] * memory_gb * GIB)


@cache
def _macs() -> dict[str, Any]:
    return read_object(Path(__file__).with_name("macs.json"))


def _activations(plan: Plan, sizes: Sizes) -> int:
    """Bytes of a denoise step at full size and speed, which takes most, with packed weights unpacked for products. The
    modulation tables may be wider than the dtype of computing."""
    config = TransformerConfig.from_dict(plan.components[TRANSFORMER].config)
    specs = [spec for move in plan.moves(TRANSFORMER) for spec in move.stored().values()]
    width = min(spec.itemsize for spec in specs if spec.dtype in FLOATS.values())
    tokens = load_preset(plan.release).text_tokens
    weights = {move.layer: prod(move.values.shape) for move in plan.moves(TRANSFORMER) if move.key.endswith(".weight")}
    packed = load_recipe(EVERY).bits(TRANSFORMER, list(weights), max(BITS))
    largest = max((weights[layer] for layer in packed), default=0)
    return denoise_step(config, _grid(plan, sizes), tokens, width, unpacked=width * largest).full


def _grid(plan: Plan, sizes: Sizes) -> Grid:
    coder = VIDEO_VAE if VIDEO_VAE in plan.components else DIFFUSION_VAE
    video = VIDEO_VAES[coder].from_dict(plan.components[coder].config)
    audio = AudioVAEConfig.from_dict(plan.components["audio_vae"].config)
    scales = Scales(video.spatial_scale, video.temporal_scale, audio.hop_seconds, audio.temporal_scale)
    return sizes.grid(1, scales, video.latent_channels, audio.latent_channels)
