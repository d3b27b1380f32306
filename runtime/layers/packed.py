"""Networks with packed layers: the files say which layers are packed, the machine how they multiply."""

from collections.abc import Mapping
from math import prod

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

from ltx2.runtime.errors import ConfigError
from ltx2.runtime.layers.linear import Linear, Packed
from ltx2.runtime.layers.matmul import Choice, choose
from ltx2.runtime.model.config import AS_PUBLISHED
from ltx2.runtime.model.forms import Form, Quantization

Shared = dict[tuple[str, tuple[int, int]], tuple[mx.array, ...]]
UNPACKABLE = 1 << 28  # values of a weight: a larger one, unpacked, would be as large as a network
UNIT = 127  # the code of scale 1 in the mx formats, whose scales are powers of two
SIGNED = -128  # the bias of signed bytes: MLX's codes are unsigned


def quantize_like(network: nn.Module, quantization: Quantization, stored: Mapping[str, tuple[int, ...]]) -> None:
    """Replace the layers that have `scales` or a `weight_scale` among the `stored` tensors by packed ones.

    Raises ConfigError for a rotation that does not divide a layer's inputs, ModelFolderError for a layer whose form
    `quantization` does not say.
    """
    if not any(name.endswith((".scales", ".weight_scale")) for name in stored):
        return
    shared: Shared = {}  # scales of 1, once for all layers of a shape

    def packed(path: str, module: nn.Module) -> nn.Module:
        if not any(f"{path}.{part}" in stored for part in ("scales", "weight_scale")):
            return module
        if isinstance(module, nn.Embedding):
            form = quantization.of(path)
            fits = module.weight.shape[1] % form.group_size == 0
            return module.to_quantized(form.group_size, form.bits, form.mode) if fits else module
        return _packed(path, module, quantization.of(path), stored, shared) if isinstance(module, Linear) else module

    leaves = tree_map_with_path(packed, network.leaf_modules(), is_leaf=nn.Module.is_module)
    network.update_modules(leaves)


def _packed(path: str, linear: Linear, form: Form, stored: Mapping[str, tuple[int, ...]], shared: Shared) -> Packed:
    """The layer with the parameters that the files have; strict loading finds a scale of an impossible shape."""
    outputs, inputs = linear.weight.shape
    if form.rotation and inputs % form.rotation:
        what = f"the inputs of {path} cannot be rotated in blocks of {form.rotation}"
        raise ConfigError(what, f"it has {inputs} inputs", AS_PUBLISHED)
    scales: tuple[mx.array, ...] = ()
    if form.bits == 8 and f"{path}.scales" not in stored:
        groups = (outputs, inputs // form.group_size)
        scales = shared.setdefault((form.mode, groups), _constant(form, groups))
    layer = Packed(inputs, outputs, form, scales)
    if "bias" in linear:
        layer.bias = linear.bias
    if (shape := stored.get(f"{path}.weight_scale")) is not None:
        layer.weight_scale = mx.ones((outputs,) if shape == (outputs,) else ())
    return layer


def _constant(form: Form, groups: tuple[int, int]) -> tuple[mx.array, ...]:
    """Scales and biases (`groups` each) of bytes that hold values, apart from a layer's `weight_scale`: FP8 and signed
    integers."""
    if form.biased:
        return mx.ones(groups, mx.bfloat16), mx.full(groups, SIGNED, mx.bfloat16)
    return (mx.full(groups, UNIT, mx.uint8),)


def choose_products(network: nn.Module, wanted: str) -> dict[str, Choice]:
    """Let a network's packed layers multiply in the fastest way on this machine, or in the `wanted` one. Returns the
    choice for each form of weights."""
    chosen: dict[str, Choice] = {}
    for module in network.modules():
        if isinstance(module, Packed):
            form = str(module.form)
            if form not in chosen:
                chosen[form] = choose(module.form, module.dtype, wanted)
            if prod(module.weight.shape) * 32 // module.form.bits <= UNPACKABLE:
                module.choice = chosen[form]
    return chosen
