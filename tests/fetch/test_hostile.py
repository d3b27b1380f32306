"""Files from strangers: whatever they hold, the command says what is wrong, at once, and writes nothing."""

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from cProfile import Profile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ltx2.runtime.errors import CheckpointError, Ltx2Error
from ltx2.runtime.files.jsonfile import MAX_DEPTH, parse_json
from ltx2.runtime.files.tensors import HEADER_BYTES, open_tensorfile
from tests.support.command import Here
from tests.support.hostile import (
    DEEP,
    ESCAPES,
    MALFORMED,
    NAMES,
    PLACES,
    TEXTS,
    VALUES,
    Mutation,
    edit,
    entry,
    harmless,
    raw,
    refused,
    spoiled,
)
from tests.support.official import GEMMA, MONOLITH, UPSCALER
from tests.support.published import read_header, write_sparse

pytestmark = pytest.mark.usefixtures("in_time")
MEGABYTES = 500
STARTED = 100  # what a process takes that has read nothing


class TestSources:
    @pytest.mark.parametrize("name", MALFORMED)
    def test_malformed_files(self, here: Here, tmp_path: Path, name: str) -> None:
        path = tmp_path / "x.safetensors"
        path.write_bytes(MALFORMED[name])
        refused(here, "inspect", path, said="x.safetensors", beside=tmp_path)
        refused(here, "convert", path, "-o", tmp_path / "out", said="x.safetensors", beside=tmp_path)
        refused(here, "convert", path, "-o", tmp_path / "out", "--dry-run", beside=tmp_path)
        refused(here, "inspect", tmp_path, beside=tmp_path)  # the folder that holds it

    @pytest.mark.parametrize("name", MALFORMED)
    def test_the_library_rejects_them_too(self, tmp_path: Path, name: str) -> None:
        """All but duplicate names, spellings of the dtype, and long headers."""
        path = tmp_path / "x.safetensors"
        path.write_bytes(MALFORMED[name])
        ours = name in ("duplicate names", "duplicate metadata", "dtype is an object")
        try:
            with safe_open(path, framework="numpy"):
                assert ours
        except (SafetensorError, OSError):
            assert not ours

    @pytest.mark.parametrize("place", PLACES)
    def test_what_is_no_file(self, here: Here, tmp_path: Path, place: str) -> None:
        path = tmp_path / "x.safetensors"
        PLACES[place](path)
        refused(here, "inspect", path, beside=tmp_path)
        refused(here, "convert", path, "-o", tmp_path / "out", beside=tmp_path)
        if place != "nothing":
            refused(here, "convert", tmp_path, "-o", tmp_path / "out", beside=tmp_path)

    @pytest.mark.parametrize("text", TEXTS)
    def test_embedded_configurations(self, here: Here, tmp_path: Path, text: str) -> None:
        path = tmp_path / "x.safetensors"
        value = TEXTS[text].decode("latin-1")
        if text in ("Latin-1", "twice") or not value:
            value += "!"
        header = {"__metadata__": {"config": value}, "vae.a": entry(0, 4, [1])}
        path.write_bytes(raw(header, bytes(4)))
        refused(here, "inspect", path, beside=tmp_path)
        refused(here, "convert", path, "-o", tmp_path / "out", beside=tmp_path)

    def test_names_do_not_reach_the_terminal(self, here: Here, tmp_path: Path) -> None:
        for name in (ESCAPES, f"vae.{ESCAPES}", f"model.diffusion_model.{ESCAPES}", "../../x", "/etc/passwd"):
            path = tmp_path / "x\x1b[31m.safetensors"
            config = json.dumps({"vae": {"_class_name": ESCAPES}, "transformer": {ESCAPES: ESCAPES}})
            path.write_bytes(raw({"__metadata__": {"config": config, ESCAPES: ""}, name: entry(0, 4, [1])}, bytes(4)))
            harmless(here("inspect", path))
            refused(here, "convert", path, "-o", tmp_path / "out", "--variant", "dev", beside=tmp_path)
            path.unlink()

    @pytest.mark.parametrize("name", ["9" * 5000, "²", ".1" * 5000, "x" * 100_000, "a\nb", "..", "", "\0"])
    def test_names_of_any_kind(self, here: Here, tmp_path: Path, name: str) -> None:
        for prefix in ("", "model.diffusion_model.", "vae.", "diffusion_model.", "upsampler.", "language_model.model."):
            path = tmp_path / "x.safetensors"
            names = [prefix + name, f"{prefix}{name}.lora_A.weight", f"{prefix}{name}.weight_scale"]
            tensors = {n: entry(4 * i, 4 * i + 4, [1, 1]) for i, n in enumerate(names)}
            path.write_bytes(raw({"__metadata__": {"config": '{"vae": {}, "transformer": {}}'}, **tensors}, bytes(12)))
            harmless(here("inspect", path))
            refused(here, "convert", path, "-o", tmp_path / "out", "--variant", "dev", beside=tmp_path)

    def test_places_without_a_name(self, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        for place in (".", "..", "x/.."):
            harmless(here("convert", UPSCALER, "-o", place)).failed(1)
        assert not list(tmp_path.iterdir())

    def test_shapes_that_no_array_has(self, here: Here, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        for shape in ([0, 1 << 63], [1] * 100, [0] * 1000):
            size = 4 * all(shape)
            path.write_bytes(raw({"vae.a.weight": entry(0, size, shape)}, bytes(size)))
            refused(here, "convert", path, "-o", tmp_path / "out", beside=tmp_path)

    def test_a_file_that_shrinks(self, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        save_file({"a": np.zeros(10_000, np.float32)}, path)
        file = open_tensorfile(path)
        with path.open("r+b") as f:
            f.truncate(100)
        with pytest.raises(CheckpointError, match="a of x"):
            file.array("a")

    def test_links_are_files(self, here: Here, tmp_path: Path) -> None:
        """As in the Hugging Face cache."""
        (tmp_path / "x.safetensors").symlink_to(MONOLITH)
        assert here("inspect", tmp_path / "x.safetensors").code == 0

    def test_a_file_among_the_tensors_twice(self, here: Here, tmp_path: Path) -> None:
        files, metadata, tensors = read_header("gemma4-12b-with-proj-ltx-2.5-bf16")
        tensors["hf_asset__tokenizer.json"] = ("U8", (9,))
        path = write_sparse(tmp_path / next(iter(files)), tensors, metadata)
        done = harmless(here("convert", path, "-o", tmp_path / "out"))
        done.failed(1, "text_encoder/tokenizer.json")
        assert list(tmp_path.iterdir()) == [path]


class TestGemmaFolders:
    @pytest.fixture
    def gemma(self, tmp_path: Path) -> Path:
        """A copy of the demo's text encoder with an index."""
        folder = Path(shutil.copytree(GEMMA, tmp_path / "gemma"))
        names = open_tensorfile(folder / "model.safetensors").tensors
        index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        save_file({"a": np.zeros(1, np.float32)}, tmp_path / "secret.safetensors")
        return folder

    @pytest.mark.parametrize("name", range(len(NAMES)))
    def test_an_index_that_leads_elsewhere(self, here: Here, gemma: Path, tmp_path: Path, name: int) -> None:
        edit(gemma / "model.safetensors.index.json", lambda data: data["weight_map"].update(other=NAMES[name]))
        refused(here, "inspect", gemma, said="index", beside=tmp_path)
        refused(here, "convert", gemma, "-o", tmp_path / "out", said="index", beside=tmp_path)

    @pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
    @pytest.mark.parametrize("text", TEXTS)
    def test_json(self, here: Here, gemma: Path, tmp_path: Path, file: str, text: str) -> None:
        (gemma / file).write_bytes(TEXTS[text])
        refused(here, "inspect", gemma, beside=tmp_path)
        refused(here, "convert", gemma, "-o", tmp_path / "out", beside=tmp_path)

    @pytest.mark.parametrize("value", range(len(VALUES)))
    def test_index_values(self, here: Here, gemma: Path, tmp_path: Path, value: int) -> None:
        (gemma / "model.safetensors.index.json").write_text(json.dumps({"weight_map": VALUES[value]}))
        refused(here, "convert", gemma, "-o", tmp_path / "out", beside=tmp_path)

    @pytest.mark.parametrize("key", ["rope_parameters", "layer_types", "rope_scaling", "num_hidden_layers"])
    def test_configuration_values(self, here: Here, gemma: Path, tmp_path: Path, key: str) -> None:
        def change(value: Any, data: dict[str, Any]) -> None:
            data["text_config"][key] = value

        nested = [{"full_attention": v, "sliding_attention": v} for v in VALUES]
        for value in (*VALUES, *nested):
            edit(gemma / "config.json", partial(change, value))
            harmless(here("convert", gemma, "-o", tmp_path / "out", "--dry-run"))

    @pytest.mark.parametrize("place", sorted(set(PLACES) - {"nothing"}))
    def test_files_that_are_none(self, here: Here, gemma: Path, tmp_path: Path, place: str) -> None:
        for name in ("config.json", "model.safetensors.index.json", "model.safetensors"):
            (gemma / name).unlink()
            PLACES[place](gemma / name)
            refused(here, "convert", gemma, "-o", tmp_path / "out", beside=tmp_path)
            shutil.rmtree(gemma)
            shutil.copytree(GEMMA, gemma)
            (gemma / "model.safetensors.index.json").write_text('{"weight_map": {}}')


def rename_file(name: Any) -> Mutation:
    return lambda data: data["components"]["vocoder"]["files"][0].update(name=name)


def rename_component(name: str) -> Mutation:
    return lambda data: data["components"].update({name: data["components"].pop("vocoder")})


class TestModelFolders:
    def refused(self, here: Here, stranger: Path, said: str = "") -> None:
        beside = stranger.parent
        commands: list[list[str | Path]] = [
            ["verify", stranger],
            ["inspect", stranger],
            ["quantize", stranger, "-o", beside / "out"],
            ["generate", "x", "-m", stranger, "-o", beside / "clip.mp4"],
        ]
        for command in commands:
            refused(here, *command, said=said, beside=beside)

    @pytest.mark.parametrize("name", range(len(NAMES)))
    def test_files_elsewhere(self, here: Here, stranger: Path, name: int) -> None:
        edit(stranger / "ltx2.json", rename_file(NAMES[name]))
        self.refused(here, stranger, "ltx2.json")

    @pytest.mark.parametrize(
        "name",
        ["..", "../model", "../..", "/etc", ".", "", "x", "vocoder/..", "loras", "loras/", "loras/..", "loras/../..",
         "loras/a/b", "loras/\x1b[2J", "a\0b", "ltx2.json", "y" * 5000, "loras/" + "y" * 5000],
    )  # fmt: skip
    def test_components_elsewhere(self, here: Here, stranger: Path, name: str) -> None:
        edit(stranger / "ltx2.json", rename_component(name))
        self.refused(here, stranger, "there is no component")

    @pytest.mark.parametrize("text", TEXTS)
    def test_manifests(self, here: Here, stranger: Path, text: str) -> None:
        (stranger / "ltx2.json").write_bytes(TEXTS[text])
        self.refused(here, stranger, "ltx2.json")

    @pytest.mark.parametrize("text", TEXTS)
    def test_configurations(self, here: Here, stranger: Path, text: str) -> None:
        (stranger / "vocoder" / "config.json").write_bytes(TEXTS[text])
        refused(here, "verify", stranger, said="vocoder", beside=stranger.parent)
        refused(here, "quantize", stranger, "-o", stranger.parent / "out", said="vocoder", beside=stranger.parent)

    def test_values_of_the_manifest(self, here: Here, stranger: Path) -> None:
        for text in spoiled(json.loads((stranger / "ltx2.json").read_text())):
            (stranger / "ltx2.json").write_text(text)
            harmless(here("verify", stranger, "-q"))
            harmless(here("inspect", stranger))

    def test_values_of_configurations(self, here: Here, stranger: Path) -> None:
        for config in (stranger / "vocoder" / "config.json", stranger / "connectors" / "config.json"):
            for text in spoiled(json.loads(config.read_text()) | {"quantization": {"group_size": 64, "bits": 4}}):
                config.write_text(text)
                harmless(here("verify", stranger, "-q")).failed(1)

    @pytest.mark.parametrize("place", PLACES)
    @pytest.mark.parametrize("name", ["ltx2.json", "vocoder/config.json", "vocoder/model-00001-of-00002.safetensors"])
    def test_what_is_no_file(self, here: Here, stranger: Path, name: str, place: str) -> None:
        (stranger / name).unlink()
        PLACES[place](stranger / name)
        refused(here, "verify", stranger, beside=stranger.parent)
        refused(here, "quantize", stranger, "-o", stranger.parent / "out", beside=stranger.parent)


class TestSideFiles:
    @pytest.mark.parametrize("option", ["--from", "--noise", "--latents", "--embeddings"])
    @pytest.mark.parametrize("place", PLACES)
    def test_what_is_no_file(self, generate: Here, tmp_path: Path, option: str, place: str) -> None:
        PLACES[place](tmp_path / "x.file")
        refused(generate, "x", option, tmp_path / "x.file", beside=tmp_path)

    @pytest.mark.parametrize("text", TEXTS)
    def test_json(self, here: Here, generate: Here, stranger: Path, tmp_path: Path, text: str) -> None:
        (tmp_path / "x.json").write_bytes(TEXTS[text])
        refused(generate, "--from", tmp_path / "x.json", said="x.json", beside=tmp_path)
        command: list[str | Path] = ["quantize", stranger, "-o", tmp_path / "out", "--recipe", tmp_path / "x.json"]
        refused(here, *command, said="x.json", beside=tmp_path)

    def test_values_of_a_sidecar(self, generate: Here, demo_f32: Path, tmp_path: Path) -> None:
        record = {"request": {"prompt": "x", "frames": 9, "seed": 1, "fps": 24.0}, "model": {"path": "y", "files": {}}}
        for text in spoiled(record):
            (tmp_path / "x.json").write_text(text)
            harmless(generate("--from", tmp_path / "x.json", to="clip.mp4", size=["--width", "33"]))

    @pytest.mark.parametrize("name", MALFORMED)
    def test_malformed_tensors(self, generate: Here, tmp_path: Path, name: str) -> None:
        (tmp_path / "x.safetensors").write_bytes(MALFORMED[name])
        refused(generate, "--latents", tmp_path / "x.safetensors", beside=tmp_path)

    def test_tensors_that_no_clip_needs(self, generate: Here, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        header = {"video": entry(0, 1 << 40, [1 << 38]), "audio": entry(1 << 40, 2 << 40, [1 << 38])}
        path.write_bytes(raw(header))
        with path.open("r+b") as f:
            f.truncate(path.stat().st_size + (2 << 40))
        harmless(generate("--latents", path)).failed(1, "too large")


# A process's own peak: what the system counts for a child may begin with its parent's.
MEASURED = """
import sys
from ltx2.cli import run
from ltx2.runtime.machine.process import process_peak_memory
code = run(sys.argv[1:])
print()
print(process_peak_memory())
sys.exit(code)
"""


def measured(*args: str | Path) -> tuple[int, float]:
    """Exit code and megabytes of a command in a process of its own."""
    command = [sys.executable, "-c", MEASURED, *map(str, args)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, float(done.stdout.splitlines()[-1]) / 1e6


def many_tensors(header: int = HEADER_BYTES) -> bytes:
    """As many tensors as a header of this size can hold; the largest that is read."""
    start = json.dumps({"__metadata__": {"config": '{"vae": {}}'}})[:-1].encode()
    room = header - len(start) - 1
    parts: list[bytes] = []
    size = 0
    while size < room - 100:
        parts.append(f',"vae.{len(parts):x}":{{"dtype":"BF16","shape":[0],"data_offsets":[0,0]}}'.encode())
        size += len(parts[-1])
    return raw(start + b"".join(parts) + b"}")


class TestSize:
    def check(self, *args: str | Path, code: int, figure: Callable[..., None], most: float = MEGABYTES) -> None:
        got, megabytes = measured(*args)
        assert got == code
        figure(f"hostile {args[0]}, MB", megabytes, limit=most)

    @pytest.mark.parametrize("share", [4, pytest.param(1, marks=pytest.mark.thorough)])
    def test_as_many_tensors_as_are_read(self, tmp_path: Path, figure: Callable[..., None], share: int) -> None:
        """Or a quarter of them in what they may take of the memory."""
        path, most = tmp_path / "x.safetensors", STARTED + (MEGABYTES - STARTED) / share
        path.write_bytes(many_tensors(HEADER_BYTES // share))
        self.check("inspect", path, code=0, figure=figure, most=most)
        self.check("convert", path, "-o", tmp_path / "out", code=1, figure=figure, most=most)
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize("command", [["inspect"], ["convert", "--dry-run", "-o", "out"]], ids=lambda args: args[0])
    def test_twice_the_tensors_are_twice_the_work(self, here: Here, tmp_path: Path, command: list[str]) -> None:
        """Counted in calls, which unlike seconds are the same on a busy machine."""
        path, calls = tmp_path / "x.safetensors", []
        for size in (100_000, 100_000, 200_000, 400_000):  # the first imports
            path.write_bytes(many_tensors(size))
            profile = Profile()
            profile.runcall(here, *command, path)
            calls.append(sum(entry.callcount for entry in profile.getstats()))
        _, small, middle, large = calls
        assert large - middle < 2.2 * (middle - small)

    def test_more_than_is_read(self, tmp_path: Path, figure: Callable[..., None]) -> None:
        path = tmp_path / "x.safetensors"
        path.write_bytes(many_tensors() + bytes(90_000_000))
        with path.open("r+b") as f:
            f.write(struct.pack("<Q", 90_000_000))
        self.check("inspect", path, code=1, figure=figure)

    def test_networks_as_large_as_are_built(self, here: Here, tmp_path: Path) -> None:
        file = open_tensorfile(MONOLITH)
        config = json.loads(file.metadata["config"])
        config["transformer"] |= {"num_layers": 128, "connector_num_layers": 128}
        config["vae"] |= {name: [["res_x", {"num_layers": 128}]] * 16 for name in ("encoder_blocks", "decoder_blocks")}
        many = {f"{part}_sizes": [3] * 16 for part in ("upsample_kernel", "resblock_kernel")}
        config["vocoder"] |= many | {"upsample_rates": [1] * 16, "resblock_dilation_sizes": [[1] * 16] * 16}
        tensors = {name: np.zeros(tensor.shape, np.float16) for name, tensor in file.tensors.items()}
        save_file(tensors, tmp_path / "x.safetensors", metadata={"config": json.dumps(config)})
        command: list[str | Path] = ["convert", tmp_path / "x.safetensors", "-o", tmp_path / "out", "--variant", "dev"]
        refused(here, *command, beside=tmp_path)


def test_an_unfinished_folder_that_leads_elsewhere(here: Here, stranger: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "journal.jsonl").write_text('{"fingerprint": "x"}\n')
    (tmp_path / "out.partial").symlink_to(other)
    refused(here, "quantize", stranger, "-o", tmp_path / "out", said="in the way", beside=tmp_path)
    (tmp_path / "out.partial").unlink()
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "journal.jsonl").symlink_to(other / "journal.jsonl")
    refused(here, "quantize", stranger, "-o", tmp_path / "out", said="in the way", beside=tmp_path)


@pytest.mark.parametrize("depth", [MAX_DEPTH, MAX_DEPTH + 1])
def test_depth_of_json(depth: int) -> None:
    text = "[" * depth + "1" + "]" * depth
    if depth == MAX_DEPTH:
        assert json.dumps(parse_json(text)) == text
    else:
        with pytest.raises(ValueError, match="nested deeper"):
            parse_json(text)
    with pytest.raises(ValueError, match="nested deeper"):
        parse_json(DEEP)


def test_messages_are_printable_and_short() -> None:
    error = Ltx2Error(f"a{ESCAPES}b", "y" * 1_000_000, "Zoë \u2264 3")
    assert error.what == r"a\x1b[2J\x07\r\n\u202e\u2028\x00\x7fb"
    assert len(str(error)) < 10_000 and error.fix == "Zoë \u2264 3"
