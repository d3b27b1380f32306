"""What components say of where they come from, and whether a text encoder belongs to a transformer."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ltx2.runtime.errors import MismatchError
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.model.origin import check_gemma, check_text_encoder, model_version
from tests.support.command import SIZE

GEMMA_3, GEMMA_4 = {"model_type": "gemma3_text"}, {"model_type": "gemma4_text"}


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("2.3.0", (2, 3, 0)), ("2.3.rc1", (2, 3)), ("2.5-beta", (2, 5)), ("2.4", (2, 4)), ("v2", ()), ("", ())],
)
def test_leading_numbers_of_a_version(text: str, numbers: tuple[int, ...]) -> None:
    assert model_version({"model_version": text}) == numbers


def test_no_version_is_the_oldest() -> None:
    assert model_version({}) < model_version({"model_version": "0"}) < (2, 4)


@pytest.mark.parametrize(
    ("transformer", "text_encoder"),
    [
        ({"gemma_version": "a"}, GEMMA_4 | {"gemma_version": "a"}),
        ({"gemma_version": "a"}, GEMMA_3 | {"gemma_version": "a"}),
        ({}, GEMMA_3),
        ({"model_version": "2.3.1"}, GEMMA_3 | {"gemma_version": "a"}),
    ],
)
def test_what_belongs_together(transformer: dict[str, Any], text_encoder: dict[str, Any]) -> None:
    assert check_gemma(transformer, text_encoder) is None


def test_what_nothing_is_said_of_is_warned_about() -> None:
    assert "neither" in str(check_gemma({"model_version": "2.4.0"}, GEMMA_4))


@pytest.mark.parametrize(
    ("transformer", "text_encoder", "said"),
    [
        ({"gemma_version": "a"}, GEMMA_4 | {"gemma_version": "b"}, "is b, the transformer was trained with a"),
        ({"gemma_version": "a", "model_version": "2.5.0"}, GEMMA_4, "is gemma4_text, .* trained with a"),
        ({"gemma_version": "a"}, GEMMA_3, "is gemma3_text, .* trained with a"),
        ({"model_version": "2.4"}, GEMMA_4 | {"gemma_version": "b"}, "is b, .* names no fine-tuned"),
        ({"model_version": "2.3.9"}, GEMMA_4, "is gemma4_text, .* names no fine-tuned"),
        ({}, GEMMA_4 | {"gemma_version": "b"}, "is b, .* names no fine-tuned"),
    ],
)
def test_what_does_not(transformer: dict[str, Any], text_encoder: dict[str, Any], said: str) -> None:
    with pytest.raises(MismatchError, match=f"second is not the text encoder of first: .*{said}"):
        check_gemma(transformer, text_encoder, ("first", "second"))


def test_folders(demo_25: Path, demo_model: Path) -> None:
    for path in (demo_25, demo_model):
        assert check_text_encoder(ModelFolder.open(path)) is None


def test_generate_checks_it(demo_f32: Path, tmp_path: Path, here: Any) -> None:
    """Before anything is computed."""
    folder = tmp_path / "model"
    shutil.copytree(demo_f32, folder, copy_function=lambda source, target: Path(target).symlink_to(source))
    config = folder / "transformer" / "config.json"
    stated = json.loads(config.read_text()) | {"gemma_version": "gemma4-x"}
    config.unlink()
    config.write_text(json.dumps(stated))
    done = here("generate", "a kite", "-m", folder, "-o", tmp_path / "clip.mp4", *SIZE, "--json")
    error = json.loads(done.out)["error"]
    assert (done.code, error["kind"]) == (1, "mismatch")
    assert "gemma3_text" in error["why"] and "gemma4-x" in error["why"]
