"""How strong a LoRA is: `alpha` tensors, or settings in its metadata or in PEFT's file beside it, as one scale per
module: config.json of its folder. Factors are never changed."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import isclose, isfinite, prod, sqrt
from typing import Any, BinaryIO

import numpy as np

from ltx2.convert.names import rules
from ltx2.convert.names.lora_names import ALPHA, DOWN, LoraTensor
from ltx2.convert.sources.lora import Layers, Parts, lora_layers
from ltx2.convert.tensors.steps import to_float32
from ltx2.runtime.errors import CheckpointError, UnsupportedError
from ltx2.runtime.files.jsonfile import parse_object, read_object
from ltx2.runtime.files.paths import open_regular
from ltx2.runtime.files.tensors import FLOATS, NUMPY_DTYPES, TensorFile, TensorInfo

PEFT_METADATA = "lora_adapter_metadata"  # what diffusers writes
PEFT_FILE, PEFT_PREFIX = "adapter_config.json", "base_model.model."
INTEGERS = ("I64", "I32", "I16", "I8")
# Facts an IC-LoRA's metadata tell about the video it refers to.
REFERENCE = ("reference_downscale_factor", "reference_temporal_scale_factor")


@dataclass(frozen=True)
class Settings:
    """What holds for the whole file. `alpha` None: every scale is 1. `rank` None: each module's own."""

    alpha: float | None = None
    rank: float | None = None
    root: bool = False  # rank-stabilised: alpha / sqrt(rank)

    def scale(self, rank: int) -> float:
        """The scale of a module of this rank."""
        if self.alpha is None:
            return 1.0
        divisor = self.rank or rank
        return self.alpha / (sqrt(divisor) if self.root else divisor)


def lora_config(file: TensorFile) -> dict[str, Any]:
    """config.json of the LoRA's folder (see lora.py).

    Raises CheckpointError for scales that are incomplete, contradictory or not finite, UnsupportedError for settings
    that say more than a scale.
    """
    layers = lora_layers(file)
    ranks = {module: parts[DOWN].shape[0] for module, parts in layers.items() if DOWN in parts}
    rank = max(ranks.values(), default=0)
    settings = _settings(file, rank)
    alphas = _alphas(file, layers)
    scales = {module: _scale(file, layers[module], alphas.get(module), settings) for module in ranks}
    counts = Counter(scales.values())
    usual = max(counts, key=lambda scale: (counts[scale], scale), default=1.0)
    others = {_key(module): scale for module, scale in scales.items() if scale != usual}
    config = {"rank": rank, "scale": usual, "modules": len(layers)}
    return config | ({"scales": dict(sorted(others.items()))} if others else {}) | _reference(file)


def _key(module: str) -> str:
    """A module as the folder's tensors name it: component and path."""
    target = rules.target("lora", LoraTensor(module, DOWN).name)
    assert target is not None  # every known module has a component
    return f"{target.component}.{target.key.removesuffix(f'.{DOWN}')}"


def _scale(file: TensorFile, parts: Parts, alpha: float | None, settings: Settings) -> float:
    rank = parts[DOWN].shape[0]
    if alpha is None:
        return settings.scale(rank)
    scale = alpha / rank
    if settings.alpha is not None and not isclose(scale, settings.scale(rank), rel_tol=1e-2):
        raise _unclear(file, f"{parts[ALPHA].name} means {scale:g}, the file's settings {settings.scale(rank):g}")
    return scale


def _alphas(file: TensorFile, layers: Layers) -> dict[str, float]:
    """The value of every module's alpha. Single values all over a file are sought and read: behind each one that is
    mapped, the system would read ahead."""
    with open_regular(file.path) as data:
        return {module: _alpha(file, parts[ALPHA], data) for module, parts in layers.items() if ALPHA in parts}


def _alpha(file: TensorFile, tensor: TensorInfo, data: BinaryIO) -> float:
    if tensor.dtype not in (*FLOATS.values(), *INTEGERS) or prod(tensor.shape) != 1:
        raise _unclear(file, f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}, not one number")
    data.seek(tensor.start)
    value = np.frombuffer(data.read(tensor.nbytes), NUMPY_DTYPES[tensor.dtype])
    return _number(file, tensor.name, to_float32(value, tensor.dtype)[0])


def _settings(file: TensorFile, rank: int) -> Settings:
    """The file-wide settings: Lightricks' metadata, or PEFT's."""
    metadata = file.metadata
    if "lora_alpha" in metadata:
        return _official(file, rank)
    beside = file.path.with_name(PEFT_FILE)
    try:
        if PEFT_METADATA in metadata:
            return _peft(file, PEFT_METADATA, parse_object(metadata[PEFT_METADATA]))
        if beside.is_file() and all(name.startswith(PEFT_PREFIX) for name in file.tensors):
            return _peft(file, PEFT_FILE, read_object(beside))
    except (OSError, ValueError) as error:
        raise _unclear(file, f"its {PEFT_METADATA} or {PEFT_FILE} cannot be read: {error}") from error
    return Settings()


def _official(file: TensorFile, rank: int) -> Settings:
    """`lora_alpha` and `lora_rank`: one scale for all modules, though narrow ones have a lower rank."""
    if "lora_rank" not in file.metadata:
        raise _unclear(file, "its metadata has lora_alpha and no lora_rank")
    alpha, stated = (_number(file, key, file.metadata[key]) for key in ("lora_alpha", "lora_rank"))
    if stated != rank:
        raise _unclear(file, f"its metadata says rank {stated:g}, its largest factor has {rank}")
    return Settings(alpha, stated)


def _peft(file: TensorFile, where: str, data: Mapping[str, Any]) -> Settings:
    """PEFT's settings; diffusers puts the network's name before each key."""
    settings = {key.rpartition(".")[2]: value for key, value in data.items()}
    if len(settings) != len(data):
        raise _unclear(file, f"{where} has settings for several networks")
    for key in ("use_dora", "alpha_pattern"):
        if settings.get(key):
            raise UnsupportedError(f"{file.path.name} uses PEFT's {key}", f"{where} says so", "use a plain LoRA")
    if settings.get("lora_alpha") is None:
        return Settings()
    return Settings(_number(file, "lora_alpha", settings["lora_alpha"]), None, bool(settings.get("use_rslora")))


def _reference(file: TensorFile) -> dict[str, float]:
    return {key: _number(file, key, file.metadata[key]) for key in REFERENCE if key in file.metadata}


def _number(file: TensorFile, name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise _unclear(file, f"{name} is {value!r}, not a number") from error
    if not isfinite(number):
        raise _unclear(file, f"{name} is {number}")
    return number


def _unclear(file: TensorFile, why: str) -> CheckpointError:
    fix = "save it again with both lora_alpha and lora_rank, with an alpha for each module, or with neither"
    return CheckpointError(f"{file.path.name} does not say how strong it is", why, fix)
