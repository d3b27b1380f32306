"""How a layer's inputs go together: what GPTQ must know of them."""

from dataclasses import dataclass

import numpy as np

from ltx2.quant.codes.arithmetic import Arithmetic, Values
from ltx2.runtime.files.tensors import Array
from ltx2.runtime.model.forms import Form
from ltx2.runtime.model.hadamard import rotated_rows

# What is measured on few tokens is mostly chance, and tokens of one prompt are alike: the correlations between columns
# are believed the less, the fewer there were. Chosen on other prompts' errors: on the demo model with 1 to 32 prompts,
# on tests/support/layers.py with 1 to 6 tokens per column; twice or half as much changes the error by some percent.
PROMPTS, TOKENS = 4.0, 2.0
LEAST = 1e-3  # of the diagonal's mean, added to the diagonal: some inputs never vary
LEAF = 256  # columns that are factored and inverted at once


@dataclass(frozen=True)
class Correlations:
    """E[x x^T] (width, width) and E[x] (width,) of inputs x, float32, and of how many tokens and prompts they are."""

    products: Array
    mean: Array
    tokens: int
    prompts: int

    def damped(self, correlations: Array) -> Array:
        """Correlations, around the mean or not, as far as they are to be believed."""
        variances = np.diagonal(correlations)
        unit = float(variances.mean()) or 1.0  # 0 where nothing varies
        share = max(PROMPTS / self.prompts, TOKENS * len(variances) / self.tokens)
        damped = correlations.copy()
        damped[np.diag_indices(len(variances))] += share * variances + LEAST * unit
        return damped


@dataclass(frozen=True)
class Feedback:
    """What the columns of a layer can do for each other. In the `order` in which they are rounded, the inverse of the
    damped correlations is U^T U with U = `upper`, upper triangular; `counts` says how much an error of each column in
    turn counts when those after it make up for it. `correlations` (width, width) are in the columns' own order.

    With a `mean` (width,), correlations are around it: the layer's bias makes up for the change of its mean output.
    """

    on: Arithmetic
    order: Array
    upper: Values
    counts: Values
    correlations: Values
    mean: Array | None

    def squares(self, values: Array) -> float:
        """Rows of values (rows, width) times inputs: the mean squares, summed over rows."""
        rows = self.on.array(values)
        products = self.on.numpy(((rows @ self.correlations) * rows).sum(axis=1))
        return float(products.sum(dtype=np.float64))


def make_feedback(given: Correlations, form: Form, biased: bool, on: Arithmetic) -> Feedback:
    """For a layer that is to be stored so, and that may have a bias. Raises ValueError for correlations that no inputs
    have."""
    if not np.isfinite(np.trace(given.products)):
        raise ValueError("what was measured of its inputs is not finite")
    correlations = given.products - np.outer(given.mean, given.mean) if biased else given.products
    damped, mean = given.damped(correlations), given.mean
    if size := form.rotation:
        correlations, damped = (rotated_rows(rotated_rows(values, size).T, size) for values in (correlations, damped))
        mean = rotated_rows(mean, size)
    order = rounding_order(np.diagonal(correlations), form.group_size)
    damped = damped[np.ix_(order, order)]  # a wide layer's matrices are 1 GB each: no more of them than there must be
    upper = inverse_factor(damped)
    del damped
    counts = 1 / np.square(np.diagonal(upper))
    upper, counts, correlations = (on.array(values) for values in (upper, counts, correlations))
    return Feedback(on, order, upper, counts, correlations, mean if biased else None)


def inverse_factor(matrix: Array) -> Array:
    """The upper triangular U with U^T U = matrix^-1. Raises ValueError where there is none."""
    # A lower L with L L^T = matrix, from last to first, is an upper R with R R^T = matrix, and U = R^-1.
    inverse = np.ascontiguousarray(matrix[::-1, ::-1])
    try:
        _invert_factor(inverse)
    except np.linalg.LinAlgError as error:
        raise ValueError(f"what was measured of its inputs is impossible: {error}") from error
    return np.ascontiguousarray(inverse[::-1, ::-1])


def _invert_factor(matrix: Array) -> None:
    """Put L^-1 in the place of a matrix L L^T, by halves: nearly all of it is products of matrices, which are several
    times faster than what LAPACK does to factor a matrix. Raises LinAlgError where there is no L."""
    size = len(matrix)
    if size <= LEAF:
        matrix[:] = np.tril(np.linalg.inv(np.linalg.cholesky(matrix)))
        return
    half = size // 2
    first, corner, last = matrix[:half, :half], matrix[half:, :half], matrix[half:, half:]
    _invert_factor(first)
    below = corner @ first.T  # of L
    last -= below @ below.T
    _invert_factor(last)
    np.matmul(last, below @ first, out=corner)
    np.negative(corner, out=corner)
    matrix[:half, half:] = 0


def rounding_order(variances: Array, group_size: int) -> Array:
    """Columns, group by group: the group, and within it the column, first whose inputs vary most."""
    groups = variances.reshape(-1, group_size)
    within = np.argsort(-groups, axis=1, kind="stable")
    first = np.argsort(-groups.max(axis=1), kind="stable")
    return (first[:, None] * group_size + within[first]).reshape(-1)
