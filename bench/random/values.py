"""Random tensors in place of trained ones: weights that keep activations near one, so that results stay finite.

Values come from a pool that is repeated: a copy costs no more than reading would. Zeros would flatter a processor: it
takes less power and runs faster when it flips fewer bits."""

from collections.abc import Callable
from math import log2, prod

import mlx.core as mx

from ltx2.runtime.files.tensors import MLX_DTYPES
from ltx2.runtime.model.forms import Form, Quantization

POOL = 1_048_583  # a prime, so that no two rows of a matrix are alike
ALL_BITS, NO_NAN = 0xFFFFFFFF, 0xBFBFBFBF  # the latter of four E4M3 codes
RMS = {"mxfp4": 2.93, "nvfp4": 2.93, "mxfp8": 0.62}  # root mean square of the drawn codes
# The exponent of a scale of 1, and the bits behind exponents: E8M0 has none, E4M3 three.
EXPONENTS = {"mxfp4": (127, 0), "mxfp8": (127, 0), "nvfp4": (7, 3)}
MULTIPLIER = 1 / 64  # of a layer's product, where it has one
BYTES = 74  # root mean square of -128 to 127
Shape = tuple[int, ...]


class RandomValues:
    """The tensors of one component whose layers are packed as `quantization` has it."""

    def __init__(self, quantization: Quantization) -> None:
        self._quantization = quantization
        normal, high, low = mx.random.split(mx.random.key(0), 3)
        self._normal = mx.random.normal((POOL,), key=normal)
        halves = [mx.random.randint(0, 1 << 16, (POOL,), mx.uint32, key=key) for key in (high, low)]
        self._codes = halves[0] * (1 << 16) + halves[1]

    def tensor(self, name: str, dtype: str, shape: Shape) -> mx.array:
        """A lazy array of this shape and safetensors dtype; the parameter's name decides what it holds."""
        layer, _, part = name.rpartition(".")
        if dtype == "U32":
            drawn = NO_NAN if self._quantization.of(layer).mode == "mxfp8" else ALL_BITS
            return _repeated(self._codes, shape, lambda codes: codes & drawn)
        kind: mx.Dtype = getattr(mx, MLX_DTYPES[dtype])
        if part in ("scales", "biases", "weight_scale"):
            return _scale(part, kind, shape, self._quantization.of(layer))
        if len(shape) == 1:
            return mx.full(shape, 1.0 if "norm" in name or part in ("std", "layer_scalar") else 0.0, kind)
        deviation = prod(shape[1:]) ** -0.5
        return _repeated(self._normal, shape, lambda values: (values * deviation).astype(kind))


def _scale(part: str, dtype: mx.Dtype, shape: Shape, form: Form) -> mx.array:
    """Scales or biases (rows, groups) of a packed layer that give its weights the deviation of others; or its
    multiplier, () or (rows,)."""
    if part == "weight_scale":  # those of int8 are all there is of scales
        return mx.full(shape, MULTIPLIER / BYTES if form.biased else MULTIPLIER, dtype)
    deviation = (shape[1] * form.group_size) ** -0.5
    if form.biased:  # codes are evenly spread from 0 to `top`
        top = (1 << form.bits) - 1
        step = deviation * (12 / (top * (top + 2))) ** 0.5
        return mx.full(shape, step if part == "scales" else -step * top / 2, dtype)
    one, behind = EXPONENTS[form.mode]
    factor = deviation / RMS[form.mode] / (MULTIPLIER if form.multiplied else 1)
    return mx.full(shape, (one + round(log2(factor))) << behind, mx.uint8)


def _repeated(pool: mx.array, shape: Shape, made: Callable[[mx.array], mx.array]) -> mx.array:
    """Applies `made` to the pool (POOL,) and repeats it to fill a new array of this shape."""
    whole, rest = divmod(prod(shape), POOL)
    if not whole:
        return made(pool[:rest]).reshape(shape)
    full = made(pool)
    return mx.concatenate([full] * whole + [full[:rest]]).reshape(shape)
