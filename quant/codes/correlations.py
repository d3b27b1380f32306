"""The correlations of a layer's inputs, which GPTQ needs.

A wide layer's matrices are 1 GB each, so there are never more than two: the measured correlations, and one that is made
from them panel by panel and replaced in place by a factor of its inverse."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ltx2.quant.codes.arithmetic import Arithmetic, Values
from ltx2.runtime.files.tensors import Array
from ltx2.runtime.model.forms import Form
from ltx2.runtime.model.hadamard import hadamard, rotated_rows

# Correlations measured on few tokens are mostly chance, and tokens of one prompt are alike: the fewer, the stronger the
# damping. Chosen by the error on other prompts: on the demo model with 1 to 32 prompts, on tests/support/layers.py with
# 1 to 6 tokens per column. Twice or half as much changes the error by a few percent.
PROMPTS, TOKENS = 4.0, 2.0
LEAST = 1e-3  # of the diagonal's mean, added to the diagonal: some inputs never vary
LEAF = 256  # columns that are factored and inverted at once
PARTS = 8  # of a triangle
PANEL = 512  # rows of a panel; a multiple of every rotation's size


@dataclass(frozen=True)
class Correlations:
    """Of inputs x: E[x x^T] (width, width), in `panels` of (usually PANEL) rows, and E[x] (width,), both float32; the
    number of tokens and prompts measured."""

    panels: Sequence[Values]
    mean: Array
    tokens: int
    prompts: int

    def rows(self) -> Iterator[tuple[slice, Values]]:
        """The panels (rows, width), each with the range of its rows."""
        start = 0
        for panel in self.panels:
            yield slice(start, start + len(panel)), panel
            start += len(panel)

    def damping(self, variances: Array) -> Array:
        """What is added to the diagonal, whose values are `variances` (width,), to damp correlations."""
        unit = float(variances.mean()) or 1.0  # 0 where nothing varies
        share = max(PROMPTS / self.prompts, TOKENS * len(variances) / self.tokens)
        return share * variances + np.float32(LEAST * unit)


@dataclass(frozen=True)
class Feedback:
    """How later columns of a layer can make up for errors of earlier ones. In the `order` (width,) of rounding, the
    inverse of the damped correlations is U^T U with `upper` = U (width, width), upper triangular. `given` describes the
    inputs before their rotation in blocks of `rotation` (0: none).

    With a `mean` (width,) of the rotated inputs, correlations are around it: the layer's bias makes up for the change
    of its mean output.
    """

    on: Arithmetic
    order: Array
    upper: Array
    given: Correlations
    rotation: int
    mean: Array | None

    @property
    def counts(self) -> Array:
        """How much an error of each column counts, in their order, once later columns make up for it (width,)."""
        return 1 / np.square(np.diagonal(self.upper))

    def squares(self, values: Array) -> float:
        """Rows of rotated values (rows, width) times inputs: the mean squares, summed over rows."""
        rows, total = self.on.array(rotated_rows(values, self.rotation) if self.rotation else values), 0.0
        for part, panel in self.given.rows():  # symmetric: what is left of the diagonal is not multiplied
            products = (rows[:, part] @ self.on.array(panel)[:, part.start :]) * rows[:, part.start :]
            size = len(panel)
            sums = products[:, :size].sum(axis=1) + 2 * products[:, size:].sum(axis=1)
            total += float(self.on.numpy(sums).sum(dtype=np.float64))
        return total


def make_feedback(given: Correlations, form: Form, biased: bool, on: Arithmetic) -> Feedback:
    """For a layer stored in this form; `biased`: its bias makes up for the mean. Raises ValueError for correlations
    that no inputs can have."""
    size, center = form.rotation, given.mean if biased else np.zeros_like(given.mean)
    if not np.isfinite(given.mean).all():
        raise ValueError("what was measured of its inputs is not finite")
    squares = [block for _, block in _centered(given, center, on, square=True)]
    variances, after = (np.concatenate(parts) for parts in zip(*(_diagonals(s, size) for s in squares), strict=True))
    order, damping = rounding_order(after, form.group_size), given.damping(variances)
    upper, place = np.empty((len(order), len(order)), np.float32), np.argsort(order)
    for rows, block in _centered(given, center, on):
        block[np.arange(len(block)), np.arange(rows.start, rows.stop)] += damping[rows]
        upper[place[rows]] = np.take(_turned(block, size), order, axis=1)
    invert_factor(upper)
    mean = rotated_rows(given.mean, size) if size else given.mean
    return Feedback(on, order, upper, given, size, mean if biased else None)


def _centered(
    given: Correlations, center: Array, on: Arithmetic, square: bool = False
) -> Iterator[tuple[slice, Array]]:
    """Panels (rows, width) around a `center` (width,), or their `square` parts on the diagonal. On the host: a GPU may
    round the factors of products."""
    for rows, panel in given.rows():
        columns = rows if square else slice(None)
        yield rows, on.numpy(panel[:, columns]) - np.outer(center[rows], center[columns])


def _turned(block: Array, size: int) -> Array:
    """Correlations (rows, columns) of the rotated inputs; both are whole blocks of the rotation's `size`."""
    if not size:
        return block
    return (hadamard(size) @ rotated_rows(block, size).reshape(-1, size, block.shape[1])).reshape(block.shape)


def _diagonals(square: Array, size: int) -> tuple[Array, Array]:
    """The diagonals (rows,) of a part (rows, rows) of the correlations: as it is, and rotated."""
    return np.diagonal(square), np.diagonal(_turned(square, size))


def invert_factor(matrix: Array) -> None:
    """Replace a matrix (width, width) by the upper triangular U with U^T U = matrix^-1. Raises ValueError if there is
    no U."""
    try:
        _invert_factor(matrix)
    except np.linalg.LinAlgError as error:
        raise ValueError(f"what was measured of its inputs is impossible: {error}") from error


def _invert_factor(matrix: Array) -> None:
    """By halves, so that nearly all work is products of matrices, which are several times faster than LAPACK's
    factorization. Only the upper triangle of the matrix (size, size) is read. Raises LinAlgError if there is no U."""
    size = len(matrix)
    if size <= LEAF:  # LAPACK's lower L with L L^T = matrix, from last to first, is U^-1
        matrix[:] = np.tril(np.linalg.inv(np.linalg.cholesky(matrix[::-1, ::-1])))[::-1, ::-1]
        return
    half = size // 2
    first, corner, last = matrix[:half, :half], matrix[:half, half:], matrix[half:, half:]
    rows, columns = _parts(half), _parts(size - half)
    _invert_factor(last)
    for part in columns:  # of U^-1
        corner[:, part] = corner[:, part.start :] @ last[part, part.start :].T
    for part in rows:
        first[part, part.start :] -= corner[part] @ corner[part.start :].T
    _invert_factor(first)
    for part in reversed(columns):
        corner[:, part] = corner[:, : part.stop] @ last[: part.stop, part]
    for part in rows:
        corner[part] = -(first[part, part.start :] @ corner[part.start :])
    matrix[half:, :half] = 0


def _parts(size: int) -> list[slice]:
    """Ranges of a triangle's rows or columns: products part by part skip nearly all zeros, and can be written over
    their factors."""
    step = max(LEAF, -(-size // PARTS))
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def rounding_order(variances: Array, group_size: int) -> Array:
    """The order of columns with these `variances` (width,), group by group: largest first, of groups and within one."""
    groups = variances.reshape(-1, group_size)
    within = np.argsort(-groups, axis=1, kind="stable")
    first = np.argsort(-groups.max(axis=1), kind="stable")
    return (first[:, None] * group_size + within[first]).reshape(-1)
