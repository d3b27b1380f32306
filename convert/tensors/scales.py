"""Which of a source's tensors are codes, and which scale them: told from dtypes, shapes and the last part of names.

    FP8    X.weight F8_E4M3 (out, in)      X.weight_scale or X.scale_weight: one value, or one per row
    NVFP4  X.weight U8 (out, in / 2)       X.weight_scale F8_E4M3 in tiles, X.weight_scale_2: one value

Where a source has no scale at all, every scale is 1."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ltx2.convert.tensors.codes import BlockScales, Codes, Fp8, Nvfp4, Scale, tiled_shape
from ltx2.runtime.errors import CheckpointError, UnsupportedError
from ltx2.runtime.files.tensors import FLOATS, TensorFile, TensorInfo

WEIGHT = ".weight"
SCALE, SCALE_2 = ".weight_scale", ".weight_scale_2"
SPELLINGS = (SCALE, ".scale_weight")
BESIDE_CODES = (
    (re.compile(r"(.+\.)?(input_scale|scale_input)"), "an activation scale: activations are not quantized"),
    (re.compile(r"(.+\.)?(comfy_quant|scaled_fp8)"), "opaque metadata: the tensors themselves say how they are stored"),
)
AS_PUBLISHED = "use the checkpoint as published"
Stored = tuple[TensorFile, TensorInfo]


@dataclass(frozen=True)
class CodedTensors:
    """The `codes` of a source by the name of their tensor; `scales`: the name of a scale -> of what it scales, and
    the name that it has there in a model folder."""

    codes: Mapping[str, Codes] = field(default_factory=dict)
    scales: Mapping[str, tuple[str, str]] = field(default_factory=dict)


def dropped_beside_codes(name: str) -> str:
    """Why a tensor that quantized files carry is of no use here; empty for all others."""
    return next((reason for pattern, reason in BESIDE_CODES if pattern.fullmatch(name)), "")


def find_codes(files: Iterable[TensorFile]) -> CodedTensors:
    """Find a source's codes and scales.

    Raises CheckpointError that names a tensor whose scale is missing, misshapen or double, and a scale of nothing;
    UnsupportedError for other codes.
    """
    tensors = {name: (file, tensor) for file in files for name, tensor in file.tensors.items()}
    scaled = any(name.endswith((*SPELLINGS, SCALE_2, "scaled_fp8")) for name in tensors)
    codes: dict[str, Codes] = {}
    scales: dict[str, tuple[str, str]] = {}
    for name, (_, tensor) in tensors.items():
        if dropped_beside_codes(name):
            continue
        if tensor.dtype == "F8_E5M2":
            raise _other_codes(name, "FP8 codes of the kind E5M2")
        if tensor.dtype == "U8" and name.endswith(WEIGHT):
            codes[name] = _nvfp4(name, tensors)
            layer = name.removesuffix(WEIGHT)
            scales |= {layer + SCALE: (name, "scales"), layer + SCALE_2: (name, "weight_scale")}
        elif tensor.dtype == "F8_E4M3" and not _is_block_scale(name, tensors):
            codes[name] = _fp8(name, tensors, scaled)
            if (scale := codes[name].scale) is not None:
                scales[scale.tensor.name] = (name, "weight_scale")
    _check_use(tensors, scales)
    return CodedTensors(codes, scales)


def _is_block_scale(name: str, tensors: Mapping[str, Stored]) -> bool:
    layer = name.removesuffix(SCALE)
    return layer != name and layer + WEIGHT in tensors and tensors[layer + WEIGHT][1].dtype == "U8"


def _fp8(name: str, tensors: Mapping[str, Stored], scaled: bool) -> Fp8:
    file, tensor = tensors[name]
    layer = name.removesuffix(WEIGHT)
    found = [layer + spelling for spelling in SPELLINGS if layer != name and layer + spelling in tensors]
    if len(found) > 1:
        raise CheckpointError(f"{name} has two scales", f"both {' and '.join(found)} are there", AS_PUBLISHED)
    if not found and scaled:
        raise CheckpointError(
            f"FP8 tensor {name} has no scale",
            "others in the same source have one, and without its own this one's values are unknown",
            AS_PUBLISHED,
        )
    scale = Scale(*tensors[found[0]]) if found else None
    if scale is not None:
        rows = tensor.shape[:1]
        _check_scale(scale.tensor, ((), (1,), (1, 1), rows, (*rows, 1)), name)
    return Fp8(file, tensor, scale)


def _nvfp4(name: str, tensors: Mapping[str, Stored]) -> Nvfp4:
    file, tensor = tensors[name]
    layer = name.removesuffix(WEIGHT)
    missing = [layer + part for part in (SCALE, SCALE_2) if layer + part not in tensors]
    if missing:
        raise _other_codes(name, f"bytes that are no NVFP4 codes, for there is no {missing[0]},")
    if len(tensor.shape) != 2 or tensor.shape[1] * 2 % Nvfp4.form.group_size:
        raise _misfit(tensor, "NVFP4 codes are rows of 16 values, two in a byte")
    (block_file, blocks), scale = tensors[layer + SCALE], Scale(*tensors[layer + SCALE_2])
    shape = (tensor.shape[0], tensor.shape[1] * 2 // Nvfp4.form.group_size)
    if blocks.dtype != "F8_E4M3" or blocks.shape != tiled_shape(shape):
        wanted = f"F8_E4M3 {list(tiled_shape(shape))}, tiles of 128 x 4 for the {shape[0]} rows of {name}"
        raise _misfit(blocks, f"the block scales should be {wanted}")
    _check_scale(scale.tensor, ((), (1,), (1, 1)), name)
    return Nvfp4(file, tensor, scale, BlockScales(block_file, blocks, shape))


def _check_scale(scale: TensorInfo, shapes: tuple[tuple[int, ...], ...], name: str) -> None:
    if scale.shape not in shapes:
        raise _misfit(scale, f"the scale of {name} is one value" + (", or one for each row" if len(shapes) > 3 else ""))
    if scale.dtype not in FLOATS.values():
        raise _misfit(scale, f"scales are {', '.join(FLOATS.values())}")


def _check_use(tensors: Mapping[str, Stored], scales: Mapping[str, tuple[str, str]]) -> None:
    for name in tensors:
        if name.endswith((*SPELLINGS, SCALE_2)) and name not in scales:
            weight = name.rpartition(".")[0] + WEIGHT
            dtype = tensors[weight][1].dtype if weight in tensors else "not there"
            raise CheckpointError(f"{name} scales nothing", f"{weight} is {dtype}, no FP8 or NVFP4", AS_PUBLISHED)


def _misfit(tensor: TensorInfo, why: str) -> CheckpointError:
    return CheckpointError(f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}", why, AS_PUBLISHED)


def _other_codes(name: str, what: str) -> UnsupportedError:
    return UnsupportedError(
        f"{name} holds {what} and cannot be read",
        "the FP8 codes that ltx2 knows are E4M3, its 4-bit codes NVFP4",
        "use the bf16, FP8 or NVFP4 file of the same model",
    )
