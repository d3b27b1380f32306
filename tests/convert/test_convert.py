"""Converting: the values of every transformation, the model folder, resuming after a kill, what is never touched."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from importlib import import_module
from itertools import groupby
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import save_file

import ltx2
from ltx2.convert.output import journal
from ltx2.convert.plan.entries import Drop, Plan
from ltx2.convert.plan.folder import folder_plan
from ltx2.convert.plan.make import make_plan
from ltx2.convert.tensors.steps import Cast, Spec, Transpose
from ltx2.convert.write import WriteOptions, write_plan
from ltx2.runtime.errors import CheckpointError, InputError, ModelFolderError, NumericsError
from ltx2.runtime.events import BytesDone, Warned, Written
from ltx2.runtime.files.tensors import Array, bf16_to_f32, f32_to_bf16, open_tensorfile
from ltx2.runtime.model.layout import ModelFolder
from tests.convert.test_wrappings import sentencepiece_model
from tests.support.folders import contents
from tests.support.official import DEMO, GEMMA, MONOLITH, UPSCALER, Official, plan_of

SMALL_SHARDS = WriteOptions(shard_gb=0.001)


def run(plan: Plan, out: Path, options: WriteOptions | None = None) -> Written:
    *_, last = write_plan(plan, out, options)
    assert isinstance(last, Written)
    return last


def stored(folder: Path, component: str) -> dict[str, Array]:
    """Every tensor of a component, BF16 as codes."""
    return {n: np.array(f.array(n)) for f in ModelFolder.open(folder).tensor_files(component) for n in f.tensors}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in shards of 1 MB."""
    out = tmp_path_factory.mktemp("shards") / "model"
    run(plan_of(*DEMO, variant="distilled"), out, SMALL_SHARDS)
    return out


