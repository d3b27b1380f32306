"""Verifying: every kind of damage is found and named; values are compared with the sources as they were converted."""

import json
import os
import shutil
from pathlib import Path

import pytest

import ltx2
from ltx2.convert.verify import Verified, verify
from ltx2.quant.plan.replan import repack
from ltx2.runtime.errors import ModelFolderError, UnsupportedError, VerificationError
from ltx2.runtime.events import BytesDone
from ltx2.runtime.files.tensors import TensorInfo, open_tensorfile
from ltx2.runtime.model.layout import ModelFolder
from tests.support.command import Here
from tests.support.folders import accept, rewrite, verified
from tests.support.official import DEMO, MONOLITH, UPSCALER, Official


@pytest.fixture
def folder(demo_model: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(demo_model, tmp_path / "model"))


def flip(path: Path, offset: int = -1) -> None:
    """Invert the lowest bit of one byte."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


class TestFolder:
    def test_whole(self, demo_model: Path) -> None:
        report = verified(demo_model)
        manifest = ModelFolder.open(demo_model).manifest
        files = [f for record in manifest.components.values() for f in record.files]
        counts = (len(files), sum(f.size for f in files), 1029, 0)
        assert report == Verified(tuple(sorted(manifest.components)), *counts, "as written")
        assert report.to_dict()["verified"] is True

    def test_progress(self, demo_model: Path) -> None:
        events = [e for e in verify(demo_model) if isinstance(e, BytesDone)]
        assert [e.done for e in events] == sorted(e.done for e in events) and events[-1].done == events[-1].total

    def test_not_a_model(self, tmp_path: Path) -> None:
        with pytest.raises(ModelFolderError):
            verified(tmp_path)

    def test_an_edited_card_is_right_and_said(self, here: Here, folder: Path) -> None:
        assert "README.md" not in here("verify", folder).out
        (folder / "README.md").write_text("mine")
        done = here("verify", folder)
        assert done.code == 0 and "is sound" in done.out and "README.md was edited" in done.out

    def test_flipped_bit(self, folder: Path) -> None:
        flip(folder / "vocoder" / "model.safetensors")
        with pytest.raises(VerificationError, match=r"vocoder/model\.safetensors has another SHA-256") as error:
            verified(folder)
        assert error.value.exit_code == 1

    def test_flipped_bit_in_a_tokenizer(self, folder: Path) -> None:
        flip(folder / "text_encoder" / "tokenizer.json")
        with pytest.raises(VerificationError, match=r"text_encoder/tokenizer\.json"):
            verified(folder)

    def test_missing_file(self, folder: Path) -> None:
        (folder / "audio_vae" / "model.safetensors").unlink()
        with pytest.raises(VerificationError, match=r"audio_vae/model\.safetensors is missing"):
            verified(folder)

    def test_truncated_file(self, folder: Path) -> None:
        os.truncate(folder / "audio_vae" / "model.safetensors", 1000)
        with pytest.raises(VerificationError, match=r"has 1000 bytes and should have .*not a valid safetensors"):
            verified(folder)

    def test_extra_weights(self, folder: Path) -> None:
        """mlx-lm would load them."""
        shutil.copy(folder / "vocoder" / "model.safetensors", folder / "vocoder" / "model-extra.safetensors")
        with pytest.raises(VerificationError, match=r"vocoder/model-extra\.safetensors is not listed"):
            verified(folder)

    def test_all_differences_are_listed(self, folder: Path) -> None:
        (folder / "audio_vae" / "config.json").unlink()
        flip(folder / "vocoder" / "model.safetensors")
        with pytest.raises(VerificationError, match=r"audio_vae/config\.json.*; .*vocoder"):
            verified(folder)

    def test_missing_tensor(self, folder: Path) -> None:
        rewrite(folder / "vocoder" / "model.safetensors", {"ups.1.bias": None})
        accept(folder)
        with pytest.raises(VerificationError, match=r"vocoder: tensor ups\.1\.bias is missing"):
            verified(folder)

    def test_wrong_shape(self, folder: Path) -> None:
        tensor = open_tensorfile(folder / "vocoder" / "model.safetensors").tensors["conv_post.weight"]
        wrong = TensorInfo(tensor.name, tensor.dtype, (7, 2, 2), 0, 0)
        rewrite(folder / "vocoder" / "model.safetensors", {tensor.name: wrong})
        accept(folder)
        with pytest.raises(VerificationError, match=r"\[7, 2, 2\] for \[2, 7, 2\] is of the wrong shape"):
            verified(folder)

    def test_configuration_of_another_network(self, folder: Path) -> None:
        path = folder / "transformer" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"num_layers": 7}))
        accept(folder)
        with pytest.raises(VerificationError, match=r"transformer_blocks\.6\.\S+ is missing.* and \d+ more "):
            verified(folder)

    def test_index(self, tmp_path: Path) -> None:
        out = ltx2.convert([UPSCALER], tmp_path / "out", shard_size=0.0005)
        assert verified(out).tensors == 24
        index = out / "spatial_upscaler" / "model.safetensors.index.json"
        data = json.loads(index.read_text())
        data["weight_map"]["final_conv.bias"] = data["weight_map"]["upsampler.conv.bias"]
        index.write_text(json.dumps(data))
        accept(out)
        with pytest.raises(VerificationError, match=r"index\.json does not say where"):
            verified(out)


class TestSources:
    def test_every_value(self, demo_model: Path) -> None:
        assert verified(demo_model, DEMO).compared == 1029

    def test_part_of_the_sources(self, demo_model: Path) -> None:
        assert verified(demo_model, [UPSCALER]).compared == 24

    @pytest.mark.parametrize("dtype", ["f16", "f32"])
    def test_cast(self, tmp_path: Path, dtype: str) -> None:
        out = tmp_path / "out"
        ltx2.convert([MONOLITH], out, variant="distilled", dtype=dtype, only=["transformer", "vocoder"])
        assert verified(out, [MONOLITH]).compared == 486 + 194

    def test_changed_value(self, folder: Path) -> None:
        """Files and manifest agree; only the source knows."""
        path = folder / "vocoder" / "model.safetensors"
        tensor = open_tensorfile(path).tensors["ups.3.weight"]
        flip(path, tensor.start + 4)
        accept(folder)
        assert verified(folder).compared == 0
        with pytest.raises(VerificationError, match=r"vocoder: 1 of \d+ values of tensor ups\.3\.weight differ"):
            verified(folder, DEMO)

    def test_other_source(self, official: Official, demo_model: Path) -> None:
        with pytest.raises(VerificationError, match=r"and \d+ more \("):
            verified(demo_model, [official.upscaler])

    def test_source_of_nothing(self, demo_model: Path, tmp_path: Path) -> None:
        out = ltx2.convert([UPSCALER], tmp_path / "out")
        with pytest.raises(VerificationError, match=r"ltx-2-demo\.safetensors holds nothing of this model"):
            verified(out, [UPSCALER, MONOLITH])

    def test_quantized(self, tmp_path: Path) -> None:
        out = ltx2.convert([MONOLITH], tmp_path / "out", variant="distilled", dtype="f16", only=["transformer"], bits=4)
        compared = verified(out, [MONOLITH], repack).compared
        assert compared == len(ModelFolder.open(out).tensor_files("transformer")[0].tensors) > 700
        path = out / "transformer" / "model.safetensors"
        flip(path, open_tensorfile(path).tensors["transformer_blocks.1.attn1.to_q.scales"].start)
        accept(out)
        with pytest.raises(VerificationError, match=r"1 of \d+ values of tensor \S+\.1\.attn1\.to_q\.scales differ"):
            verified(out, [MONOLITH], repack)

    def test_quantized_needs_a_packer(self, tmp_path: Path) -> None:
        out = ltx2.convert([MONOLITH], tmp_path / "out", variant="distilled", only=["connectors"], bits=8)
        with pytest.raises(UnsupportedError, match="is quantized"):
            verified(out, [MONOLITH])
