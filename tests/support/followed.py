"""Prompts of the demo models, and whether their clips show what they say."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ltx2
from ltx2.bench.quality.classify import classify
from ltx2.bench.quality.demo_prompts import random_prompts

Note = Callable[[str], None]


def once_packed(model: Path) -> Callable[[int], Path]:
    """The float32 model at so many bits, quantized when it is first asked for; 32 is as it is."""

    def packed(bits: int) -> Path:
        folder = model.with_name(f"{model.name}-q{bits}")
        if bits < 32 and not folder.exists():
            ltx2.quantize(model, folder, bits=bits)
        return folder if bits < 32 else model

    return packed


def check_followed(model: Path, numbers: Iterable[int], misses: int, name: str, note: Note, **options: Any) -> None:
    """Clips of these prompts show all five attributes, but for so many of them. A prompt's number is its seed."""
    pipeline, prompts = ltx2.load(model), random_prompts(64)
    wrong, count = [], 0
    for number in numbers:
        prompt, count = prompts[number], count + 1
        clip = pipeline.generate(prompt.text, seed=number, width=192, height=128, frames=25, **options)
        other = prompt.wrong(classify(clip.frames, clip.audio, clip.sample_rate))
        wrong += [f"{prompt.text}: {other}"] if other else []
    note(f"demo prompts followed, {name}: {count - len(wrong)} of {count} {wrong}")
    assert len(wrong) <= misses, wrong
