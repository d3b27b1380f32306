"""LoRA files become loras/<name> of a model folder, whatever their spelling (lora_names.py).

The folder is the contract of whoever applies it. Its tensors, with the network's own module paths:
    <component>.<path>.lora_A.weight (rank, in), <component>.<path>.lora_B.weight (out, rank)
    <component>.<path>.diff, shaped as the module's weight; <component>.<path>.diff_b, as its bias
and its config.json: `rank` (the largest), `modules` (how many are changed), `scale`, where modules differ `scales`
({"<component>.<path>": scale}, which overrides `scale`), and an IC-LoRA's `reference_downscale_factor` and
`reference_temporal_scale_factor`. Factors are the file's own values; with a strength s, and for every part present,
    weight += s * (scale * lora_B @ lora_A + diff),  bias += s * diff_b"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ltx2.convert.names.lora_names import ALPHA, BIAS_DELTA, DELTA, DOWN, UP, module_kind, read_name
from ltx2.convert.names.release import Release, recognise_releases, releases
from ltx2.runtime.errors import CheckpointError, UnsupportedError
from ltx2.runtime.files.tensors import FLOATS, TensorFile, TensorInfo

# Found in no other file's names.
ADAPTER_NAMES = r"\.lora_|^lora_unet_|\.(?:dora_scale|hada_\w+|lokr_\w+|oft_\w+|diff|diff_b)$"
LISTED = 3  # names in an error
# Adapters that are no plain LoRA: a pattern in some tensor's name, what it is, and why it is refused.
REFUSED = (
    (r"\.dora_scale$|\.lora_magnitude_vector", "DoRA", "it rescales every row of the merged weights"),
    (r"\.hada_", "LoHa", "its deltas are elementwise products of factors"),
    (r"\.lokr_", "LoKr", "its deltas are Kronecker products of factors"),
    (r"\.lora_mid\b", "LoCon", "its factors are convolution kernels"),
    (r"\.oft_(blocks|diag)", "OFT", "it rotates weights instead of adding to them"),
    (r"\.lora_B(\.\w+)?\.bias$", "LoRA with trained biases", "beside the factors it adds biases of its own"),
)
_LAYER = re.compile(r"(.+)\.(lora_[AB]\.weight|diff|diff_b)")

Parts = Mapping[str, TensorInfo]  # what a tensor is (lora_names.py) -> the tensor
Layers = Mapping[str, Parts]  # module, by Lightricks' own path -> its tensors
Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


def lora_layers(file: TensorFile) -> Layers:
    """The modules that a LoRA changes, in the file's order; tensors whose names mean none are left out."""
    layers: dict[str, dict[str, TensorInfo]] = {}
    for name, tensor in file.tensors.items():
        if found := read_name(name):
            layers.setdefault(found.module, {})[found.part] = tensor
    return layers


def alphas(file: TensorFile) -> Mapping[str, str]:
    """The name of every alpha -> of the down factor beside it: together they say how strong their module is."""
    return {
        parts[ALPHA].name: parts[DOWN].name for parts in lora_layers(file).values() if ALPHA in parts and DOWN in parts
    }


def recognise_lora(file: TensorFile, config: Mapping[str, Any]) -> tuple[Release, ...]:
    """The releases a LoRA can belong to: those whose signs it carries, else those that have all of its modules; none
    when nothing tells them apart. Raises as `recognise_releases` does."""
    spelled = {name: read_name(name) for name in file.tensors}
    official = {found.name if found else name: file.tensors[name] for name, found in spelled.items()}
    if signed := recognise_releases(replace(file, tensors=official), config):
        return signed
    fitting = _fitting(lora_layers(file))
    return fitting if len(fitting) < len(releases()) else ()


def check_lora(file: TensorFile) -> None:
    """Refuse, from the header alone, what cannot become a loras/<name>.

    Raises UnsupportedError for other kinds of adapters and other dtypes, CheckpointError for tensors that belong to no
    module of the published networks, for missing or ill-fitting factors, and for modules of different releases.
    """
    _check_format(file)
    unknown = [name for name in file.tensors if read_name(name) is None]
    if unknown:
        known = len(file.tensors) - len(unknown)
        raise CheckpointError(
            f"{file.path.name} does not fit the networks of any release",
            f"{known} of {len(file.tensors)} tensors match one of their modules, {len(unknown)} do not: "
            f"{_listed(unknown)}",
            "use a LoRA made for LTX-2",
        )
    layers = lora_layers(file)
    swapped = _swapped(layers.values())
    broken = [module for module, parts in layers.items() if swapped or not _complete(parts)]
    if broken:
        raise CheckpointError(
            f"{file.path.name} is not a complete LoRA",
            f"the tensors of {len(broken)} of {len(layers)} modules lack or do not fit each other: {_listed(broken)}",
            "download or save it again; lora_A is (rank, in), lora_B (out, rank)",
        )
    if not _fitting(layers):
        raise CheckpointError(
            f"{file.path.name} fits no release as a whole",
            "no published network has all of its modules, with these widths",
            "use a LoRA made for one release",
        )


