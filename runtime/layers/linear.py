"""The linear layers of all networks, plain and packed: what they multiply with is theirs, what is done around them is
not. A hook sees every call, and low-rank factors (a LoRA's) act beside the weight; neither is a parameter of the
network.

`Packed` holds its weight in any form that MLX multiplies (runtime/model/forms.py). Beside MLX's own names (`weight`,
`scales`, `biases`, `bias`) it may have a `weight_scale`, one value or one per row, that its product is multiplied by:
so weights published as FP8, NVFP4 or int8 run as the very codes they were published in."""

from abc import abstractmethod
from collections.abc import Callable
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from ltx2.runtime.layers.matmul import Choice, Codes, Factors, added, summed_linear
from ltx2.runtime.layers.rotation import rotated
from ltx2.runtime.model.forms import Form


class LinearLayer(nn.Module):
    """A linear layer: x (..., inputs) -> (..., outputs), in x's dtype.

    `around`, if there is one, is called in its place, with the layer and x; it gets the layer's output by `multiply`.
    `factors`, if there are some, act beside its weight."""

    around: "Callable[[LinearLayer, mx.array], mx.array] | None" = None

    @property
    def factors(self) -> Factors | None:
        """What acts beside the weight."""
        return cast(Factors | None, self.get("_factors"))

    def __call__(self, x: mx.array) -> mx.array:
        return self.multiply(x) if self.around is None else self.around(self, x)

    def take(self, down: mx.array, up: mx.array) -> None:
        """Let up (outputs, rank) @ down (rank, inputs), both float32, act beside the weight."""
        self._factors = Factors(down.astype(self.dtype), up.astype(self.dtype))

    def release(self) -> None:
        """Nothing acts beside the weight any more."""
        self.pop("_factors", None)

    @property
    @abstractmethod
    def dtype(self) -> mx.Dtype:
        """The float type of its parameters."""

    @abstractmethod
    def multiply(self, x: mx.array) -> mx.array:
        """x (..., inputs) with the layer's weight, factors and bias: (..., outputs); whatever is `around`."""


class Linear(LinearLayer, nn.Linear):
    """x @ W^T + bias, with W (outputs, inputs)."""

    @property
    def dtype(self) -> mx.Dtype:
        return self.weight.dtype

    def multiply(self, x: mx.array) -> mx.array:
        if self.factors is None:
            return nn.Linear.__call__(self, x)
        return summed_linear(x, self.weight, self.get("bias"), self.factors)

    def settle(self) -> None:
        """Add the factors to the weight for good: the same bits as beside it, and no more work in any call."""
        if self.factors is not None:
            mx.eval(self.weight)  # reading is no part of what the device is given
            self.weight = added(self.weight, self.factors)
            mx.eval(self.weight)
            self.release()


class Packed(LinearLayer):
    """x @ W^T * weight_scale + bias, with W (outputs, inputs) in packed form; W is that of rotated inputs where the
    form says so."""

    def __init__(self, inputs: int, outputs: int, form: Form, shared: tuple[mx.array, ...] = ()) -> None:
        """Without `bias` and `weight_scale`; a layer that has them gets them as attributes. `shared` scales and biases
        (outputs, inputs / group size) are no parameters; without them `scales` and `biases` are."""
        super().__init__()
        self.weight = mx.zeros((outputs, inputs * form.bits // 32), mx.uint32)
        groups = (outputs, inputs // form.group_size)
        if not shared:
            self.scales = mx.zeros(groups, mx.float32 if form.biased else mx.uint8)
        if not shared and form.biased:
            self.biases = mx.zeros(groups)
        self._shared = shared
        self.form, self.choice = form, Choice()

    @property
    def dtype(self) -> mx.Dtype:
        floats = (self.get("bias"), self.get("scales") if self.form.biased else None)
        return next((array.dtype for array in floats if array is not None), mx.bfloat16)

    def take(self, down: mx.array, up: mx.array) -> None:
        """The factors of the codes, which inputs are rotated for and whose product is scaled."""
        if self.form.rotation:
            down = rotated(down, self.form.rotation, self.form.hadamard)
        dtype = self.dtype
        if "weight_scale" in self:
            up = up / self.weight_scale.astype(mx.float32).reshape(-1, 1)
            dtype = mx.float32 if dtype == mx.float16 else dtype  # as their products
        self._factors = Factors(down.astype(dtype), up.astype(dtype))

    def multiply(self, x: mx.array) -> mx.array:
        bias = self.get("bias")
        if self.form.rotation:
            x = rotated(x, self.form.rotation, self.form.hadamard)
        if "weight_scale" not in self:
            return self._codes_product(x, bias)
        # Sums of products with codes, which are hundreds of times as large as the weights, may not fit float16.
        y = self._codes_product(x.astype(mx.float32) if x.dtype == mx.float16 else x)
        y = _scaled(y, self.weight_scale) if bias is None else _scaled_biased(y, self.weight_scale, bias)
        return y.astype(x.dtype)

    def _codes_product(self, x: mx.array, bias: mx.array | None = None) -> mx.array:
        scales = self._shared[0] if self._shared else self.scales
        biases = self._shared[1] if len(self._shared) > 1 else self.get("biases")
        codes = Codes(self.weight, scales, biases, self.form, plain=bool(self._shared))
        return self.choice.product(x.size // x.shape[-1])(x, codes, bias, self.factors)


@mx.compile
def _scaled(y: mx.array, scale: mx.array) -> mx.array:
    """y * scale in float32, in y's dtype."""
    return (y.astype(mx.float32) * scale).astype(y.dtype)


@mx.compile
def _scaled_biased(y: mx.array, scale: mx.array, bias: mx.array) -> mx.array:
    """y * scale + bias in float32, in y's dtype."""
    return (y.astype(mx.float32) * scale + bias.astype(mx.float32)).astype(y.dtype)
