"""--delete-sources: what was converted goes, once the folder is whole; nothing else, and not a moment earlier."""

import json
import shutil
from importlib import import_module
from pathlib import Path

import pytest

import ltx2
from ltx2.cli import run
from ltx2.convert.verify import verify
from ltx2.runtime.errors import InputError, UsageError
from tests.support.command import Here
from tests.support.folders import verified
from tests.support.official import GEMMA, MONOLITH, UPSCALER


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    """A file and a folder, with a file in it that no network is made of."""
    shutil.copytree(GEMMA, tmp_path / "gemma")
    (tmp_path / "gemma" / "notes.txt").write_text("mine")
    return [Path(shutil.copy(UPSCALER, tmp_path)), tmp_path / "gemma"]


def test_sources_go_once_converted(sources: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["convert", *map(str, sources), "-o", str(tmp_path / "out"), "--delete-sources", "--json"]
    assert run([*arguments, "--dry-run"]) == 0
    planned = json.loads(capsys.readouterr().out)["deletes"]
    assert run(arguments) == 0
    done = capsys.readouterr()
    assert json.loads(done.out)["deleted"] == planned and planned["bytes"] > UPSCALER.stat().st_size
    assert not sources[0].exists() and [path.name for path in sources[1].iterdir()] == ["notes.txt"]
    assert f"not removed, or not whole: {sources[1]}" in done.err
    assert verified(tmp_path / "out").tensors > 0


def test_an_empty_folder_goes_too(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    shutil.copy(UPSCALER, tmp_path / "files")
    ltx2.convert(tmp_path / "files", tmp_path / "out", delete_sources=True)
    assert not (tmp_path / "files").exists()


def test_nothing_outside_what_was_given(tmp_path: Path) -> None:
    """A link's target, the tokenizer beside a given folder, a fused LoRA."""
    link = tmp_path / "upscaler.safetensors"
    link.symlink_to(shutil.copy(UPSCALER, tmp_path / "real.safetensors"))
    shutil.copytree(GEMMA, tmp_path / "text_encoder")
    (tmp_path / "tokenizer").mkdir()
    for path in (tmp_path / "text_encoder").glob("*token*"):
        path.rename(tmp_path / "tokenizer" / path.name)
    ltx2.convert([link, tmp_path / "text_encoder"], tmp_path / "out", delete_sources=True)
    assert link.is_symlink() and link.exists()
    assert len(list((tmp_path / "tokenizer").iterdir())) == len(list(GEMMA.glob("*token*")))
    assert not list((tmp_path / "text_encoder").glob("*.safetensors"))


def test_not_before_the_folder_is_right(sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that cannot be verified, and a source that is another one by then."""

    def damaging(folder: Path) -> object:
        path = next((folder / "spatial_upscaler").glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        return verify(folder)

    def replacing(folder: Path) -> object:
        sources[0].write_bytes(b"another")
        return verify(folder)

    for name, wrong in (("damaged", damaging), ("replaced", replacing)):
        monkeypatch.setattr(import_module("ltx2.convert.delete"), "verify", wrong)
        with pytest.raises(ltx2.Ltx2Error):
            ltx2.convert(sources, tmp_path / name, delete_sources=True)
        assert sources[0].is_file() and (sources[1] / "model.safetensors").is_file()


def test_a_model_that_lacks_a_network_keeps_its_sources(here: Here, tmp_path: Path) -> None:
    """To add the network takes all of them again. Without --delete-sources it is a warning."""
    source, out = Path(shutil.copy(MONOLITH, tmp_path)), tmp_path / "out"
    command = ["convert", source, "-o", out, "--variant", "dev"]
    here(*command, "--delete-sources").failed(1, "the sources are still needed", "text_encoder")
    with pytest.raises(InputError, match="text_encoder"):
        ltx2.convert(source, out, variant="dev", delete_sources=True)
    assert source.exists() and not out.exists()
    done = here(*command)
    assert done.code == 0 and "warning: generating from a prompt also needs text_encoder" in done.err
    assert "also needs" not in here(*command[:2], GEMMA, *command[2:], "--force").err
    assert "also needs" not in here("convert", UPSCALER, "-o", tmp_path / "upscaler").err


def test_a_part_is_not_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What --only leaves out would be lost."""
    with pytest.raises(UsageError):
        ltx2.convert(MONOLITH, tmp_path / "out", variant="dev", only=("vocoder",), delete_sources=True)
    assert issubclass(UsageError, InputError)
    command = ["convert", str(MONOLITH), "-o", str(tmp_path / "out"), "--only", "vocoder", "--delete-sources"]
    assert run(command) == 2 and "--only" in capsys.readouterr().err
