"""Every published file, from its header: recognised, planned completely, of the predicted size, or refused by name."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import pytest

from ltx2.convert.names import rules
from ltx2.convert.plan.check import check_plan, incomplete_parts
from ltx2.convert.plan.entries import Asset, Drop, Merge, Move, Plan
from ltx2.convert.plan.make import Options, make_plan
from ltx2.convert.sources.checkpoint import open_sources, special_storage
from ltx2.convert.sources.source import Source, variant_in_name
from ltx2.convert.tensors.scales import dropped_beside_codes
from ltx2.runtime.errors import CheckpointError, ConfigError, MismatchError, UnsupportedError
from tests.support import published
from tests.support.official import plan_of


@dataclass(frozen=True)
class File:
    """What one header file is: kind, releases, variants by published name, tensors stored per component, dropped ones,
    and how the transformer's weights are stored."""

    kind: str
    releases: tuple[str, ...]
    tensors: dict[str, int]
    dropped: int = 0
    storage: str | None = None
    variants: tuple[str | None, ...] = (None,)
    classes: dict[str, str] = field(default_factory=dict)


LAYERS = 28 * 42  # of a quantized transformer
OLD_PARTS = {"connectors": 59, "video_vae": 184, "audio_vae": 102, "vocoder": 194}
NEW_PARTS = {"connectors": 262, "video_vae": 170, "audio_vae": 102, "vocoder": 1226}
BOTH = ("dev", "distilled")
MONOLITHS = {
    "ltx-2-19b": File("checkpoint", ("2.0",), {"transformer": 3510, **OLD_PARTS}, 3, variants=BOTH),
    "ltx-2-19b-fp8": File(
        "checkpoint", ("2.0",), {"transformer": 3510 + LAYERS, **OLD_PARTS}, 3 + LAYERS, "FP8 (E4M3)", BOTH
    ),
    "ltx-2-19b-fp4": File(
        "checkpoint", ("2.0",), {"transformer": 3510 + 2 * LAYERS, **OLD_PARTS}, 3 + LAYERS, "NVFP4", ("dev",)
    ),
    "ltx-2.3-22b": File(
        "checkpoint", ("2.3",), {"transformer": 4186, **NEW_PARTS}, 1, variants=("dev", "distilled", "distilled"),
        classes={"vocoder": "VocoderWithBWE"},
    ),
    "ltx-2.3-22b-dev-fp8": File(
        "checkpoint", ("2.3",), {"transformer": 4186 + 1496, **NEW_PARTS}, 1 + 1496, "FP8 (E4M3)", ("dev",)
    ),
    "ltx-2.3-22b-distilled-fp8": File(
        "checkpoint", ("2.3",), {"transformer": 4186 + 1462, **NEW_PARTS}, 1 + 1462, "FP8 (E4M3)", ("distilled",)
    ),
}  # fmt: skip
SPLIT = {
    "ltx-2.5-22b-transformer-bf16": File(
        "checkpoint", ("2.5",), {"transformer": 4091, "connectors": 258}, variants=BOTH
    ),
    "ltx-2.5-22b-transformer-nvfp4": File(
        "checkpoint", ("2.5",), {"transformer": 4091 + 2 * LAYERS, "connectors": 258}, LAYERS, "NVFP4", ("distilled",)
    ),
    "ltx-2.5-22b-transformer-int8": File(
        "checkpoint", ("2.5",), {"transformer": 4091 + 28 * 48, "connectors": 258 + 96}, 28 * 48 + 96, "int8", BOTH
    ),
    "ltx-2.5-video-vae-bf16": File(
        "diffusion_vae", ("2.5",), {"diffusion_vae": 395}, 1, classes={"diffusion_vae": "CausalDiffusionVAE"}
    ),
    "ltx-2.5-video-vae-conv-bf16": File(
        "checkpoint", ("2.5",), {"video_vae": 170}, classes={"video_vae": "CausalVideoAutoencoder"}
    ),
    "ltx-2.5-audio-vae-bf16": File(
        "checkpoint", ("2.5",), {"audio_vae": 102, "vocoder": 1226}, 1, classes={"vocoder": "VocoderWithBWE"}
    ),
    "ltx-2.5-duration-head-bf16": File(
        "checkpoint", ("2.5",), {"duration_head": 15}, classes={"duration_head": "DurationHead"}
    ),
    "gemma4-12b-with-proj-ltx-2.5-bf16": File(
        "text_encoder", ("2.5",), {"text_encoder": 666, "connectors": 4}, 11,
        classes={"text_encoder": "Gemma4UnifiedForCausalLM"},
    ),
    "gemma4-12b-with-proj-ltx-2.5-int8": File(
        "text_encoder", ("2.5",), {"text_encoder": 666 + 328, "connectors": 4}, 11 + 328, "int8"
    ),
}  # fmt: skip
UPSCALERS = {
    "ltx-2-spatial-upscaler-x2-1.0": File("spatial_upscaler", ("2.0",), {"spatial_upscaler": 72}, 1),
    "ltx-2-temporal-upscaler-x2-1.0": File("temporal_upscaler", ("2.0",), {"temporal_upscaler": 72}),
    "ltx-2.3-spatial-upscaler-x2": File("spatial_upscaler", ("2.3",), {"spatial_upscaler": 72}, variants=(None, None)),
    "ltx-2.3-spatial-upscaler-x1.5-1.0": File("spatial_upscaler", ("2.3",), {"spatial_upscaler": 72}, 1),
    # These two have the same header: configuration, names and shapes.
    "ltx-2.3-temporal-upscaler-x2-1.0": File("temporal_upscaler", ("2.3", "2.5"), {"temporal_upscaler": 72}),
    "ltx-2.5-latent-temporal-upscaler-x2-bf16-1.0": File(
        "temporal_upscaler", ("2.3", "2.5"), {"temporal_upscaler": 72}
    ),
    "ltx-2.5-latent-spatial-upscaler-x2-bf16-1.0": File("spatial_upscaler", ("2.5",), {"spatial_upscaler": 72}),
}
LORAS = {
    "ltx-2-19b-distilled-lora-384": File("lora", ("2.0",), {"loras/ltx-2-19b-distilled-lora-384": 2742}),
    "ltx-2.3-22b-distilled-lora-384": File(
        "lora", ("2.3",), {"loras/ltx-2.3-22b-distilled-lora-384": 3320}, variants=(None, None)
    ),
    "ltx-2.5-22b-distilled-lora-450-bf16": File("lora", ("2.5",), {"loras/ltx-2.5-22b-distilled-lora-450-bf16": 3320}),
}
CONVERTED = MONOLITHS | SPLIT | UPSCALERS | LORAS
# A file in another storage -> the same model in bf16.
PLAIN = {
    "ltx-2-19b-fp8": "ltx-2-19b", "ltx-2-19b-fp4": "ltx-2-19b", "ltx-2.3-22b-dev-fp8": "ltx-2.3-22b",
    "ltx-2.3-22b-distilled-fp8": "ltx-2.3-22b", "ltx-2.5-22b-transformer-nvfp4": "ltx-2.5-22b-transformer-bf16",
    "ltx-2.5-22b-transformer-int8": "ltx-2.5-22b-transformer-bf16",
    "gemma4-12b-with-proj-ltx-2.5-int8": "gemma4-12b-with-proj-ltx-2.5-bf16",
}  # fmt: skip
REASONS = {
    rules.UNUSED_STATISTIC, rules.UNUSED_MARK, rules.VISION, rules.CONSTANT, rules.UNUSED_CONSTANT,
    dropped_beside_codes("x.input_scale"), dropped_beside_codes("x.comfy_quant"),
}  # fmt: skip
# Axes of kernels per component, where not all stay as they are.
TURNED = {
    "ltx-2-19b": {
        ("video_vae", "(0,2,3,4,1)"): 91, ("audio_vae", "(0,2,3,1)"): 50, ("vocoder", "(1,2,0)"): 5,
        ("vocoder", "(0,2,1)"): 92,
    },
    "ltx-2.3-22b": {
        ("video_vae", "(0,2,3,4,1)"): 84, ("audio_vae", "(0,2,3,1)"): 50, ("vocoder", "(1,2,0)"): 11,
        # 6 kernels and 12 filters of 33 blocks, four kernels and filters at the ends of both, and the Fourier basis
        ("vocoder", "(0,2,1)"): 33 * (6 + 12) + 2 * 4 + 1,
    },
    "ltx-2.5-video-vae-bf16": {("diffusion_vae", "(0,2,3,4,1)"): 42},
    "ltx-2.5-video-vae-conv-bf16": {("video_vae", "(0,2,3,4,1)"): 84},
    "ltx-2.3-spatial-upscaler-x2": {("spatial_upscaler", "(0,2,3,4,1)"): 18, ("spatial_upscaler", "(0,2,3,1)"): 1},
    "ltx-2.3-temporal-upscaler-x2-1.0": {("temporal_upscaler", "(0,2,3,4,1)"): 19},
    "ltx-2.5-22b-transformer-bf16": {},
    "ltx-2.5-duration-head-bf16": {},
    "gemma4-12b-with-proj-ltx-2.5-bf16": {},
}  # fmt: skip