@pytest.fixture(scope="module")
def spiece_gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text encoder whose tokenizer is made of a SentencePiece model."""
    source = tmp_path_factory.mktemp("spiece") / "gemma"
    source.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(GEMMA / name, source)
    (source / "tokenizer.model").write_bytes(sentencepiece_model())
    return ltx2.convert(source, source.with_name("model"))


class TestSteps:
    def test_transpose(self) -> None:
        x = np.arange(24).reshape(2, 3, 4)
        step = Transpose((1, 2, 0))
        assert str(step) == "transpose(1,2,0)" and step.spec(Spec((2, 3, 4), "F32")) == Spec((3, 4, 2), "F32")
        np.testing.assert_array_equal(step.rows(x, Spec(x.shape, "F32"), 0), np.moveaxis(x, 0, 2))

    def test_casts_round_once_as_mlx_does(self) -> None:
        values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
        names = {"F32": mx.float32, "BF16": mx.bfloat16, "F16": mx.float16}
        for source, source_type in names.items():
            exact = mx.array(values).astype(source_type)
            codes = np.array(exact.view(mx.uint16)) if source == "BF16" else np.array(exact)
            for target, target_type in names.items():
                got = Cast(target.lower()).rows(codes, Spec(codes.shape, source), 0)
                cast = exact.astype(target_type)
                np.testing.assert_array_equal(got, np.array(cast.view(mx.uint16) if target == "BF16" else cast))

    def test_f16_is_too_narrow(self) -> None:
        with pytest.raises(NumericsError, match="70000"):
            Cast("f16").rows(np.array([1.0, 7e4], np.float32), Spec((2,), "F32"), 0)
        assert np.isinf(Cast("f16").rows(np.array([np.inf], np.float32), Spec((1,), "F32"), 0)).all()  # it was before


class TestValues:
    """Against the official tensors, independently renamed and transposed."""

    def test_every_tensor(self, official: Official, model: Path) -> None:
        expected: dict[str, dict[str, Array]] = {}
        for path in (official.monolith, official.upscaler, official.gemma / "model.safetensors"):
            for name, value in official.tensors(path).items():
                component, key = self.place(path == official.upscaler, name)
                if component:
                    expected.setdefault(component, {})[key] = self.turned(component, key, value)
        assert set(expected) == set(ModelFolder.open(model).manifest.components)
        for component, tensors in expected.items():
            got = stored(model, component)
            assert got.keys() == tensors.keys()
            for key, value in tensors.items():
                np.testing.assert_array_equal(got[key], value, err_msg=f"{component}/{key}")

    @staticmethod
    def place(upscaler: bool, name: str) -> tuple[str, str]:
        if upscaler:
            return ("", "") if name == "upsampler.blur_down.kernel" else ("spatial_upscaler", name)
        if name.startswith("language_model.model."):
            return "text_encoder", name.removeprefix("language_model.")
        if name.startswith("text_embedding_projection."):
            return "connectors", name.replace("text_embedding_projection", "text_projection")
        prefix, _, rest = name.partition(".")
        rest = rest.removeprefix("diffusion_model.").replace("to_out.0", "to_out")
        rest = rest.replace("net.0.proj", "proj_in").replace("net.2", "proj_out")
        for statistic in ("mean", "std"):
            rest = rest.replace(f"statistics.{statistic}-of-means", f"statistics.{statistic}")
        if "_embeddings_connector." in rest:
            return "connectors", rest.replace("_embeddings_connector", "_connector")
        if rest.startswith("per_channel_statistics") and rest.split(".")[1] not in ("mean", "std"):
            return "", ""
        return {"model": "transformer", "vae": "video_vae"}.get(prefix, prefix), rest

    @staticmethod
    def turned(component: str, key: str, value: Array) -> Array:
        if component == "vocoder" and key.startswith("ups.") and value.ndim == 3:
            value = value.swapaxes(0, 1)
        return np.moveaxis(value, 1, -1) if value.ndim >= 3 else value

    def test_bf16_is_copied(self, demo_model: Path) -> None:
        source = open_tensorfile(MONOLITH)
        got = stored(demo_model, "transformer")
        name = "model.diffusion_model.transformer_blocks.2.attn1.to_q.weight"
        np.testing.assert_array_equal(got["transformer_blocks.2.attn1.to_q.weight"], source.array(name))
        table = "model.diffusion_model.transformer_blocks.2.scale_shift_table"
        assert got["transformer_blocks.2.scale_shift_table"].dtype == np.float32
        np.testing.assert_array_equal(got["transformer_blocks.2.scale_shift_table"], source.array(table))

    def test_dtype(self, official: Official, tmp_path: Path) -> None:
        """Every weight is rounded once; tables kept in F32 stay."""
        run(plan_of(official.monolith, dtype="bf16", only=("transformer", "vocoder")), tmp_path / "out")
        source = official.tensors(official.monolith)
        got = stored(tmp_path / "out", "transformer")
        name = "transformer_blocks.0.attn1.to_q.weight"
        np.testing.assert_array_equal(got[name], f32_to_bf16(source[f"model.diffusion_model.{name}"]))
        assert np.abs(bf16_to_f32(got[name]) - source[f"model.diffusion_model.{name}"]).max() < 2**-9
        assert {n for n, v in got.items() if v.dtype == np.float32} == {n for n in got if "scale_shift_table" in n}
        ups = stored(tmp_path / "out", "vocoder")["ups.0.weight"]
        np.testing.assert_array_equal(ups, f32_to_bf16(source["vocoder.ups.0.weight"].transpose(1, 2, 0)))
        record = ModelFolder.open(tmp_path / "out").record("transformer")
        assert record.dtype == "BF16"

    def test_error_of_a_narrow_dtype_names_the_tensor(self, official: Official, tmp_path: Path) -> None:
        tensors = official.tensors(official.upscaler)
        tensors["res_blocks.0.conv1.bias"][3] = 1e6
        metadata = dict(open_tensorfile(official.upscaler).metadata)
        save_file(tensors, tmp_path / "up.safetensors", metadata=metadata)
        with pytest.raises(NumericsError, match=r"res_blocks\.0\.conv1\.bias"):
            run(plan_of(tmp_path / "up.safetensors", dtype="f16"), tmp_path / "out")


class TestFolder:
    def test_manifest(self, demo_model: Path) -> None:
        manifest = ModelFolder.open(demo_model).manifest
        assert (manifest.release, manifest.variant, manifest.tool_version) == ("2.0", "distilled", ltx2.__version__)
        for name, record in manifest.components.items():
            assert record.dtype == "BF16" and record.quantization is None
            for file in record.files:
                data = (demo_model / name / file.name).read_bytes()
                assert (len(data), hashlib.sha256(data).hexdigest()) == (file.size, file.sha256)
        sources = {f.name: f for f in manifest.sources}
        assert sources.keys() == {MONOLITH.name, UPSCALER.name, "model.safetensors"}
        assert sources[MONOLITH.name].sha256 == hashlib.sha256(MONOLITH.read_bytes()).hexdigest()
        listed = {f"{name}/{f.name}" for name, record in manifest.components.items() for f in record.files}
        assert listed | {"ltx2.json", "README.md"} == set(contents(demo_model))

    def test_configurations_are_the_checkpoints_own(self, demo_model: Path) -> None:
        embedded = json.loads(open_tensorfile(MONOLITH).metadata["config"])
        for component, section in {"transformer": "transformer", "video_vae": "vae", "vocoder": "vocoder"}.items():
            assert json.loads((demo_model / component / "config.json").read_text()) == embedded[section]

    def test_tokenizer_is_copied(self, demo_model: Path) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            assert (demo_model / "text_encoder" / name).read_bytes() == (GEMMA / name).read_bytes()

    def test_weights_are_readable_by_mlx(self, demo_model: Path) -> None:
        weights, metadata = mx.load(str(demo_model / "video_vae" / "model.safetensors"), return_metadata=True)
        assert metadata == {"format": "mlx"} and len(weights) == len(stored(demo_model, "video_vae"))

    def test_same_sources_same_bytes(self, demo_model: Path, tmp_path: Path) -> None:
        """In another folder, from copies, in another order."""
        copies = [Path(shutil.copy(path, tmp_path)) for path in (UPSCALER, MONOLITH)]
        shutil.copytree(GEMMA, tmp_path / "gemma")
        run(plan_of(tmp_path / "gemma", *copies, variant="distilled"), tmp_path / "out")
        assert contents(tmp_path / "out") == contents(demo_model)

    def test_links_to_read_only_files(self, demo_model: Path, tmp_path: Path) -> None:
        """As the Hugging Face cache holds files: names are the links', bytes are elsewhere."""
        (tmp_path / "blobs").mkdir()
        (tmp_path / "links" / "gemma").mkdir(parents=True)
        files = {path: tmp_path / "links" / path.name for path in (MONOLITH, UPSCALER)}
        files |= {path: tmp_path / "links" / "gemma" / path.name for path in GEMMA.iterdir()}
        for number, (path, link) in enumerate(files.items()):
            blob = Path(shutil.copy(path, tmp_path / "blobs" / f"{number:064x}"))
            blob.chmod(0o444)
            link.symlink_to(blob)
        run(plan_of(*(tmp_path / "links" / name for name in ("gemma", MONOLITH.name, UPSCALER.name)),
                    variant="distilled"), tmp_path / "out")  # fmt: skip
        assert contents(tmp_path / "out") == contents(demo_model)

    def test_shards(self, shards: Path, demo_model: Path) -> None:
        folder = ModelFolder.open(shards)
        files = folder.weight_files("transformer")
        assert len(files) > 3 and all(f.stat().st_size <= 10**6 for f in files)
        numbers = [f"{n + 1:05d}-of-{len(files):05d}" for n in range(len(files))]
        assert [f.stem for f in files] == [f"model-{number}" for number in numbers]
        index = json.loads((shards / "transformer" / "model.safetensors.index.json").read_text())
        where = {name: f.path.name for f in folder.tensor_files("transformer") for name in f.tensors}
        assert index["weight_map"] == where
        whole = stored(demo_model, "transformer")
        assert index["metadata"] == {
            "total_size": sum(v.nbytes for v in whole.values()), "total_parameters": sum(v.size for v in whole.values())
        }  # fmt: skip
        for name, value in stored(shards, "transformer").items():
            np.testing.assert_array_equal(value, whole[name])

    def test_a_block_is_one_range(self, shards: Path) -> None:
        blocks: set[str] = set()
        for file in ModelFolder.open(shards).tensor_files("transformer"):
            order = sorted(file.tensors.values(), key=lambda t: t.start)
            names = [".".join(t.name.split(".")[:2]) for t in order if t.name.startswith("transformer_blocks.")]
            blocks |= set(names)
            assert [name for name, _ in groupby(names)] == list(dict.fromkeys(names))
        assert blocks == {f"transformer_blocks.{n}" for n in range(6)}

    def test_progress(self, tmp_path: Path) -> None:
        events = list(write_plan(plan_of(UPSCALER), tmp_path / "out"))
        steps = [e for e in events if isinstance(e, BytesDone) and e.file.startswith("spatial_upscaler")]
        assert [e.done for e in steps] == sorted(e.done for e in steps)
        size = sum(len(data) for name, data in contents(tmp_path / "out").items() if "/" in name)
        assert steps[-1].done == steps[-1].total == size
        assert events[-1] == Written(str(tmp_path / "out"), size, events[-1].seconds)  # type: ignore[attr-defined]

    def test_only(self, tmp_path: Path) -> None:
        out = ltx2.convert([MONOLITH, UPSCALER], tmp_path / "out", only=("video_vae",), variant="distilled")
        manifest = ModelFolder.open(out).manifest
        assert list(manifest.components) == ["video_vae"] and [f.name for f in manifest.sources] == [MONOLITH.name]

    def test_a_missing_tokenizer_is_said_to_be_missing(self, tmp_path: Path) -> None:
        for name in ("config.json", "model.safetensors"):
            shutil.copy(GEMMA / name, tmp_path)
        with pytest.raises(CheckpointError, match="comes without a tokenizer"):
            list(write_plan(plan_of(tmp_path), tmp_path / "out"))
        assert not any(isinstance(event, Warned) for event in write_plan(plan_of(GEMMA), tmp_path / "whole"))

    @pytest.mark.parametrize("tokenizer", ["beside the weights", "in their file", "made"])
    def test_copying_a_model_folder(
        self, demo_model: Path, demo_25: Path, spiece_gemma: Path, tmp_path: Path, tokenizer: str
    ) -> None:
        """What quantizing starts from: the plan of a folder reproduces it, its manifest and companions included."""
        model = {"beside the weights": demo_model, "in their file": demo_25, "made": spiece_gemma}[tokenizer]
        plan = folder_plan(ModelFolder.open(model))
        assert not any(isinstance(e, Drop) for e in plan.entries)
        run(plan, tmp_path / "copy")
        assert contents(tmp_path / "copy") == contents(model)


