"""Checkpoints as FP8, NVFP4 and int8 files hold them, made of the demo models by encoders that share nothing with the
code under test: values of codes are spelt out from their bits, tiles are filled element by element."""

import json
import shutil
import struct
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ltx2.runtime.files.tensors import open_tensorfile
from tests.support.official import DEMO_25, GEMMA, MONOLITH, UPSCALER
from tests.support.published import read_header

Array = np.ndarray[Any, np.dtype[Any]]
Tensors = dict[str, tuple[str, Array]]  # name -> safetensors dtype, values or codes
Encode = Callable[[str, Array], Tensors]  # name of a weight, its values -> its tensors
PREFIX = "model.diffusion_model.transformer_blocks."
LAST = 5  # block of the demo model
SIZES = {"F32": 4, "U32": 4, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U8": 1, "I8": 1}


def e4m3_value(code: int) -> float:
    """One sign bit, four of exponent with bias 7, three of mantissa; no infinities."""
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, (code >> 3) & 0xF, code & 0x7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


E4M3 = np.array([e4m3_value(code) for code in range(256)], np.float32)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def to_e4m3(values: Array) -> Array:
    """The nearest codes."""
    positive = E4M3[:127].astype(np.float64)
    middles = (positive[1:] + positive[:-1]) / 2
    codes = np.searchsorted(middles, np.minimum(np.abs(values), 448)).astype(np.uint8)
    return codes | np.where(values < 0, 0x80, 0).astype(np.uint8)


def fp8(weight: Array) -> tuple[Array, Array]:
    """Codes and the scale of the whole tensor."""
    scale = np.float32(np.abs(weight).max() / 448)
    return to_e4m3(weight / scale), np.array(scale)


def from_fp8(codes: Array, scale: Array) -> Array:
    return (E4M3[codes] * scale).astype(np.float32)


def nvfp4(weight: Array) -> tuple[Array, Array, Array]:
    """Codes (rows, width / 2), high nibble first; block scales in tiles of 128 x 4; the tensor's scale."""
    rows = len(weight)
    blocks = np.abs(weight).reshape(rows, -1, 16).max(axis=2) / 6
    scale = np.float32(blocks.max() / 448)
    linear = to_e4m3(blocks / scale)
    steps = np.repeat(E4M3[linear] * scale, 16, axis=1)
    ratio = np.divide(weight, steps, out=np.zeros_like(weight), where=steps > 0)
    nibbles = np.abs(np.abs(ratio)[..., None] - E2M1[:8]).argmin(axis=2).astype(np.uint8)
    nibbles |= np.where(ratio < 0, 8, 0).astype(np.uint8)
    return nibbles[:, 0::2] << 4 | nibbles[:, 1::2], tiled(linear), np.array(scale)


def tiled(scales: Array) -> Array:
    """CHECKPOINTS.md 6: where element (row, column) stands; what fills the last tiles is nonsense on purpose."""
    rows, columns = scales.shape
    high, wide = -(-rows // 128) * 128, -(-columns // 4) * 4
    flat = np.full(high * wide, 0x7F, np.uint8)
    for row in range(rows):
        for column in range(columns):
            tile = (row // 128) * (wide // 4) + column // 4
            flat[tile * 512 + (row % 32) * 16 + ((row % 128) // 32) * 4 + column % 4] = scales[row, column]
    return flat.reshape(high, wide)


def from_nvfp4(codes: Array, scales: Array, scale: Array) -> Array:
    """(code * block scale) * tensor scale, for scales in rows."""
    values = E2M1[np.stack([codes >> 4, codes & 15], axis=2).reshape(len(codes), -1)]
    return (values * np.repeat(E4M3[scales], 16, axis=1)) * np.float32(scale)


def regular(size: int) -> Array:
    """The matrix that ComfyUI rotates rows by, entry by entry: -1/2 for every pair of digits in base 4 that add up to
    3, 1/2 for every other."""
    matrix = np.ones((size, size))
    rest = np.arange(size)
    for _ in range(int(np.log2(size)) // 2):
        matrix *= np.where(rest[:, None] % 4 + rest % 4 == 3, -0.5, 0.5)
        rest //= 4
    return matrix


def turned(weight: Array, size: int) -> Array:
    """Rows with every block of `size` values rotated; twice is not at all."""
    return (weight.reshape(len(weight), -1, size) @ regular(size)).reshape(weight.shape)


def to_bf16(values: Array) -> Array:
    """Round half to even, in integers."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(codes: Array) -> Array:
    return (codes.astype(np.uint32) << 16).view(np.float32)


def demo_tensors() -> Tensors:
    """The demo model's monolith."""
    file = open_tensorfile(MONOLITH)
    return {name: (info.dtype, np.array(file.array(name))) for name, info in file.tensors.items()}


def widened(tensors: Tensors) -> Tensors:
    """Float32 in place of bf16, which a CPU computes imprecisely."""
    wide = {name: ("F32", from_bf16(values)) for name, (dtype, values) in tensors.items() if dtype == "BF16"}
    return tensors | wide


def demo_sources(folder: Path, encode: Encode) -> list[Path]:
    """The whole demo model with the linears of its inner blocks encoded, all else in float32."""
    gemma = shutil.copytree(GEMMA, folder / "gemma")
    for source, path in ((GEMMA / "model.safetensors", gemma), (UPSCALER, folder)):
        write(path / source.name, widened(file_tensors(source)), open_tensorfile(source).metadata)
    monolith = write(folder / "demo-distilled.safetensors", demo_encoded(encode, float32=True))
    return [monolith, folder / UPSCALER.name, gemma]


def demo_sources_25(folder: Path, encode: Encode) -> list[Path]:
    """The whole demo model of 2.5 with the layers encoded that its published int8 files have as codes, all else in
    float32."""
    headers = ("ltx-2.5-22b-transformer-int8", "gemma4-12b-with-proj-ltx-2.5-int8")
    coded = {name for header in headers for name, (dtype, _) in read_header(header)[2].items() if dtype == "I8"}
    for path in DEMO_25:
        tensors = file_tensors(path)
        found = [encode(name, from_bf16(tensors.pop(name)[1])) for name in coded & tensors.keys()]
        tensors = widened(tensors) | {name: value for each in found for name, value in each.items()}
        write(folder / path.name, tensors, open_tensorfile(path).metadata)
    return [folder / path.name for path in DEMO_25]


def demo_linears(tensors: Tensors) -> dict[str, Array]:
    """float32 weights of the linears of all blocks but the first and the last, as the published files choose them."""
    return {
        name: from_bf16(values)
        for name, (_, values) in tensors.items()
        if name.startswith(PREFIX) and name.endswith(".weight") and values.ndim == 2
        and 0 < int(name.removeprefix(PREFIX).split(".")[0]) < LAST
    }  # fmt: skip


def write(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> Path:
    """A safetensors file of any dtypes; the demo monolith's metadata unless others are given."""
    metadata = open_tensorfile(MONOLITH).metadata if metadata is None else metadata
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset, blocks = 0, []
    for name in sorted(tensors, key=lambda n: (-SIZES[tensors[n][0]], n)):
        dtype, values = tensors[name]
        blocks.append(np.ascontiguousarray(values).tobytes())
        end = offset + len(blocks[-1])
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blocks))
    return path


def scaled(name: str, weight: Array) -> Tensors:
    """As Lightricks writes FP8."""
    codes, scale = fp8(weight)
    layer = name.removesuffix(".weight")
    one = np.array(0.0157, np.float32)
    return {name: ("F8_E4M3", codes), f"{layer}.weight_scale": ("F32", scale), f"{layer}.input_scale": ("F32", one)}


def scale_weight(name: str, weight: Array) -> Tensors:
    """As community files write it."""
    codes, scale = fp8(weight)
    layer = name.removesuffix(".weight")
    one = np.ones(1, np.float32)
    return {
        name: ("F8_E4M3", codes),
        f"{layer}.scale_weight": ("F32", scale.reshape(1)),
        f"{layer}.scale_input": ("F32", one),
        f"{layer}.comfy_quant": ("U8", np.frombuffer(b'{"format": "float8_e4m3fn"}', np.uint8)),
    }


def row_scaled(name: str, weight: Array) -> Tensors:
    """One scale per row."""
    scale = (np.abs(weight).max(axis=1, keepdims=True) / 448).astype(np.float32)
    layer = name.removesuffix(".weight")
    return {name: ("F8_E4M3", to_e4m3(weight / scale)), f"{layer}.weight_scale": ("F32", scale)}


def plain_cast(name: str, weight: Array) -> Tensors:
    return {name: ("F8_E4M3", to_e4m3(weight))}


def four_bit(name: str, weight: Array) -> Tensors:
    """As Lightricks writes NVFP4."""
    codes, blocks, scale = nvfp4(weight)
    layer = name.removesuffix(".weight")
    return {
        name: ("U8", codes),
        f"{layer}.weight_scale": ("F8_E4M3", blocks),
        f"{layer}.weight_scale_2": ("F32", scale),
        f"{layer}.input_scale": ("F32", np.array(0.5, np.float32)),
    }


def signed(name: str, weight: Array, size: int = 64) -> Tensors:
    """As ComfyUI writes int8: rows rotated in blocks of `size`, unless that is 0, with one scale each."""
    values = turned(weight, size) if size else weight
    scale = (np.abs(values).max(axis=1, keepdims=True) / 127).astype(np.float32)
    layer = name.removesuffix(".weight")
    mark = {"format": "int8_tensorwise"} | ({"convrot": True, "convrot_groupsize": size} if size else {})
    return {
        name: ("I8", np.rint(values / scale).astype(np.int8)),
        f"{layer}.weight_scale": ("F32", scale),
        f"{layer}.comfy_quant": ("U8", np.frombuffer(json.dumps(mark).encode(), np.uint8)),
    }


def from_signed(codes: Array, scale: Array, size: int) -> Array:
    return turned(codes, size).astype(np.float32) * scale if size else codes.astype(np.float32) * scale


def demo_encoded(encode: Encode, float32: bool = False) -> Tensors:
    """The demo monolith with the linears of its inner blocks encoded; all else in `float32` if need be."""
    return dict(_demo_encoded(encode, float32))


def denoiser(tensors: Tensors) -> Tensors:
    """Without other networks, which make two thirds of the file."""
    others = ("vae.", "audio_vae.", "vocoder.", "text_embedding_projection.")
    return {n: value for n, value in tensors.items() if not n.startswith(others) and "embeddings_connector." not in n}


@cache
def _demo_encoded(encode: Encode, float32: bool) -> Tensors:
    tensors = demo_tensors()
    linears = demo_linears(tensors)
    tensors = widened(tensors) if float32 else tensors
    for name, weight in linears.items():
        del tensors[name]
        tensors |= encode(name, weight)
    return tensors


def decoded(tensors: Tensors, name: str) -> Array:
    """The float32 values of one encoded weight, from its tensors in a file."""
    layer = name.removesuffix(".weight")
    dtype, codes = tensors[name]
    if dtype == "U8":
        rows, blocks = len(codes), codes.shape[1] // 8
        _, stored = tensors[f"{layer}.weight_scale"]
        position = tiled_position(rows, blocks, stored.shape[1])
        return from_nvfp4(codes, stored.reshape(-1)[position], tensors[f"{layer}.weight_scale_2"][1])
    if dtype == "I8":
        mark = json.loads(tensors[f"{layer}.comfy_quant"][1].tobytes())
        return from_signed(codes, tensors[f"{layer}.weight_scale"][1], mark.get("convrot_groupsize", 0))
    scale = next((tensors[layer + s][1] for s in (".weight_scale", ".scale_weight") if layer + s in tensors), None)
    return from_fp8(codes, np.ones((), np.float32) if scale is None else scale)


def tiled_position(rows: int, columns: int, wide: int) -> Array:
    """Where the scales of `rows` x `columns` stand in tiles of a file `wide` columns wide."""
    r, c = np.indices((rows, columns))
    return ((r // 128) * (wide // 4) + c // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4


def file_tensors(path: Path) -> Tensors:
    file = open_tensorfile(path)
    return {name: (info.dtype, np.array(file.array(name))) for name, info in file.tensors.items()}
