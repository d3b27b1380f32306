"""The reader of demo clips itself: what it says of clips whose content is known."""

import numpy as np
import pytest

from ltx2.bench.quality.classify import classify
from tests.support.golden import golden

RATE = 24000
BLUE, WHITE = (40, 80, 230), (240, 240, 240)


def drawn(step: tuple[int, int]) -> np.ndarray:
    """A blue square on white that moves by `step` (x, y) pixels a frame."""
    frames = np.full((6, 96, 128, 3), WHITE, np.uint8)
    for i, frame in enumerate(frames):
        x, y = 50 + i * step[0], 40 + i * step[1]
        frame[y : y + 24, x : x + 24] = BLUE
    return frames


@pytest.mark.parametrize(
    ("which", "words"),
    [
        ("a", {"shape": "square", "colour": "red", "background": "white", "motion": "left", "tone": "low"}),
        ("b", {"shape": "triangle", "colour": "yellow", "background": "black", "motion": "up", "tone": "high"}),
    ],
)
def test_reference_clips_show_their_prompts(which: str, words: dict[str, str]) -> None:
    seen = classify(golden(f"{which}.frames"), golden(f"{which}.audio"), RATE)
    assert {name: seen[name] for name in words} == words


@pytest.mark.parametrize(
    ("step", "motion"), [((0, 0), "still"), ((8, 0), "right"), ((-8, 0), "left"), ((0, 6), "down"), ((0, -6), "up")]
)
def test_motion(step: tuple[int, int], motion: str) -> None:
    seen = classify(drawn(step))
    assert (seen["shape"], seen["colour"], seen["motion"]) == ("square", "blue", motion)
    assert "tone" not in seen


@pytest.mark.parametrize(("hertz", "tone"), [(200, "low"), (400, "middle"), (800, "high"), (0, "silence")])
def test_tone(hertz: float, tone: str) -> None:
    sound = 0.3 * np.sin(2 * np.pi * hertz * np.arange(RATE) / RATE)
    assert classify(drawn((0, 0)), np.stack([sound, sound]), RATE)["tone"] == tone


def test_an_empty_picture_shows_nothing() -> None:
    seen = classify(np.zeros((5, 64, 64, 3), np.uint8))
    assert (seen["background"], seen["shape"], seen["found"]) == ("black", "none", 0)
