"""Linear layers of packed weights, in every form that MLX multiplies: affine codes of 2 to 8 bits, mxfp4, mxfp8, nvfp4.

One module serves all. Beside MLX's own names (`weight`, `scales`, `biases`, `bias`) a layer may have a `weight_scale`,
one value or one per row, that its product is multiplied by: so weights published as FP8 or NVFP4 run as the very codes
they were published in. FP8 codes need no other scale; MLX's, all 1, are made here, once per shape of a network. A
layer's inputs may be rotated first (rotation.py)."""

from collections.abc import Mapping
from math import prod

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

from ltx2.runtime.errors import ConfigError
from ltx2.runtime.layers.matmul import Choice, Codes, choose
from ltx2.runtime.layers.rotation import rotated
from ltx2.runtime.model.config import AS_PUBLISHED
from ltx2.runtime.model.forms import Form, Quantization

UNPACKABLE = 1 << 28  # values of a weight: a larger one, unpacked, would be as large as a network
UNIT = 127  # of the mx formats, whose scales are powers of two: 1


class QuantizedLinear(nn.Module):
    """x @ W^T * weight_scale + bias, with W (outputs, inputs) in packed form; W is that of rotated inputs where the
    form says so."""

    def __init__(self, inputs: int, outputs: int, form: Form, shared_scales: mx.array | None = None) -> None:
        """Without `bias` and `weight_scale`; a layer that has them gets them as attributes. `shared_scales` (outputs,
        inputs / group size) are no parameter; without them `scales` is one."""
        super().__init__()
        self.group_size, self.bits, self.mode = form.group_size, form.bits, form.mode  # named as in nn.QuantizedLinear
        self.weight = mx.zeros((outputs, inputs * form.bits // 32), mx.uint32)
        groups = (outputs, inputs // form.group_size)
        if form.biased:
            self.scales, self.biases = mx.zeros(groups), mx.zeros(groups)
        elif shared_scales is None:
            self.scales = mx.zeros(groups, mx.uint8)
        self._shared_scales = shared_scales
        self.form, self.choice = form, Choice()

    def __call__(self, x: mx.array) -> mx.array:
        """x (..., inputs) -> (..., outputs), in x's dtype."""
        bias = self.get("bias")
        if self.form.rotation:
            x = rotated(x, self.form.rotation)
        if "weight_scale" not in self:
            return self._product(x, bias)
        # Sums of products with codes, which are hundreds of times as large as the weights, may not fit float16.
        y = self._product(x.astype(mx.float32) if x.dtype == mx.float16 else x)
        y = _scaled(y, self.weight_scale) if bias is None else _scaled_biased(y, self.weight_scale, bias)
        return y.astype(x.dtype)

    def _product(self, x: mx.array, bias: mx.array | None = None) -> mx.array:
        scales = self.scales if self._shared_scales is None else self._shared_scales
        codes = Codes(self.weight, scales, self.get("biases"), self.form, plain=self._shared_scales is not None)
        return self.choice.product(x.size // x.shape[-1])(x, codes, bias)


@mx.compile
def _scaled(y: mx.array, scale: mx.array) -> mx.array:
    """y * scale in float32, in y's dtype."""
    return (y.astype(mx.float32) * scale).astype(y.dtype)


@mx.compile
def _scaled_biased(y: mx.array, scale: mx.array, bias: mx.array) -> mx.array:
    """y * scale + bias in float32, in y's dtype."""
    return (y.astype(mx.float32) * scale + bias.astype(mx.float32)).astype(y.dtype)


def quantize_like(network: nn.Module, quantization: Quantization, stored: Mapping[str, tuple[int, ...]]) -> None:
    """Replace the layers that have `scales` or a `weight_scale` among the `stored` tensors by packed ones.

    Raises ConfigError for a rotation that does not divide a layer's inputs, ModelFolderError for a layer whose form
    `quantization` does not say.
    """
    shared: dict[tuple[int, int], mx.array] = {}

    def packed(path: str, module: nn.Module) -> nn.Module:
        if not any(f"{path}.{part}" in stored for part in ("scales", "weight_scale")):
            return module
        if not isinstance(module, nn.Linear | nn.Embedding):
            return module
        form = quantization.of(path)
        if isinstance(module, nn.Embedding):
            fits = module.weight.shape[1] % form.group_size == 0
            return module.to_quantized(form.group_size, form.bits, form.mode) if fits else module
        width = module.weight.shape[1]
        if form.rotation and width % form.rotation:
            what = f"the inputs of {path} cannot be rotated in blocks of {form.rotation}"
            raise ConfigError(what, f"it has {width} inputs", AS_PUBLISHED)
        scales = None if f"{path}.scales" in stored else _unit_scales(module, form, shared)
        return _packed_linear(module, form, scales, stored.get(f"{path}.weight_scale"))

    leaves = tree_map_with_path(packed, network.leaf_modules(), is_leaf=nn.Module.is_module)
    network.update_modules(leaves)


def choose_products(network: nn.Module, wanted: str) -> dict[str, Choice]:
    """Let a network's packed layers multiply in the fastest way on this machine, or in the `wanted` one; returns what
    was chosen for each form of weights."""
    chosen: dict[str, Choice] = {}
    for module in network.modules():
        if isinstance(module, QuantizedLinear):
            form = str(module.form)
            if form not in chosen:
                chosen[form] = choose(module.form, _dtype(module), wanted)
            if prod(module.weight.shape) * 32 // module.bits <= UNPACKABLE:
                module.choice = chosen[form]
    return chosen


def _dtype(layer: QuantizedLinear) -> mx.Dtype:
    """What a layer computes in."""
    floats = (layer.get("bias"), layer.scales if layer.form.biased else None)
    return next((array.dtype for array in floats if array is not None), mx.bfloat16)


def _unit_scales(linear: nn.Linear, form: Form, shared: dict[tuple[int, int], mx.array]) -> mx.array | None:
    """Scales of 1, the same array for all layers of one shape; None for a form whose scales are always stored."""
    if form.mode != "mxfp8":
        return None
    outputs, inputs = linear.weight.shape
    shape = (outputs, inputs // form.group_size)
    return shared.setdefault(shape, mx.full(shape, UNIT, mx.uint8))


def _packed_linear(
    linear: nn.Linear, form: Form, shared_scales: mx.array | None, scale_shape: tuple[int, ...] | None
) -> QuantizedLinear:
    """With the parameters that the files have; a scale of an impossible shape is left for strict loading to find."""
    outputs, inputs = linear.weight.shape
    layer = QuantizedLinear(inputs, outputs, form, shared_scales)
    if "bias" in linear:
        layer.bias = linear.bias
    if scale_shape is not None:
        layer.weight_scale = mx.ones((outputs,) if scale_shape == (outputs,) else ())
    return layer
