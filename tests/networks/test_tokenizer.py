"""The tokenizer: golden tokens, padding and truncation, and files that cannot be used."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ltx2.runtime.errors import ModelFolderError
from ltx2.runtime.networks.text.tokenizer import Tokenizer
from tests.support.golden import PROMPTS, golden
from tests.support.official import GEMMA


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer.load(GEMMA)


def test_golden_tokens(tokenizer: Tokenizer) -> None:
    for name, prompt in PROMPTS.items():
        encoded = tokenizer.encode(f"  {prompt}\n", 1024)
        np.testing.assert_array_equal(encoded.ids, golden(f"{name}.input_ids"))
        np.testing.assert_array_equal(encoded.mask, golden(f"{name}.attention_mask"))
        assert encoded.ids.dtype == encoded.mask.dtype == np.dtype(np.int32)
        assert encoded.truncated == 0


def test_empty_prompt_is_one_token(tokenizer: Tokenizer) -> None:
    encoded = tokenizer.encode(" \n", 16)
    assert encoded.ids[0].tolist() == [0] * 15 + [2]
    assert encoded.mask[0].tolist() == [0] * 15 + [1]


def test_long_prompt_keeps_its_beginning(tokenizer: Tokenizer) -> None:
    prompt = "a red square moves left on a white background"
    whole = tokenizer.encode(prompt, 64)
    text = whole.ids[whole.mask.astype(bool)].tolist()
    cut = tokenizer.encode(prompt, 4)
    assert cut.ids[0].tolist() == text[:4]
    assert cut.mask.all()
    assert cut.truncated == len(text) - 4


def edited(folder: Path, **changes: Any) -> Path:
    """A copy of the tokenizer in which top-level entries of both files are replaced."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        data = json.loads((GEMMA / name).read_text())
        data |= {key: value for key, value in changes.items() if key in data}
        (folder / name).write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))
    return folder


def test_first_token_does_not_depend_on_the_files_post_processor(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Gemma 3's adds it, others do not."""
    without = Tokenizer.load(edited(tmp_path, post_processor=None))
    np.testing.assert_array_equal(without.encode("a red square", 8).ids, tokenizer.encode("a red square", 8).ids)


def test_a_prompt_that_begins_with_the_first_token(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """What a post-processor adds is added in any case, what is missing only where it is missing."""
    without = Tokenizer.load(edited(tmp_path, post_processor=None))
    assert without.encode("<bos>a", 4).ids[0, 1:].tolist() == [0, 2, 260]
    assert tokenizer.encode("<bos>a", 4).ids[0, 1:].tolist() == [2, 2, 260]


def test_saved_truncation_and_padding_have_no_effect(tokenizer: Tokenizer, tmp_path: Path) -> None:
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 32}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>",
    }  # fmt: skip
    saved = Tokenizer.load(edited(tmp_path, truncation=truncation, padding=padding))
    np.testing.assert_array_equal(saved.encode("a red square", 8).ids, tokenizer.encode("a red square", 8).ids)


def test_padding_token_falls_back_to_the_end_token(tmp_path: Path) -> None:
    loaded = Tokenizer.load(edited(tmp_path, pad_token=..., eos_token={"content": "<eos>"}))
    assert (loaded.pad, loaded.bos) == (1, 2)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("damage", [None, "", "{}"])
def test_unusable_files_are_named(tmp_path: Path, name: str, damage: str | None) -> None:
    shutil.copy(GEMMA / "tokenizer.json", tmp_path)
    shutil.copy(GEMMA / "tokenizer_config.json", tmp_path)
    if damage is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(damage)
    with pytest.raises(ModelFolderError, match=name) as error:
        Tokenizer.load(tmp_path)
    assert "Gemma" in error.value.fix