class TestExistingFolders:
    @pytest.fixture
    def made(self, tmp_path: Path) -> Path:
        run(plan_of(UPSCALER), tmp_path / "out")
        return tmp_path / "out"

    def test_again_says_it_is_done(self, made: Path) -> None:
        before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
        done = run(plan_of(UPSCALER), made)
        assert done.reused and {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before

    def test_touched_source_is_the_same(self, made: Path, tmp_path: Path) -> None:
        (tmp_path / "copy").mkdir()
        copy = Path(shutil.copy(UPSCALER, tmp_path / "copy"))
        assert run(plan_of(copy), made).reused

    def test_changed_source_is_another(self, made: Path, tmp_path: Path) -> None:
        """Same name, same size, one bit."""
        (tmp_path / "copy").mkdir()
        copy = Path(shutil.copy(UPSCALER, tmp_path / "copy"))
        with copy.open("r+b") as f:
            f.seek(-1, os.SEEK_END)
            f.write(bytes([UPSCALER.read_bytes()[-1] ^ 1]))
        with pytest.raises(ModelFolderError, match="different model"):
            run(plan_of(copy), made)

    @pytest.mark.parametrize("options", [{"dtype": "f16"}, {"variant": "dev"}], ids=["dtype", "variant"])
    def test_other_options_make_another(self, made: Path, options: dict[str, str]) -> None:
        before = contents(made)
        with pytest.raises(ModelFolderError, match="different model") as error:
            run(plan_of(UPSCALER, **options), made)
        assert "--force" in error.value.fix and contents(made) == before

    def test_force_replaces_when_complete(self, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before, plan = contents(made), plan_of(UPSCALER, dtype="f16")
        events = write_plan(plan, made, WriteOptions(force=True))
        next(events)
        events.close()  # type: ignore[attr-defined]
        assert contents(made) == before
        run(plan, made, WriteOptions(force=True))
        assert ModelFolder.open(made).record("spatial_upscaler").dtype == "F16"
        assert [p.name for p in made.parent.iterdir()] == ["out"]

    @pytest.mark.parametrize("moment", ["before", "after"])
    def test_crash_while_replacing(self, made: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
        """The moment at which the old model has lost its name and the new one has it not yet, or just has it."""
        plan, finish = plan_of(UPSCALER, dtype="f16"), journal.Partial.finish

        def crash(partial: journal.Partial, target: Path) -> None:
            if moment == "after":
                shutil.copy(partial.path / journal.JOURNAL, made.parent / "kept")
                finish(partial, target)
                shutil.move(made.parent / "kept", target / journal.JOURNAL)
            raise KeyboardInterrupt

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(journal.Partial, "finish", crash)
            run(plan, made, WriteOptions(force=True))
        assert made.exists() == (moment == "after")
        assert run(plan, made).reused == (moment == "after")
        assert ModelFolder.open(made).record("spatial_upscaler").dtype == "F16"
        assert not (made / journal.JOURNAL).exists() and not (made.parent / "out.partial").exists()
        run(plan_of(UPSCALER), made, WriteOptions(force=True))
        assert [p.name for p in made.parent.iterdir()] == ["out"]

    def test_damaged_model_is_not_done(self, made: Path) -> None:
        (made / "spatial_upscaler" / "model.safetensors").unlink()
        with pytest.raises(ModelFolderError, match="damaged"):
            run(plan_of(UPSCALER), made)

    @pytest.mark.parametrize("force", [False, True])
    def test_other_folders_are_never_touched(self, tmp_path: Path, force: bool) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("precious")
        with pytest.raises(ModelFolderError, match="not a model folder"):
            run(plan_of(UPSCALER), tmp_path / "out", WriteOptions(force=force))
        assert contents(tmp_path) == {"out/thesis.txt": b"precious"}

    def test_a_file_in_the_way(self, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("precious")
        with pytest.raises(ModelFolderError):
            run(plan_of(UPSCALER), tmp_path / "out", WriteOptions(force=True))
        assert (tmp_path / "out").read_text() == "precious"

    def test_something_under_the_unfinished_name(self, tmp_path: Path) -> None:
        (tmp_path / "out.partial").mkdir()
        (tmp_path / "out.partial" / "thesis.txt").write_text("precious")
        with pytest.raises(ModelFolderError, match="in the way"):
            run(plan_of(UPSCALER), tmp_path / "out")
        assert contents(tmp_path) == {"out.partial/thesis.txt": b"precious"}

    def test_empty_folder_is_filled(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        assert not run(plan_of(UPSCALER), tmp_path / "out").reused

    def test_output_inside_which_the_source_lies(self, tmp_path: Path) -> None:
        copy = Path(shutil.copy(UPSCALER, tmp_path))
        with pytest.raises(InputError, match="never modified"):
            run(plan_of(copy), tmp_path, WriteOptions(force=True))

    def test_one_writer_at_a_time(self, tmp_path: Path) -> None:
        events = write_plan(plan_of(UPSCALER), tmp_path / "out")
        next(events)
        with pytest.raises(InputError, match="being written"):
            run(plan_of(UPSCALER), tmp_path / "out")
        assert isinstance(list(events)[-1], Written)

    def test_a_model_that_appears_meanwhile_stays(self, tmp_path: Path) -> None:
        events = write_plan(plan_of(UPSCALER), tmp_path / "out")
        next(events)
        ltx2.convert([UPSCALER], tmp_path / "other", dtype="f16")
        (tmp_path / "other").rename(tmp_path / "out")
        before = contents(tmp_path / "out")
        with pytest.raises(ModelFolderError, match="appeared"):
            list(events)
        assert contents(tmp_path / "out") == before

    def test_shard_size(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="--shard-size"):
            run(plan_of(UPSCALER), tmp_path / "out", WriteOptions(shard_gb=0))


def test_import_is_light() -> None:
    """Neither `import ltx2` nor planning loads MLX."""
    code = "import sys, ltx2, ltx2.convert.plan.make; sys.exit('mlx.core' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent.parent, check=True)


def test_convert_is_a_package_and_a_function(tmp_path: Path) -> None:
    assert ltx2.convert([str(UPSCALER)], str(tmp_path / "out")) == tmp_path / "out"
    assert vars(import_module("ltx2.convert.plan.make"))["make_plan"] is make_plan
