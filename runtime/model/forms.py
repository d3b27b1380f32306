"""How the weights of layers are packed: the modes that MLX multiplies, and `quantization` of config.json."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import lcm
from typing import Any

from ltx2.runtime.errors import ModelFolderError
from ltx2.runtime.model.hadamard import BASES, ROTATIONS, SYLVESTER

AFFINE = "affine"


@dataclass(frozen=True)
class Mode:
    """One of MLX's kinds of codes."""

    bits: tuple[int, ...]
    group_sizes: tuple[int, ...]
    biased: bool = False  # a group has a bias beside its scale
    multiplied: bool = False  # scales have a narrow range, and a multiplier of the layer's output centres it


MODES: Mapping[str, Mode] = {
    AFFINE: Mode((2, 3, 4, 5, 6, 8), (32, 64, 128), biased=True),  # scale * code + bias, in the tensor's dtype
    "mxfp4": Mode((4,), (32,)),  # E2M1 codes, power-of-two scales (E8M0)
    "mxfp8": Mode((8,), (32,)),  # E4M3 codes, power-of-two scales
    "nvfp4": Mode((4,), (16,), multiplied=True),  # E2M1 codes, E4M3 scales
}


@dataclass(frozen=True)
class Form:
    """How a layer's weight is packed: bits of a code, values that share a scale, mode; and, unless 0, the size of the
    blocks in which the weight and the layer's inputs are rotated, by which `hadamard` matrix. Raises ValueError for a
    form that MLX does not multiply."""

    bits: int
    group_size: int
    mode: str = AFFINE
    rotation: int = 0
    hadamard: str = SYLVESTER

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"there is no mode {self.mode!r}, only {', '.join(MODES)}")
        mode = MODES[self.mode]
        for name, value, known in (
            (f"{self.mode} has bits", self.bits, mode.bits),
            (f"{self.mode} has group size", self.group_size, mode.group_sizes),
            ("inputs are rotated in blocks of", self.rotation, (0, *ROTATIONS)),
            ("inputs are rotated by matrices", self.hadamard, tuple(BASES)),
        ):
            if type(value) is not type(known[0]) or value not in known:
                raise ValueError(f"{name} {', '.join(map(str, known))}, not {value!r}")

    def __str__(self) -> str:
        """The kind of codes, e.g. affine-4-64."""
        return f"{self.mode}-{self.bits}-{self.group_size}"

    @property
    def biased(self) -> bool:
        return MODES[self.mode].biased

    @property
    def multiplied(self) -> bool:
        return MODES[self.mode].multiplied

    @property
    def block(self) -> int:
        """A layer's width is a multiple of this."""
        return lcm(self.group_size, self.rotation or 1)

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> "Form":
        """From an entry of config.json. Raises ValueError, TypeError or AttributeError for anything else."""
        bits, group_size = entry.get("bits", 0), entry.get("group_size", 0)
        rotation = (entry.get("rotation", 0), entry.get("hadamard", SYLVESTER))
        return cls(bits, group_size, entry.get("mode", AFFINE), *rotation)

    def entry(self) -> dict[str, Any]:
        """As an entry of config.json."""
        entry = {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}
        entry |= {"rotation": self.rotation} if self.rotation else {}
        return entry | ({"hadamard": self.hadamard} if self.hadamard != SYLVESTER else {})


@dataclass(frozen=True)
class Quantization:
    """`quantization` of a component's config.json, as mlx-lm writes it: the common form of its packed layers and, by
    path, other forms. The tensors tell which layers are packed."""

    common: Form | None = None
    others: Mapping[str, Form | None] = field(default_factory=dict)

    @classmethod
    def from_config(cls, data: Any) -> "Quantization":
        """`data` is None where nothing is packed. Raises ValueError, TypeError or AttributeError for any other
        value."""
        if data is None:
            return cls()
        common, entries = Form.from_entry(data), {k: v for k, v in data.items() if k not in Form.__dataclass_fields__}
        # False is mlx-lm's way to say that a layer is not packed.
        return cls(common, {k: None if entry is False else Form.from_entry(entry) for k, entry in entries.items()})

    def of(self, layer: str) -> Form:
        """The form of the packed layer at this path. Raises ModelFolderError where the configuration has none."""
        form = self.others.get(layer, self.common)
        if form is None:
            why = "its configuration does not say how"
            raise ModelFolderError(f"{layer} is packed", why, "convert the checkpoint again")
        return form
