"""Prompts of the demo model's grammar, each with what its clip must show."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

import numpy as np

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple")
BACKGROUNDS = ("white", "black", "gray", "cyan")
MOTIONS = {name: f"moves {name}" for name in ("left", "right", "up", "down")} | {"still": "stands still"}
SOUNDS = {name: f"with a {name} tone" for name in ("low", "middle", "high")} | {"silence": "in silence"}


@dataclass(frozen=True)
class Prompt:
    """A prompt and, as `classify` names them, the attributes it asks for."""

    text: str
    want: Mapping[str, str]


def random_prompts(count: int, seed: int = 0) -> list[Prompt]:
    """Different prompts, always the same ones for a seed; more of them begin with the same ones."""
    return list(islice(_different(np.random.default_rng(seed)), count))


def _different(draw: np.random.Generator) -> Iterator[Prompt]:
    known: set[str] = set()
    while True:
        prompt = _prompt(draw)
        if prompt.text not in known:
            known.add(prompt.text)
            yield prompt


def _prompt(draw: np.random.Generator) -> Prompt:
    choices = {"shape": SHAPES, "colour": COLOURS, "background": BACKGROUNDS, "motion": (*MOTIONS,), "tone": (*SOUNDS,)}
    want = {name: str(draw.choice(values)) for name, values in choices.items()}
    article = "an" if want["colour"] == "orange" else "a"
    figure = f"{article} {want['colour']} {want['shape']} {MOTIONS[want['motion']]}"
    return Prompt(f"{figure} on a {want['background']} background {SOUNDS[want['tone']]}", want)
