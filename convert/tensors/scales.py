"""Finds codes and their scales among a source's tensors, by dtypes, shapes and the last part of names.

    FP8    X.weight F8_E4M3 (out, in)      X.weight_scale or X.scale_weight: one value, or one per row
    MXFP8  X.weight F8_E4M3 (out, in)      X.weight_scale U8 or F8_E8M0 (out, in / 32), exponents; in tiles where
                                           ComfyUI's mark X.comfy_quant stands beside them
    NVFP4  X.weight U8 (out, in / 2)       X.weight_scale F8_E4M3 in tiles, X.weight_scale_2: one value
    int8   X.weight I8 (out, in)           X.weight_scale: one value, or one per row; X.comfy_quant: JSON, the format
                                           and how rows are rotated
    MLX    X.weight U32 (out, words)       X.scales, X.biases: floats (out, groups)
    GGUF   any name, a type of blocks      in the blocks

Where a source has no scale at all, every scale is 1."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ltx2.convert.tensors.codes import Affine, BlockScales, Codes, Fp8, Int8, Mxfp8, Nvfp4, Scale, tiled_shape
from ltx2.convert.tensors.gguf import Blocks, GgufFile
from ltx2.runtime.errors import CheckpointError, ModelFolderError, UnsupportedError, reason
from ltx2.runtime.files.jsonfile import parse_object
from ltx2.runtime.files.tensors import FLOATS, TensorFile, TensorInfo
from ltx2.runtime.model.forms import AFFINE, MODES, Form, Quantization
from ltx2.runtime.model.hadamard import REGULAR, ROTATIONS, SYLVESTER

WEIGHT = ".weight"
SCALE, SCALE_2, MARK = ".weight_scale", ".weight_scale_2", ".comfy_quant"
SPELLINGS = (SCALE, ".scale_weight")
EXPONENTS = ("U8", "F8_E8M0")
_ACTIVATIONS = "an activation scale: activations are not quantized"
_OPAQUE = "opaque metadata: the tensors themselves say how they are stored"
_MARK = "what it says of the codes is in config.json"
# The last part of a name -> why the tensor is of no use.
BESIDE_CODES = {
    "input_scale": _ACTIVATIONS, "scale_input": _ACTIVATIONS, "comfy_quant": _MARK, "scaled_fp8": _OPAQUE,
}  # fmt: skip
AS_PUBLISHED = "use the checkpoint as published"
MARK_BYTES = 4096  # published ones have 72
Stored = tuple[TensorFile, TensorInfo]
Tensors = Mapping[str, Stored]  # a source's, by name


@dataclass(frozen=True)
class CodedTensors:
    """A source's `codes` by the name of their tensor. `scales`: name of a scale -> name of its weight, and the scale's
    own last name part in a model folder."""

    codes: Mapping[str, Codes] = field(default_factory=dict)
    scales: Mapping[str, tuple[str, str]] = field(default_factory=dict)


class Found(NamedTuple):
    """One tensor's codes. `scales`: name of a scale -> its last name part in a model folder."""

    codes: Codes
    scales: Mapping[str, str]


def dropped_beside_codes(name: str) -> str:
    """Why a tensor that quantized files carry is of no use here; empty for all others."""
    return BESIDE_CODES.get(name.rpartition(".")[2], "")


def find_codes(files: Iterable[TensorFile], quantization: Quantization | None = None) -> CodedTensors:
    """Find a source's codes and scales. `quantization` says how MLX packed layers, where it did.

    Raises CheckpointError that names a tensor whose scale is missing, misshapen or double, and a scale of nothing;
    UnsupportedError for other codes.
    """
    tensors = {name: (file, tensor) for file in files for name, tensor in file.tensors.items()}
    found = {name: codes for name in tensors if (codes := _codes(name, tensors, quantization or Quantization()))}
    _check_scaled(found, tensors)
    scales = {scale: (name, part) for name, codes in found.items() for scale, part in codes.scales.items()}
    for name in tensors:
        if name.endswith((*SPELLINGS, SCALE_2)) and name not in scales:
            weight = name.rpartition(".")[0] + WEIGHT
            dtype = tensors[weight][1].dtype if weight in tensors else "not there"
            raise CheckpointError(f"{name} scales nothing", f"{weight} is {dtype}, which is no code", AS_PUBLISHED)
    return CodedTensors({name: codes.codes for name, codes in found.items()}, scales)