Look = Callable[[str], Path]
LookAll = Callable[[str], list[Path]]
Recognised = Callable[[str], Source]
PlanOf = Callable[..., Plan]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> LookAll:
    """Look-alikes of the header file's published files."""
    folder = tmp_path_factory.mktemp("published")
    return cache(lambda name: published.write_published(folder, name))


@pytest.fixture(scope="module")
def file(files: LookAll) -> Look:
    """The first of them."""
    return lambda name: files(name)[0]


@pytest.fixture(scope="module")
def source(file: Look) -> Recognised:
    """The same, opened."""

    def opened(name: str) -> Source:
        (source,) = open_sources([file(name)])
        return source

    return cache(opened)


@pytest.fixture(scope="module")
def plan(source: Recognised) -> PlanOf:
    """The plan of one header file."""
    return cache(lambda name, dtype=None: make_plan([source(name)], Options("dev", dtype)))


def stored_bytes(plan: Plan) -> int:
    return sum(spec.nbytes for e in plan.entries if isinstance(e, Move) for spec in e.stored().values())


def other_bytes(plan: Plan, *kinds: type) -> int:
    return sum(e.tensor.nbytes for e in plan.entries if isinstance(e, kinds))


def test_all_published_files_are_here() -> None:
    names = [name for header in published.header_names() for name in published.read_header(header)[0]]
    assert len(names) + len(published.GEMMA) == 38 and len(set(names)) == len(names)
    assert CONVERTED.keys() == set(published.header_names())


