"""LoRAs: whatever the spelling, the same folder; what cannot be one is refused by name."""

import json
import re
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ltx2
from ltx2.convert.inspect import inspect
from ltx2.convert.names import rules
from ltx2.convert.plan.check import check_plan, planned_shapes
from ltx2.convert.plan.entries import Drop, Merge, plan_json
from ltx2.convert.plan.make import lora_name
from ltx2.convert.sources.checkpoint import open_sources
from ltx2.convert.sources.together import common_release
from ltx2.runtime.errors import CheckpointError, InputError, UnsupportedError, VerificationError
from ltx2.runtime.files.tensors import open_tensorfile
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.model.lorafile import misfits
from ltx2.runtime.model.names import modules, read_lora_name
from tests.support import published
from tests.support.folders import contents, verified
from tests.support.official import MONOLITH, plan_of
from tests.support.parity import require

Tensors = dict[str, np.ndarray]
Naming = Callable[[str, str], str]  # module and what (lora_A, ...) -> tensor name
RANK = 4
BLOCK = "transformer_blocks.1"
# diffusers' words for parts of Lightricks' paths.
DIFFUSERS = {
    "proj_in": "patchify_proj", "audio_proj_in": "audio_patchify_proj", "time_embed": "adaln_single",
    "audio_time_embed": "audio_adaln_single", "prompt_adaln": "prompt_adaln_single",
    "audio_prompt_adaln": "audio_prompt_adaln_single",
    "av_cross_attn_video_scale_shift": "av_ca_video_scale_shift_adaln_single",
    "av_cross_attn_audio_scale_shift": "av_ca_audio_scale_shift_adaln_single",
    "av_cross_attn_video_a2v_gate": "av_ca_a2v_gate_adaln_single",
    "av_cross_attn_audio_v2a_gate": "av_ca_v2a_gate_adaln_single", "norm_q": "q_norm", "norm_k": "k_norm",
    "video_connector.transformer_blocks": "video_embeddings_connector.transformer_1d_blocks",
    "audio_connector.transformer_blocks": "audio_embeddings_connector.transformer_1d_blocks",
    "text_proj_in": "text_embedding_projection.aggregate_embed",
    "video_text_proj_in": "text_embedding_projection.video_aggregate_embed",
    "audio_text_proj_in": "text_embedding_projection.audio_aggregate_embed",
}  # fmt: skip
PUBLISHED = {
    published.LORA: ("2.0", 1371, 384),
    "ltx-2.3-22b-distilled-lora-384": ("2.3", 1660, 384),
    "ltx-2.5-22b-distilled-lora-450-bf16": ("2.5", 1660, 450),
}
TRANSFORMERS = {published.LORA: "ltx-2-19b", "ltx-2.3-22b-distilled-lora-384": "ltx-2.3-22b",
                "ltx-2.5-22b-distilled-lora-450-bf16": "ltx-2.5-22b-transformer-bf16"}  # fmt: skip


