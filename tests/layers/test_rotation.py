"""The matrices that weights and inputs are rotated by."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from ltx2.runtime.files.tensors import bf16_to_f32, f32_to_bf16
from ltx2.runtime.layers.rotation import rotated
from ltx2.runtime.model.hadamard import REGULAR, ROTATIONS, SYLVESTER, hadamard, rotated_rows
from tests.support.encoded import regular
from tests.support.parity import relative_l2


def sylvester(size: int) -> np.ndarray:
    """(-1) to the number of binary digits that are 1 in both indices, normalised."""
    both = np.arange(size)[:, None] & np.arange(size)
    return (-1.0) ** np.bitwise_count(both) / np.sqrt(size)


@pytest.mark.parametrize("size", ROTATIONS)
@pytest.mark.parametrize(("kind", "definition"), [(SYLVESTER, sylvester), (REGULAR, regular)])
def test_matrices(size: int, kind: str, definition: Callable[[int], np.ndarray]) -> None:
    matrix = hadamard(size, kind)
    assert np.array_equal(matrix, definition(size))
    assert np.array_equal(matrix @ matrix.T, np.eye(size)) and np.array_equal(matrix, matrix.T), "its own inverse"
    assert np.array_equal(bf16_to_f32(f32_to_bf16(matrix)), matrix)


@pytest.mark.parametrize("size", ROTATIONS)
def test_a_regular_matrix_spreads_what_inputs_share(size: int) -> None:
    """Where Sylvester's puts all of it into one value of a block."""
    ones = np.ones((1, size), np.float32)
    assert np.array_equal(rotated_rows(ones, size, REGULAR), ones)
    assert np.array_equal(rotated_rows(ones, size)[0].nonzero()[0], [0])


@pytest.mark.parametrize("kind", [SYLVESTER, REGULAR])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_inputs(kind: str, dtype: mx.Dtype) -> None:
    """Block by block, in their own type; the product with rotated weights is that of both as they were."""
    draw = np.random.default_rng(0)
    x, w = (draw.standard_normal((n, 512)).astype(np.float32) for n in (6, 8))
    ours = rotated(mx.array(x, dtype).reshape(2, 3, 512), 256, kind)
    assert ours.dtype == dtype and ours.shape == (2, 3, 512)
    limit = {mx.float32: 1e-6, mx.float16: 1e-3, mx.bfloat16: 2e-2}[dtype]  # a CPU adds up in bf16
    values = np.array(ours.astype(mx.float32)).reshape(6, 512)
    assert relative_l2(values, rotated_rows(x, 256, kind)) < limit
    assert relative_l2(values @ rotated_rows(w, 256, kind).T, x @ w.T) < limit


@pytest.mark.parametrize("kind", [SYLVESTER, REGULAR])
def test_codes_are_turned_exactly(kind: str) -> None:
    """Sums of 256 signed bytes, each divided by 16, fit float32."""
    codes = np.random.default_rng(1).integers(-128, 128, (64, 1024)).astype(np.float32)
    codes[0], codes[1] = -128, np.sign(hadamard(256, kind)[3])[np.arange(1024) % 256] * 127
    exact = (codes.reshape(64, -1, 256).astype(np.float64) @ hadamard(256, kind)).reshape(codes.shape)
    assert np.array_equal(rotated_rows(codes, 256, kind), exact)
    assert np.array_equal(rotated_rows(rotated_rows(codes, 256, kind), 256, kind), codes)
