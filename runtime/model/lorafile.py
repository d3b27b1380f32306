"""A published LoRA: the modules that it changes, its strength, and the kinds that are no plain LoRA. The file's header
and the values of its alphas tell, in any spelling (names.py). Converting a LoRA and applying one both read it here.

Converted, its folder is loras/<name> of a model folder. Tensors, with the network's own module paths:
    <component>.<path>.lora_A.weight (rank, in), <component>.<path>.lora_B.weight (out, rank)
    <component>.<path>.diff, shaped as the module's weight; <component>.<path>.diff_b, as its bias
and its config.json: `rank` (the largest), `modules` (how many are changed), `scale`, where modules differ `scales`
({"<component>.<path>": scale}, which overrides `scale`), and an IC-LoRA's `reference_downscale_factor` and
`reference_temporal_scale_factor`. Factors are the file's own values; with a strength s, and for every part present,
    weight += s * (scale * lora_B @ lora_A + diff),  bias += s * diff_b"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isclose, isfinite, prod, sqrt
from typing import Any, BinaryIO

import numpy as np

from ltx2.runtime.errors import CheckpointError, UnsupportedError, listed, reason
from ltx2.runtime.files.jsonfile import parse_object, read_object
from ltx2.runtime.files.paths import open_regular
from ltx2.runtime.files.tensors import FLOATS, NUMPY_DTYPES, TensorFile, TensorInfo, to_float32
from ltx2.runtime.model.names import ALPHA, BIAS_DELTA, DELTA, DOWN, UP, Module, read_lora_name

# Only names in adapters' files match.
ADAPTER_NAMES = r"\.lora_|^lora_unet_|^lycoris_|\.(?:dora_scale|hada_\w+|lokr_\w+|oft_\w+|magnitude|diff|diff_b)$"
# Adapters that are no plain LoRA: a pattern in some tensor's name, what it is, and why it is refused.
REFUSED = (
    (r"\.dora_scale$|\.lora_magnitude_vector|\.magnitude$", "DoRA", "it rescales every row of the merged weights"),
    (r"\.hada_", "LoHa", "its deltas are elementwise products of factors"),
    (r"\.lokr_", "LoKr", "its deltas are Kronecker products of factors"),
    (r"\.lora_mid\b", "LoCon", "its factors are convolution kernels"),
    (r"\.oft_", "OFT", "it rotates weights instead of adding to them"),
    (r"\b(self_attn|mlp)[._]\w+_proj\.lora_|^lora_te\d?_", "LoRA for a language model", "it changes the text encoder"),
    (r"\.lora_B(\.\w+)?\.bias$", "LoRA with trained biases", "beside the factors it adds biases of its own"),
)
PEFT_METADATA = "lora_adapter_metadata"  # written by diffusers
PEFT_FILE, PEFT_PREFIX = "adapter_config.json", "base_model.model."
INTEGERS = ("I64", "I32", "I16", "I8")
# An IC-LoRA's metadata about its reference video.
REFERENCE = ("reference_downscale_factor", "reference_temporal_scale_factor")
_LAYER = re.compile(r"(.+)\.(lora_[AB]\.weight|diff|diff_b)")

Parts = Mapping[str, TensorInfo]  # part of a LoRA (names.py) -> its tensor
Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class Layer:
    """A module that a LoRA changes: its row in the table of names, its "<component>.<path>" in a model folder, and its
    tensors."""

    kind: Module
    path: str
    parts: Parts

    def changes(self) -> dict[str, Shape]:
        """The shapes of the parameters that it changes; none where its tensors do not fit each other."""
        return _changes({part: tensor.shape for part, tensor in self.parts.items()}) or {}


Layers = Mapping[str, Layer]  # by a module's published path


def lora_layers(file: TensorFile) -> Layers:
    """The modules that a LoRA changes, in the file's order, without tensors whose names mean none."""
    layers: dict[str, Layer] = {}
    parts: dict[str, dict[str, TensorInfo]] = {}
    for name, tensor in file.tensors.items():
        if found := read_lora_name(name):
            parts.setdefault(found.module, {})[found.part] = tensor
            layers.setdefault(
                found.module, Layer(found.kind, f"{found.kind.component}.{found.path}", parts[found.module])
            )
    return layers


