"""Compares a plan with the networks it fills: every parameter once, in the right shape, and nothing else."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import mlx.nn as nn

from ltx2.convert.plan.entries import Plan, parameters
from ltx2.convert.sources.textencoder import TOKENIZER
from ltx2.runtime.errors import CheckpointError, listed
from ltx2.runtime.model.layout import DIFFUSION_VAE, TRANSFORMER, VIDEO_VAE, is_lora, missing_networks
from ltx2.runtime.model.lorafile import misfits
from ltx2.runtime.networks.load import Shapes, build_network, parameter_shapes, shape_differences


def check_plan(plan: Plan) -> None:
    """Compare every planned component with its network.

    Raises CheckpointError naming missing, unknown and misshapen tensors, or a text encoder of other sizes than the
    connectors read; ConfigError or UnsupportedError when the configuration is not one this version computes.
    """
    planned = {name: planned_shapes(plan, name) for name in plan.components}
    check_projection(plan)
    _check_text_width(plan, planned)
    for name, component in plan.components.items():
        files = [path.name for path in component.companions] + [asset.name for asset in plan.assets(name)]
        _check_once(name, "files", files)
        if is_lora(name):
            _check_lora(name, planned)
        else:
            build = partial(build_network, component.cls, component.config)
            if wrong := network_differences(component.cls, component.config, planned[name], build):
                raise CheckpointError(
                    f"the source does not fit its {name}",
                    "; ".join(_listed(kind, keys) for kind, keys in wrong.items()),
                    "use the checkpoint as published, complete and unchanged",
                )


def network_differences(
    class_name: str, config: Mapping[str, Any], stored: Shapes, build: Callable[[], nn.Module]
) -> dict[str, list[str]]:
    """Kind of difference -> names, between the `stored` tensors and the parameters of the network that `build` makes.
    Empty for a network without a part that comes in another file: it cannot be built.

    Raises ConfigError or UnsupportedError when the configuration is not one this version computes.
    """
    if _missing_parts(class_name, config, stored):
        return {}
    return shape_differences(parameter_shapes(build()), stored)


def check_tokenizer(plan: Plan) -> None:
    """Raises CheckpointError for a text encoder without a tokenizer: it would read no prompts."""
    encoder = plan.components.get("text_encoder")
    if encoder is None:
        return
    names = {*(path.name for path in encoder.companions), *encoder.made, *(a.name for a in plan.assets("text_encoder"))}
    if TOKENIZER not in names:
        raise CheckpointError(
            "the text encoder comes without a tokenizer",
            f"{TOKENIZER} is neither in its file nor beside it, nor in another source",
            "add a folder that holds it: hf download google/gemma-3-12b-it --include 'token*' --local-dir tokenizer",
        )


def check_projection(plan: Plan) -> None:
    """Raises CheckpointError for connectors of one projection that come without it, so that its width is not known."""
    connectors = plan.components.get("connectors")
    if connectors is None or connectors.config.get("caption_proj_before_connector", len(connectors.config) == 1):
        return
    if "text_projection_in_features" not in connectors.config:
        raise CheckpointError(
            "the text projection is missing",
            "the embeddings connectors are there, and text_embedding_projection, which goes before them, is not",
            "add the file that holds it, such as ComfyUI's file of connectors, or the checkpoint as published",
        )


def incomplete_parts(plan: Plan) -> Iterator[str]:
    """The parts of components that come in other files, which are not among the sources."""
    for name, component in plan.components.items():
        missing = _missing_parts(component.cls, component.config, parameters(plan.moves(name)))
        yield from (f"{name}: {part}" for part in missing)


def missing_of_model(plan: Plan) -> list[str]:
    """The networks that a transformer with its decoder lacks to generate from a prompt; none for parts of a model."""
    have = plan.components
    whole = TRANSFORMER in have and (VIDEO_VAE in have or DIFFUSION_VAE in have)
    return missing_networks(have) if whole else []


def _missing_parts(class_name: str, config: Mapping[str, Any], stored: Iterable[str]) -> list[str]:
    """The parts that connectors lack: those with a projection for each stream may come in two files, with the
    transformer and with the text encoder, whose file says nothing of the other part."""
    if class_name != "EmbeddingsConnectors" or not config.get("caption_proj_before_connector", len(config) == 1):
        return []
    have = {name.partition(".")[0] for name in stored}
    parts = {"text projection": {"text_projection"}, "embeddings connectors": {"video_connector", "audio_connector"}}
    return [part for part, names in parts.items() if not names & have]


def planned_shapes(plan: Plan, component: str) -> Shapes:
    """Shape of every parameter the component gets, before packing. Raises CheckpointError when two tensors get one
    name."""
    moves = plan.moves(component)
    _check_once(component, "tensors", [move.key for move in moves])
    return {key: spec.shape for key, spec in parameters(moves).items()}


def _check_once(component: str, kind: str, names: Iterable[str]) -> None:
    """Raises CheckpointError for a name that occurs twice."""
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise CheckpointError(
            f"two source {kind} become {component}/{twice[0]}",
            f"{len(twice)} {kind} would be stored twice",
            "use the checkpoint as published",
        )


def _check_lora(lora: str, planned: Mapping[str, Shapes]) -> None:
    count, wrong = misfits(planned[lora], planned)
    if wrong:
        listed = _listed("do not", [f"{module} ({reason})" for module, reason in wrong.items()])
        raise CheckpointError(
            f"{lora} does not fit the model",
            f"{count - len(wrong)} of {count} modules match; {listed}",
            "use a LoRA made for this release",
        )


def _check_text_width(plan: Plan, planned: Mapping[str, Shapes]) -> None:
    """The connectors read all hidden states of the text encoder side by side."""
    embedding = planned.get("text_encoder", {}).get("model.embed_tokens.weight")
    connectors = plan.components.get("connectors")
    wanted = connectors.config.get("text_projection_in_features") if connectors else None
    if not embedding or wanted is None:
        return
    layers = len({key.split(".")[2] for key in planned["text_encoder"] if key.startswith("model.layers.")})
    given = embedding[-1] * (layers + 1)
    if given != wanted:
        raise CheckpointError(
            "the text encoder does not fit the checkpoint",
            f"its {layers} layers of width {embedding[-1]} give {given} features, the connectors read {wanted}",
            "use the text encoder that the release was trained with",
        )


def _listed(kind: str, keys: list[str]) -> str:
    return f"{len(keys)} {kind}: {listed(keys)}"
