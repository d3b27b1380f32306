"""The model folder's manifest and what is said when a folder is not one."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ltx2.runtime.errors import ModelFolderError
from ltx2.runtime.files.tensors import FileRecord
from ltx2.runtime.model.layout import ComponentRecord, Manifest, ModelFolder

VOCODER = ComponentRecord(
    "Vocoder", (FileRecord("config.json", 2, "00"), FileRecord("model.safetensors", 80, "11")), "BF16"
)
QUANTIZED = ComponentRecord("Net", (), "BF16", {"group_size": 64, "bits": 4, "a.b": {"group_size": 64, "bits": 8}})


def manifest() -> Manifest:
    return Manifest(
        "2.0", "distilled", "0.1.0", {"vocoder": VOCODER, "transformer": QUANTIZED}, (FileRecord("s", 3, "22"),)
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "ltx2.json").write_text(manifest().to_json())
    (tmp_path / "vocoder").mkdir()
    (tmp_path / "vocoder" / "config.json").write_text('{"stereo": true}')
    save_file({"w": np.zeros(2, np.float32)}, tmp_path / "vocoder" / "model.safetensors")
    return tmp_path


def test_manifest_round_trip() -> None:
    assert Manifest.from_json(manifest().to_json()) == manifest()


def test_manifest_without_variant_or_sources() -> None:
    bare = Manifest("2.0", None, "0.1.0", {})
    assert Manifest.from_json(bare.to_json()) == bare


def test_manifest_text_does_not_depend_on_the_order_of_components() -> None:
    swapped = Manifest(
        "2.0", "distilled", "0.1.0", {"transformer": QUANTIZED, "vocoder": VOCODER}, (FileRecord("s", 3, "22"),)
    )
    assert swapped.to_json() == manifest().to_json()


def test_manifest_is_what_the_contract_says() -> None:
    data = json.loads(manifest().to_json())
    assert set(data) == {"release", "variant", "tool_version", "components", "sources"}
    assert set(data["components"]["vocoder"]) == {"class", "files", "dtype", "quantization"}
    assert data["sources"] == [{"name": "s", "size": 3, "sha256": "22"}]


def test_open_and_read(folder: Path) -> None:
    opened = ModelFolder.open(folder)
    assert opened.has("vocoder") and not opened.has("duration_head")
    assert opened.record("vocoder") == VOCODER
    assert opened.config("vocoder") == {"stereo": True}
    assert opened.weight_files("vocoder") == [folder / "vocoder" / "model.safetensors"]
    assert [list(f.tensors) for f in opened.tensor_files("vocoder")] == [["w"]]


def test_not_a_model_folder(folder: Path, tmp_path: Path) -> None:
    """What is there instead is said: a file, another folder, a folder of model folders, nothing."""
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    cases = {"absent": "there is no such file or folder", "file": "it is a file", "empty": r"it has no ltx2\.json"}
    for name, why in cases.items():
        with pytest.raises(ModelFolderError, match=why) as caught:
            ModelFolder.open(tmp_path / name)
        assert "ltx2 convert" in caught.value.fix
    (tmp_path / "many" / "one").mkdir(parents=True)
    (folder / "ltx2.json").rename(tmp_path / "many" / "one" / "ltx2.json")
    with pytest.raises(ModelFolderError, match="it holds model folders: ") as caught:
        ModelFolder.open(tmp_path / "many")
    assert ModelFolder.open(Path(caught.value.fix.removeprefix("use "))).path == tmp_path / "many" / "one"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"release": "2.0"}',
        manifest().to_json().replace('"class"', '"klass"'),
        manifest().to_json().replace('"sha256"', '"sha1"'),
        json.dumps({**json.loads(manifest().to_json()), "components": []}),
        json.dumps({**json.loads(manifest().to_json()), "sources": None}),
    ],
)
def test_damaged_manifest(folder: Path, text: str) -> None:
    (folder / "ltx2.json").write_text(text)
    with pytest.raises(ModelFolderError, match="cannot be read"):
        ModelFolder.open(folder)


def test_manifest_that_is_not_text(folder: Path) -> None:
    (folder / "ltx2.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ModelFolderError, match="cannot be read"):
        ModelFolder.open(folder)


def test_absent_component_is_named_with_what_is_there(folder: Path) -> None:
    opened = ModelFolder.open(folder)
    for read in (opened.record, opened.config, opened.weight_files, opened.component_path):
        with pytest.raises(ModelFolderError, match=r"no duration_head.*transformer, vocoder"):
            read("duration_head")


@pytest.mark.parametrize("text", [None, "{", "[]", "3"])
def test_damaged_component_config(folder: Path, text: str | None) -> None:
    config = folder / "vocoder" / "config.json"
    config.unlink()
    if text is not None:
        config.write_text(text)
    with pytest.raises(ModelFolderError, match=r"config\.json cannot be read"):
        ModelFolder.open(folder).config("vocoder")


def test_missing_weight_file_is_named(folder: Path) -> None:
    (folder / "vocoder" / "model.safetensors").unlink()
    with pytest.raises(ModelFolderError, match=r"model\.safetensors is missing"):
        ModelFolder.open(folder).weight_files("vocoder")


def test_truncated_weight_file_is_noticed(folder: Path) -> None:
    file = folder / "vocoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelFolderError, match=r"vocoder of .* is damaged: model\.safetensors .*copy the file back"):
        ModelFolder.open(folder).tensor_files("vocoder")


def test_a_weight_file_that_may_not_be_read_is_not_called_damaged(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    opened = ModelFolder.open(folder)
    monkeypatch.setattr(Path, "open", closed)
    with pytest.raises(ModelFolderError) as error:
        opened.tensor_files("vocoder")
    assert (error.value.why, error.value.fix) == ("permission denied", "check the path and its permissions")


def test_shards_come_in_the_manifest_order(folder: Path) -> None:
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name in names:
        save_file({name: np.zeros(1, np.float32)}, folder / "vocoder" / name)
    record = ComponentRecord("Vocoder", tuple(FileRecord(name, 1, "") for name in names), "F32")
    (folder / "ltx2.json").write_text(Manifest("2.0", None, "0", {"vocoder": record}).to_json())
    opened = ModelFolder.open(folder)
    assert [path.name for path in opened.weight_files("vocoder")] == names