def alphas(file: TensorFile) -> Mapping[str, str]:
    """The name of every alpha -> that of its module's down factor; the two give the module's scale."""
    all_parts = (layer.parts for layer in lora_layers(file).values())
    return {parts[ALPHA].name: parts[DOWN].name for parts in all_parts if ALPHA in parts and DOWN in parts}


def checked_layers(file: TensorFile) -> Layers:
    """The modules that a plain LoRA changes, from its header alone.

    Raises UnsupportedError for other kinds of adapters and other dtypes, CheckpointError for tensors that belong to no
    module of the published networks, and for missing or ill-fitting factors.
    """
    _check_format(file)
    unknown = [name for name in file.tensors if read_lora_name(name) is None]
    if unknown:
        known = len(file.tensors) - len(unknown)
        raise CheckpointError(
            f"{file.path.name} does not fit the networks of any release",
            f"{known} of {len(file.tensors)} tensors match one of their modules, {len(unknown)} do not: "
            f"{listed(unknown)}",
            "use a LoRA made for LTX-2",
        )
    layers = lora_layers(file)
    swapped = _swapped(layer.parts for layer in layers.values())
    broken = [module for module, layer in layers.items() if swapped or not _complete(layer)]
    if broken:
        raise CheckpointError(
            f"{file.path.name} is not a complete LoRA",
            f"the tensors of {len(broken)} of {len(layers)} modules lack or do not fit each other: {listed(broken)}",
            "download or save it again; lora_A is (rank, in), lora_B (out, rank)",
        )
    return layers


def misfits(lora: Shapes, networks: Mapping[str, Shapes]) -> tuple[int, dict[str, str]]:
    """The number of modules that a converted LoRA's tensors change, and those that do not fit: module -> reason.
    `networks` has the shapes of the parameters by component; other components are not checked."""
    modules: dict[str, dict[str, Shape]] = {}
    for key, shape in lora.items():
        layer, part = match.groups() if (match := _LAYER.fullmatch(key)) else (key, "")
        modules.setdefault(layer, {})[part] = shape
    reasons = {module: _misfit(module, parts, networks) for module, parts in modules.items()}
    return len(modules), {module: reason for module, reason in reasons.items() if reason}


def _misfit(module: str, parts: Mapping[str, Shape], networks: Mapping[str, Shapes]) -> str:
    """Why a module's tensors do not fit; empty where they do."""
    changes = _changes(parts)
    if changes is None:
        return "its tensors do not fit each other"
    component, _, path = module.partition(".")
    for parameter, shape in changes.items() if component in networks else ():
        wanted = networks[component].get(f"{path}.{parameter}")
        if wanted is None:
            return f"the {component} has no such {parameter}"
        if wanted != shape:
            return f"{parameter} {list(shape)} for {list(wanted)}"
    return ""


def _changes(parts: Mapping[str, Shape]) -> dict[str, Shape] | None:
    """The shapes of the parameters that a module's tensors change; None when they do not fit each other."""
    weights = {_product(parts.get(DOWN, ()), parts.get(UP, ()))} if DOWN in parts or UP in parts else set()
    weights |= {parts[DELTA]} if DELTA in parts else set()
    changes = {"bias": parts[BIAS_DELTA]} if BIAS_DELTA in parts else {}
    if len(weights) == 1:
        changes["weight"] = weights.pop()
    return None if weights or not changes or () in changes.values() else changes


def _product(down: Shape, up: Shape) -> Shape:
    """The shape of up @ down; () when the factors do not fit each other."""
    if len(down) != 2 or len(up) != 2 or down[0] != up[1]:
        return ()
    return (up[0], down[1]) if down[0] else ()


def _swapped(layers: Iterable[Parts]) -> bool:
    """Whether all factors are stored transposed: then every "rank" exceeds both widths. Of narrow modules alone, a real
    rank may."""
    pairs = [(parts[DOWN].shape, parts[UP].shape) for parts in layers if DOWN in parts and UP in parts]
    return bool(pairs) and all(len(down) == len(up) == 2 and down[0] > max(down[1], up[0]) for down, up in pairs)


def _complete(layer: Layer) -> bool:
    return bool(layer.changes()) and (ALPHA not in layer.parts or DOWN in layer.parts)


