"""Options become one valid request, or an error that says how to fix them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ltx2.runtime.errors import InputError
from ltx2.runtime.generate.options.kinds import Choice
from ltx2.runtime.generate.options.preset import load_preset
from ltx2.runtime.generate.options.request import Request
from ltx2.runtime.generate.options.table import ROWS, repeated
from ltx2.runtime.layers.matmul import AUTO, PRODUCTS
from ltx2.runtime.sampling.latents import Scales, Sizes

SCALES = Scales(spatial=32, temporal=8, audio_hop=0.01, audio_temporal=4)
DEFAULTS = load_preset("2.0").defaults
VALID = {"width": 768, "height": 512, "frames": 121, "fps": 24.0}


def error_of(**changes: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        Sizes(**VALID | changes).check(SCALES, 2, 64)
    return caught.value


class TestSizes:
    @pytest.mark.parametrize("changes", [{}, {"width": 64}, {"frames": 1}, {"fps": 1}, {"fps": 240.0}, {"fps": 23.976}])
    def test_valid(self, changes: dict[str, Any]) -> None:
        Sizes(**VALID | changes).check(SCALES, 2, 64)

    @pytest.mark.parametrize("side", ["width", "height"])
    @pytest.mark.parametrize(
        ("value", "fix"),
        [
            (100, "use 64 or 128"),
            (767, "use 704 or 768"),
            (96, "use 64 or 128"),  # a multiple of 32 is not enough for two stages
            (63, "use 64"),
            (0, "use 64"),
            (-64, "use 64"),
        ],
    )
    def test_sides_name_both_nearest(self, side: str, value: int, fix: str) -> None:
        error = error_of(**{side: value})
        assert error.what == f"{side} {value} is not valid"
        assert "multiple of 64" in error.why
        assert error.fix == fix

    @pytest.mark.parametrize(
        ("frames", "fix"),
        [(120, "use 113 or 121"), (122, "use 121 or 129"), (8, "use 1 or 9"), (0, "use 1"), (-7, "use 1")],
    )
    def test_frames_name_both_nearest(self, frames: int, fix: str) -> None:
        error = error_of(frames=frames)
        assert (error.what, error.why, error.fix) == (f"frames {frames} is not valid", "it must be 8k+1", fix)

    @pytest.mark.parametrize("fps", [0.5, 241.0, -24.0, float("nan"), float("inf")])
    def test_fps(self, fps: float) -> None:
        assert "between 1 and 240" in error_of(fps=fps).why

    def test_one_stage_takes_multiples_of_32(self) -> None:
        Sizes(96, 224, 9, 24.0).check(SCALES, 1, 64)
        with pytest.raises(InputError, match="use 64 or 96"):
            Sizes(80, 64, 9, 24.0).check(SCALES, 1, 64)

    def test_what_the_decoder_needs_at_least(self) -> None:
        with pytest.raises(InputError, match=r"at least 64 \(use 64\)"):
            Sizes(32, 64, 9, 24.0).check(SCALES, 1, 64)
        Sizes(32, 64, 9, 24.0).check(SCALES, 1, 32)

    def test_grids_of_both_stages(self) -> None:
        """MODEL.md 11's sizes: half as large in stage 1; the sound is the same."""
        sizes = Sizes(1536, 1024, 121, 24.0)
        first, second = (sizes.grid(downscale, SCALES, 128, 8) for downscale in (2, 1))
        assert (first.video_shape, first.tokens) == ((1, 128, 16, 16, 24), 6144)
        assert (second.video_shape, second.tokens) == ((1, 128, 16, 32, 48), 24576)
        assert first.audio_shape == second.audio_shape == (1, 8, 126, 16)