@pytest.mark.parametrize("name", published.header_names())
def test_fixtures_are_the_published_files(name: str, files: LookAll) -> None:
    """Names, dtypes, shapes and metadata are right: data and header have the very sizes of the published file's."""
    sizes, _, tensors = published.read_header(name)
    assert sum(published.SIZES[dtype] * prod(shape) for dtype, shape in tensors.values()) == published.data_bytes(name)
    for path in files(name):
        assert sizes[path.name] in (None, path.stat().st_size)


@pytest.mark.parametrize("name", CONVERTED)
class TestFile:
    def test_recognised(self, name: str, source: Recognised) -> None:
        found, expected = source(name), CONVERTED[name]
        assert (found.kind, tuple(r.name for r in found.releases)) == (expected.kind, expected.releases)
        assert special_storage(found.files[0]) == expected.storage
        if "transformer" in expected.tensors:
            assert tuple(map(variant_in_name, published.read_header(name)[0])) == expected.variants

    def test_planned(self, name: str, plan: PlanOf) -> None:
        """Every tensor once; moved or dropped for one of the few allowed reasons."""
        made, expected = plan(name), CONVERTED[name]
        assert Counter(e.tensor.name for e in made.entries) == Counter(published.read_header(name)[2].keys())
        assert {component: len(made.moves(component)) for component in made.components} == expected.tensors
        dropped = [e for e in made.entries if isinstance(e, Drop)]
        assert len(dropped) == expected.dropped and {e.reason for e in dropped} <= REASONS
        assert made.release == (expected.releases[0] if len(expected.releases) == 1 else None)
        for component, cls in expected.classes.items():
            assert made.components[component].cls == cls
        check_plan(made)

    def test_size(self, name: str, plan: PlanOf) -> None:
        """Nothing grows or gets lost: FP8 stays FP8, NVFP4 stays NVFP4, int8 stays int8."""
        made = plan(name)
        assert not any(isinstance(e, Merge) for e in made.entries)
        assert stored_bytes(made) + other_bytes(made, Drop, Asset) == published.data_bytes(name)


