"""Opening LoRAs: as published in any spelling, converted, or by name; what does not fit is refused from headers."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ltx2
from ltx2.runtime.errors import CheckpointError, InputError, UnsupportedError
from ltx2.runtime.model.layout import CONFIG, ModelFolder
from ltx2.runtime.model.loras import LoraSet, LoraUse, find_lora
from ltx2.runtime.networks.load import build_component, parameter_shapes
from tests.support.loras import random_factors, write_lora
from tests.support.official import LORA_25

Q, OUT = "transformer_blocks.0.attn1.to_q", "transformer_blocks.1.ff.proj_out"
Shapes = dict[str, tuple[int, ...]]


@pytest.fixture(scope="module")
def wanted(demo_f32: Path) -> Shapes:
    return parameter_shapes(build_component(ModelFolder.open(demo_f32), "transformer", {}))


@pytest.fixture(scope="module")
def published(wanted: Shapes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of the transformer at scale 6 / 3, and one of the text's projection, which tells its release."""
    path = write_lora(tmp_path_factory.mktemp("lora") / "style.safetensors", factors(wanted), alpha=6.0)
    text = random_factors({"text_embedding_projection.aggregate_embed": (8, 16)})
    ((name, (down, up)),) = text.items()
    save_file(load_file(path) | {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, path)
    return path


@pytest.fixture(scope="module")
def converted(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model")
    ltx2.convert([published], out)
    return out / "loras" / "style"


def factors(wanted: Shapes) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return dict(random_factors({path: wanted[f"{path}.weight"] for path in (Q, OUT)}))


def opened(path: Path, wanted: Shapes) -> LoraSet:
    return LoraSet.open([LoraUse(path)], wanted, "2.0")


@pytest.mark.parametrize("source", ["published", "converted"])
def test_what_it_adds(source: str, wanted: Shapes, request: pytest.FixtureRequest) -> None:
    loras = opened(request.getfixturevalue(source), wanted)
    changes = loras.at(1)
    assert changes.keys() == {Q, OUT}
    for path, (down, up) in factors(wanted).items():
        ((strength, change),) = changes[path]
        assert strength == 1.0 and change.parts.keys() == {"lora_A.weight", "lora_B.weight"}
        np.testing.assert_allclose(change.rows(1, 5), 2 * up[1:5] @ down, rtol=1e-5, atol=1e-6)
    ((_, ours, others),) = loras.facts()
    assert (ours, others) == (2, 1), "layers of the transformer, and those that are not applied"
    assert loras.sizes(1) == {path: 3 * sum(wanted[f"{path}.weight"]) for path in (Q, OUT)}


def test_kohya_and_diffusers_spell_the_same(published: Path, wanted: Shapes, tmp_path: Path) -> None:
    tensors = load_file(published)
    kohya = {
        "lora_unet_" + name.removeprefix("diffusion_model.").replace(".lora_A", "+").replace(".lora_B", "-")
        .replace(".alpha", "=").replace(".weight", "").replace(".", "_").replace("+", ".lora_down.weight")
        .replace("-", ".lora_up.weight").replace("=", ".alpha"): value
        for name, value in tensors.items() if name.startswith("diffusion_model.")
    }  # fmt: skip
    save_file(kohya, tmp_path / "kohya.safetensors")
    ours, theirs = (opened(path, wanted).at(1) for path in (published, tmp_path / "kohya.safetensors"))
    assert ours.keys() == theirs.keys()
    for path, ((_, change),) in ours.items():
        np.testing.assert_array_equal(change.rows(0, 4), theirs[path][0][1].rows(0, 4))


def test_strengths_by_stage() -> None:
    use = LoraUse(Path("a"), (0.25, 0.5))
    assert [use.strength(stage) for stage in (1, 2, 3)] == [0.25, 0.5, 0.5]


def test_named(converted: Path, published: Path) -> None:
    folder = ModelFolder.open(converted.parent.parent)
    assert find_lora("style", folder) == converted
    assert find_lora(str(published), folder) == published
    with pytest.raises(InputError, match="there is no LoRA styel") as failed:
        find_lora("styel", folder)
    assert "style" in failed.value.why


class TestRefused:
    """By name, from headers."""

    def refuse(self, path: Path, wanted: Shapes, what: str, why: str) -> None:
        with pytest.raises(InputError, match=what) as failed:
            opened(path, wanted)
        assert why in failed.value.why and path.name in failed.value.what

    def test_a_wrong_shape(self, wanted: Shapes, tmp_path: Path) -> None:
        rows, columns = wanted[f"{Q}.weight"]
        shapes = {Q: (rows, columns), OUT: (rows + 1, columns)}
        path = write_lora(tmp_path / "wide.safetensors", random_factors(shapes))
        self.refuse(path, wanted, "does not fit the model", f"1 of the 2 layers that it changes; transformer.{OUT}")

    def test_another_release(self, wanted: Shapes, tmp_path: Path) -> None:
        """Told by modules that this one has not, such as gates."""
        gate = Q.replace("to_q", "to_gate_logits")
        path = write_lora(tmp_path / "gates.safetensors", random_factors({Q: wanted[f"{Q}.weight"], gate: (4, 128)}))
        self.refuse(path, wanted, "does not fit the model", f"{gate}: the transformer has no such weight")

    def test_a_release_that_it_is_not_made_for(self, wanted: Shapes) -> None:
        """As the file itself says: its layers would fit."""
        self.refuse(LORA_25, wanted, "does not fit the model", "made for 2.5.0, and the model is of 2.0")

    def test_a_block_too_many(self, wanted: Shapes, tmp_path: Path) -> None:
        path = write_lora(tmp_path / "deep.safetensors", random_factors({Q.replace("0", "6"): wanted[f"{Q}.weight"]}))
        self.refuse(path, wanted, "does not fit", "the transformer has no such weight")

    def test_no_layer_of_the_transformer(self, published: Path, wanted: Shapes, tmp_path: Path) -> None:
        text = {name: value for name, value in load_file(published).items() if name.startswith("text_")}
        save_file(text, tmp_path / "text.safetensors")
        self.refuse(tmp_path / "text.safetensors", wanted, "has no effect", "none of the 1 layers")

    def test_whole_differences(self, wanted: Shapes, tmp_path: Path) -> None:
        """Which only fusing can add."""
        rows = wanted[f"{Q}.weight"][0]
        tensors = {"diffusion_model.transformer_blocks.0.attn1.to_q.diff_b": np.zeros(rows, np.float32)}
        save_file(tensors, tmp_path / "bias.safetensors")
        self.refuse(tmp_path / "bias.safetensors", wanted, "cannot act beside the weights", Q)

    def test_no_lora(self, demo_f32: Path, wanted: Shapes) -> None:
        (weights,) = (demo_f32 / "vocoder").glob("*.safetensors")
        with pytest.raises(CheckpointError, match="does not fit the networks of any release"):
            opened(weights, wanted)
        with pytest.raises(CheckpointError, match="is no converted LoRA"):
            opened(demo_f32, wanted)

    def test_other_adapters(self, published: Path, wanted: Shapes, tmp_path: Path) -> None:
        name = "diffusion_model.transformer_blocks.0.attn1.to_q.dora_scale"
        save_file(load_file(published) | {name: np.ones(1, np.float32)}, tmp_path / "dora.safetensors")
        with pytest.raises(UnsupportedError, match="DoRA"):
            opened(tmp_path / "dora.safetensors", wanted)

    @pytest.mark.parametrize("change", [{"modules": 4}, {"scale": "strong"}, {"scales": [1]}, None])
    def test_a_folder_that_is_not_whole(
        self, converted: Path, wanted: Shapes, tmp_path: Path, change: dict[str, object] | None
    ) -> None:
        for file in converted.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        if change is None:
            (tmp_path / CONFIG).unlink()
        else:
            config = json.loads((converted / CONFIG).read_text())
            (tmp_path / CONFIG).write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match="is no converted LoRA"):
            opened(tmp_path, wanted)
