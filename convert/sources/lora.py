"""Which releases a LoRA can belong to (runtime/model/lorafile.py reads all the rest)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ltx2.convert.names.release import Release, recognise_releases, releases
from ltx2.runtime.errors import CheckpointError
from ltx2.runtime.files.tensors import TensorFile
from ltx2.runtime.model.lorafile import Layer, Layers, checked_layers, lora_layers
from ltx2.runtime.model.names import read_lora_name


def recognise_lora(file: TensorFile, config: Mapping[str, Any]) -> tuple[Release, ...]:
    """The releases a LoRA can belong to: those whose signs it carries, else those that have all of its modules; none
    when nothing tells them apart. Raises as `recognise_releases` does."""
    spelled = {name: read_lora_name(name) for name in file.tensors}
    official = {found.name if found else name: file.tensors[name] for name, found in spelled.items()}
    if signed := recognise_releases(replace(file, tensors=official), config):
        return signed
    fitting = _fitting(lora_layers(file))
    return fitting if len(fitting) < len(releases()) else ()


def check_lora(file: TensorFile) -> None:
    """Refuse what cannot become a loras/<name>. Raises as `checked_layers`, CheckpointError also for modules of
    different releases."""
    if not _fitting(checked_layers(file)):
        raise CheckpointError(
            f"{file.path.name} fits no release as a whole",
            "no published network has all of its modules, with these widths",
            "use a LoRA made for one release",
        )


def _fitting(layers: Layers) -> tuple[Release, ...]:
    """The releases whose networks have every module that the LoRA changes."""
    having = [_having(layer) for layer in layers.values()]
    return tuple(release for release in releases() if all(release.name in names for names in having))


def _having(layer: Layer) -> frozenset[str]:
    ratios, weight = layer.kind.releases, layer.changes().get("weight", ())
    if len(weight) != 2:
        return frozenset(ratios)
    rows, columns = weight
    return frozenset(name for name, ratio in ratios.items() if ratio is None or rows == ratio * columns)
