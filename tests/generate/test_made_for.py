"""A model folder carries the sizes that its model was made for, and what is far from them is said."""

import json
from pathlib import Path

import pytest

import ltx2
from ltx2.runtime.errors import CheckpointError
from ltx2.runtime.files.tensors import open_tensorfile, write_tensorfile
from ltx2.runtime.generate.job import Job
from ltx2.runtime.generate.options.request import Request
from ltx2.runtime.model.layout import ModelFolder, read_sizes
from tests.support.command import Here
from tests.support.official import MONOLITH

DEMO_SIZES = {"width": 192, "height": 128, "frames": 25, "fps": 24.0}
MADE_FOR = "this model was made for --width 192 --height 128 --frames 25: "


def job(folder: Path, **options: object) -> Job:
    return Job(ModelFolder.open(folder), Request.from_options({"prompt": "a red square", **options}))


class TestDefaults:
    def test_are_the_source_s_own(self, demo_model: Path) -> None:
        assert ModelFolder.open(demo_model).manifest.sizes == DEMO_SIZES
        found = job(demo_model).sizes
        assert (found.width, found.height, found.frames, found.fps) == (192, 128, 25, 24.0)

    def test_are_the_release_s_where_the_source_has_none(self, model: Path) -> None:
        assert ModelFolder.open(model).manifest.sizes == {} and "sizes" not in (model / "ltx2.json").read_text()
        found = job(model, pipeline="one-stage").sizes
        assert (found.width, found.height, found.frames, found.fps) == (768, 512, 121, 24.0)

    def test_go_along_when_quantized(self, demo_model: Path, tmp_path: Path) -> None:
        ltx2.quantize(demo_model, tmp_path / "q", bits=8, only=["transformer"], recipe="uniform")
        assert ModelFolder.open(tmp_path / "q").manifest.sizes == DEMO_SIZES

    def test_plan_knows_them(self, demo_model: Path) -> None:
        assert ltx2.plan(str(demo_model), bits=16)["clip"] == DEMO_SIZES

    @pytest.mark.parametrize("text", ["192x128", "[192, 128]", '{"width": -1}', '{"depth": 3}', '{"frames": "all"}'])
    def test_other_metadata_are_refused(self, tmp_path: Path, text: str) -> None:
        source = open_tensorfile(MONOLITH)
        values = {name: (tensor.dtype, source.array(name)) for name, tensor in source.tensors.items()}
        write_tensorfile(tmp_path / "ltx-2-distilled.safetensors", values, {**source.metadata, "ltx2_sizes": text})
        with pytest.raises(CheckpointError, match=r"the ltx2_sizes in .* cannot be read"):
            ltx2.convert(tmp_path / "ltx-2-distilled.safetensors", tmp_path / "out")


@pytest.mark.parametrize("sizes", [{"width": True}, {"width": 0}, {"frames": 24.5}, {"fps": 1e9}, {"seed": 1}])
def test_sizes_that_no_clip_has(sizes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"sizes are|not whole"):
        read_sizes(sizes)


class TestWarnings:
    @pytest.mark.parametrize(
        "asked", [{"width": 1920, "height": 1088}, {"frames": 49}, {"width": 128, "height": 192}, {"frames": 1}]
    )
    def test_of_what_the_model_was_not_made_for(self, demo_model: Path, asked: dict[str, int]) -> None:
        assert [said for said in job(demo_model, **asked).warnings() if said.startswith(MADE_FOR)] != []

    @pytest.mark.parametrize("asked", [{}, {"width": 128, "frames": 9}, {"fps": 12}])
    def test_not_of_others(self, demo_model: Path, asked: dict[str, int]) -> None:
        assert list(job(demo_model, **asked).warnings()) == []

    def test_of_clips_longer_than_the_positions_reach(self, model: Path) -> None:
        said = "the clip has 20.4 s, and this model was made for 20 s at most"
        assert said in job(model, pipeline="one-stage", frames=489).warnings()
        assert said not in job(model, pipeline="one-stage", frames=473).warnings()

    def test_a_dry_run_says_them(self, here: Here, demo_model: Path) -> None:
        done = here("generate", "a red square", "-m", demo_model, "--frames", "49", "--dry-run", "--json")
        assert json.loads(done.out)["plan"]["frames"] == 49 and f"warning: {MADE_FOR}" in done.err