@pytest.mark.parametrize("name", PLAIN)
def test_decoded_is_the_plain_model(name: str, plan: PlanOf) -> None:
    """--dtype bf16: the names, shapes and dtypes of the bf16 file's plan."""
    decoded, plain = plan(name, "bf16"), plan(PLAIN[name])
    assert {c: {m.key: m.spec for m in decoded.moves(c)} for c in decoded.components} == {
        c: {m.key: m.spec for m in plain.moves(c)} for c in plain.components
    }
    assert decoded.components == plain.components
    check_plan(decoded)


@pytest.mark.parametrize("name", TURNED)
def test_axes(name: str, plan: PlanOf) -> None:
    """Only kernels are touched, and only those of the right kind transposed as transposed convolutions."""
    steps = Counter((m.component, str(s).removeprefix("transpose")) for e in (plan(name),) for c in e.components
                    for m in e.moves(c) for s in m.steps)  # fmt: skip
    assert steps == TURNED[name]


class TestKeys:
    """A few names that are easy to get wrong."""

    @pytest.mark.parametrize(
        ("header", "name", "component", "key"),
        [
            ("ltx-2.3-22b", "model.diffusion_model.transformer_blocks.3.attn1.to_gate_logits.weight", "transformer",
             "transformer_blocks.3.attn1.to_gate_logits.weight"),
            ("ltx-2.3-22b", "model.diffusion_model.audio_prompt_adaln_single.linear.bias", "transformer",
             "audio_prompt_adaln_single.linear.bias"),
            ("ltx-2.3-22b", "text_embedding_projection.video_aggregate_embed.weight", "connectors",
             "text_projection.video_aggregate_embed.weight"),
            ("ltx-2.3-22b", "vocoder.vocoder.ups.5.weight", "vocoder", "vocoder.ups.5.weight"),
            ("ltx-2.3-22b", "vocoder.mel_stft.mel_basis", "vocoder", "mel_stft.mel_basis"),
            ("ltx-2.5-video-vae-bf16", "per_channel_statistics.std-of-means", "diffusion_vae",
             "per_channel_statistics.std"),
            ("ltx-2.5-video-vae-bf16", "decoder.det_stages.1.0.attn.qkv.weight", "diffusion_vae",
             "decoder.det_stages.1.0.attn.qkv.weight"),
            ("ltx-2.5-duration-head-bf16", "duration_head.mlp_out.bias", "duration_head", "mlp_out.bias"),
            ("gemma4-12b-with-proj-ltx-2.5-bf16", "model.layers.5.layer_scalar", "text_encoder",
             "model.layers.5.layer_scalar"),
        ],
    )  # fmt: skip
    def test_key(self, header: str, name: str, component: str, key: str, plan: PlanOf) -> None:
        (move,) = [e for e in plan(header).entries if e.tensor.name == name]
        assert isinstance(move, Move) and (move.component, move.key) == (component, key)

    def test_tables_stay_float32(self, plan: PlanOf) -> None:
        tables = [m for m in plan("ltx-2.3-22b", "f16").moves("transformer") if "scale_shift_table" in m.key]
        assert len(tables) == 290 and {(m.spec.dtype, m.steps) for m in tables} == {("F32", ())}

    def test_tokenizer(self, plan: PlanOf) -> None:
        assets = {a.name: a.tensor.name for a in plan("gemma4-12b-with-proj-ltx-2.5-bf16").assets("text_encoder")}
        assert assets == {
            "tokenizer.json": "tokenizer_json", "chat_template.jinja": "hf_asset__chat_template.jinja",
            "generation_config.json": "hf_asset__generation_config.json",
            "processor_config.json": "hf_asset__processor_config.json",
            "tokenizer_config.json": "hf_asset__tokenizer_config.json",
        }  # fmt: skip

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "../x_config.json", "a/b.json"])
    def test_assets_write_no_other_file(self, name: str) -> None:
        assert rules.target("text_encoder", f"hf_asset__{name}") is None

    def test_configurations_are_the_checkpoints_own(self, plan: PlanOf) -> None:
        made = plan("ltx-2.3-22b")
        config = json.loads(published.read_header("ltx-2.3-22b")[1]["config"])
        sections = {"transformer": "transformer", "video_vae": "vae", "audio_vae": "audio_vae", "vocoder": "vocoder"}
        for component, section in sections.items():
            assert made.components[component].config == config[section] | {"model_version": "2.3.0"}
        assert made.components["connectors"].config["text_projection_in_features"] == 188160
        widths = {"cross_attention_dim": 4096, "audio_cross_attention_dim": 2048, "model_version": "2.5.0"}
        assert plan("ltx-2.5-duration-head-bf16").components["duration_head"].config == widths