class TestOptions:
    def test_defaults_are_the_presets(self) -> None:
        request = Request.from_options({"prompt": "x"}).with_defaults(DEFAULTS)
        got = {name: getattr(request, name) for name in ("width", "height", "frames", "fps")}
        assert got == {"width": 768, "height": 512, "frames": 121, "fps": 24.0}
        assert (request.no_audio, request.no_upscale) == (False, False)

    def test_a_seed_is_drawn(self) -> None:
        seeds = {Request.from_options({"prompt": "x"}).with_defaults({}).seed for _ in range(5)}
        assert len(seeds) == 5 and all(seed is not None and 0 <= seed < 1 << 32 for seed in seeds)
        assert Request.from_options({"prompt": "x", "noise": "n"}).with_defaults({}).seed is None

    def test_what_is_asked_for_stays(self) -> None:
        asked = {"prompt": "x", "width": 64, "height": 128, "frames": 9, "fps": 30.0, "seed": 0}
        request = Request.from_options(asked).with_defaults(DEFAULTS)
        assert {name: getattr(request, name) for name in asked} == asked

    @pytest.mark.parametrize("prompt", ["", " \n"])
    def test_an_empty_prompt_is_none(self, prompt: str) -> None:
        with pytest.raises(InputError, match="the prompt is empty"):
            Request.from_options({"prompt": prompt}).with_defaults(DEFAULTS)
        Request.from_options({"prompt": prompt, "embeddings": "e"}).with_defaults(DEFAULTS)

    @pytest.mark.parametrize("instead", [{"embeddings": "e"}, {"latents": "l"}])
    def test_what_stands_for_a_prompt(self, instead: dict[str, str]) -> None:
        Request.from_options(instead).with_defaults(DEFAULTS)

    def test_nothing_stands_for_a_prompt(self) -> None:
        with pytest.raises(InputError, match=r"no prompt.*PROMPT, --embeddings or --latents"):
            Request.from_options({"seed": 1}).with_defaults(DEFAULTS)

    @pytest.mark.parametrize(
        ("options", "warnings"),
        [
            ({"prompt": "x", "noise": "n", "no_upscale": True, "save_embeddings": "s"}, []),
            ({"embeddings": "e", "save_embeddings": "s"}, []),
            ({"prompt": "", "embeddings": "e"}, ["the prompt has no effect with --embeddings"]),
            (
                {"prompt": "x", "latents": "l", "no_upscale": True, "save_embeddings": "s"},
                [f"{n} has no effect with --latents" for n in ("the prompt", "--save-embeddings", "--no-upscale")],
            ),
            ({"prompt": "x", "upscale": "c", "preview": "p", "distilled_lora": "l"}, []),
            ({"upscale": "c", "resume": True, "state": "s"}, []),
            (
                {"upscale": "c", "preview": "p", "distilled_lora": "l"},
                [
                    f"{n} has no effect without a prompt, which refines the clip"
                    for n in ("--distilled-lora", "--preview")
                ],
            ),
        ],
    )
    def test_nothing_is_ignored_in_silence(self, options: dict[str, Any], warnings: list[str]) -> None:
        assert list(Request.from_options(options).without_effect()) == warnings

    @pytest.mark.parametrize(
        ("given", "left"),
        [
            ({"seed": 2}, {"prompt": "a", "width": 64, "embeddings": "e", "seed": 2}),
            ({"prompt": "b"}, {"prompt": "b", "width": 64, "noise": "n", "seed": 1}),
            ({"embeddings": "f"}, {"width": 64, "noise": "n", "embeddings": "f", "seed": 1}),
            ({"noise": "o"}, {"prompt": "a", "width": 64, "noise": "o", "embeddings": "e"}),
            ({"latents": "l"}, {"latents": "l", "seed": 1}),
        ],
    )
    def test_an_earlier_run_with_other_options(self, given: dict[str, Any], left: dict[str, Any]) -> None:
        """What they leave nothing to do is not taken over: nobody asked for it, so nobody should be warned of it."""
        earlier = {"prompt": "a", "width": 64, "noise": "n", "embeddings": "e", "seed": 1}
        assert repeated(earlier, given) == left

    def test_ways_to_multiply_are_the_runtimes(self) -> None:
        row = ROWS["matmul"]
        assert isinstance(row, Choice) and row.choices == (AUTO, *PRODUCTS)

    def test_prompts_from_files_of_other_systems(self) -> None:
        assert Request.from_options({"prompt": "\ufeffa red square"}).prompt == "a red square"
        with pytest.raises(InputError, match="must be a text in UTF-8"):
            Request.from_options({"prompt": "caf\udce9"})

    def test_unknown_option(self) -> None:
        for name, meant in (("widht", "did you mean width"), ("frmes", r"did you mean frames\?"), ("x", "--help")):
            with pytest.raises(InputError, match=f"'{name}'.*no such option.*{meant}") as raised:
                Request.from_options({name: 64})
            assert len(str(raised.value)) < 150

    def test_none_is_the_default(self) -> None:
        assert Request.from_options({"no_audio": None, "width": None}) == Request()

    def test_numpy_and_pathlib_values(self) -> None:
        """They must not reach the sidecar as they are: JSON knows neither."""
        options = {"width": np.int64(64), "fps": np.float32(24), "no_audio": np.True_, "noise": Path("/n.safetensors")}
        request = Request.from_options(options)
        assert request == Request(width=64, fps=24.0, no_audio=True, noise="/n.safetensors")
        types = {name: type(getattr(request, name)) for name in options}
        assert types == {"width": int, "fps": float, "no_audio": bool, "noise": str}

    @pytest.mark.parametrize(
        ("name", "value", "kind"),
        [
            ("width", 64.0, "whole number"),
            ("width", "64", "whole number"),
            ("seed", True, "whole number"),
            ("fps", "fast", "number"),
            ("no_audio", "no", "true or false"),
            ("noise", 7, "text or path"),
            ("prompt", b"bytes", "text"),
        ],
    )
    def test_values_of_the_wrong_type(self, name: str, value: object, kind: str) -> None:
        with pytest.raises(InputError, match=f"{ROWS[name].flag} .*must be a? ?{kind}"):
            Request.from_options({name: value})

    @pytest.mark.parametrize("seed", [0, 1, (1 << 64) - 1])
    def test_seeds(self, seed: int) -> None:
        assert Request.from_options({"seed": seed}).seed == seed

    def test_the_record_names_files_by_absolute_path(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.chdir(tmp_path)
        record = Request(prompt="x", noise="n.safetensors").recorded()
        assert (record["noise"], record["prompt"]) == (str(tmp_path / "n.safetensors"), "x")
        assert record["latents"] is None


class TestGivenLatents:
    SHAPE = (1, 128, 4, 6, 8)  # 25 frames of 256x192

    def test_their_sizes_are_the_requests(self) -> None:
        request = Request(latents="l").for_latents(self.SHAPE, SCALES)
        assert (request.width, request.height, request.frames) == (256, 192, 25)

    def test_the_same_sizes_may_be_asked_for(self) -> None:
        asked = Request(latents="l", width=256, height=192, frames=25)
        assert asked.for_latents(self.SHAPE, SCALES) == asked

    @pytest.mark.parametrize("asked", [{"width": 192}, {"height": 256}, {"frames": 33}])
    def test_others_may_not(self, asked: dict[str, int]) -> None:
        (name,) = asked
        with pytest.raises(InputError, match=f"{name} .* does not fit the latents.*leave out --{name}"):
            Request.from_options({"latents": "l", **asked}).for_latents(self.SHAPE, SCALES)
