"""Files of later releases, tiny, from end to end."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import ltx2
from ltx2.convert.inspect import inspect
from ltx2.convert.plan.check import check_plan
from ltx2.convert.write import write_plan
from ltx2.runtime.errors import UnsupportedError, VerificationError
from ltx2.runtime.events import Warned
from ltx2.runtime.files.tensors import open_tensorfile
from ltx2.runtime.model.layout import ModelFolder
from tests.support.folders import accept, verified
from tests.support.official import DEMO_25, LORA_25, Official, Split, plan_of
from tests.support.parity import relative_l2, require


def convert(out: Path, *sources: Path) -> tuple[Path, list[str]]:
    """The converted folder, and the warnings."""
    plan = plan_of(*sources, variant="dev")
    warnings = [event.message for event in write_plan(plan, out) if isinstance(event, Warned)]
    return out, warnings


class TestSplitFiles:
    def test_whole(self, model_25: Path, official_25: Split) -> None:
        """All components, every value, without a warning."""
        report = verified(model_25, official_25.sources)
        assert report.components == (
            "audio_vae", "connectors", "duration_head", "spatial_upscaler", "text_encoder", "transformer", "video_vae",
            "vocoder",
        )  # fmt: skip
        assert report.compared == report.tensors
        assert (inspect(model_25)["release"], inspect(model_25)["generate"]) == ("2.5", True)

    def test_tokenizer(self, official_25: Split, tmp_path: Path) -> None:
        source = official_25.path("gemma4")
        out, _ = convert(tmp_path / "out", source)
        blobs = open_tensorfile(source)
        files = {"tokenizer.json": "tokenizer_json", "chat_template.jinja": "hf_asset__chat_template.jinja"}
        for name, tensor in files.items():
            assert (out / "text_encoder" / name).read_bytes() == blobs.array(tensor).tobytes()
        path = out / "text_encoder" / "tokenizer.json"
        path.write_bytes(path.read_bytes().replace(b"version", b"Version"))
        accept(out)
        with pytest.raises(VerificationError, match=r"text_encoder: tokenizer\.json differs from the source"):
            verified(out, [source])

    def test_parts_come_alone(self, official_25: Split, tmp_path: Path) -> None:
        """What a component lacks then is said, and such a folder is what it claims to be."""
        source = official_25.path("transformer")
        transformer, warnings = convert(tmp_path / "transformer", source)
        assert [w.partition(" is missing")[0] for w in warnings] == ["connectors: text projection"]
        assert verified(transformer, [source]).components == ("connectors", "transformer")
        source = official_25.path("gemma4")
        text, warnings = convert(tmp_path / "text", source)
        assert [w.partition(" is missing")[0] for w in warnings] == ["connectors: embeddings connectors"]
        assert verified(text, [source]).components == ("connectors", "text_encoder")


class TestMonolith:
    def test_whole(self, official_23: Official, tmp_path: Path) -> None:
        out, warnings = convert(tmp_path / "out", official_23.monolith)
        report = verified(out, [official_23.monolith])
        unused = 1  # the inverse Fourier basis
        assert report.compared == report.tensors == len(official_23.tensors(official_23.monolith)) - unused
        assert warnings == ["generating from a prompt also needs text_encoder, which no source has"]
        assert ModelFolder.open(out).manifest.release == "2.3"


def test_the_configuration_decides_the_structure() -> None:
    """The demo model's sound has as few channels on its second level as on its first."""
    plan = plan_of(*DEMO_25, LORA_25, variant="distilled")
    check_plan(plan)
    assert plan.release == "2.5" and "loras/ltx-2.5-demo-lora-green-bf16" in plan.components
    assert "encoder.down.1.block.0.nin_shortcut.conv.weight" not in {m.key for m in plan.moves("audio_vae")}


class TestGenerate:
    """With a folder that a newer ltx2 made."""

    SAID = r"cannot generate with LTX-9\.9: it converts and verifies its files, and generates with LTX-2\.0 and .* only"

    @pytest.fixture
    def newer(self, model_25: Path, tmp_path: Path) -> Path:
        manifest = json.loads((model_25 / "ltx2.json").read_text())
        (tmp_path / "ltx2.json").write_text(json.dumps(manifest | {"release": "9.9"}))
        for component in manifest["components"]:
            (tmp_path / component).symlink_to(model_25 / component)
        return tmp_path

    def test_says_so_at_once(self, newer: Path) -> None:
        with pytest.raises(UnsupportedError, match=self.SAID) as error:
            ltx2.load(newer)
        assert error.value.exit_code == 1 and "newer ltx2" in error.value.fix
        assert inspect(newer)["generate"] is False

    def test_command(self, newer: Path, here: Any) -> None:
        done = here("generate", "a kite", "-m", newer, "-o", newer / "clip.mp4", "--json")
        assert done.code == 1 and json.loads(done.out)["error"]["kind"] == "unsupported"
        assert not list(newer.glob("clip*"))


def test_text_encoder_is_what_mlx_lm_loads(official_25: Split, model_25: Path, figure: Any) -> None:
    """Folder and configuration describe the model that transformers computes."""
    mlx_lm = require("mlx_lm.utils")
    torch = require("torch")
    transformers = require("transformers")
    ids = np.array([[2, 5, 7, 9, 11, 3, 4, 8, 19, 22, 100, 50]])
    network, config = mlx_lm.load_model(model_25 / "text_encoder")
    assert config["gemma_version"] == "gemma4-demo-ltx-v1"
    logits = np.array(network(mx.array(ids)))

    text_config = official_25.config("gemma4")["text_config"]
    reference = transformers.Gemma4UnifiedForCausalLM(transformers.Gemma4UnifiedTextConfig(**text_config)).eval()
    tensors = official_25.tensors("gemma4")
    weights = {name: torch.from_numpy(value) for name, value in tensors.items() if name.startswith("model.")}
    assert reference.load_state_dict(weights, strict=False).unexpected_keys == []
    with torch.no_grad():
        expected = reference(torch.from_numpy(ids)).logits.numpy()
    figure("Gemma 4 as converted, mlx-lm vs transformers, rel L2", relative_l2(logits, expected), limit=1e-5)