class TestGemma3:
    """Published as -it and as its quantization-aware training, in the same layout; newer transformers spell it anew."""

    SPELLINGS = (r"^language_model\.model\.", "model.language_model."), (r"^(vision_tower|multi_modal)", r"model.\1")

    def test_fixtures_are_the_published_files(self, tmp_path: Path) -> None:
        folder = published.write_gemma(tmp_path / "gemma")
        sizes = {file: size for name in published.GEMMA for file, size in published.read_header(name)[0].items()}
        assert sizes == {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}

    def test_both_spellings(self, tmp_path: Path) -> None:
        old = plan_of(published.write_gemma(tmp_path / "old"))
        new = plan_of(published.write_gemma(tmp_path / "new", self.SPELLINGS))
        for plan in (old, new):
            check_plan(plan)
            assert Counter(type(e) for e in plan.entries) == {Move: 626, Drop: 439}
            assert {e.reason for e in plan.entries if isinstance(e, Drop)} == {rules.VISION}
            assert stored_bytes(plan) == 23_532_068_352
        assert {m.key: m.spec for m in old.moves("text_encoder")} == {m.key: m.spec for m in new.moves("text_encoder")}

    def test_fits_two_releases(self, tmp_path: Path) -> None:
        (source,) = open_sources([published.write_gemma(tmp_path / "gemma")])
        assert [release.name for release in source.releases] == ["2.0", "2.3"]


