"""Sources: recognised by content, completed by options, or refused with the reason and the remedy."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ltx2.convert.names.release import releases
from ltx2.convert.plan.check import check_plan
from ltx2.convert.sources.checkpoint import open_sources
from ltx2.convert.sources.source import variant_in_name
from ltx2.runtime.errors import CheckpointError, ConfigError, InputError, UnsupportedError, UsageError
from tests.support import published
from tests.support.official import DEMO, GEMMA, MONOLITH, UPSCALER, plan_of

SHARD: published.Tensors = {"language_model.model.norm.weight": ("F32", (2,)), "vision_tower.x.weight": ("F32", (2,))}


class TestVariant:
    @pytest.mark.parametrize(
        ("name", "variant"),
        [
            ("ltx-2-19b-dev", "dev"), ("LTX_2_Distilled", "distilled"), ("device", None), ("ltx-2-demo", None),
            ("dev-with-distilled-lora", None),
        ],
    )  # fmt: skip
    def test_in_name(self, name: str, variant: str | None) -> None:
        assert variant_in_name(name) == variant

    def test_asks_for_the_option(self) -> None:
        with pytest.raises(InputError, match="--variant"):
            plan_of(MONOLITH)

    def test_is_not_needed_without_a_transformer(self) -> None:
        assert plan_of(UPSCALER, GEMMA).variant is None


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "error"),
        [({"variant": "turbo"}, UsageError), ({"dtype": "int4"}, UsageError), ({"only": ("vae",)}, InputError)],
        ids=str,
    )
    def test_unknown_values(self, options: dict[str, Any], error: type[InputError]) -> None:
        with pytest.raises(error):
            plan_of(*DEMO, **{"variant": "dev", **options})

    def test_only_what_no_source_holds(self) -> None:
        with pytest.raises(InputError, match="vocoder"):
            plan_of(UPSCALER, only=("vocoder",))


class TestSources:
    """Recognition by content, and refusals that say what was recognised."""

    def write(self, folder: Path, tensors: published.Tensors, metadata: dict[str, str] | None = None) -> Path:
        return published.write_sparse(folder / "file.safetensors", tensors, metadata or {})

    @pytest.mark.parametrize(
        ("extra", "said"),
        [
            ({"weight": ("U32", (8, 2)), "scales": ("BF16", (8, 1))}, "MLX-quantized.*another tool"),
            (
                {"weight": ("F64", (8, 8))},
                "F64 weights.*f32, FP8, MXFP8, NVFP4 and int8 weights are converted",
            ),
        ],
    )
    def test_storage_that_is_not_converted(self, tmp_path: Path, extra: published.Tensors, said: str) -> None:
        layer = "model.diffusion_model.transformer_blocks.1.attn1.to_k."
        with pytest.raises(UnsupportedError, match=said):
            open_sources([self.write(tmp_path, {layer + name: spec for name, spec in extra.items()})])

    @pytest.mark.parametrize(
        ("tensors", "metadata", "release"),
        [
            ({"model.diffusion_model.prompt_adaln_single.linear.weight": ("BF16", (2, 2))}, {}, "2.3"),
            ({"vae.encoder.conv_in.conv.weight": ("BF16", (2, 2))}, {"model_version": "2.3.0"}, "2.3"),
            ({"vae.encoder.conv_in.conv.weight": ("BF16", (2, 2))}, {}, None),
            ({"model.diffusion_model.keyframes_abs_pos_embedding": ("BF16", (1, 2))}, {}, "2.5"),
            ({"vae.encoder.conv_in.conv.weight": ("BF16", (2, 2))}, {"model_version": "2.5.0"}, "2.5"),
            ({"encoder.conv.weight": ("F16", (2, 2))}, {"model_version": "2.5.1", "config": '{"vae": {}}'}, "2.5"),
            ({"model.norm.weight": ("BF16", (2,))}, {"gemma_config": '{"gemma_version": "x"}'}, "2.5"),
            (
                {"upsampler.0.weight": ("BF16", (8, 2, 3, 3))},
                {"config": '{"_class_name": "LatentUpsampler", "spatial_upsample": true, "temporal_upsample": false}'},
                "2.3",
            ),
        ],
    )
    def test_release(
        self, tmp_path: Path, tensors: published.Tensors, metadata: dict[str, str], release: str | None
    ) -> None:
        (source,) = open_sources([self.write(tmp_path, tensors, metadata)])
        assert (source.release.name if source.release else None) == release

    def test_releases_are_data(self) -> None:
        assert [release.name for release in releases()] == ["2.0", "2.3", "2.5"]

    def test_mixed_signs(self, tmp_path: Path) -> None:
        tensors: published.Tensors = {"vocoder.conv_pre.weight": ("BF16", (2, 2, 7))}
        with pytest.raises(CheckpointError, match="mixes releases"):
            open_sources([self.write(tmp_path, tensors, {"model_version": "2.3.0"})])

    def test_unknown_file(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"not an LTX-2 file.*unet\.conv"):
            open_sources([self.write(tmp_path, {"unet.conv": ("F32", (2, 2))})])

    def test_unknown_tensor(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, {"vae.conv": ("F32", (2, 2)), "extra.thing": ("F32", (2,))})
        with pytest.raises(CheckpointError, match=r"1 of 2 match no rule.*extra\.thing"):
            plan_of(path)

    def test_missing_configuration(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"config\.vae"):
            plan_of(self.write(tmp_path, {"vae.conv": ("F32", (2, 2))}))

    def test_unknown_configuration_key(self, tmp_path: Path) -> None:
        _, metadata, tensors = published.read_header(published.TEMPORAL)
        config = json.loads(metadata["config"]) | {"attention": True}
        path = self.write(tmp_path, tensors, {"config": json.dumps(config)})
        with pytest.raises(ConfigError, match="attention"):
            check_plan(plan_of(path))

    def test_unreadable_configuration(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, {"vae.conv": ("F32", (2, 2))}, {"config": "{"})
        with pytest.raises(CheckpointError, match="unreadable configuration"):
            open_sources([path])

    def test_upscaler_without_direction(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="space or time"):
            open_sources([self.write(tmp_path, {"upsampler.conv.weight": ("F32", (2, 2, 3, 3))})])

    def test_truncated_file(self, tmp_path: Path) -> None:
        path = tmp_path / "cut.safetensors"
        path.write_bytes(MONOLITH.read_bytes()[:-1])
        with pytest.raises(CheckpointError, match="not a valid safetensors file"):
            open_sources([path])

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="cannot read"):
            open_sources([tmp_path / "nothing.safetensors"])

    def test_the_same_source_twice(self) -> None:
        with pytest.raises(InputError, match="twice"):
            open_sources([UPSCALER, UPSCALER.parent / "." / UPSCALER.name])

    def test_no_source(self) -> None:
        with pytest.raises(InputError):
            open_sources([])

    def test_folder_of_files(self) -> None:
        assert [s.kind for s in open_sources([MONOLITH.parent])] == ["spatial_upscaler", "checkpoint"]

    def test_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="holds no checkpoint"):
            open_sources([tmp_path])

    def test_model_folder(self, tmp_path: Path) -> None:
        (tmp_path / "ltx2.json").write_text("{}")
        with pytest.raises(InputError, match=r"already a model folder.*sources are published files"):
            open_sources([tmp_path])

    @pytest.mark.parametrize("named", ["", "model.safetensors"])
    @pytest.mark.parametrize("part", ["transformer", "video_vae", "loras/style"])
    def test_one_network_of_a_model_folder(self, tmp_path: Path, part: str, named: str) -> None:
        """Or a file of it, from wherever it is named."""
        (tmp_path / part).mkdir(parents=True)
        published.write_sparse(tmp_path / part / "model.safetensors", SHARD, {"format": "mlx"})
        for path in (tmp_path / "ltx2.json", tmp_path / part / "config.json"):
            path.write_text("{}")
        with pytest.raises(InputError, match=f"one network of a model: {tmp_path} is the model folder.*ltx2 quantize"):
            open_sources([tmp_path / part / named])
        with contextlib.chdir(tmp_path / part), pytest.raises(InputError, match="one network of a model"):
            open_sources([Path(named)])

    def test_a_file_that_only_lies_in_a_model_folder(self, tmp_path: Path) -> None:
        (tmp_path / "ltx2.json").write_text("{}")
        (tmp_path / "mine").mkdir()
        assert [source.kind for source in open_sources([Path(shutil.copy(UPSCALER, tmp_path / "mine"))])]

    def test_one_network_laid_out_for_diffusers(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"_class_name": "X", "_diffusers_version": "0.37.0"}')
        with pytest.raises(UnsupportedError, match=r"laid out for diffusers.*as Lightricks publishes it"):
            open_sources([tmp_path])


class TestGemmaFolder:
    def folder(self, path: Path, tensors: published.Tensors | None = None, **config: object) -> Path:
        published.write_sparse(path / "model-00001-of-00002.safetensors", tensors or SHARD, {})
        published.write_sparse(path / "model-00002-of-00002.safetensors", {"language_model.model.x": ("F32", (1,))}, {})
        (path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": {}} | config))
        return path

    def test_companions(self) -> None:
        (source,) = open_sources([GEMMA])
        assert [p.name for p in source.companions] == [
            "generation_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
        ]  # fmt: skip

    def test_missing_shard_without_index(self, tmp_path: Path) -> None:
        (self.folder(tmp_path) / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors is missing"):
            open_sources([tmp_path])

    def test_missing_shard_with_index(self, tmp_path: Path) -> None:
        folder = self.folder(tmp_path)
        where = {"language_model.model.norm.weight": "model-00003-of-00003.safetensors"}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        with pytest.raises(CheckpointError, match=r"model-00003-of-00003\.safetensors is missing"):
            open_sources([folder])

    def test_index_of_other_files(self, tmp_path: Path) -> None:
        folder = self.folder(tmp_path)
        where = dict.fromkeys((*SHARD, "language_model.model.x"), "model-00001-of-00002.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        with pytest.raises(CheckpointError, match=r"1 tensors are elsewhere.*language_model\.model\.x"):
            open_sources([folder])

    def test_one_shard_alone(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"is a part of a text encoder.*name its folder"):
            open_sources([self.folder(tmp_path) / "model-00001-of-00002.safetensors"])

    @pytest.mark.parametrize(
        ("config", "said"),
        [
            ({"model_type": "gemma2", "hidden_size": 3584, "num_hidden_layers": 42}, "Gemma 2 9B"),
            ({"model_type": "gemma3_text", "hidden_size": 1152, "num_hidden_layers": 26}, "Gemma 3 1B"),
            ({"text_config": {"hidden_size": 2560, "num_hidden_layers": 34}}, "Gemma 3 4B"),
            ({"text_config": {"hidden_size": 5376, "num_hidden_layers": 62}}, "Gemma 3 27B"),
            ({"model_type": "gemma3n"}, "Gemma 3n"),
            ({"model_type": "gemma4_unified", "text_config": {"hidden_size": 3840, "num_hidden_layers": 48}},
             "the Gemma 4 12B of Google"),
            ({"model_type": "gemma4"}, "a Gemma 4 of Google"),
            ({"model_type": "paligemma"}, "PaliGemma"),
            ({"model_type": "t5"}, "T5"),
            ({"model_type": "llama"}, "a llama model"),
        ],
    )  # fmt: skip
    def test_another_model(self, tmp_path: Path, config: dict[str, Any], said: str) -> None:
        needed = r"LTX-2 and LTX-2\.3: Gemma 3 12B; LTX-2\.5: its own Gemma 4 12B.*google/gemma-3-12b-it"
        with pytest.raises(UnsupportedError, match=rf"{said}.*{needed}"):
            open_sources([self.folder(tmp_path, **config)])

    @pytest.mark.parametrize(
        ("tensors", "said"),
        [
            ({"encoder.block.0.layer.0.SelfAttention.q.weight": ("F16", (2, 2))}, "T5"),
            ({f"model.layers.{n}.self_attn.q_proj.weight": ("F16", (1, 1)) for n in range(48)}
             | {"model.embed_tokens.weight": ("F16", (9, 3840)), "model.layers.0.layer_scalar": ("F16", (1,))},
             "a Gemma 4 of Google"),
            ({"model.embed_tokens.weight": ("F16", (9, 64))}, "a language model of 0 layers"),
            ({f"layers.{n}.self_attn.q_proj.weight": ("F16", (1, 1)) for n in range(28)},
             "a language model of 28 layers"),
        ],
    )  # fmt: skip
    def test_language_model_in_one_file(self, tmp_path: Path, tensors: published.Tensors, said: str) -> None:
        with pytest.raises(UnsupportedError, match=rf"te\.safetensors holds {said}.*google/gemma-3-12b-it"):
            open_sources([published.write_sparse(tmp_path / "te.safetensors", tensors, {})])

    @pytest.mark.parametrize(
        ("name", "said"), [("absmax", "bitsandbytes"), ("weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
                           ("qweight", "GPTQ or AWQ")],
    )  # fmt: skip
    def test_quantized(self, tmp_path: Path, name: str, said: str) -> None:
        tensors = SHARD | {f"language_model.model.layers.0.mlp.up_proj.{name}": ("U8", (2,))}
        with pytest.raises(UnsupportedError, match=f"holds {said} weights"):
            open_sources([self.folder(tmp_path, tensors)])


class TestForeignFiles:
    """Recognised by their first bytes, whatever they are called."""

    @pytest.mark.parametrize(
        ("content", "kind", "said"),
        [
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 43\n", CheckpointError,
             "a Git LFS pointer, not the file.*git lfs pull"),
            (b"<!DOCTYPE html><html><body>Sign in</body></html>", CheckpointError, "a web page, not the file"),
            (b"\n  <HTML>", CheckpointError, "a web page"),
            (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", CheckpointError, "a web page"),
            (b"Access to model google/gemma-3-12b-it is restricted. You must", CheckpointError,
             "an error message, not the file.*hf auth login"),
            (b'{"error":"Repository not found"}', CheckpointError, "an error message"),
            (b"PK\x03\x04" + bytes(40), UnsupportedError, "a PyTorch file.*would run code"),
            (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", UnsupportedError, "a PyTorch file"),
            (b"", CheckpointError, "holds no data: it is empty"),
            (bytes(4096), CheckpointError, "holds no data: it begins with zeros"),
        ],
    )  # fmt: skip
    def test_named(self, tmp_path: Path, content: bytes, kind: type[Exception], said: str) -> None:
        path = tmp_path / "ltx.safetensors"
        path.write_bytes(content)
        with pytest.raises(kind, match=rf"ltx\.safetensors (is )?{said}"):
            open_sources([path])

    def test_pointer_among_shards(self, tmp_path: Path) -> None:
        """A repository cloned without git-lfs."""
        (tmp_path / "config.json").write_text('{"model_type": "gemma3"}')
        (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
        with pytest.raises(CheckpointError, match=r"model\.safetensors is a Git LFS pointer"):
            open_sources([tmp_path])

    @pytest.mark.parametrize("length", [0x0280, 0x4034B50, 0x46554747])
    def test_lengths_that_look_alike(self, tmp_path: Path, length: int) -> None:
        """A safetensors file begins with its header's length, which may be the first bytes of another format."""
        path = tmp_path / "x.safetensors"
        path.write_bytes(length.to_bytes(8, "little") + b"{" + bytes(100))
        with pytest.raises(CheckpointError, match="not a valid safetensors file"):
            open_sources([path])

    def test_folder_of_diffusers(self, tmp_path: Path) -> None:
        (tmp_path / "model_index.json").write_text("{}")
        with pytest.raises(UnsupportedError, match=r"laid out for diffusers.*as Lightricks publishes it"):
            open_sources([tmp_path])