def misfits(lora: Shapes, networks: Mapping[str, Shapes]) -> tuple[int, dict[str, str]]:
    """How many modules the tensors of a loras/<name> change, and which of them cannot be: module -> reason.

    `networks` holds the parameters' shapes of the components that are there to compare with.
    """
    modules: dict[str, dict[str, Shape]] = {}
    for key, shape in lora.items():
        layer, part = match.groups() if (match := _LAYER.fullmatch(key)) else (key, "")
        modules.setdefault(layer, {})[part] = shape
    reasons = {module: _misfit(module, parts, networks) for module, parts in modules.items()}
    return len(modules), {module: reason for module, reason in reasons.items() if reason}


def _misfit(module: str, parts: Mapping[str, Shape], networks: Mapping[str, Shapes]) -> str:
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
    """The parameters that a module's tensors change, and their shapes; None when they do not fit each other."""
    weights = {_product(parts.get(DOWN, ()), parts.get(UP, ()))} if DOWN in parts or UP in parts else set()
    weights |= {parts[DELTA]} if DELTA in parts else set()
    changes = {"bias": parts[BIAS_DELTA]} if BIAS_DELTA in parts else {}
    if len(weights) == 1:
        changes["weight"] = weights.pop()
    return None if weights or not changes or () in changes.values() else changes


def _product(down: Shape, up: Shape) -> Shape:
    """The shape of up @ down; () when they are no pair of factors."""
    if len(down) != 2 or len(up) != 2 or down[0] != up[1]:
        return ()
    return (up[0], down[1]) if down[0] else ()


def _swapped(layers: Iterable[Parts]) -> bool:
    """Whether all factors are stored the other way around: every "rank" is a width, more than in and out. A rank that
    is higher than some narrow modules are wide is none."""
    pairs = [(parts[DOWN].shape, parts[UP].shape) for parts in layers if DOWN in parts and UP in parts]
    return bool(pairs) and all(len(down) == len(up) == 2 and down[0] > max(down[1], up[0]) for down, up in pairs)


def _complete(parts: Parts) -> bool:
    if ALPHA in parts and DOWN not in parts:
        return False
    return _changes({part: tensor.shape for part, tensor in parts.items()}) is not None


def _check_format(file: TensorFile) -> None:
    for pattern, kind, reason in REFUSED:
        named = next((name for name in file.tensors if re.search(pattern, name)), None)
        if named is not None:
            raise _unsupported(file, f"is a {kind}", f"{reason} ({named}); plain LoRAs are converted")
    for name, tensor in file.tensors.items():
        part = found.part if (found := read_name(name)) else ""
        if part in (DOWN, UP) and len(tensor.shape) > 2:
            raise _unsupported(file, "is a LoCon", f"its factors are convolution kernels ({name})")
        if part not in ("", ALPHA) and tensor.dtype not in FLOATS.values():
            allowed = ", ".join(sorted(FLOATS.values()))
            raise _unsupported(file, f"holds {tensor.dtype} factors", f"LoRAs are converted from {allowed} ({name})")


def _unsupported(file: TensorFile, what: str, why: str) -> UnsupportedError:
    return UnsupportedError(f"{file.path.name} {what}", why, "use a plain LoRA of the same style, in bf16, f16 or f32")


def _fitting(layers: Layers) -> tuple[Release, ...]:
    """The releases whose networks have every module that the LoRA changes."""
    having = [_having(module, parts) for module, parts in layers.items()]
    return tuple(release for release in releases() if all(release.name in names for names in having))


def _having(module: str, parts: Parts) -> frozenset[str]:
    kind = module_kind(module)
    changes = _changes({part: tensor.shape for part, tensor in parts.items()}) or {}
    weight, ratios = changes.get("weight", ()), kind.rows_per_column
    if len(weight) != 2:
        return kind.releases
    rows, columns = weight
    return frozenset(name for name in kind.releases if name not in ratios or rows == ratios[name] * columns)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