class TestTogether:
    """A model from several files."""

    WHOLE = tuple(name for name in SPLIT if name not in PLAIN)

    def together(self, source: Recognised, *names: str) -> Plan:
        return make_plan([source(name) for name in names], Options("dev"))

    @pytest.mark.parametrize("coded", ["", "int8"])
    def test_split_files(self, coded: str, source: Recognised) -> None:
        """Connectors come from two files, the upscaler of two releases goes with either."""
        others = {PLAIN[name]: name for name in PLAIN if coded and name.endswith(coded)}
        files = [others.get(name, name) for name in self.WHOLE]
        plan = self.together(source, *files, "ltx-2.5-latent-temporal-upscaler-x2-bf16-1.0")
        assert plan.release == "2.5" and len(plan.moves("connectors")) == 262 + (96 if coded else 0)
        assert set(plan.components) == {
            "transformer", "connectors", "text_encoder", "video_vae", "diffusion_vae", "audio_vae", "vocoder",
            "duration_head", "temporal_upscaler",
        }  # fmt: skip
        versions = [plan.components[name].config["gemma_version"] for name in ("transformer", "text_encoder")]
        assert versions == ["gemma4-12b-ltx-v1"] * 2
        assert plan.components["connectors"].config["connector_num_layers"] == 8
        assert plan.components["connectors"].config["text_projection_in_features"] == 188160
        check_plan(plan)
        assert not list(incomplete_parts(plan))
        assert self.together(source, "ltx-2.3-22b", "ltx-2.3-temporal-upscaler-x2-1.0").release == "2.3"

    def test_what_comes_in_another_file_is_said(self, plan: PlanOf) -> None:
        assert list(incomplete_parts(plan("ltx-2.5-22b-transformer-bf16"))) == ["connectors: text projection"]
        assert list(incomplete_parts(plan("gemma4-12b-with-proj-ltx-2.5-bf16"))) == [
            "connectors: embeddings connectors"
        ]

    @pytest.mark.parametrize(
        ("first", "second", "said"),
        [
            ("ltx-2-19b", "ltx-2.3-spatial-upscaler-x2", r"-dev.* belongs to LTX-2; .*x2-1.0.* belongs to LTX-2\.3"),
            ("ltx-2.3-22b", "ltx-2.5-22b-distilled-lora-450-bf16", r"LTX-2\.3; .*lora-450.* LTX-2\.5"),
            ("ltx-2-19b", "ltx-2.5-latent-temporal-upscaler-x2-bf16-1.0", r"belongs to LTX-2\.3 or LTX-2\.5"),
            ("ltx-2.3-22b", "ltx-2.5-video-vae-conv-bf16", r"LTX-2\.3; ltx-2\.5-video-vae-conv.*LTX-2\.5"),
        ],
    )
    def test_other_releases(self, first: str, second: str, said: str, source: Recognised) -> None:
        with pytest.raises(CheckpointError, match=rf"different releases: .*{said}"):
            self.together(source, first, second)

    def test_gemma_of_another_release(self, file: Look, tmp_path: Path) -> None:
        gemma = published.write_gemma(tmp_path / "gemma")
        with pytest.raises(CheckpointError, match=r"LTX-2\.5; gemma belongs to LTX-2 or .*its own Gemma 4 12B"):
            plan_of(file("ltx-2.5-22b-transformer-bf16"), gemma, variant="dev")
        assert plan_of(file("ltx-2.3-22b"), gemma, variant="dev").release == "2.3"

    def test_two_files_of_one_component(self, file: Look, tmp_path: Path) -> None:
        _, metadata, tensors = published.read_header("ltx-2.5-video-vae-conv-bf16")
        other = published.write_sparse(tmp_path / "other.safetensors", tensors, metadata)
        with pytest.raises(CheckpointError, match=r"two sources hold a video_vae.*vae-conv-bf16.*other"):
            plan_of(file("ltx-2.5-video-vae-conv-bf16"), other, variant="dev")

    def test_text_encoder_of_another_training(self, file: Look, tmp_path: Path) -> None:
        _, metadata, tensors = published.read_header("gemma4-12b-with-proj-ltx-2.5-bf16")
        metadata["gemma_config"] = metadata["gemma_config"].replace("gemma4-12b-ltx-v1", "gemma4-12b-ltx-v2")
        other = published.write_sparse(tmp_path / "te.safetensors", tensors, metadata)
        with pytest.raises(MismatchError, match=r"te\.safetensors is not the text .*-ltx-v2, .*-ltx-v1"):
            plan_of(file("ltx-2.5-22b-transformer-bf16"), other, variant="dev")

    def test_text_encoder_of_another_width(self, file: Look, tmp_path: Path) -> None:
        """A Gemma 3 of an unknown size is told from its tensors."""
        tensors: published.Tensors = {f"language_model.model.layers.{n}.x": ("BF16", (1,)) for n in range(2)}
        tensors["language_model.model.embed_tokens.weight"] = ("BF16", (10, 16))
        published.write_sparse(tmp_path / "model.safetensors", tensors, {})
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3_text", "hidden_size": 16}))
        with pytest.raises(CheckpointError, match="2 layers of width 16 give 48 features, the connectors read 188160"):
            check_plan(plan_of(file("ltx-2.3-22b"), tmp_path, variant="dev"))


