"""From a model folder's component to an MLX module: its configuration gives the class, its files the quantization, and
every tensor must fit."""

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any, TypeVar, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ltx2.runtime.errors import ConfigError, ModelFolderError, UnsupportedError, reason
from ltx2.runtime.layers.packed import quantize_like
from ltx2.runtime.layers.statistics import LatentStatistics
from ltx2.runtime.model.config import AS_PUBLISHED
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.networks.text.tokenizer import Encoded, Tokenizer

# Class name in ltx2.json -> module with `build(config) -> nn.Module`. Imported on demand.
NETWORKS: Mapping[str, str] = {
    "AVTransformer3DModel": "ltx2.runtime.networks.transformer.model",
    "EmbeddingsConnectors": "ltx2.runtime.networks.text.connectors",
    "Gemma3ForCausalLM": "ltx2.runtime.networks.text.gemma3",
    "Gemma4UnifiedForCausalLM": "ltx2.runtime.networks.text.gemma4",
    "CausalVideoAutoencoder": "ltx2.runtime.networks.video_vae.model",
    "CausalDiffusionVAE": "ltx2.runtime.networks.video_vae.diffusion",
    "AudioAutoencoder": "ltx2.runtime.networks.audio.vae",
    "Vocoder": "ltx2.runtime.networks.audio.vocoder",
    "VocoderWithBWE": "ltx2.runtime.networks.audio.bandwidth",
    "LatentUpsampler": "ltx2.runtime.networks.upsampler",
    "DurationHead": "ltx2.runtime.networks.text.duration_head",
}

READ_BYTES = 1 << 30  # weights are read in portions of this size

Module = TypeVar("Module", bound=nn.Module)
Shapes = Mapping[str, tuple[int, ...]]


def build_network(class_name: str, config: Mapping[str, Any]) -> nn.Module:
    """An uninitialised network. Raises UnsupportedError for an unknown class, ConfigError for a bad config.

    Parameters are lazy: nothing is allocated until they are evaluated.
    """
    if class_name not in NETWORKS:
        raise UnsupportedError(
            f"network class {class_name!r} is not supported",
            f"this version implements {', '.join(sorted(NETWORKS))}",
            "update ltx2",
        )
    build = cast(Callable[[Mapping[str, Any]], nn.Module], import_module(NETWORKS[class_name]).build)
    try:
        return build(config)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # widths that no network can have
        raise ConfigError(
            f"no {class_name} can be built from this configuration",
            reason(error),
            AS_PUBLISHED,
        ) from error


def parameter_shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, in our layout."""
    parameters = cast(list[tuple[str, mx.array]], tree_flatten(network.parameters()))
    return {name: tuple(value.shape) for name, value in parameters}


def load_weights(folder: ModelFolder, component: str) -> dict[str, mx.array]:
    """The component's tensors by name, as lazy arrays: data are read at first use."""
    if (made := folder.arrays(component)) is not None:
        return dict(made)
    weights: dict[str, mx.array] = {}
    for path in folder.weight_files(component):
        weights.update(cast(dict[str, mx.array], mx.load(str(path))))
    return weights


def encode_prompt(folder: ModelFolder, prompt: str, length: int) -> Encoded:
    """A prompt's tokens, by the text encoder's own tokenizer. Raises what `Tokenizer.load` raises."""
    if (made := folder.tokens(length)) is not None:
        return Encoded(*made)
    return Tokenizer.load(folder.component_path("text_encoder")).encode(prompt, length)


def build_component(folder: ModelFolder, component: str, stored: Shapes) -> nn.Module:
    """The component's network, uninitialised; layers with scales among the `stored` tensors are quantized."""
    network = build_network(folder.record(component).cls, folder.config(component))
    quantize_like(network, folder.quantization(component), stored)
    return network


def check_network(folder: ModelFolder, component: str) -> nn.Module:
    """The component's network, uninitialised. Reads headers alone, and raises what `load_network` would raise."""
    stored = {name: tensor.shape for file in folder.tensor_files(component) for name, tensor in file.tensors.items()}
    network = build_component(folder, component, stored)
    _check_fit(folder, component, network, stored)
    return network


def load_network(folder: ModelFolder, component: str, expected: type[Module], built: nn.Module | None = None) -> Module:
    """Load one component strictly, into a network that `check_network` has `built`, or into a new one.

    Raises ModelFolderError naming the first missing, extra or misshapen tensor.
    """
    weights = load_weights(folder, component)
    stored = {name: tuple(value.shape) for name, value in weights.items()}
    network = built if built is not None else build_component(folder, component, stored)
    if not isinstance(network, expected):
        raise ModelFolderError(
            f"{component} of {folder.path} is a {type(network).__name__}",
            f"a {expected.__name__} is needed here",
            "convert the checkpoint again",
        )
    _check_fit(folder, component, network, stored)
    network.load_weights(list(weights.items()), strict=True)
    network.eval()
    return network


def load_statistics(folder: ModelFolder, component: str, channels: int) -> LatentStatistics:
    """The statistics of the picture's latents, without the video VAE around them."""
    weights, statistics = load_weights(folder, component), LatentStatistics(channels, 1, 1, 1)
    own = [(name, weights[f"per_channel_statistics.{name}"]) for name in parameter_shapes(statistics)]
    statistics.load_weights(own, strict=True)
    return statistics


def read_weights(network: nn.Module) -> None:
    """Read a network's weights from disk now, some at a time."""
    read_arrays(value for _, value in cast(list[tuple[str, mx.array]], tree_flatten(network.parameters())))


def read_arrays(values: Iterable[mx.array]) -> None:
    """Read arrays of files from disk now, some at a time.

    Otherwise their first use would read them inside GPU commands, and macOS ends a command that waits for a disk.
    """
    pending: list[mx.array] = []
    size = 0
    for value in values:
        pending.append(value)
        size += value.nbytes
        if size >= READ_BYTES:
            mx.eval(pending)
            pending, size = [], 0
    mx.eval(pending)


def shape_differences(wanted: Shapes, given: Shapes) -> dict[str, list[str]]:
    """The tensors by kind of difference; empty when `given` is exactly as wanted."""
    differences = {
        "missing": sorted(wanted.keys() - given.keys()),
        "not part of the network": sorted(given.keys() - wanted.keys()),
        "of the wrong shape": [
            f"{key} {list(given[key])} for {list(shape)}"
            for key, shape in wanted.items()
            if key in given and given[key] != shape
        ],
    }
    return {kind: keys for kind, keys in differences.items() if keys}


def _check_fit(folder: ModelFolder, component: str, network: nn.Module, stored: Shapes) -> None:
    differences = shape_differences(parameter_shapes(network), stored)
    if differences:
        kind, names = next(iter(differences.items()))
        raise ModelFolderError(
            f"{component} of {folder.path} does not fit its configuration",
            f"tensor {names[0]} is {kind}",
            "convert the checkpoint again; ltx2 verify MODEL lists every difference",
        )