def _check_format(file: TensorFile) -> None:
    for pattern, kind, why in REFUSED:
        named = next((name for name in file.tensors if re.search(pattern, name)), None)
        if named is not None:
            raise _unsupported(file, f"is a {kind}", f"{why} ({named}); plain LoRAs are converted")
    for name, tensor in file.tensors.items():
        part = found.part if (found := read_lora_name(name)) else ""
        if part in (DOWN, UP) and len(tensor.shape) > 2:
            raise _unsupported(file, "is a LoCon", f"its factors are convolution kernels ({name})")
        if part not in ("", ALPHA) and tensor.dtype not in FLOATS.values():
            allowed = ", ".join(sorted(FLOATS.values()))
            raise _unsupported(file, f"holds {tensor.dtype} factors", f"LoRAs are converted from {allowed} ({name})")


def _unsupported(file: TensorFile, what: str, why: str) -> UnsupportedError:
    return UnsupportedError(f"{file.path.name} {what}", why, "use a plain LoRA of the same style, in bf16, f16 or f32")


@dataclass(frozen=True)
class Settings:
    """File-wide settings. `alpha` None: every scale is 1. `rank` None: each module's own."""

    alpha: float | None = None
    rank: float | None = None
    root: bool = False  # rank-stabilised: alpha / sqrt(rank)

    def scale(self, rank: int) -> float:
        """A module's scale by its rank."""
        if self.alpha is None:
            return 1.0
        divisor = self.rank or rank
        return self.alpha / (sqrt(divisor) if self.root else divisor)


def lora_config(file: TensorFile) -> dict[str, Any]:
    """config.json of the LoRA's folder (see above). Raises CheckpointError for scales that are incomplete,
    contradictory or not finite, UnsupportedError for settings beyond a scale."""
    layers = lora_layers(file)
    ranks = {module: layer.parts[DOWN].shape[0] for module, layer in layers.items() if DOWN in layer.parts}
    rank = max(ranks.values(), default=0)
    settings = _settings(file, rank)
    strengths = _alphas(file, layers)
    scales = {module: _scale(file, layers[module].parts, strengths.get(module), settings) for module in ranks}
    counts = Counter(scales.values())
    usual = max(counts, key=lambda scale: (counts[scale], scale), default=1.0)
    others = {layers[module].path: scale for module, scale in scales.items() if scale != usual}
    config = {"rank": rank, "scale": usual, "modules": len(layers)}
    return config | ({"scales": dict(sorted(others.items()))} if others else {}) | _reference(file)


def _scale(file: TensorFile, parts: Parts, alpha: float | None, settings: Settings) -> float:
    """A module's scale. Raises CheckpointError where its alpha contradicts the settings."""
    rank = parts[DOWN].shape[0]
    if alpha is None:
        return settings.scale(rank)
    scale = alpha / rank
    if settings.alpha is not None and not isclose(scale, settings.scale(rank), rel_tol=1e-2):
        raise _unclear(file, f"{parts[ALPHA].name} means {scale:g}, the file's settings {settings.scale(rank):g}")
    return scale


def _alphas(file: TensorFile, layers: Layers) -> dict[str, float]:
    """The value of every module's alpha, read one by one: behind mapped ones the system would read ahead."""
    found = {module: layer.parts[ALPHA] for module, layer in layers.items() if ALPHA in layer.parts}
    if not found:
        return {}
    with open_regular(file.path) as data:
        return {module: _alpha(file, tensor, data) for module, tensor in found.items()}


def _alpha(file: TensorFile, tensor: TensorInfo, data: BinaryIO) -> float:
    if tensor.dtype not in (*FLOATS.values(), *INTEGERS) or prod(tensor.shape) != 1:
        raise _unclear(file, f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}, not one number")
    data.seek(tensor.start)
    value = np.frombuffer(data.read(tensor.nbytes), NUMPY_DTYPES[tensor.dtype])
    return _number(file, tensor.name, to_float32(value, tensor.dtype)[0])


def _settings(file: TensorFile, rank: int) -> Settings:
    """The file-wide settings, from Lightricks' metadata or PEFT's."""
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
        raise _unclear(file, f"its {PEFT_METADATA} or {PEFT_FILE} cannot be read: {reason(error)}") from error
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
