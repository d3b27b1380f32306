"""How a layer's inputs go together: what GPTQ must know of them.

A wide layer's matrices are 1 GB each. So there are never more than two: the correlations as they were measured, and one
that is made of them panel by panel and turned into a factor of its inverse in its own place."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ltx2.quant.codes.arithmetic import Arithmetic, Values
from ltx2.runtime.files.tensors import Array
from ltx2.runtime.model.forms import Form
from ltx2.runtime.model.hadamard import hadamard, rotated_rows

# What is measured on few tokens is mostly chance, and tokens of one prompt are alike: the correlations between columns
# are believed the less, the fewer there were. Chosen on other prompts' errors: on the demo model with 1 to 32 prompts,
# on tests/support/layers.py with 1 to 6 tokens per column; twice or half as much changes the error by some percent.
PROMPTS, TOKENS = 4.0, 2.0
LEAST = 1e-3  # of the diagonal's mean, added to the diagonal: some inputs never vary
LEAF = 256  # columns that are factored and inverted at once
PARTS = 8  # of a triangle
PANEL = 512  # rows of a panel; a multiple of every rotation's size


@dataclass(frozen=True)
class Correlations:
    """E[x x^T] (width, width), cut into `panels` of (usually PANEL) rows, and E[x] (width,) of inputs x, float32, and
    of how many tokens and prompts they are."""

    panels: Sequence[Values]
    mean: Array
    tokens: int
    prompts: int

    def rows(self) -> Iterator[tuple[slice, Values]]:
        """The panels, with the rows that they are."""
        start = 0
        for panel in self.panels:
            yield slice(start, start + len(panel)), panel
            start += len(panel)

    def damping(self, variances: Array) -> Array:
        """What is added to the diagonal (width,), so that correlations are believed as far as they are to be."""
        unit = float(variances.mean()) or 1.0  # 0 where nothing varies
        share = max(PROMPTS / self.prompts, TOKENS * len(variances) / self.tokens)
        return share * variances + np.float32(LEAST * unit)


@dataclass(frozen=True)
class Feedback:
    """What the columns of a layer can do for each other. In the `order` in which they are rounded, the inverse of the
    damped correlations is U^T U with U = `upper`, upper triangular. `given` is of the inputs before they are rotated,
    in blocks of `rotation` (0: not).

    With a `mean` (width,), of the rotated inputs, correlations are around it: the layer's bias makes up for the change
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
        """How much an error of each column in turn counts when those after it make up for it."""
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
    """For a layer that is to be stored so, and that may have a bias. Raises ValueError for correlations that no inputs
    have."""
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
    """Panels around a center, or their `square` parts on the diagonal. On the host, since a GPU may take its products
    from rounded factors."""
    for rows, panel in given.rows():
        columns = rows if square else slice(None)
        yield rows, on.numpy(panel[:, columns]) - np.outer(center[rows], center[columns])


def _turned(block: Array, size: int) -> Array:
    """Correlations of rotated inputs, of rows and columns that are whole blocks of the rotation."""
    if not size:
        return block
    return (hadamard(size) @ rotated_rows(block, size).reshape(-1, size, block.shape[1])).reshape(block.shape)


def _diagonals(square: Array, size: int) -> tuple[Array, Array]:
    """Of a part of the correlations, as it is and rotated."""
    return np.diagonal(square), np.diagonal(_turned(square, size))


def invert_factor(matrix: Array) -> None:
    """Put the upper triangular U with U^T U = matrix^-1 in the matrix's place. Raises ValueError where there is
    none."""
    try:
        _invert_factor(matrix)
    except np.linalg.LinAlgError as error:
        raise ValueError(f"what was measured of its inputs is impossible: {error}") from error


def _invert_factor(matrix: Array) -> None:
    """By halves: nearly all of it is products of matrices, which are several times faster than what LAPACK does to
    factor a matrix. What is below the diagonal is not read. Raises LinAlgError where there is no U."""
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
    """Of a triangle's rows or columns: products with each part leave out nearly all of its zeros, and may take the
    place of what they are made of."""
    step = max(LEAF, -(-size // PARTS))
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def rounding_order(variances: Array, group_size: int) -> Array:
    """Columns, group by group: the group, and within it the column, first whose inputs vary most."""
    groups = variances.reshape(-1, group_size)
    within = np.argsort(-groups, axis=1, kind="stable")
    first = np.argsort(-groups.max(axis=1), kind="stable")
    return (first[:, None] * group_size + within[first]).reshape(-1)