class TestTensors:
    """The configuration decides which tensors a network has, and all of them must be there."""

    def changed(self, plan: Plan, change: Callable[[Move], Move | None]) -> Plan:
        entries = [change(e) if isinstance(e, Move) else e for e in plan.entries]
        return replace(plan, entries=tuple(e for e in entries if e is not None))

    @pytest.mark.parametrize(
        ("name", "key"),
        [
            ("ltx-2.3-22b", "transformer_blocks.47.ff.proj_in.bias"),
            ("ltx-2.3-22b", "video_connector.transformer_1d_blocks.7.attn1.to_gate_logits.weight"),
            ("ltx-2.3-22b", "bwe_generator.act_post.upsample.filter"),
            ("ltx-2.5-22b-transformer-nvfp4", "keyframes_abs_pos_embedding"),
            ("ltx-2.5-video-vae-bf16", "decoder.diff_blocks.7.context_proj.weight"),
            ("gemma4-12b-with-proj-ltx-2.5-bf16", "model.layers.46.self_attn.v_proj.weight"),
            ("ltx-2.3-spatial-upscaler-x1.5-1.0", "upsampler.conv.weight"),
        ],
    )
    def test_missing_and_unknown(self, name: str, key: str, plan: PlanOf) -> None:
        (component,) = {m.component for e in (plan(name),) for c in e.components for m in e.moves(c) if m.key == key}
        made = replace(plan(name), components={component: plan(name).components[component]})
        with pytest.raises(CheckpointError, match=f"does not fit.*1 missing: {key}$|1 missing: {key} \\("):
            check_plan(self.changed(made, lambda m: None if m.key == key else m))
        with pytest.raises(CheckpointError, match=rf"1 missing: {key}; 1 not part of the network: extra\.thing"):
            check_plan(self.changed(made, lambda m: replace(m, key="extra.thing") if m.key == key else m))

    def test_number_of_blocks(self, plan: PlanOf) -> None:
        made = plan("ltx-2.3-22b")
        transformer = made.components["transformer"]
        fewer = replace(transformer, config={**transformer.config, "num_layers": 47})
        with pytest.raises(CheckpointError, match=r"86 not part of the network: transformer_blocks\.47\."):
            check_plan(replace(made, components={**made.components, "transformer": fewer}))

    def test_without_an_option(self, plan: PlanOf) -> None:
        """A variant without prompt modulation: its configuration says so, and fewer names are wanted."""
        made = plan("ltx-2.5-22b-transformer-bf16")
        transformer = made.components["transformer"]
        other = replace(transformer, config={**transformer.config, "use_prompt_adaln_single": False})
        plain = replace(made, components={**made.components, "transformer": other})
        with pytest.raises(CheckpointError, match=r"12 not part of the network: audio_prompt_adaln_single\."):
            check_plan(plain)
        check_plan(self.changed(plain, lambda m: None if "prompt_adaln_single" in m.key else m))

    @pytest.mark.parametrize("value", [-1, 10**9, "48", True, 1.5])
    def test_impossible_configuration(self, value: Any, plan: PlanOf) -> None:
        made = plan("ltx-2.3-22b")
        connectors = made.components["connectors"]
        changed = replace(connectors, config={**connectors.config, "connector_num_layers": value})
        with pytest.raises(ConfigError, match="num_layers"):
            check_plan(replace(made, components={**made.components, "connectors": changed}))

    def test_unknown_network(self, plan: PlanOf) -> None:
        made = plan("ltx-2.5-audio-vae-bf16")
        changed = replace(made.components["vocoder"], cls="Singer")
        with pytest.raises(UnsupportedError, match="Singer"):
            check_plan(replace(made, components={**made.components, "vocoder": changed}))