def _check_scaled(found: Mapping[str, Found], tensors: Tensors) -> None:
    unscaled = [name for name, codes in found.items() if isinstance(codes.codes, Fp8) and not codes.scales]
    if unscaled and any(name.endswith((*SPELLINGS, SCALE_2, "scaled_fp8")) for name in tensors):
        raise CheckpointError(
            f"FP8 tensor {unscaled[0]} has no scale",
            "others in the same source have one, and without its own this one's values are unknown",
            AS_PUBLISHED,
        )


def _codes(name: str, tensors: Tensors, quantization: Quantization) -> Found | None:
    """The codes that a tensor is; None for another tensor. Raises as `find_codes`."""
    file, tensor = tensors[name]
    if dropped_beside_codes(name):
        return None
    if tensor.dtype == "F8_E5M2":
        raise _other_codes(name, "FP8 codes of the kind E5M2")
    if isinstance(file, GgufFile):
        return Found(Blocks(file, tensor), {}) if tensor.dtype in file.block_types else None
    if tensor.dtype == "U8" and name.endswith(WEIGHT):
        return _nvfp4(name, tensors)
    if tensor.dtype == "U32" and name.endswith(WEIGHT):
        return _affine(name, tensors, quantization)
    if tensor.dtype == "I8":
        return _int8(name, tensors)
    if tensor.dtype == "F8_E4M3" and not _is_block_scale(name, tensors):
        return _fp8(name, tensors)
    return None


def _is_block_scale(name: str, tensors: Tensors) -> bool:
    layer = name.removesuffix(SCALE)
    return layer != name and layer + WEIGHT in tensors and tensors[layer + WEIGHT][1].dtype == "U8"


def _fp8(name: str, tensors: Tensors) -> Found:
    file, tensor = tensors[name]
    layer = name.removesuffix(WEIGHT)
    found = [layer + spelling for spelling in SPELLINGS if layer != name and layer + spelling in tensors]
    if len(found) > 1:
        raise CheckpointError(f"{name} has two scales", f"both {' and '.join(found)} are there", AS_PUBLISHED)
    if not found:
        return Found(Fp8(file, tensor, None), {})
    (scale,) = found
    if tensors[scale][1].dtype in EXPONENTS:
        return Found(_mxfp8(name, tensors), {layer + SCALE: "scales"})
    return Found(Fp8(file, tensor, _scale(tensors[scale], tensor)), {scale: "weight_scale"})


