"""Model folders that somebody has published: the card that makes one publishable, and `ltx2 download OWNER/NAME`."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import ltx2
from ltx2.cli import run
from ltx2.convert.card import Quality, card_text
from ltx2.convert.fetch.catalogue import HubFile, catalogue
from ltx2.convert.fetch.repository import is_repository
from ltx2.convert.verify import verify
from ltx2.runtime.errors import DownloadError, VerificationError
from ltx2.runtime.files.tensors import FileRecord
from ltx2.runtime.model.layout import ComponentRecord, Manifest, ModelFolder
from tests.fetch.test_download import hub as hub
from tests.support.folders import contents, verified
from tests.support.hub import Hub
from tests.support.official import GEMMA, MONOLITH, UPSCALER

NAME = "somebody/ltx-2-small"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ltx2.convert(UPSCALER, tmp_path_factory.mktemp("shared") / "model")


@pytest.fixture
def published(hub: Hub, model: Path) -> Hub:
    hub.files |= {f"{NAME}/{path}": content for path, content in contents(model).items()}
    return hub


class TestDownload:
    def test_the_same_folder(self, published: Hub, model: Path, tmp_path: Path) -> None:
        (folder,) = ltx2.download(NAME, to=tmp_path / "weights")
        assert folder == tmp_path / "weights" / "ltx-2-small"
        assert contents(folder) == contents(model) and verified(folder).card == "as written"
        asked = len(published.asked)
        ltx2.download(NAME, to=tmp_path / "weights")
        assert not [a for a in published.asked[asked:] if a.method == "GET" and a.name != "ltx2.json"]

    def test_on_the_command_line(self, published: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["download", NAME, "-o", str(tmp_path / "w"), "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert {Path(file["path"]).name for file in said["files"]} >= {"ltx2.json", "README.md", "model.safetensors"}
        assert run(["download", NAME, "-o", str(tmp_path / "w"), "--convert", "-q"]) == 2

    def test_no_model_folder(self, hub: Hub, tmp_path: Path) -> None:
        with pytest.raises(DownloadError, match=r"Lightricks/LTX-2 is not a model folder.*no ltx2\.json"):
            ltx2.download("Lightricks/LTX-2", to=tmp_path)

    @pytest.mark.parametrize("text", ["{", '{"components": {"../x": {}}}', "\xff"])
    def test_a_list_that_is_none(self, published: Hub, tmp_path: Path, text: str) -> None:
        published.files[f"{NAME}/ltx2.json"] = text.encode("latin-1")
        with pytest.raises(DownloadError, match="cannot be read"):
            ltx2.download(NAME, to=tmp_path)
        assert not list(tmp_path.rglob("*.safetensors"))

    def test_a_file_that_was_changed_later(self, published: Hub, tmp_path: Path) -> None:
        key = f"{NAME}/spatial_upscaler/model.safetensors"
        published.files[key] = published.files[key][:-1] + b"x"
        with pytest.raises(DownloadError, match=r"model\.safetensors is not the file that ltx2\.json lists"):
            ltx2.download(NAME, to=tmp_path)

    def test_an_edited_card_is_fetched(self, published: Hub, tmp_path: Path) -> None:
        published.files[f"{NAME}/README.md"] += b"\nMore about it.\n"
        (folder,) = ltx2.download(NAME, to=tmp_path)
        assert verified(folder).card == "edited"

    def test_names(self) -> None:
        assert is_repository("owner/name")
        assert not any(map(is_repository, ("name", "a/b/c", "/b", "a/", "../b", "a/..")))


class TestCard:
    def test_published_files_are_its_base(self) -> None:
        """Repository, terms and page come from the catalogue, whatever the file lay beside."""
        model, text = catalogue().choose(["ltx-2-19b-distilled-fp8", "gemma-3-12b-it"])
        sources = tuple(FileRecord(f.path, f.bytes, "0") for published in (text, model) for f in published.files)
        form = {"group_size": 64, "bits": 4, "mode": "affine"}
        record = ComponentRecord("AVTransformer3DModel", (FileRecord("a", 10**9, "0"),), "BF16", form)
        manifest = Manifest("2.0", "distilled", "0.1.0", {"transformer": record}, sources)
        card = card_text(manifest, {"transformer": Quality(4.5, 1000, 0.08, 0.11, "output")})
        for line in (
            "license_name: ltx-2-community-license", "base_model:\n- Lightricks/LTX-2\n- google/gemma-3-12b-it",
            "- text-to-video", "# LTX-2 distilled, 4 bits (affine, groups of 64), for MLX",
            "| `transformer` | 4.50 | 1000 | 0.08 | 0.11 | output |", "Gemma Terms of Use", "ltx2 generate",
        ):  # fmt: skip
            assert line in card, line
        other = card_text(replace(manifest, sources=(FileRecord("my-ltx.safetensors", 5, "0"),)), {})
        assert "base_model" not in other and "those who published" in other and "Quality" not in other

    def test_every_folder_has_one(self, model: Path, tmp_path: Path) -> None:
        """Of quantized ones it says what that has cost, in one step or in two."""
        whole = ltx2.convert(MONOLITH, tmp_path / "whole", variant="dev", only=("connectors",))
        report = ltx2.quantize(whole, tmp_path / "two", bits=4, recipe="uniform")
        ltx2.convert(MONOLITH, tmp_path / "one", variant="dev", only=("connectors",), bits=4, recipe="uniform")
        assert contents(tmp_path / "one") == contents(tmp_path / "two")
        said = (tmp_path / "two" / "README.md").read_text()
        assert f"| {len(report.layers)} | " in said and "## Quality" in said
        assert "## Quality" not in (whole / "README.md").read_text()
        assert ModelFolder.open(model).manifest.card is not None

    def test_an_edited_one_stays(self, model: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(model, tmp_path / "model"))
        (folder / "README.md").write_text("mine")
        assert ltx2.convert(UPSCALER, folder) == folder
        assert (folder / "README.md").read_text() == "mine" and verified(folder).card == "edited"
        (folder / "README.md").unlink()
        assert verified(folder).card == "none"
        (folder / "spatial_upscaler" / "config.json").unlink()
        with pytest.raises(VerificationError):
            list(verify(folder))


def test_a_bundle_without_its_sources(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fetched, converted, removed; the same command then has nothing to do."""
    (gemma,) = catalogue().choose(["gemma-3-12b-it"])
    repository = "Lightricks/LTX-2"
    hub.files |= {
        f"{repository}/ltx-2-19b-distilled.safetensors": MONOLITH.read_bytes(),
        f"{repository}/ltx-2-spatial-upscaler-x2-1.0.safetensors": UPSCALER.read_bytes(),
    }
    one = replace(gemma, files=tuple(f for f in gemma.files if (GEMMA / f.path).is_file()))
    one = replace(one, files=(*one.files, HubFile("model.safetensors", 0, exact=False)))
    hub.files |= {f"{gemma.repository}/{file.path}": (GEMMA / file.path).read_bytes() for file in one.files}
    monkeypatch.setitem(catalogue().published, gemma.name, one)
    command = ["download", "ltx-2-distilled", "-o", str(tmp_path / "w"), "--convert", "--delete-sources", "--json"]
    assert run(command) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["deleted"]["bytes"] >= MONOLITH.stat().st_size and done["converted"]["reused"] is False
    assert not list((tmp_path / "w" / "ltx-2").glob("*.safetensors")) and not list((tmp_path / "w").rglob("*.jinja"))
    asked = len(hub.asked)
    assert run(command) == 0 and json.loads(capsys.readouterr().out)["reused"] is True
    assert len(hub.asked) == asked
    verified(tmp_path / "w" / "ltx-2-distilled")