def linear_modules(tensors: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """A checkpoint's linear layers that take part in denoising, by official path without prefix, with their shapes."""
    names = {name: re.fullmatch(r"(?:model\.diffusion_model\.)?(.+)\.weight", name) for name in tensors}
    roots = ("model.diffusion_model.", "text_embedding_projection.")
    return {
        match[1]: tensors[name]
        for name, match in names.items()
        if match and name.startswith(roots) and len(tensors[name]) == 2
    }


def published_shapes(name: str) -> dict[str, tuple[int, ...]]:
    return {key: shape for key, (_, shape) in published.read_header(name)[2].items()}


def demo_modules() -> dict[str, tuple[int, ...]]:
    file = open_tensorfile(MONOLITH)
    return linear_modules({name: tensor.shape for name, tensor in file.tensors.items()})


@pytest.fixture(scope="module")
def factors() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Random A and B for every linear layer of the demo model, by official path."""
    rng = np.random.default_rng(0)
    draw = rng.standard_normal
    return {
        module: (draw((RANK, columns), np.float32), draw((rows, RANK), np.float32))
        for module, (rows, columns) in demo_modules().items()
    }


def spelled(factors: dict[str, tuple[np.ndarray, np.ndarray]], naming: Naming) -> Tensors:
    return {naming(module, f"lora_{x}"): pair["AB".index(x)] for module, pair in factors.items() for x in "AB"}


def is_text(module: str) -> bool:
    return module.startswith("text_embedding_projection.")


def official(module: str, what: str) -> str:
    return f"{'' if is_text(module) else 'diffusion_model.'}{module}.{what}.weight"


def kohya(module: str, what: str) -> str:
    suffix = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight"}.get(what, what)
    return f"lora_unet_{module.replace('.', '_')}.{suffix}"


def musubi(module: str) -> str:
    """Its wrapper calls the transformer `model`, and the connectors by names of its own."""
    if "_embeddings_connector." in module:
        return module.removeprefix("video_")
    return module if is_text(module) else f"model.{module}"


def diffusers(module: str, what: str) -> str:
    path, connector = module, is_text(module) or "_embeddings_connector." in module
    for theirs, ours in DIFFUSERS.items():
        path = re.sub(rf"(^|\.){re.escape(ours)}($|\.)", rf"\1{theirs}\2", path)
    return f"{'connectors' if connector else 'transformer'}.{path}.{what}.weight"


SPELLINGS: dict[str, Naming] = {
    "comfy": lambda m, w: f"{'' if is_text(m) else 'model.diffusion_model.'}{m}.{w}.weight",
    "bare": lambda m, w: f"{m}.{w}",
    "peft": lambda m, w: f"base_model.model.{m}.{w}.default.weight",
    "nested": lambda m, w: f"base_model.model.diffusion_model.{m}.{w}.weight",
    "down-up": lambda m, w: official(m, {"lora_A": "lora_down", "lora_B": "lora_up"}[w]),
    "transformer": lambda m, w: f"transformer.{m}.{w}.weight",
    "kohya": kohya,
    "diffusers": diffusers,
    "musubi": lambda m, w: kohya(musubi(m), w),
    "kohya of diffusers": lambda m, w: kohya(diffusers(m, w).partition(".")[2].removesuffix(f".{w}.weight"), w),
}


def save(folder: Path, tensors: Tensors, name: str = "style", **metadata: str) -> Path:
    path = folder / f"{name}.safetensors"
    save_file(tensors, path, metadata=metadata or None)
    return path


def converted(folder: Path, *sources: Path, **options: Any) -> ModelFolder:
    return ModelFolder.open(ltx2.convert(list(sources), folder / "model", **options))


def stored(folder: Path, *sources: Path, **options: Any) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and config.json of the LoRA after conversion."""
    model = converted(folder, *sources, **options)
    (file,) = model.weight_files("loras/style")
    return load_file(file), model.config("loras/style")


def pair(rows: int = 128, columns: int = 128, rank: int = RANK) -> tuple[np.ndarray, np.ndarray]:
    return np.ones((rank, columns), np.float32), np.ones((rows, rank), np.float32)


def small(naming: Naming = official, layers: tuple[str, ...] = ("to_q", "to_k"), **extra: Any) -> Tensors:
    """A LoRA of a few layers; `extra` are more tensors of each."""
    names = [f"{BLOCK}.attn1.{layer}" for layer in layers]
    tensors = spelled(dict.fromkeys(names, pair()), naming)
    return tensors | {
        naming(name, what).removesuffix(".weight"): np.array(value) for name in names for what, value in extra.items()
    }


@pytest.fixture(scope="module")
def expected(factors: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tensors, dict[str, Any]]:
    """What the official spelling becomes."""
    folder = tmp_path_factory.mktemp("official")
    return stored(folder, save(folder, spelled(factors, official)))


class TestSpellings:
    @pytest.mark.parametrize("naming", SPELLINGS.values(), ids=SPELLINGS)
    def test_same_keys_and_values(self, naming: Naming, factors: Any, expected: Any, tmp_path: Path) -> None:
        tensors, config = stored(tmp_path, save(tmp_path, spelled(factors, naming)))
        assert tensors.keys() == expected[0].keys()
        assert all(np.array_equal(tensors[key], value) for key, value in expected[0].items())
        assert config == expected[1] == {"rank": RANK, "scale": 1.0, "modules": len(factors)}

    def test_keys_are_those_of_the_networks(self, expected: Any, factors: Any) -> None:
        networks = plan_of(MONOLITH, variant="distilled")
        paths = {m.tensor.name: f"{m.component}.{m.key}" for name in networks.components for m in networks.moves(name)}
        for module, (down, up) in factors.items():
            name = f"{'' if is_text(module) else 'model.diffusion_model.'}{module}.weight"
            layer = paths[name].removesuffix(".weight")
            assert np.array_equal(expected[0][f"{layer}.lora_A.weight"], down)
            assert np.array_equal(expected[0][f"{layer}.lora_B.weight"], up)

    @pytest.mark.parametrize("naming", SPELLINGS.values(), ids=SPELLINGS)
    def test_every_published_module_is_found(self, naming: Naming) -> None:
        """With underscores too: `audio_to_video_attn_to_out_0` is `audio_to_video_attn.to_out.0`."""
        found = {module for name in TRANSFORMERS.values() for module in linear_modules(published_shapes(name))}
        assert len(found) > 1700
        for module in found:
            read = read_lora_name(naming(module, "lora_A"))
            assert read is not None and (read.module, read.part) == (module, "lora_A.weight")

    def test_known_are_the_published_modules_only(self) -> None:
        for name, network in TRANSFORMERS.items():
            release = PUBLISHED[name][0]
            known = {m.published for m in modules() if m.lora and release in m.releases}
            linear = linear_modules(published_shapes(network))
            found = {re.sub(r"(?<=blocks\.)\d+", "{bid}", module) for module in linear}
            beside = {path for path in known if path.endswith("_norm") or (release == "2.5" and is_text(path))}
            assert known - beside == found

    def test_flat_names_have_one_reading(self) -> None:
        flat = [re.sub(r"\W", "_", module.published) for module in modules() if module.lora]
        assert len(set(flat)) == len(flat) > 90

    @pytest.mark.parametrize(
        "name",
        ["diffusion_model.transformer_blocks.1.attn3.to_q.lora_A.weight", "unet.proj_out.lora_A.weight",
         "lora_unet_transformer_blocks_1_attn1.lora_down.weight", "lora_te_proj_out.lora_down.weight",
         "diffusion_model.transformer_blocks.#.attn1.to_q.lora_A.weight", "lora_unet_proj.alpha",
         "diffusion_model.transformer_blocks.01.attn1.to_q.lora_A.weight", "proj_out.weight", "proj_out.lora_A.bias",
         "diffusion_model.proj_out.lora_C.weight", "vae.decoder.conv_in.conv.lora_A.weight", ""],
    )  # fmt: skip
    def test_no_guessing(self, name: str) -> None:
        assert read_lora_name(name) is None and rules.target("lora", name) is None


class TestDiffusers:
    def test_names_written_by_its_own_conversion(self) -> None:
        utils = require("diffusers.loaders.lora_conversion_utils")
        convert = utils._convert_non_diffusers_ltx2_lora_to_diffusers
        for name in PUBLISHED:
            _, _, tensors = published.read_header(name)
            names = {key: key for key in tensors}
            theirs = convert(names) | convert(names, "text_embedding_projection")
            assert len(theirs) == len(tensors)
            for theirs_name, ours in theirs.items():
                read = read_lora_name(theirs_name)
                assert read is not None and read.name == ours

    @pytest.mark.parametrize("gated", [False, True])
    def test_names_of_its_networks(self, gated: bool) -> None:
        """Every linear layer of its networks is one of the published ones, and all of those are among them."""
        torch, models = require("torch"), require("diffusers")
        later = {"gated_attn": True, "cross_attn_mod": True, "audio_gated_attn": True, "audio_cross_attn_mod": True,
                 "use_prompt_embeddings": False} if gated else {}  # fmt: skip
        sides = {"per_modality_projections": True, "video_gated_attn": True, "audio_gated_attn": True} if gated else {}
        with torch.device("meta"):
            network = models.LTX2VideoTransformer3DModel(num_layers=1, **later)
            connectors = models.pipelines.ltx2.LTX2TextConnectors(
                video_connector_num_layers=1, audio_connector_num_layers=1, **sides
            )
        names = [f"transformer.{name}" for name, m in network.named_modules() if isinstance(m, torch.nn.Linear)]
        names += [f"connectors.{name}" for name, m in connectors.named_modules() if isinstance(m, torch.nn.Linear)]
        read = {name: read_lora_name(f"{name}.lora_A.weight") for name in names}
        assert not [name for name, found in read.items() if found is None]
        release = "2.3" if gated else "2.0"
        known = {m.published.replace("{bid}", "0") for m in modules() if m.lora and release in m.releases}
        assert {found.module for found in read.values() if found} == {m for m in known if not m.endswith("_norm")}


class TestScale:
    def config(self, folder: Path, tensors: Tensors, **metadata: str) -> dict[str, Any]:
        (component,) = plan_of(save(folder, tensors, **metadata)).components.values()
        return dict(component.config)

    def test_alpha_over_rank(self, tmp_path: Path) -> None:
        config = self.config(tmp_path, small(kohya, alpha=np.array(1, np.float16)))
        assert config == {"rank": RANK, "scale": 0.25, "modules": 2}

    def test_alphas_that_differ(self, tmp_path: Path) -> None:
        layer = f"diffusion_model.{BLOCK}.attn1"
        alphas = {f"{layer}.to_q.alpha": np.array(2, np.float32), f"{layer}.to_v.alpha": np.array(8, np.float32)}
        tensors = small(layers=("to_q", "to_k", "to_v", "to_out.0")) | alphas
        assert self.config(tmp_path, tensors) == {
            "rank": RANK, "scale": 1.0, "modules": 4,
            "scales": {f"transformer.{BLOCK}.attn1.to_q": 0.5, f"transformer.{BLOCK}.attn1.to_v": 2.0},
        }  # fmt: skip

    def test_alpha_is_merged_into_the_factor_beside_it(self, tmp_path: Path) -> None:
        """It is no tensor of the folder, and it is not dropped either."""
        plan = plan_of(save(tmp_path, small(kohya, alpha=np.array([2], np.int64))))
        assert len(plan.moves("loras/style")) == 4 and not any(isinstance(e, Drop) for e in plan.entries)
        merged = {e.tensor.name: e.into.tensor.name for e in plan.entries if isinstance(e, Merge)}
        layers = [f"lora_unet_{BLOCK.replace('.', '_')}_attn1_{layer}" for layer in ("to_q", "to_k")]
        assert merged == {f"{layer}.alpha": f"{layer}.lora_down.weight" for layer in layers}

    def test_plan_of_an_alpha(self, tmp_path: Path) -> None:
        plan = plan_of(save(tmp_path, small(alpha=np.float32(2))), dtype="bf16")
        entries = [e for e in plan_json(plan)["plan"] if e["name"].endswith("to_q.alpha")]
        key = f"transformer.{BLOCK}.attn1.to_q.lora_A.weight"
        assert [(e["component"], e["key"], e["dtype"]) for e in entries] == [("loras/style", key, "F32")]

    def test_alpha_is_inspected_with_its_factors_and_is_no_parameter(self, tmp_path: Path) -> None:
        found = inspect(save(tmp_path, small(kohya, alpha=np.float32(2))))["components"]
        assert found.keys() == {"transformer"}
        assert (found["transformer"]["tensors"], found["transformer"]["parameters"]) == (6, 4 * RANK * 128)

    def test_official_metadata(self, tmp_path: Path) -> None:
        """One scale for narrow layers too, whose rank is lower."""
        narrow = spelled({f"{BLOCK}.attn1.to_v": pair(rank=2)}, official)
        config = self.config(tmp_path, small() | narrow, lora_alpha="2", lora_rank="4")
        assert config == {"rank": RANK, "scale": 0.5, "modules": 3}

    def test_metadata_of_peft(self, tmp_path: Path) -> None:
        settings = {"transformer.lora_alpha": 8, "transformer.r": 4, "transformer.alpha_pattern": {}}
        config = self.config(tmp_path, small(), lora_adapter_metadata=json.dumps(settings))
        assert config["scale"] == 2.0
        settings["transformer.use_rslora"] = True
        assert self.config(tmp_path, small(), lora_adapter_metadata=json.dumps(settings))["scale"] == 4.0

    def test_settings_of_peft_beside_the_file(self, tmp_path: Path) -> None:
        (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 12, "r": 4, "peft_type": "LORA"}')
        assert self.config(tmp_path, small(SPELLINGS["peft"]))["scale"] == 3.0
        assert self.config(tmp_path, small())["scale"] == 1.0  # somebody else's

    def test_reference_of_an_ic_lora(self, tmp_path: Path) -> None:
        config = self.config(tmp_path, small(), reference_downscale_factor="2")
        assert config["reference_downscale_factor"] == 2 and "reference_temporal_scale_factor" not in config

    @pytest.mark.parametrize(
        ("metadata", "extra", "reason"),
        [({"lora_alpha": "8"}, {}, "no lora_rank"), ({"lora_alpha": "8", "lora_rank": "16"}, {}, "rank 16.* has 4"),
         ({"lora_alpha": "x", "lora_rank": "4"}, {}, "not a number"),
         ({"lora_adapter_metadata": "[]"}, {}, "JSON object"),
         ({"lora_alpha": "4", "lora_rank": "4"}, {"alpha": np.float32(2)}, "means 0.5, the file's settings 1"),
         ({}, {"alpha": np.float32("nan")}, "alpha is nan"), ({}, {"alpha": np.zeros(2, np.float32)}, "not one number"),
         ({"reference_downscale_factor": "inf"}, {}, "is inf"),
         ({"lora_adapter_metadata": '{"a.lora_alpha": 1, "b.lora_alpha": 2}'}, {}, "several networks")],
    )  # fmt: skip
    def test_unclear(self, metadata: dict[str, str], extra: dict[str, Any], reason: str, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=f"how strong.*{reason}"):
            self.config(tmp_path, small(**extra), **metadata)

    @pytest.mark.parametrize("setting", ['"use_dora": true', '"alpha_pattern": {"to_q": 2}'])
    def test_settings_that_are_more_than_a_scale(self, setting: str, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedError, match=setting.split('"')[1]):
            self.config(tmp_path, small(), lora_adapter_metadata=f"{{{setting}}}")


class TestEffect:
    def test_merged_as_the_source_means_it(self, factors: Any, tmp_path: Path) -> None:
        """weight + scale * B @ A from the folder is weight + alpha / rank * up @ down from kohya's file."""
        rng = np.random.default_rng(1)
        source = spelled(factors, kohya)
        alphas = {module: float(rng.integers(1, 9)) for module in list(factors)[::2]}
        source |= {kohya(module, "alpha"): np.array(alpha, np.float32) for module, alpha in alphas.items()}
        tensors, config = stored(tmp_path, MONOLITH, save(tmp_path, source), variant="distilled")
        networks = plan_of(MONOLITH, variant="distilled")
        paths = {m.tensor.name: f"{m.component}.{m.key}" for name in networks.components for m in networks.moves(name)}
        for module in factors:
            down, up = (source[kohya(module, f"lora_{x}")].astype(np.float64) for x in "AB")
            delta = up @ down * (alphas[module] / down.shape[0] if module in alphas else 1)
            name = f"{'' if is_text(module) else 'model.diffusion_model.'}{module}.weight"
            layer = paths[name].removesuffix(".weight")
            a, b = (tensors[f"{layer}.lora_{x}.weight"].astype(np.float64) for x in "AB")
            scale = config.get("scales", {}).get(layer, config["scale"])
            assert np.allclose(scale * b @ a, delta, rtol=1e-12, atol=1e-12)

    def test_whole_deltas(self, tmp_path: Path) -> None:
        delta, bias = np.full((128, 512), 2, np.float32), np.ones(128, np.float32)
        source = {f"diffusion_model.{BLOCK}.ff.net.2.diff": delta, f"diffusion_model.{BLOCK}.ff.net.2.diff_b": bias}
        source[f"diffusion_model.{BLOCK}.attn1.q_norm.diff"] = bias
        tensors, config = stored(tmp_path, MONOLITH, save(tmp_path, source), variant="distilled")
        assert config == {"rank": 0, "scale": 1.0, "modules": 2}
        layer = f"transformer.{BLOCK}.ff.proj_out"
        assert np.array_equal(tensors[f"{layer}.diff"], delta) and np.array_equal(tensors[f"{layer}.diff_b"], bias)
        assert np.array_equal(tensors[f"transformer.{BLOCK}.attn1.q_norm.diff"], bias)

    def test_dtype(self, tmp_path: Path) -> None:
        path = save(tmp_path, small())
        for dtype, stored_as in ((None, "F32"), ("bf16", "BF16"), ("f16", "F16")):
            assert {m.spec.dtype for m in plan_of(path, dtype=dtype).moves("loras/style")} == {stored_as}
        half = save(tmp_path, {name: value.astype(np.float16) for name, value in small().items()})
        assert {m.spec.dtype for m in plan_of(half).moves("loras/style")} == {"F16"}


class TestFolder:
    def test_alone(self, tmp_path: Path) -> None:
        path = save(tmp_path, small())
        model = converted(tmp_path, path)
        assert list(model.manifest.components) == ["loras/style"] and model.manifest.variant is None
        done = verified(model.path, [path])
        assert (done.tensors, done.compared) == (4, 4)

    def test_strength_is_compared_with_the_source(self, tmp_path: Path) -> None:
        path = save(tmp_path, small(alpha=np.float32(2)))
        model = converted(tmp_path, path)
        verified(model.path, [path])
        save(tmp_path, small(alpha=np.float32(8)))
        with pytest.raises(VerificationError, match=r"loras/style: config\.json"):
            verified(model.path, [path])

    def test_quantizing_leaves_it_alone(self, tmp_path: Path) -> None:
        path = save(tmp_path, small(alpha=np.float32(2)))
        model = converted(tmp_path, MONOLITH, path, variant="distilled")
        ltx2.quantize(model.path, tmp_path / "q4", bits=4)
        assert contents(tmp_path / "q4" / "loras") == contents(model.path / "loras")
        straight = ltx2.convert([MONOLITH, path], tmp_path / "straight", variant="distilled", bits=4)
        assert contents(straight / "loras") == contents(model.path / "loras")
        with pytest.raises(InputError, match="nothing to quantize"):
            ltx2.quantize(model.path, tmp_path / "q", bits=4, only=["loras/style"])

    def test_inspected(self, tmp_path: Path) -> None:
        facts = inspect(save(tmp_path, small(kohya)))
        assert facts["kind"] == "lora" and facts["components"]["transformer"]["tensors"] == 4

    def test_name(self) -> None:
        assert lora_name(Path("x/My Style (v2).safetensors")) == "my-style-v2"


class TestRefused:
    def refused(self, folder: Path, tensors: Tensors, reason: str, error: type[Exception] = CheckpointError) -> None:
        with pytest.raises(error, match=reason):
            plan_of(save(folder, tensors))

    @pytest.mark.parametrize(
        ("what", "kind"),
        [("dora_scale", "DoRA"), ("lora_magnitude_vector.default.weight", "DoRA"), ("hada_w1_a", "LoHa"),
         ("lokr_w1", "LoKr"), ("lora_mid.weight", "LoCon"), ("oft_blocks", "OFT"), ("magnitude", "DoRA"),
         ("lora_B.bias", "biases")],
    )  # fmt: skip
    def test_other_adapters(self, what: str, kind: str, tmp_path: Path) -> None:
        other = {f"diffusion_model.{BLOCK}.attn1.to_q.{what}": np.ones((4, 4), np.float32)}
        self.refused(tmp_path, small() | other, kind, UnsupportedError)
        self.refused(tmp_path, other, kind, UnsupportedError)

    @pytest.mark.parametrize("prefix", ["base_model.model.model.", "lora_te_model_", "text_encoder.model."])
    def test_of_a_text_encoder(self, prefix: str, tmp_path: Path) -> None:
        layer = "layers.0.self_attn.q_proj" if "te_" not in prefix else "layers_0_self_attn_q_proj"
        factors = {f"{prefix}{layer}.lora_{x}.weight": np.ones((4, 4), np.float32) for x in ("down", "up")}
        self.refused(tmp_path, factors, "LoRA for a language model: it changes the text encoder", UnsupportedError)

    def test_convolution_factors(self, tmp_path: Path) -> None:
        tensors = {name: value[:, :, None, None] for name, value in small(kohya).items()}
        self.refused(tmp_path, tensors, "LoCon", UnsupportedError)

    @pytest.mark.parametrize("dtype", ["F8_E4M3", "I8"])
    def test_other_dtypes(self, dtype: str, tmp_path: Path) -> None:
        tensors: published.Tensors = {name: (dtype, value.shape) for name, value in small().items()}
        path = published.write_sparse(tmp_path / "x.safetensors", tensors, {})
        with pytest.raises(UnsupportedError, match=rf"holds {dtype} factors"):
            open_sources([path])

    def test_a_rank_beyond_narrow_modules_is_no_mistake(self, tmp_path: Path) -> None:
        """They have factors of the whole file's rank, which says nothing wrong."""
        narrow = spelled({f"{BLOCK}.attn1.to_v": pair(rank=200)}, official)
        check_plan(plan_of(save(tmp_path, small() | narrow)))

    def test_unmatched_names_are_counted(self, tmp_path: Path) -> None:
        foreign = {f"unet.{n}.lora_A.weight": np.ones((4, 4), np.float32) for n in "abcdef"}
        self.refused(tmp_path, small() | foreign, r"4 of 10 tensors match.* 6 do not: unet\.a.*unet\.d.* and 2 more")
        self.refused(tmp_path, foreign, "0 of 6 tensors match")

    def test_incomplete(self, tmp_path: Path) -> None:
        name = f"diffusion_model.{BLOCK}.attn1.to_q"
        half = {key: value for key, value in small().items() if key != f"{name}.lora_B.weight"}
        self.refused(tmp_path, half, r"1 of 2 modules .*attn1\.to_q")
        self.refused(tmp_path, small() | {f"{name}.lora_A.weight": pair(rank=8)[0]}, "fit each other")
        swapped = spelled({f"{BLOCK}.attn1.to_q": (pair()[0].T, pair()[1].T)}, official)
        self.refused(tmp_path, swapped, r"lora_A is \(rank, in\)|fit each other")
        self.refused(tmp_path, {f"{name}.alpha": np.ones((), np.float32)} | small(layers=("to_k",)), "1 of 2 modules")

    def test_one_tensor_twice(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="two source tensors become"):
            check_plan(plan_of(save(tmp_path, small() | small(kohya))))

    def test_what_the_network_lacks(self, tmp_path: Path) -> None:
        deep = {name.replace("blocks.1", "blocks.40"): value for name, value in small().items()}
        with pytest.raises(CheckpointError, match=r"2 of 4 .*2 do not.*40\.attn1\.to_k \(the transformer has no such"):
            check_plan(plan_of(MONOLITH, save(tmp_path, small() | deep), variant="distilled"))
        wide = spelled({f"{BLOCK}.attn1.to_v": pair(columns=64)}, official)
        with pytest.raises(CheckpointError, match=r"2 of 3 .*1 do not: .*to_v \(weight \[128, 64\] for \[128, 128\]\)"):
            check_plan(plan_of(MONOLITH, save(tmp_path, small() | wide), variant="distilled"))


class TestReleases:
    @pytest.fixture(scope="class")
    @classmethod
    def files(cls, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
        folder = tmp_path_factory.mktemp("published")
        return {name: published.write_published(folder, name)[0] for name in chain(*TRANSFORMERS.items())}

    @pytest.mark.parametrize("name", PUBLISHED)
    def test_published(self, name: str, files: dict[str, Path]) -> None:
        """Recognised, planned completely, and every target is there in the transformer of its release."""
        release, count, rank = PUBLISHED[name]
        plan = plan_of(files[name])
        (lora,) = plan.components
        assert inspect(files[name])["release"] == plan.release == release
        assert plan.components[lora].config == {"rank": rank, "scale": 1.0, "modules": count}
        assert len(plan.moves(lora)) == len(plan.entries) == 2 * count
        check_plan(plan)
        networks = plan_of(files[TRANSFORMERS[name]], variant="dev")
        shapes = {component: planned_shapes(networks, component) for component in ("transformer", "connectors")}
        assert misfits(planned_shapes(plan, lora), shapes) == (count, {})

    @pytest.mark.parametrize("lora", PUBLISHED)
    @pytest.mark.parametrize("network", TRANSFORMERS.values())
    def test_of_another_release(self, lora: str, network: str, files: dict[str, Path]) -> None:
        sources = open_sources([files[lora], files[network]])
        if TRANSFORMERS[lora] == network:
            assert common_release(sources) == PUBLISHED[lora][0]
        else:
            with pytest.raises(CheckpointError, match=f"different releases.*{lora}"):
                common_release(sources)

    def test_widths_and_gates_tell(self, tmp_path: Path) -> None:
        """Without any name of one release only."""
        for rows, release in ((24576, "2.0"), (36864, None)):
            tensors = spelled({"adaln_single.linear": pair(rows, 4096)}, kohya)
            assert plan_of(save(tmp_path, tensors)).release == release
            if release is None:
                with pytest.raises(CheckpointError, match=r"LTX-2\.3 or LTX-2\.5"):
                    plan_of(MONOLITH, save(tmp_path, tensors), variant="distilled")
        gates = spelled({f"{BLOCK}.attn1.to_gate_logits": pair(32, 4096)}, kohya)
        with pytest.raises(CheckpointError, match=r"LTX-2\.3 or LTX-2\.5"):
            plan_of(MONOLITH, save(tmp_path, gates), variant="distilled")
        mixed = gates | spelled({"adaln_single.linear": pair(24576, 4096)}, official)
        with pytest.raises(CheckpointError, match="no release as a whole"):
            plan_of(save(tmp_path, mixed))

    def test_what_fits_any_release(self, tmp_path: Path) -> None:
        assert plan_of(save(tmp_path, small())).release is None