def _mxfp8(name: str, tensors: Tensors) -> Mxfp8:
    (file, tensor), (scale_file, scale) = tensors[name], tensors[name.removesuffix(WEIGHT) + SCALE]
    if len(tensor.shape) != 2 or tensor.shape[1] % 32:
        raise _misfit(tensor, "MXFP8 codes are rows of 32 values that share a scale")
    shape = (tensor.shape[0], tensor.shape[1] // 32)
    tiled = name.removesuffix(WEIGHT) + MARK in tensors
    wanted = tiled_shape(shape) if tiled else shape
    if scale.shape != wanted:
        how = "in tiles of 128 x 4" if tiled else "or in tiles, with ComfyUI's mark beside them"
        raise _misfit(scale, f"the exponents of {name} should be {list(wanted)}, {how}")
    return Mxfp8(file, tensor, None, BlockScales(scale_file, scale, shape, tiled, exponents=True))


def _int8(name: str, tensors: Tensors) -> Found:
    (file, tensor), layer = tensors[name], name.removesuffix(WEIGHT)
    missing = [layer + part for part in (WEIGHT, SCALE, MARK) if layer + part not in tensors]
    if missing:
        raise _other_codes(name, f"int8 values, for which there is no {missing[0]},")
    scale, size = _scale(tensors[layer + SCALE], tensor), _rotation(name, *tensors[layer + MARK])
    if len(tensor.shape) != 2 or tensor.shape[1] % (size or 1):
        raise _misfit(tensor, f"int8 codes are rows, and rotated in blocks of {size} values")
    group = max((n for n in MODES[AFFINE].group_sizes if tensor.shape[1] % n == 0), default=32)
    form = Form(8, group, rotation=size, hadamard=REGULAR if size else SYLVESTER)
    return Found(Int8(file, tensor, scale, form), {layer + SCALE: "weight_scale"})


def _rotation(weight: str, file: TensorFile, mark: TensorInfo) -> int:
    """The size of the blocks in which a weight's rows are rotated, or 0, as ComfyUI's mark beside them says."""
    try:
        if mark.nbytes > MARK_BYTES:
            raise ValueError(f"it has {mark.nbytes} bytes")
        own = parse_object(file.array(mark.name).tobytes().decode())
        said = {"format": None, "convrot": False, "convrot_groupsize": 256} | own.get("params", {}) | own
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{mark.name} cannot be read", reason(error), AS_PUBLISHED) from error
    if said["format"] != "int8_tensorwise":
        raise _other_codes(weight, f"int8 codes of the format {said['format']!r}")
    if not said["convrot"]:
        return 0
    size = said["convrot_groupsize"]
    if type(size) is not int or size not in ROTATIONS:
        raise _other_codes(weight, f"int8 codes rotated in blocks of {size!r}")
    return int(size)


def _affine(name: str, tensors: Tensors, quantization: Quantization) -> Found:
    (file, tensor), layer = tensors[name], name.removesuffix(WEIGHT)
    scales, biases = (tensors.get(f"{layer}.{part}") for part in ("scales", "biases"))
    if scales is None or biases is None or len(tensor.shape) != 2:
        raise _other_codes(name, "words without scales and biases")
    try:
        form = quantization.of(layer)
    except ModelFolderError as error:
        raise CheckpointError(f"{name} is packed by MLX", error.why, "add the config.json it came with") from error
    wanted = (tensor.shape[0], tensor.shape[1] * 32 // form.bits // form.group_size)
    if form.mode != AFFINE or form.rotation:
        raise _other_codes(name, f"MLX's {form.mode} codes")
    if not scales[1].shape == biases[1].shape == wanted or scales[1].dtype not in FLOATS.values():
        why = f"of {form.bits} bits in groups of {form.group_size}, its scales and biases should be {list(wanted)}"
        raise _misfit(tensor, why)
    found = Affine(file, tensor, None, form, scales, biases)
    return Found(found, {f"{layer}.{part}": part for part in ("scales", "biases")})


def _nvfp4(name: str, tensors: Tensors) -> Found:
    (file, tensor), layer = tensors[name], name.removesuffix(WEIGHT)
    missing = [layer + part for part in (SCALE, SCALE_2) if layer + part not in tensors]
    if missing:
        raise _other_codes(name, f"bytes that are no NVFP4 codes, for there is no {missing[0]},")
    if len(tensor.shape) != 2 or tensor.shape[1] % 8:
        raise _misfit(tensor, "NVFP4 codes are rows of 16 values, two in a byte")
    block_file, blocks = tensors[layer + SCALE]
    shape = (tensor.shape[0], tensor.shape[1] // 8)
    if blocks.dtype != "F8_E4M3" or blocks.shape != tiled_shape(shape):
        wanted = f"F8_E4M3 {list(tiled_shape(shape))}, tiles of 128 x 4 for the {shape[0]} rows of {name}"
        raise _misfit(blocks, f"the block scales should be {wanted}")
    scale = _scale(tensors[layer + SCALE_2], tensor, of_rows=False)
    found = Nvfp4(file, tensor, scale, BlockScales(block_file, blocks, shape))
    return Found(found, {layer + SCALE: "scales", layer + SCALE_2: "weight_scale"})


def _scale(stored: Stored, weight: TensorInfo, of_rows: bool = True) -> Scale:
    """The scale of a weight, or of each of its rows. Raises CheckpointError for another shape or dtype."""
    scale, rows = stored[1], weight.shape[:1]
    if scale.shape not in ((), (1,), (1, 1)) and not (of_rows and scale.shape in (rows, (*rows, 1))):
        each = ", or one for each row" if of_rows else ""
        raise _misfit(scale, f"the scale of {weight.name} is one value{each}")
    if scale.dtype not in FLOATS.values():
        raise _misfit(scale, f"scales are {', '.join(FLOATS.values())}")
    return Scale(*stored)


def _misfit(tensor: TensorInfo, why: str) -> CheckpointError:
    return CheckpointError(f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}", why, AS_PUBLISHED)


def _other_codes(name: str, what: str) -> UnsupportedError:
    return UnsupportedError(
        f"{name} holds {what} and cannot be read",
        "the codes that ltx2 knows are FP8 (E4M3), MXFP8, NVFP4, int8 and MLX's affine ones",
        "use the bf16, FP8 or NVFP4 file of the same model",
    )
