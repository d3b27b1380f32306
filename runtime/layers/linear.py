"""The linear layers of all networks, plain and packed: what they multiply with is theirs, what is done around them is
not. A hook sees every call, and low-rank factors (a LoRA's) add to the output; neither is a parameter of the network.

`Packed` holds its weight in any form that MLX multiplies (runtime/model/forms.py). Beside MLX's own names (`weight`,
`scales`, `biases`, `bias`) it may have a `weight_scale`, one value or one per row, that its product is multiplied by:
so weights published as FP8 or NVFP4 run as the very codes they were published in."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ltx2.runtime.layers.matmul import Choice, Codes
from ltx2.runtime.layers.rotation import rotated
from ltx2.runtime.model.forms import Form


@dataclass(frozen=True)
class Factors:
    """What is added to a layer's weight, as a product: up (outputs, rank) @ down (rank, inputs)."""

    down: mx.array
    up: mx.array


class LinearLayer(nn.Module):
    """A linear layer: x (..., inputs) -> (..., outputs), in x's dtype.

    `around`, if there is one, is called in its place, with the layer and x; it gets the layer's output by `multiply`.
    `factors` add up @ (down @ x) to it."""

    around: "Callable[[LinearLayer, mx.array], mx.array] | None" = None
    factors: Factors | None = None

    def __call__(self, x: mx.array) -> mx.array:
        return self.multiply(x) if self.around is None else self.around(self, x)

    def multiply(self, x: mx.array) -> mx.array:
        """x (..., inputs) -> (..., outputs), whatever is `around`."""
        y = self.product(x)
        return y if self.factors is None else _added(y, x, self.factors.down, self.factors.up)

    @property
    @abstractmethod
    def dtype(self) -> mx.Dtype:
        """The float type of its parameters."""

    @abstractmethod
    def product(self, x: mx.array) -> mx.array:
        """x (..., inputs) with the layer's own weight and bias: (..., outputs)"""


class Linear(LinearLayer, nn.Linear):
    """x @ W^T + bias, with W (outputs, inputs)."""

    @property
    def dtype(self) -> mx.Dtype:
        return self.weight.dtype

    def product(self, x: mx.array) -> mx.array:
        return nn.Linear.__call__(self, x)


class Packed(LinearLayer):
    """x @ W^T * weight_scale + bias, with W (outputs, inputs) in packed form; W is that of rotated inputs where the
    form says so."""

    def __init__(self, inputs: int, outputs: int, form: Form, shared_scales: mx.array | None = None) -> None:
        """Without `bias` and `weight_scale`; a layer that has them gets them as attributes. `shared_scales` (outputs,
        inputs / group size) are no parameter; without them `scales` is one."""
        super().__init__()
        self.weight = mx.zeros((outputs, inputs * form.bits // 32), mx.uint32)
        groups = (outputs, inputs // form.group_size)
        if form.biased:
            self.scales, self.biases = mx.zeros(groups), mx.zeros(groups)
        elif shared_scales is None:
            self.scales = mx.zeros(groups, mx.uint8)
        self._shared_scales = shared_scales
        self.form, self.choice = form, Choice()

    @property
    def dtype(self) -> mx.Dtype:
        floats = (self.get("bias"), self.scales if self.form.biased else None)
        return next((array.dtype for array in floats if array is not None), mx.bfloat16)

    def product(self, x: mx.array) -> mx.array:
        bias = self.get("bias")
        if self.form.rotation:
            x = rotated(x, self.form.rotation)
        if "weight_scale" not in self:
            return self._codes_product(x, bias)
        # Sums of products with codes, which are hundreds of times as large as the weights, may not fit float16.
        y = self._codes_product(x.astype(mx.float32) if x.dtype == mx.float16 else x)
        y = _scaled(y, self.weight_scale) if bias is None else _scaled_biased(y, self.weight_scale, bias)
        return y.astype(x.dtype)

    def _codes_product(self, x: mx.array, bias: mx.array | None = None) -> mx.array:
        scales = self.scales if self._shared_scales is None else self._shared_scales
        codes = Codes(self.weight, scales, self.get("biases"), self.form, plain=self._shared_scales is not None)
        return self.choice.product(x.size // x.shape[-1])(x, codes, bias)


@mx.compile
def _added(y: mx.array, x: mx.array, down: mx.array, up: mx.array) -> mx.array:
    """y (..., outputs) + (x (..., inputs) @ down^T) @ up^T"""
    return mx.addmm(y, x @ down.T, up.T)


@mx.compile
def _scaled(y: mx.array, scale: mx.array) -> mx.array:
    """y * scale in float32, in y's dtype."""
    return (y.astype(mx.float32) * scale).astype(y.dtype)


@mx.compile
def _scaled_biased(y: mx.array, scale: mx.array, bias: mx.array) -> mx.array:
    """y * scale + bias in float32, in y's dtype."""
    return (y.astype(mx.float32) * scale + bias.astype(mx.float32)).astype(y.dtype)
