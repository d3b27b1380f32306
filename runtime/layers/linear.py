"""The linear layers of all networks, plain and packed. A hook sees every call, and low-rank factors (a LoRA's) act
beside the weight; neither is a parameter of the network.

`Packed` holds its weight in any form that MLX multiplies (runtime/model/forms.py). Beside MLX's own names (`weight`,
`scales`, `biases`, `bias`) it may have a `weight_scale`, one value or one per row, that multiplies the product: so
weights published as FP8, NVFP4 or int8 run in the very codes that were published."""

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

    A hook `around` is called in its place, with the layer and x; it calls `multiply`."""

    around: "Callable[[LinearLayer, mx.array], mx.array] | None" = None

    @property
    def factors(self) -> Factors | None:
        """The factors that act beside the weight, if any."""
        return cast(Factors | None, self.get("_factors"))

    def __call__(self, x: mx.array) -> mx.array:
        return self.multiply(x) if self.around is None else self.around(self, x)

    def take(self, down: mx.array, up: mx.array) -> None:
        """Let up (outputs, rank) @ down (rank, inputs), both float32, act beside the weight."""
        self._factors = Factors(down.astype(self.dtype), up.astype(self.dtype))

    def release(self) -> None:
        """Drop the factors."""
        self.pop("_factors", None)

    @property
    @abstractmethod
    def dtype(self) -> mx.Dtype:
        """The float type of its parameters."""

    @abstractmethod
    def multiply(self, x: mx.array) -> mx.array:
        """x (..., inputs) -> (..., outputs) by the layer's weight, factors and bias, without the hook."""


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
        """Add the factors to the weight for good: the same bits as beside it, without their work in every call."""
        if self.factors is not None:
            mx.eval(self.weight)  # so that the device does not wait for the disk
            self.weight = added(self.weight, self.factors)
            mx.eval(self.weight)
            self.release()


class Packed(LinearLayer):
    """x @ W^T * weight_scale + bias, with W (outputs, inputs) in packed form; where the form says so, W multiplies
    rotated inputs."""

    def __init__(self, inputs: int, outputs: int, form: Form, shared: tuple[mx.array, ...] = ()) -> None:
        """A layer without `bias` and `weight_scale`, which are set as attributes. `shared`: scales and biases (outputs,
        inputs / group size) that are no parameters, in place of its own `scales` and `biases`."""
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
        """As the base class says, for codes: they multiply rotated inputs, and their product is scaled."""
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
        """x (..., inputs) with codes and factors, before `weight_scale`: (..., outputs)."""
        scales = self._shared[0] if self._shared else self.scales
        biases = self._shared[1] if len(self._shared) > 1 else self.get("biases")
        codes = Codes(self.weight, scales, biases, self.form, plain=bool(self._shared))
        return self.choice.product(x.size // x.shape[-1])(x, codes, bias, self.factors)


@mx.compile
def _scaled(y: mx.array, scale: mx.array) -> mx.array:
    """y (..., outputs) * scale (outputs,) or (), in float32, cast to y's dtype."""
    return (y.astype(mx.float32) * scale).astype(y.dtype)


@mx.compile
def _scaled_biased(y: mx.array, scale: mx.array, bias: mx.array) -> mx.array:
    """As `_scaled`, plus bias (outputs,)."""
    return (y.astype(mx.float32) * scale + bias.astype(mx.float32)).astype(y.dtype)
