"""The searches' arithmetic in MLX. On GPUs functions are compiled, which saves trips to memory."""

from typing import Any, cast

import mlx.core as mx
import numpy as np

from ltx2.quant.codes.arithmetic import EXPONENT, ROUND, Arithmetic, Function, Grid, Values
from ltx2.runtime.files.tensors import Array

ADDED = 8  # values added at once: a kernel has a limited number of arguments
KINDS = {"uint32": mx.uint32, "int32": mx.int32, "float32": mx.float32}
STORED = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}


def is_gpu() -> bool:
    """Whether MLX's work goes to a GPU."""
    return bool(mx.default_device().type == mx.DeviceType.gpu)


def compiled(function: Function) -> Function:
    """The function, compiled where that pays: not on CPUs, where it takes three times as long."""
    fused = mx.compile(function)

    def call(*args: Any) -> Any:
        return (fused if is_gpu() else function)(*args)

    return cast(Function, call)


class OnGpu(Arithmetic):
    """Runs on MLX's device, whatever that is."""

    xp = mx

    def block(self, rows: Array, group_size: int, factor: float) -> mx.array:
        values = mx.array(rows)
        values = values.view(mx.bfloat16) if rows.dtype == np.uint16 else values
        block = mx.contiguous(values.reshape(-1, group_size).T).astype(mx.float32)
        return block if factor == 1 else block * factor

    def tiled(self, weights: Array, rows: int, group_size: int) -> mx.array:
        columns = mx.array(weights).reshape(-1, group_size).T[:, None]
        repeated = mx.broadcast_to(columns, (group_size, rows, columns.shape[2]))
        return mx.contiguous(repeated).reshape(group_size, -1)

    def rounded(self, values: mx.array, dtype: str) -> mx.array:
        return values.astype(STORED[dtype]).astype(mx.float32)

    def view(self, values: mx.array, kind: str) -> mx.array:
        return values.view(KINDS[kind])

    def cast(self, values: mx.array, kind: str) -> mx.array:
        return values.astype(KINDS[kind])

    def contiguous(self, values: mx.array) -> mx.array:
        return mx.contiguous(values)

    def numpy(self, values: mx.array) -> Array:
        return np.asarray(values)

    def array(self, values: Values) -> mx.array:
        return values if isinstance(values, mx.array) else mx.array(values)

    def compiled(self, function: Function) -> Function:
        return compiled(function)

    def begin(self, *values: mx.array) -> None:
        mx.async_eval(values)

    def finish(self, *values: mx.array) -> None:
        mx.eval(values)

    def less_outer(self, values: mx.array, place: int, factors: mx.array, errors: mx.array) -> mx.array:
        return values - factors * errors

    def less_product(self, values: mx.array, factors: mx.array, errors: mx.array) -> mx.array:
        return mx.addmm(values, factors.T, errors, alpha=-1)

    def group_sums(self, values: mx.array) -> mx.array:
        total, *rest = mx.split(values, range(ADDED, len(values), ADDED))
        total = _added(*mx.unstack(total))
        for part in rest:
            total = _added(total, *mx.unstack(part))
        return total

    def squares(self, values: mx.array, *weights: mx.array) -> mx.array:
        return self.group_sums(_squares(values, *weights))

    def affine_errors(
        self, values: mx.array, scale: mx.array, bias: mx.array, top: float, *weights: mx.array
    ) -> mx.array:
        values, *weights = (a[:, None] for a in (values, *weights))  # type: ignore[assignment]
        return self.group_sums(_affine_errors(values, scale, bias, top, *weights))

    def affine_moments(
        self, values: mx.array, scale: mx.array, bias: mx.array, top: float, *weights: mx.array
    ) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        r, q, qr, qq = (self.group_sums(a) for a in _affine_moments(values, scale, bias, top, *weights))
        return r, q, qr, qq

    def affine_rest(self, values: mx.array, scale: mx.array, bias: mx.array, top: float) -> mx.array:
        return _affine_rest(values, scale, bias, top)

    def affine_codes(self, values: mx.array, scale: mx.array, bias: mx.array, top: float) -> mx.array:
        return _affine_codes(values, scale, bias, top)

    def grid_errors(self, values: mx.array, scale: mx.array, grid: Grid, *weights: mx.array) -> mx.array:
        values, *weights = (a[:, None] for a in (values, *weights))  # type: ignore[assignment]
        return self.group_sums(_grid_errors(values, scale, grid, *weights))

    def grid_rest(self, values: mx.array, scale: mx.array, grid: Grid) -> mx.array:
        return _grid_rest(values, scale, grid)

    def grid_codes(self, values: mx.array, scale: mx.array, grid: Grid) -> mx.array:
        return _grid_codes(values, scale, grid)


@compiled
def _added(first: mx.array, *rest: mx.array) -> mx.array:
    for value in rest:
        first = first + value
    return first


@compiled
def _squares(values: mx.array, *weights: mx.array) -> mx.array:
    squared = values * values
    return squared * weights[0] if weights else squared


def _steps(values: mx.array, scale: mx.array, bias: mx.array, top: float) -> tuple[mx.array, mx.array]:
    """Values in units of the scale, and the nearest codes."""
    steps = (values - bias) / scale
    return steps, (mx.clip(steps, 0.0, top) + ROUND) - ROUND


@compiled
def _affine_errors(values: mx.array, scale: mx.array, bias: mx.array, top: float, *weights: mx.array) -> mx.array:
    steps, codes = _steps(values, scale, bias, top)
    return _squares(steps - codes, *weights)


@compiled
def _affine_moments(
    values: mx.array, scale: mx.array, bias: mx.array, top: float, *weights: mx.array
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    steps, q = _steps(values, scale, bias, top)
    r = steps - q
    r, wq = (r * weights[0], q * weights[0]) if weights else (r, q)
    return r, wq, q * r, q * wq


@compiled
def _affine_rest(values: mx.array, scale: mx.array, bias: mx.array, top: float) -> mx.array:
    steps, codes = _steps(values, scale, bias, top)
    return steps - codes


@compiled
def _affine_codes(values: mx.array, scale: mx.array, bias: mx.array, top: float) -> mx.array:
    return _steps(values, scale, bias, top)[1].astype(mx.uint32)


def _nearest(values: mx.array, scale: mx.array, grid: Grid) -> tuple[mx.array, mx.array]:
    """Absolute values in units of the scale, and the nearest values of the grid, half to even."""
    steps = mx.abs(values) / scale
    sizes = mx.minimum(steps, grid.top)
    octave = mx.maximum((sizes.view(mx.uint32) & EXPONENT).view(mx.float32), 2.0**grid.low) * grid.coarse
    return steps, (sizes + octave) - octave


@compiled
def _grid_errors(values: mx.array, scale: mx.array, grid: Grid, *weights: mx.array) -> mx.array:
    steps, nearest = _nearest(values, scale, grid)
    return _squares(steps - nearest, *weights)


@compiled
def _grid_rest(values: mx.array, scale: mx.array, grid: Grid) -> mx.array:
    steps, nearest = _nearest(values, scale, grid)
    change = steps - nearest
    return mx.where(values < 0, -change, change)


@compiled
def _grid_codes(values: mx.array, scale: mx.array, grid: Grid) -> mx.array:
    _, sizes = _nearest(values, scale, grid)
    normal = (sizes.view(mx.uint32) >> grid.shift) - grid.bias
    codes = mx.where(sizes < 2.0**grid.low, (sizes * (1 / grid.step)).astype(mx.uint32), normal)
    return mx.where((values < 0) & (sizes > 0), codes | grid.sign, codes)
