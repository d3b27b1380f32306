"""The searches' arithmetic in numpy. Large arrays are computed in place, in buffers that every thread keeps: memory
fresh from the system would cost more than the arithmetic."""

from math import prod
from threading import local

import numpy as np

from ltx2.convert.tensors.steps import from_float32
from ltx2.quant.codes.arithmetic import EXPONENT, ROUND, Arithmetic, Grid, Values
from ltx2.runtime.files.tensors import Array, to_float32

F32, I32, U32 = np.dtype(np.float32), np.dtype(np.int32), np.dtype(np.uint32)
_kept = local()


class OnCpu(Arithmetic):
    """Runs in the calling thread; results of `block`, `tiled`, codes and rests are valid until the thread's next."""

    xp = np

    def block(self, rows: Array, group_size: int, factor: float) -> Array:
        groups = rows.reshape(-1, group_size).T
        block = _buffer("block", groups.shape)
        if rows.dtype == np.uint16:  # bfloat16 is the upper half of a float32
            wide = block.view(U32)
            np.copyto(wide, groups)
            np.left_shift(wide, 16, out=wide)
        else:
            np.copyto(block, groups)
        return block if factor == 1 else np.multiply(block, np.float32(factor), out=block)

    def tiled(self, weights: Array, rows: int, group_size: int) -> Array:
        columns = weights.reshape(-1, group_size).T[:, None]
        tiled = _buffer("weights", (group_size, rows, columns.shape[2]))
        np.copyto(tiled, columns)
        return tiled.reshape(group_size, -1)

    def rounded(self, values: Array, dtype: str) -> Array:
        return to_float32(_narrow(values, dtype), dtype)

    def view(self, values: Array, kind: str) -> Array:
        return values.view(kind)

    def cast(self, values: Array, kind: str) -> Array:
        return values.astype(kind)

    def contiguous(self, values: Array) -> Array:
        return np.ascontiguousarray(values)

    def numpy(self, values: Values) -> Array:
        return np.asarray(values)

    def array(self, values: Values) -> Array:
        return np.asarray(values)

    def begin(self, *values: Array) -> None:
        pass

    def finish(self, *values: Array) -> None:
        pass

    def less_outer(self, values: Array, place: int, factors: Array, errors: Array) -> Array:
        later = values[place + 1 :]
        products = np.multiply(factors[place + 1 :], errors, out=_buffer("u", later.shape))
        np.subtract(later, products, out=later)
        return values

    def less_product(self, values: Array, factors: Array, errors: Array) -> Array:
        products = np.matmul(factors.T, errors, out=_buffer("products", values.shape))
        return np.subtract(values, products, out=values)

    def group_sums(self, values: Array) -> Array:
        if values.shape[1] == 1:  # which numpy would take for a contiguous axis, and sum in pairs
            return np.add.accumulate(values, axis=0)[-1]
        return np.add.reduce(values, axis=0)

    def squares(self, values: Array, *weights: Array) -> Array:
        return self._squares(np.multiply(values, values, out=_buffer("t", values.shape)), *weights)

    def _squares(self, squares: Array, *weights: Array) -> Array:
        return self.group_sums(np.multiply(squares, weights[0], out=squares) if weights else squares)

    def affine_errors(self, values: Array, scale: Array, bias: Array, top: float, *weights: Array) -> Array:
        errors = np.empty_like(scale)
        for place, (one, other) in enumerate(zip(scale, bias, strict=True)):
            t, q = self._steps(values, one, other, top)
            np.subtract(t, q, out=t)
            errors[place] = self._squares(np.multiply(t, t, out=t), *weights)
        return errors

    def _steps(self, values: Array, scale: Array, bias: Array, top: float) -> tuple[Array, Array]:
        """Values in units of the scale, and the nearest codes."""
        t, q = _buffer("t", values.shape), _buffer("q", values.shape)
        np.subtract(values, bias, out=t)
        np.divide(t, scale, out=t)
        np.clip(t, np.float32(0), np.float32(top), out=q)
        np.add(q, np.float32(ROUND), out=q)
        np.subtract(q, np.float32(ROUND), out=q)
        return t, q

    def affine_moments(
        self, values: Array, scale: Array, bias: Array, top: float, *weights: Array
    ) -> tuple[Array, Array, Array, Array]:
        r, q = self._steps(values, scale, bias, top)
        np.subtract(r, q, out=r)
        wq, buffer = q, _buffer("u", values.shape)
        if weights:
            np.multiply(r, weights[0], out=r)
            wq = np.multiply(q, weights[0], out=buffer)
        sums = self.group_sums(r), self.group_sums(wq)
        qr = self.group_sums(np.multiply(q, r, out=r))
        return *sums, qr, self.group_sums(np.multiply(q, wq, out=buffer))

    def affine_rest(self, values: Array, scale: Array, bias: Array, top: float) -> Array:
        t, q = self._steps(values, scale, bias, top)
        return np.subtract(t, q, out=t)

    def affine_codes(self, values: Array, scale: Array, bias: Array, top: float) -> Array:
        return _integers(self._steps(values, scale, bias, top)[1])

    def grid_errors(self, values: Array, scale: Array, grid: Grid, *weights: Array) -> Array:
        errors = np.empty_like(scale)
        for place, one in enumerate(scale):
            t, q = self._nearest(values, one, grid)
            np.subtract(t, q, out=t)
            errors[place] = self._squares(np.multiply(t, t, out=t), *weights)
        return errors

    def grid_rest(self, values: Array, scale: Array, grid: Grid) -> Array:
        t, q = self._nearest(values, scale, grid)
        return np.negative(np.subtract(t, q, out=t), out=t, where=values < 0)

    def grid_codes(self, values: Array, scale: Array, grid: Grid) -> Array:
        t, sizes = self._nearest(values, scale, grid)
        codes, even = _buffer("codes", values.shape).view(I32), _buffer("u", values.shape).view(I32)
        np.right_shift(sizes.view(I32), grid.shift, out=codes)
        np.subtract(codes, grid.bias, out=codes)  # below the grid's octaves it is less than the number of steps
        np.multiply(sizes, np.float32(1 / grid.step), out=t)
        np.copyto(even, np.minimum(t, np.float32(1 << grid.mantissa), out=t), casting="unsafe")
        np.maximum(codes, even, out=codes)
        np.right_shift(values.view(U32), 31, out=even.view(U32))
        np.multiply(even, sizes > 0, out=even)
        np.bitwise_or(codes, np.multiply(even, grid.sign, out=even), out=codes)
        return codes.view(U32)

    def _nearest(self, values: Array, scale: Array, grid: Grid) -> tuple[Array, Array]:
        """Absolute values in units of the scale, and the nearest values of the grid, half to even."""
        t, q, octave = (_buffer(name, values.shape) for name in "tqu")
        np.abs(values, out=t)
        np.divide(t, scale, out=t)
        np.minimum(t, np.float32(grid.top), out=q)
        np.bitwise_and(q.view(U32), np.uint32(EXPONENT), out=octave.view(U32))
        np.maximum(octave, np.float32(2.0**grid.low), out=octave)
        np.multiply(octave, np.float32(grid.coarse), out=octave)
        np.add(q, octave, out=q)
        return t, np.subtract(q, octave, out=q)


def _buffer(name: str, shape: tuple[int, ...]) -> Array:
    """Memory of this thread; two of the same name are the same."""
    kept: dict[str, Array] = _kept.__dict__
    size = prod(shape)
    if name not in kept or kept[name].size < size:
        kept[name] = np.empty(size, F32)
    return kept[name][:size].reshape(shape)


def _integers(values: Array) -> Array:
    codes = _buffer("codes", values.shape).view(U32)
    np.copyto(codes, values, casting="unsafe")
    return codes


def _narrow(values: Array, dtype: str) -> Array:
    return values.astype(np.float16) if dtype == "F16" else from_float32(values, dtype)
