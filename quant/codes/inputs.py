"""Statistics of a layer's inputs, and the weight that they give each of its columns."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ltx2.runtime.files.tensors import Array

LEAST_WEIGHT = 2.0**-20  # of the largest


class Columns(NamedTuple):
    """By column, float32 (width,): the weight of errors, the weight of values, and the inputs' means."""

    errors: Array
    values: Array
    means: Array | None


@dataclass(frozen=True)
class Inputs:
    """Of a layer's inputs x, (width,): `mean_square` E[x^2], and `mean` E[x] if the layer has a bias that will make up
    for the change of its mean output."""

    mean_square: Array
    mean: Array | None = None

    @property
    def weights(self) -> Array:
        """The weight of an error in each column (width,): with a mean, whose part the bias makes up for, the
        variance."""
        if self.mean is None:
            return self.mean_square
        return np.maximum(self.mean_square.astype(np.float64) - np.square(self.mean, dtype=np.float64), 0)

    def columns(self, width: int) -> Columns:
        """For a layer of this width; columns whose inputs are (almost) 0 still count a little. Raises ValueError for
        statistics of another layer."""
        _check(self.mean_square, width)
        values = self.mean_square.astype(np.float32) if self.mean_square.any() else np.ones(width, np.float32)
        if self.mean is not None:
            _check(np.abs(self.mean), width)
        errors = self.weights.astype(np.float32)
        errors = np.maximum(errors, errors.max() * LEAST_WEIGHT) if errors.any() else values
        return Columns(errors, values, None if self.mean is None else self.mean.astype(np.float32))


def _check(values: Array, width: int) -> None:
    """Raises ValueError unless `values` are (width,), finite and not negative."""
    if values.shape != (width,) or not np.isfinite(values).all() or (values < 0).any():
        raise ValueError(f"statistics of inputs are not {width} finite numbers of the right sign")
