"""Arithmetic on blocks of groups. Two implementations give the same bits: numpy's, twice as fast on CPUs, and MLX's,
for GPUs.

A block is (group size, groups): the values of a group lie along axis 0, so all work is elementwise over groups; sums
add one value after the other. IEEE 754 defines every operation, and no expression multiplies and adds, so a compiler
that fuses the two (CUDA, Metal, ARM) changes nothing."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from ltx2.runtime.files.tensors import Array

Values = Any  # an array of numpy or of MLX
Function = TypeVar("Function", bound=Callable[..., Any])

ROUND = float(3 << 22)  # adding and taking it away rounds to the nearest integer, half to even, below 2**22
EXPONENT = 0x7F800000  # of a float32


class Grid(NamedTuple):
    """The values of a code. `top` is the largest; from 2**low on an octave has 2**mantissa values, below that they are
    evenly spaced."""

    top: float
    mantissa: int
    low: int
    sign: int  # the bit of a code that is the sign

    @property
    def shift(self) -> int:
        """The bits of a float32 above this one are the code plus `bias`."""
        return 23 - self.mantissa

    @property
    def bias(self) -> int:
        """How much larger than the code the upper bits of a float32 are, because of the exponent's bias."""
        return (126 + self.low) << self.mantissa

    @property
    def step(self) -> float:
        """The smallest value above 0."""
        return 2.0 ** (self.low - self.mantissa)

    @property
    def coarse(self) -> float:
        """Adding this times 2**n rounds a number of that octave to the grid."""
        return float(3 << (22 - self.mantissa))


class Arithmetic(ABC):
    """The operations of the searches. `weights` are one block, or none."""

    xp: Any  # numpy or mlx.core, for functions that both have

    @abstractmethod
    def block(self, rows: Array, group_size: int, factor: float) -> Values:
        """Rows (rows, width) as they are stored, as a float32 block times a power of two."""

    @abstractmethod
    def tiled(self, weights: Array, rows: int, group_size: int) -> Values:
        """One weight per column (width,) as the block of `rows` rows that all have these weights."""

    @abstractmethod
    def rounded(self, values: Values, dtype: str) -> Values:
        """float32 values of any shape, rounded to a safetensors dtype."""

    @abstractmethod
    def view(self, values: Values, kind: str) -> Values:
        """The same bits, of any shape, as `uint32` or `float32`."""

    @abstractmethod
    def cast(self, values: Values, kind: str) -> Values:
        """Values of any shape, converted to `uint32`, `int32` or `float32`."""

    @abstractmethod
    def contiguous(self, values: Values) -> Values:
        """A copy of an array of any shape, in row-major order."""

    @abstractmethod
    def numpy(self, values: Values) -> Array:
        """An array of any shape as numpy's."""

    @abstractmethod
    def array(self, values: Array) -> Values:
        """A numpy array of any shape as one of these."""

    def compiled(self, function: Function) -> Function:
        """A function of arrays, compiled where that pays."""
        return function

    @abstractmethod
    def begin(self, *values: Values) -> None:
        """Begin to compute arrays of any shape."""

    @abstractmethod
    def finish(self, *values: Values) -> None:
        """Wait for arrays of any shape, so that no more work than theirs is queued."""

    @abstractmethod
    def less_outer(self, values: Values, place: int, factors: Values, errors: Values) -> Values:
        """Values (columns, rows), those after column `place` less factors (columns, 1) times errors (1, rows); factors
        are 0 up to there. May be in the values' own place."""

    @abstractmethod
    def less_product(self, values: Values, factors: Values, errors: Values) -> Values:
        """Values (columns, rows) less the product of factors (changed, columns), turned, with errors (changed, rows).
        May be in the values' own place."""

    @abstractmethod
    def group_sums(self, values: Values) -> Values:
        """(group size, groups) -> (groups,): sums over axis 0, added one value after the other."""

    @abstractmethod
    def squares(self, values: Values, *weights: Values) -> Values:
        """(group size, groups) -> (groups,): sums of squares."""

    @abstractmethod
    def affine_errors(self, values: Values, scale: Values, bias: Values, top: float, *weights: Values) -> Values:
        """Summed squares of the rounding errors for codes from 0 to `top`, in units of the scale, for several scales
        and biases (fits, groups)."""

    @abstractmethod
    def affine_moments(
        self, values: Values, scale: Values, bias: Values, top: float, *weights: Values
    ) -> tuple[Values, Values, Values, Values]:
        """With codes q and remainders r: the sums of r, q, q r, q q, each (groups,)."""

    @abstractmethod
    def affine_rest(self, values: Values, scale: Values, bias: Values, top: float) -> Values:
        """Values less what their codes stand for, in units of the scale (group size, groups)."""

    @abstractmethod
    def affine_codes(self, values: Values, scale: Values, bias: Values, top: float) -> Values:
        """The codes, uint32 (group size, groups)."""

    @abstractmethod
    def grid_errors(self, values: Values, scale: Values, grid: Grid, *weights: Values) -> Values:
        """Summed squares of the rounding errors on a grid, in units of the scale, for several scales (fits, groups)."""

    @abstractmethod
    def grid_rest(self, values: Values, scale: Values, grid: Grid) -> Values:
        """Values less the nearest of a grid, in units of the scale (group size, groups)."""

    @abstractmethod
    def grid_codes(self, values: Values, scale: Values, grid: Grid) -> Values:
        """The codes of the nearest values of a grid, uint32 (group size, groups): from bit 0 mantissa, exponent, sign.
        -0 becomes 0."""

    def words(self, codes: Values, bits: int) -> Values:
        """Codes (group size, groups), uint32, as MLX stores them: (groups, words), each row a stream of bits that
        starts with the lowest of the first word."""
        while bits <= 16:  # two codes become one of twice the bits
            codes = codes[0::2] | codes[1::2] << bits
            bits *= 2
        return self.contiguous((codes if bits == 32 else self._joined(codes, bits)).T)

    def _joined(self, codes: Values, bits: int) -> Values:
        """Codes (count, groups) of 17 to 31 bits as a stream, cut into words (words, groups)."""
        rows = 32 // (bits & -bits)  # codes after which words and codes end together
        codes = codes.reshape(-1, rows, codes.shape[1])
        words = [_word(codes, bits, 32 * index) for index in range(rows * bits // 32)]
        return self.xp.stack(words, axis=1).reshape(-1, codes.shape[2])


E2M1, E4M3 = Grid(6.0, 1, 0, 8), Grid(448.0, 3, -6, 128)


def _word(codes: Values, bits: int, start: int) -> Values:
    """The word (parts, groups) that begins `start` bits after the first of codes (parts, codes, groups)."""
    word = codes[:, start // bits] >> (start % bits)
    for index in range(start // bits + 1, -(-(start + 32) // bits)):
        word = word | codes[:, index] << (index * bits - start)
    return word
