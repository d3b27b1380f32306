"""The packer against MLX's own kernels: its bit layout, its error, and that its bytes depend on the values alone."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from ltx2.quant import pack
from ltx2.quant.pack import BITS, DTYPES, GROUP_SIZES, Affine, Packed, dequantize_rows, quantize_rows
from ltx2.runtime.tensorfile import bf16_to_f32, f32_to_bf16
from tests.parity import relative_l2

Figure = Callable[..., None]


def stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values as a checkpoint stores them."""
    return f32_to_bf16(values) if dtype == "BF16" else values.astype(np.float16 if dtype == "F16" else np.float32)


def as_float32(values: np.ndarray, dtype: str) -> np.ndarray:
    return bf16_to_f32(values) if dtype == "BF16" else values.astype(np.float32)


def weights(kind: str, rows: int = 256, width: int = 2048, seed: int = 0) -> np.ndarray:
    """Synthetic weights; "heavy" has Student-t tails, uneven rows and columns, and some large columns."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, width))
    if kind == "heavy":
        x = rng.standard_t(5, (rows, width))
        x *= np.exp(0.4 * rng.standard_normal((rows, 1))) * np.exp(0.4 * rng.standard_normal((1, width)))
        x[:, rng.choice(width, width // 128, replace=False)] *= 4
    elif kind == "uniform":
        x = rng.uniform(-1, 1, (rows, width))
    elif kind == "shifted":
        x += 1.5
    elif kind == "negative":
        x = -3 - np.abs(x)
    return (0.02 * x).astype(np.float32)


def on_mlx(packed: Packed, affine: Affine, dtype: str) -> dict[str, Any]:
    """Arguments of MLX's kernels, scales and biases in float32: on a CPU they compute in the scales' dtype."""
    scales, biases = (mx.array(as_float32(a, dtype)) for a in (packed.scales, packed.biases))
    return {"scales": scales, "biases": biases, "group_size": affine.group_size, "bits": affine.bits}


def packed_by_mlx(values: np.ndarray, affine: Affine) -> Packed:
    """What mx.quantize makes of bfloat16 codes."""
    codes, *scales_and_biases = mx.quantize(mx.array(values).view(mx.bfloat16), affine.group_size, affine.bits)
    return Packed(np.array(codes), *(np.array(a.view(mx.uint16)) for a in scales_and_biases))


def error_against_mlx(values: np.ndarray, affine: Affine) -> float:
    """Our relative error on bfloat16 codes, as a fraction of mx.quantize's."""
    _, loss = quantize_rows(values, "BF16", affine)
    restored = dequantize_rows(packed_by_mlx(values, affine), "BF16", affine)
    return loss.relative / relative_l2(restored, bf16_to_f32(values))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_mlx_reads_what_is_written(bits: int, group_size: int, dtype: str) -> None:
    affine = Affine(bits, group_size)
    values = stored(weights("shifted", rows=7, width=384), dtype)
    packed, loss = quantize_rows(values, dtype, affine)
    assert packed.codes.shape == (7, 384 * bits // 32) and packed.codes.dtype == np.uint32
    assert packed.scales.shape == packed.biases.shape == (7, 384 // group_size)
    assert packed.scales.dtype == packed.biases.dtype == values.dtype
    theirs = np.array(mx.dequantize(mx.array(packed.codes), **on_mlx(packed, affine, dtype)))
    np.testing.assert_array_equal(dequantize_rows(packed, dtype, affine), theirs)
    assert relative_l2(theirs, as_float32(values, dtype)) == pytest.approx(loss.relative, rel=1e-4)


@pytest.mark.parametrize("bits", BITS)
def test_every_code_is_where_mlx_expects_it(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 128))
    codes[:, ::64], codes[:, 1::64] = 0, 2**bits - 1  # so that the range of a group is the range of codes
    packed, loss = quantize_rows(codes.astype(np.float32), "F32", Affine(bits, 64))
    if bits > 6:  # at fewer bits the search may prefer a narrower range
        assert loss.error == 0
    ones, zeros = np.ones((3, 2), np.float32), np.zeros((3, 2), np.float32)
    theirs = mx.dequantize(mx.array(packed.codes), mx.array(ones), mx.array(zeros), 64, bits)
    ours = dequantize_rows(Packed(packed.codes, ones, zeros), "F32", Affine(bits, 64))
    np.testing.assert_array_equal(np.array(theirs), ours)


@pytest.mark.parametrize("kind", ["gauss", "heavy", "uniform", "shifted", "negative"])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_error_is_below_mlx(bits: int, group_size: int, kind: str) -> None:
    assert error_against_mlx(f32_to_bf16(weights(kind, rows=32)), Affine(bits, group_size)) < 1


@pytest.mark.parametrize(
    ("bits", "kind", "limit"),
    [(2, "gauss", 0.85), (3, "gauss", 0.9), (4, "gauss", 0.91), (4, "heavy", 0.91), (4, "shifted", 0.91),
     (5, "heavy", 0.94), (6, "heavy", 0.94), (8, "gauss", 0.81), (8, "heavy", 0.73)],
)  # fmt: skip
def test_error_relative_to_mlx(figure: Figure, bits: int, kind: str, limit: float) -> None:
    error = error_against_mlx(f32_to_bf16(weights(kind)), Affine(bits, 64))
    figure(f"error of {bits}-bit {kind} weights / mx.quantize's", error, limit=limit)


def test_output_error_for_inputs_with_a_mean(figure: Figure) -> None:
    """mx.quantize rounds scale and bias after choosing codes, which shifts whole groups; a GELU's output shows it."""
    affine = Affine(8, 64)
    values = f32_to_bf16(weights("heavy"))
    x = np.maximum(np.random.default_rng(1).standard_normal((128, 2048)), 0).astype(np.float32)

    def output_error(packed: Packed) -> float:
        out = mx.quantized_matmul(mx.array(x), mx.array(packed.codes), **on_mlx(packed, affine, "BF16"))
        return relative_l2(np.array(out), x @ bf16_to_f32(values).T)

    ours, theirs = output_error(quantize_rows(values, "BF16", affine)[0]), output_error(packed_by_mlx(values, affine))
    figure("8-bit output error, inputs with a mean", ours, limit=0.008)
    figure("8-bit output error, inputs with a mean / mx.quantize's", ours / theirs, limit=0.5)


@pytest.mark.parametrize("bits", BITS)
def test_quantized_matmul_equals_dequantized_matmul(figure: Figure, bits: int) -> None:
    affine = Affine(bits, 64)
    packed, _ = quantize_rows(weights("gauss", 64, 256), "F32", affine)
    x = np.random.default_rng(1).standard_normal((5, 256)).astype(np.float32)
    ours = mx.quantized_matmul(mx.array(x), mx.array(packed.codes), **on_mlx(packed, affine, "F32"))
    error = relative_l2(np.array(ours), x @ dequantize_rows(packed, "F32", affine).T)
    figure(f"quantized_matmul, {bits} bits, rel L2", error, limit=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_chunks_blocks_and_threads_change_nothing(monkeypatch: pytest.MonkeyPatch, bits: int, dtype: str) -> None:
    values, affine = stored(weights("heavy", 13, 128), dtype), Affine(bits, 32)
    whole, loss = quantize_rows(values, dtype, affine)
    for processors, block in ((1, 32), (3, 96), (5, 1 << 20)):
        monkeypatch.setattr("os.cpu_count", lambda n=processors: n)
        monkeypatch.setattr(pack, "BLOCK_VALUES", block)
        for rows in (1, 5, 13):
            parts = [quantize_rows(values[i : i + rows], dtype, affine) for i in range(0, 13, rows)]
            for name in ("codes", "scales", "biases"):
                joined = np.concatenate([getattr(p, name) for p, _ in parts])
                np.testing.assert_array_equal(joined, getattr(whole, name))
            assert sum(part.error for _, part in parts) == pytest.approx(loss.error, rel=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_constant_groups_are_exact(bits: int, dtype: str) -> None:
    values = np.zeros((4, 64), np.float32)
    values[1:3] = [[0.75], [-1.5e-3]]
    values[3, ::2] = -0.0
    packed, loss = quantize_rows(stored(values, dtype), dtype, Affine(bits, 32))
    restored = dequantize_rows(packed, dtype, Affine(bits, 32))
    np.testing.assert_array_equal(restored, as_float32(stored(values, dtype), dtype))
    assert loss.error == 0 and not np.signbit(restored[3]).any()


def test_all_zero_weights_have_no_error() -> None:
    assert quantize_rows(np.zeros((2, 64), np.float32), "F32", Affine(4, 64))[1].relative == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(value: float, dtype: str) -> None:
    values = np.ones((4, 64), np.float32)
    values[2, 17] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize_rows(stored(values, dtype), dtype, Affine(4, 64))


def test_ranges_beyond_float32_are_refused() -> None:
    values = np.array([[-3e38] * 32 + [3e38] * 32], np.float32)
    with pytest.raises(ValueError, match="too far"):
        quantize_rows(values, "F32", Affine(4, 64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiny_and_large_values_keep_their_scale(dtype: str) -> None:
    for magnitude in (1e-4, 1.0, 3e3):
        values = stored(weights("gauss", 8, 256) * magnitude / 0.02, dtype)
        _, loss = quantize_rows(values, dtype, Affine(8, 64))
        assert 0 < loss.relative < 0.007
