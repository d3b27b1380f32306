"""A plan quantized as an existing model folder is: what verifying a quantized folder against its sources compares."""

from dataclasses import replace

from ltx2.convert.plan import Move, Plan, packed_key
from ltx2.quant.pack import Affine
from ltx2.quant.step import AffinePacking
from ltx2.runtime.errors import UnsupportedError
from ltx2.runtime.layout import ModelFolder


def pack_like(plan: Plan, model: ModelFolder) -> Plan:
    """Pack every weight whose scales the folder stores, with the bits and group size its configuration gives.

    Raises UnsupportedError for a quantization this version does not make.
    """
    layers = {name: _layers(model, name) for name in model.manifest.components}
    entries = []
    for entry in plan.entries:
        affine = layers.get(entry.component, {}).get(entry.keys[0]) if isinstance(entry, Move) else None
        if isinstance(entry, Move) and affine is not None:
            entry = replace(entry, packing=AffinePacking(affine, entry.tensor.name))
        entries.append(entry)
    return replace(plan, entries=tuple(entries))


def _layers(model: ModelFolder, component: str) -> dict[str, Affine]:
    """Key of every packed weight -> how it is packed."""
    config = model.config(component).get("quantization")
    if config is None:
        return {}
    stored = {name for file in model.tensor_files(component) for name in file.tensors}
    return {
        key: _affine(component, config | config.get(key.rpartition(".")[0], {}))
        for key in stored
        if key.endswith(".weight") and packed_key(key, "scales") in stored
    }


def _affine(component: str, settings: dict[str, int | str]) -> Affine:
    if settings.get("mode", "affine") != "affine":
        raise UnsupportedError(
            f"{component} is quantized as {settings['mode']}",
            "this version compares affine quantization only",
            "verify without sources, or update ltx2",
        )
    return Affine(int(settings["bits"]), int(settings["group_size"]))
