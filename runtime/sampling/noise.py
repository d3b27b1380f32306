"""A run's random numbers, from a seed or a file. They are drawn when they are used, by name: no draw depends on another
one's size or on what else is drawn, and a state file needs to hold none of them."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Protocol

import mlx.core as mx

# The first four keys are those of the first versions of this tool, so that seeds keep their clips.
SPLIT = ("stage1.video", "stage1.audio", "stage2.video", "stage2.audio")


class Noise(Protocol):
    """Standard normal draws by name."""

    def __call__(self, name: str, shape: tuple[int, ...], row: int | None = None) -> mx.array:
        """The draw `name`, float32, shaped (1, channels, ...). Of several draws of one name, which a file has as rows
        (rows, channels, ...), the one number `row`."""


class Seeded:
    """Noise of a seed: one key per name and row."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, name: str, shape: tuple[int, ...], row: int | None = None) -> mx.array:
        """As `Noise` says."""
        return mx.random.normal(shape, key=self._key(name, row))

    def _key(self, name: str, row: int | None) -> mx.array:
        if name in SPLIT:
            return mx.random.split(mx.random.key(self.seed), len(SPLIT))[SPLIT.index(name)]
        digest = hashlib.sha256(f"{self.seed} {name} {row}".encode()).digest()
        return mx.random.key(int.from_bytes(digest[:8], "big"))


class Injected:
    """Given noise: `read` has a draw by its name, with all its rows. It is read when it is used, and not kept."""

    def __init__(self, read: Callable[[str], mx.array]) -> None:
        self.read = read

    def __call__(self, name: str, shape: tuple[int, ...], row: int | None = None) -> mx.array:
        """As `Noise` says; shapes were checked when the file was read."""
        value = self.read(name)
        return (value if row is None else value[row : row + 1]).reshape(shape)


def standardised(noise: Sequence[mx.array]) -> list[mx.array]:
    """Draws of one stream's tokens, with mean 0 and standard deviation 1 over all of them together (MODEL.md §3.4)."""
    values = mx.concatenate([part.reshape(-1) for part in noise])
    mean, deviation = values.mean(), mx.std(values, ddof=1)
    return [(part - mean) / deviation for part in noise]
