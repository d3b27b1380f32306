"""The table of options: combinations that are wrong usage, and what an earlier run's options become."""

from collections.abc import Iterator
from math import isfinite, nan
from typing import Any

import pytest

from ltx2.runtime.errors import UsageError
from ltx2.runtime.generate.options.kinds import Choice, Number, Whole
from ltx2.runtime.generate.options.request import Request
from ltx2.runtime.generate.options.table import CLASHES, ROWS, Options, check_usage, repeated
from ltx2.runtime.generate.options.values import Lora, Picture, Sound, Span
from tests.support.command import Here

# One pair of every rule of the public contract, and some that are easily lost.
WRONG: list[tuple[str, Any, str]] = [
    ("pipeline", "distilled", "steps"),
    ("pipeline", "distilled", "negative_prompt"),
    ("pipeline", "distilled", "audio_cfg"),
    ("pipeline", "distilled", "stg_blocks"),
    ("pipeline", "distilled", "skip_steps"),
    ("pipeline", "one-stage", "distilled_lora"),
    ("pipeline", "two-stage", "no_upscale"),
    ("pipeline", "two-stage", "retake"),
    ("pipeline", "hq", "video"),
    ("pipeline", "hq", "no_video"),
    ("pipeline", "hq", "skip_steps"),
    ("audio", Sound("a"), "video"),
    ("audio", Sound("a"), "retake"),
    ("audio", Sound("a"), "no_audio"),
    ("audio", Sound("a"), "no_video"),
    ("audio", Sound("a"), "audio_rescale"),
    ("video", "v", "retake"),
    ("video", "v", "no_audio"),
    ("video", "v", "image"),
    ("video", "v", "keyframe"),
    ("video", "v", "reference"),
    ("video", "v", "frames"),
    ("video", "v", "modality_scale"),
    ("retake", Span("r", 0, 1), "image"),
    ("retake", Span("r", 0, 1), "keyframe_slots"),
    ("retake", Span("r", 0, 1), "width"),
    ("no_video", True, "image"),
    ("no_video", True, "height"),
    ("no_video", True, "no_audio"),
    ("no_video", True, "preview"),
    ("no_video", True, "cfg"),
    ("no_video", True, "audio_modality_scale"),
    ("latents", "l", "image"),
    ("latents", "l", "keep"),
    ("latents", "l", "cfg"),
]

RIGHT: list[dict[str, Any]] = [
    {"pipeline": "one-stage", "steps": 20, "cfg": 3.0, "skip_steps": 1},
    {"pipeline": "two-stage", "distilled_lora": Lora("d"), "image": (Picture("a"),)},
    {"pipeline": "hq", "cfg": 3.0},
    {"audio": Sound("a"), "image": (Picture("a"),), "cfg": 3.0, "width": 64},
    {"video": "v", "audio_cfg": 7.0, "audio_modality_scale": 3.0},
    {"retake": Span("r", 0, 1), "keep": "audio", "fps": 24.0, "cfg": 2.0},
    {"no_video": True, "frames": 9, "audio_cfg": 7.0},
    {"latents": "l", "no_audio": True, "noise": "n"},
    {"reference": ("r",), "lora": (Lora("l"),), "reference_attention": 0.5},
]

LACKING = [("keep", "retake"), ("reference", "lora"), ("reference_attention", "reference")]


class TestWrongUsage:
    @pytest.mark.parametrize(("option", "value", "other"), WRONG)
    def test_both_are_named(self, option: str, value: object, other: str) -> None:
        with pytest.raises(UsageError) as caught:
            check_usage({other: "something", option: value})
        error = caught.value
        assert (error.exit_code, error.kind) == (2, "usage")
        assert ROWS[option].flag in error.what and ROWS[other].flag in error.what
        assert ROWS[option].flag in error.fix and ROWS[other].flag in error.fix

    @pytest.mark.parametrize("given", RIGHT)
    def test_what_goes_together(self, given: dict[str, Any]) -> None:
        check_usage(given)

    @pytest.mark.parametrize(("option", "needed"), LACKING)
    def test_what_lacks_another(self, option: str, needed: str) -> None:
        with pytest.raises(UsageError) as caught:
            check_usage({option: "something"})
        assert ROWS[option].flag in caught.value.what and ROWS[needed].flag in caught.value.what

    def test_the_tables_names_exist(self) -> None:
        for clash in CLASHES:
            assert {clash.option, *clash.others} <= ROWS.keys()
        for row in ROWS.values():
            assert {*row.replaces, *row.sets, *([row.needs] if row.needs else [])} <= ROWS.keys()

    def test_in_python(self) -> None:
        with pytest.raises(UsageError, match="resume has no effect without state"):
            Request.from_options({"prompt": "x", "resume": True})


