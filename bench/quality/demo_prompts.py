"""Prompts in the demo model's grammar, each with the attributes of its clip."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple")
BACKGROUNDS = ("white", "black", "gray", "cyan")
MOTIONS = {name: f"moves {name}" for name in ("left", "right", "up", "down")} | {"still": "stands still"}
SOUNDS = {name: f"with a {name} tone" for name in ("low", "middle", "high")} | {"silence": "in silence"}


@dataclass(frozen=True)
class Prompt:
    """A prompt and the attributes that it asks for, as `classify` names them."""

    text: str
    want: Mapping[str, str]

    def wrong(self, seen: Mapping[str, Any]) -> dict[str, str]:
        """The attributes that a clip shows, as `classify` says, and the prompt does not ask for."""
        return {name: seen[name] for name, value in self.want.items() if seen[name] != value}


def random_prompts(count: int, seed: int = 0) -> list[Prompt]:
    """Different prompts, the same for a seed; a longer list begins with the shorter one."""
    draw, found = np.random.default_rng(seed), dict[str, Prompt]()
    while len(found) < count:
        prompt = _prompt(draw)
        found[prompt.text] = prompt
    return list(found.values())


def _prompt(draw: np.random.Generator) -> Prompt:
    choices = {"shape": SHAPES, "colour": COLOURS, "background": BACKGROUNDS, "motion": (*MOTIONS,), "tone": (*SOUNDS,)}
    want = {name: str(draw.choice(values)) for name, values in choices.items()}
    article = "an" if want["colour"] == "orange" else "a"
    figure = f"{article} {want['colour']} {want['shape']} {MOTIONS[want['motion']]}"
    return Prompt(f"{figure} on a {want['background']} background {SOUNDS[want['tone']]}", want)
