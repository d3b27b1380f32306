"""Arithmetic on blocks of groups, for which there are two implementations that give the same bits: numpy's, twice
as fast on CPUs, and MLX's, for GPUs.

A block is (group size, groups): values of a group lie along axis 0, so that all work is elementwise over groups, also
the additions of a sum, one value after the other. Every operation is one that IEEE 754 defines; no product is rounded
and added in one expression, so a compiler that fuses the two (CUDA, Metal, ARM) changes nothing."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from ltx2.runtime.files.tensors import Array

Values = Any  # an array of numpy or of MLX
Function = TypeVar("Function", bound=Callable[..., Any])

ROUND = float(3 << 22)  # adding and taking it away rounds to the nearest integer, half to even, below 2**22
EXPONENT = 0x7F800000  # of a float32


class Grid(NamedTuple):
    """The values of a code: `top` is the largest; from 2**low on there are 2**mantissa values per octave, below they
    are evenly spaced."""

    top: float
    mantissa: int
    low: int
    sign: int  # the bit of a code that is the sign

    @property
    def shift(self) -> int:
        """A float32's bits above this are a code, but for the exponent's bias."""
        return 23 - self.mantissa

    @property
    def bias(self) -> int:
        """What the exponent's bias makes a float32's upper bits larger than the code."""
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
    """What the searches compute with. Weights are a tuple of one block, or of none."""

    xp: Any  # numpy or mlx.core, for functions that both have

    @abstractmethod
    def block(self, rows: Array, group_size: int, factor: float) -> Values:
        """Rows (rows, width) as they are stored, as a float32 block times a power of two."""

    @abstractmethod
    def tiled(self, weights: Array, rows: int, group_size: int) -> Values:
        """One weight per column (width,) as the block of `rows` rows that all have these weights."""

    @abstractmethod
    def rounded(self, values: Values, dtype: str) -> Values:
        """float32 values rounded to what a safetensors dtype stores."""

    @abstractmethod
    def view(self, values: Values, kind: str) -> Values:
        """The same bits as `uint32` or `float32`."""

    @abstractmethod
    def cast(self, values: Values, kind: str) -> Values:
        """Values converted to `uint32`, `int32` or `float32`."""

    @abstractmethod
    def contiguous(self, values: Values) -> Values:
        """A copy in row-major order."""

    @abstractmethod
    def numpy(self, values: Values) -> Array:
        """As a numpy array."""

    @abstractmethod
    def array(self, values: Array) -> Values:
        """A numpy array as one of these."""

    def compiled(self, function: Function) -> Function:
        """A function of arrays, compiled where that pays."""
        return function

    @abstractmethod
    def begin(self, *values: Values) -> None:
        """Begin to compute them."""

    @abstractmethod
    def finish(self, *values: Values) -> None:
        """Return when they are computed, so that no more work than that is queued."""

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
        """Sums over axis 0, added one after the other."""

    @abstractmethod
    def squares(self, values: Values, *weights: Values) -> Values:
        """Sums of the groups' squares."""

    @abstractmethod
    def affine_errors(self, values: Values, scale: Values, bias: Values, top: float, *weights: Values) -> Values:
        """Summed squares of what rounding to codes from 0 to `top` changes, in units of the scale, for several scales
        and biases (fits, groups)."""

    @abstractmethod
    def affine_moments(
        self, values: Values, scale: Values, bias: Values, top: float, *weights: Values
    ) -> tuple[Values, Values, Values, Values]:
        """With codes q and remainders r: the sums of r, q, q r, q q."""

    @abstractmethod
    def affine_rest(self, values: Values, scale: Values, bias: Values, top: float) -> Values:
        """What rounding to codes takes away, in units of the scale (group size, groups)."""

    @abstractmethod
    def affine_codes(self, values: Values, scale: Values, bias: Values, top: float) -> Values:
        """The codes, uint32."""

    @abstractmethod
    def grid_errors(self, values: Values, scale: Values, grid: Grid, *weights: Values) -> Values:
        """Summed squares of what rounding to a grid changes, in units of the scale, for several scales
        (fits, groups)."""

    @abstractmethod
    def grid_rest(self, values: Values, scale: Values, grid: Grid) -> Values:
        """What rounding to a grid takes away, in units of the scale (group size, groups)."""

    @abstractmethod
    def grid_codes(self, values: Values, scale: Values, grid: Grid) -> Values:
        """The codes of the nearest values of the grid, uint32; bits from 0 are mantissa, exponent, sign. There is no
        -0."""

    def words(self, codes: Values, bits: int) -> Values:
        """Codes (group size, groups), uint32, as MLX stores them: (groups, words), each row a stream of bits that
        starts with the lowest of the first word."""
        while bits <= 16:  # two codes become one of twice the bits
            codes = codes[0::2] | codes[1::2] << bits
            bits *= 2
        return self.contiguous((codes if bits == 32 else self._joined(codes, bits)).T)

    def _joined(self, codes: Values, bits: int) -> Values:
        """The stream of codes of 17 to 31 bits, cut into words."""
        rows = 32 // (bits & -bits)  # codes after which words and codes end together
        codes = codes.reshape(-1, rows, codes.shape[1])
        words = [_word(codes, bits, 32 * index) for index in range(rows * bits // 32)]
        return self.xp.stack(words, axis=1).reshape(-1, codes.shape[2])


E2M1, E4M3 = Grid(6.0, 1, 0, 8), Grid(448.0, 3, -6, 128)


def _word(codes: Values, bits: int, start: int) -> Values:
    """The word that begins `start` bits after the first code."""
    word = codes[:, start // bits] >> (start % bits)
    for index in range(start // bits + 1, -(-(start + 32) // bits)):
        word = word | codes[:, index] << (index * bits - start)
    return word
