"""Random tensors in place of trained ones: weights that keep activations near one, so that results stay finite.

Values come from a pool that is repeated: a copy costs no more than reading would, and a GPU works no less on them.
Zeros would flatter it: a processor that flips fewer bits takes less power and runs faster."""

from collections.abc import Callable
from math import log2, prod

import mlx.core as mx

from ltx2.convert.tensors.steps import Spec
from ltx2.runtime.files.tensors import MLX_DTYPES
from ltx2.runtime.model.forms import Form, Quantization

POOL = 1_048_583  # a prime, so that no two rows of a matrix are alike
ALL_BITS, NO_NAN = 0xFFFFFFFF, 0xBFBFBFBF  # the latter of four E4M3 codes
RMS = {"mxfp4": 2.93, "nvfp4": 2.93, "mxfp8": 0.62}  # root mean square of the codes that are drawn
# Exponents of scales: E8M0 is nothing else, E4M3 has three bits behind it.
EXPONENTS = {"mxfp4": (127, 0), "mxfp8": (127, 0), "nvfp4": (7, 3)}
MULTIPLIER = 1 / 64


class RandomValues:
    """The tensors of one component; `quantization`: how its layers are packed."""

    def __init__(self, quantization: Quantization) -> None:
        self._quantization = quantization
        normal, high, low = mx.random.split(mx.random.key(0), 3)
        self._normal = mx.random.normal((POOL,), key=normal)
        halves = [mx.random.randint(0, 1 << 16, (POOL,), mx.uint32, key=key) for key in (high, low)]
        self._codes = halves[0] * (1 << 16) + halves[1]

    def tensor(self, name: str, spec: Spec) -> mx.array:
        """A lazy array of this spec; what it holds goes by the parameter's name."""
        layer, _, part = name.rpartition(".")
        if spec.dtype == "U32":
            drawn = NO_NAN if self._quantization.of(layer).mode == "mxfp8" else ALL_BITS
            return _repeated(self._codes, spec, lambda codes: codes & drawn)
        if part in ("scales", "biases", "weight_scale"):
            return _scale(part, spec, self._quantization.of(layer))
        dtype = getattr(mx, MLX_DTYPES[spec.dtype])
        if len(spec.shape) == 1:
            return mx.full(spec.shape, 1.0 if "norm" in name or part in ("std", "layer_scalar") else 0.0, dtype)
        deviation = prod(spec.shape[1:]) ** -0.5
        return _repeated(self._normal, spec, lambda values: (values * deviation).astype(dtype))


def _scale(part: str, spec: Spec, form: Form) -> mx.array:
    """Of a packed layer, so that its weights have the deviation of others."""
    if part == "weight_scale":
        return mx.array(MULTIPLIER)
    deviation = (spec.shape[1] * form.group_size) ** -0.5
    if form.biased:  # codes are evenly spread from 0 to `top`
        top = (1 << form.bits) - 1
        step = deviation * (12 / (top * (top + 2))) ** 0.5
        return mx.full(spec.shape, step if part == "scales" else -step * top / 2, getattr(mx, MLX_DTYPES[spec.dtype]))
    one, behind = EXPONENTS[form.mode]
    factor = deviation / RMS[form.mode] / (MULTIPLIER if form.multiplied else 1)
    return mx.full(spec.shape, (one + round(log2(factor))) << behind, mx.uint8)


def _repeated(pool: mx.array, spec: Spec, made: Callable[[mx.array], mx.array]) -> mx.array:
    """What is made of the pool, over and over, in memory of its own."""
    whole, rest = divmod(prod(spec.shape), POOL)
    if not whole:
        return made(pool[:rest]).reshape(spec.shape)
    full = made(pool)
    return mx.concatenate([full] * whole + [full[:rest]]).reshape(spec.shape)