AGAIN: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ({"audio": "a", "seed": 1}, {"retake": "r"}, {"seed": 1, "retake": "r"}),
    ({"retake": "r", "keep": "audio", "width": 64}, {"audio": "a"}, {"width": 64, "audio": "a"}),
    ({"pipeline": "distilled", "cfg": 1}, {"seed": 2}, {"pipeline": "distilled", "cfg": 1, "seed": 2}),
    ({"pipeline": "distilled", "steps": 8, "cfg": 1}, {"pipeline": "hq"}, {"pipeline": "hq"}),
    ({"pipeline": "hq", "steps": 15}, {"cfg": 2}, {"pipeline": "hq", "steps": 15, "cfg": 2}),
    ({"image": "i", "prompt": "p"}, {"latents": "l"}, {"latents": "l"}),
]


class TestAgain:
    @pytest.mark.parametrize(("earlier", "given", "wanted"), AGAIN)
    def test_new_options_in_the_place_of_old_ones(
        self, earlier: dict[str, Any], given: dict[str, Any], wanted: dict[str, Any]
    ) -> None:
        assert repeated(earlier, given) == wanted

    @pytest.mark.parametrize(
        ("earlier", "given"),
        [
            ({"retake": "r"}, {"width": 64}),
            ({"audio": "a"}, {"no_audio": True}),
            ({"pipeline": "distilled"}, {"cfg": 3}),
            ({}, {"audio": "a", "video": "v"}),
        ],
    )
    def test_what_does_not_go_together(self, earlier: dict[str, Any], given: dict[str, Any]) -> None:
        with pytest.raises(UsageError, match="do not go together"):
            repeated(earlier, given)

    def test_what_still_lacks_another(self) -> None:
        with pytest.raises(UsageError, match="no effect without --retake"):
            repeated({"seed": 1}, {"keep": "audio"})


class TestTable:
    def test_a_request_cannot_be_changed(self) -> None:
        with pytest.raises(AttributeError):
            Request(prompt="x").width = 64  # type: ignore[misc]

    def test_the_class_has_the_defaults(self) -> None:
        assert (Options.width, Options.matmul, Options.no_audio, Options.lora) == (None, "auto", False, ())

    def test_every_row_is_explained(self) -> None:
        for row in ROWS.values():
            assert row.help.endswith(".") and row.help[0].isupper(), row.name


def outside() -> Iterator[tuple[str, Any]]:
    """Options and values that they never have: of every range and choice, and of some forms."""
    for name, row in ROWS.items():
        if isinstance(row, Whole | Number):
            yield from ((name, bound) for bound in (row.least - 1, row.most + 1) if isfinite(bound))
        if isinstance(row, Choice):
            yield name, "nonsense"
        if isinstance(row, Number):
            yield name, nan
    yield from [("frames", "auto:0-5"), ("frames", "long"), ("stg_blocks", "a"), ("retake", "a.mp4@3-2")]
    yield from [("extend", "a.mp4@0"), ("lora", "a:1e999"), ("keyframe", "a.png")]


@pytest.mark.parametrize(("name", "value"), list(outside()))
def test_a_value_that_an_option_never_has(here: Here, name: str, value: Any) -> None:
    """Wrong usage that names the option, on the command line and in Python."""
    with pytest.raises(UsageError, match=ROWS[name].flag):
        Request.from_options({name: value})
    done = here("generate", "a kite", f"{ROWS[name].flag}={value}", "--json")
    assert done.code == 2 and done.json["error"]["kind"] == "usage" and ROWS[name].flag in done.json["error"]["what"]
