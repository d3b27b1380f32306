"""The kinds of codes that MLX's kernels read: what each has, and which sizes."""

from collections.abc import Mapping
from dataclasses import dataclass

from ltx2.convert.tensors.steps import Storage

AFFINE = "affine"

# How codes are chosen: each for itself; in turn, with the errors of those before in view; so, with inputs rotated.
SEARCH, GPTQ, GPTQ_HADAMARD = METHODS = ("search", "gptq", "gptq-hadamard")


@dataclass(frozen=True)
class Kind:
    """One of MLX's modes."""

    bits: tuple[int, ...]
    group_sizes: tuple[int, ...]
    biased: bool = False  # a group has a bias beside its scale
    multiplied: bool = False  # scales have a narrow range, which an output multiplier per tensor centres


KINDS: Mapping[str, Kind] = {
    AFFINE: Kind((2, 3, 4, 5, 6, 8), (32, 64, 128), biased=True),  # scale * code + bias, in the tensor's dtype
    "mxfp4": Kind((4,), (32,)),  # E2M1 codes, power-of-two scales (E8M0)
    "mxfp8": Kind((8,), (32,)),  # E4M3 codes, power-of-two scales
    "nvfp4": Kind((4,), (16,), multiplied=True),  # E2M1 codes, E4M3 scales
}


def kind_of(storage: Storage) -> Kind:
    """What the mode of a storage has. Raises ValueError for a combination that MLX does not know."""
    if storage.mode not in KINDS:
        raise ValueError(f"there is no mode {storage.mode}, only {', '.join(KINDS)}")
    kind = KINDS[storage.mode]
    for name, value, known in (
        ("bits", storage.bits, kind.bits),
        ("group size", storage.group_size, kind.group_sizes),
    ):
        if value not in known:
            raise ValueError(f"{storage.mode} has {name} {', '.join(map(str, known))}, not {value}")
    return kind
