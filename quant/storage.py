"""How a quantized tensor is stored: the kinds that MLX's kernels read, and the sizes of their parts."""

from collections.abc import Mapping
from dataclasses import dataclass

AFFINE = "affine"


@dataclass(frozen=True)
class Kind:
    """One of MLX's modes: which bits and group sizes it has, and whether a group has a bias beside its scale."""

    bits: tuple[int, ...]
    group_sizes: tuple[int, ...]
    biased: bool = False
    multiplied: bool = False  # its scales have a narrow range, which one output multiplier per tensor centres


KINDS: Mapping[str, Kind] = {
    AFFINE: Kind((2, 3, 4, 5, 6, 8), (32, 64, 128), biased=True),  # value ~ scale * code + bias, in the tensor's dtype
    "mxfp4": Kind((4,), (32,)),  # E2M1 codes, power-of-two scales (E8M0)
    "mxfp8": Kind((8,), (32,)),  # E4M3 codes, power-of-two scales
    "nvfp4": Kind((4,), (16,), multiplied=True),  # E2M1 codes, E4M3 scales
}


@dataclass(frozen=True)
class Storage:
    """Bits per code, values that share a scale, and MLX's name of the mode.

    Raises ValueError for a combination that MLX does not know.
    """

    bits: int
    group_size: int
    mode: str = AFFINE

    def __post_init__(self) -> None:
        if self.mode not in KINDS:
            raise ValueError(f"there is no mode {self.mode}, only {', '.join(KINDS)}")
        for name, value, known in (
            ("bits", self.bits, self.kind.bits),
            ("group size", self.group_size, self.kind.group_sizes),
        ):
            if value not in known:
                raise ValueError(f"{self.mode} has {name} {', '.join(map(str, known))}, not {value}")

    @property
    def kind(self) -> Kind:
        """What its mode has."""
        return KINDS[self.mode]

    def words(self, width: int) -> int:
        """uint32 words that hold the codes of `width` values."""
        return width * self.bits // 32

    def groups(self, width: int) -> int:
        """Scales of `width` values."""
        return width // self.group_size
