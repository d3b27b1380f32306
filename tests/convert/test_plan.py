"""Planning from headers: the published files completely and exactly, the plan as the contract writes it."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from ltx2.convert.names import rules
from ltx2.convert.output.files import WeightFile, component_files, stream_order
from ltx2.convert.plan.check import check_plan
from ltx2.convert.plan.entries import Drop, Move, Plan, plan_json
from ltx2.runtime.errors import CheckpointError
from ltx2.runtime.files.tensors import open_tensorfile
from tests.support import published
from tests.support.official import DEMO, MONOLITH, UPSCALER, plan_of


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sparse look-alikes of all published files of the release; the monolith is the dev one."""
    folder = tmp_path_factory.mktemp("published")
    names = (published.MONOLITH, published.SPATIAL, published.TEMPORAL, published.LORA)
    found = {name: published.write_published(folder, name)[0] for name in names}
    return found | {"gemma": published.write_gemma(folder / "gemma")}


@pytest.fixture(scope="module")
def plan(files: dict[str, Path]) -> Plan:
    return plan_of(*files.values())


def demo_plan(*sources: Path, **options: Any) -> Plan:
    return plan_of(*(sources or DEMO), **{"variant": "distilled", **options})


class TestPublishedFiles:
    """All of one release together; each alone: test_published.py."""

    def test_every_tensor_appears_exactly_once(self, files: dict[str, Path], plan: Plan) -> None:
        sources = [*files["gemma"].glob("*.safetensors"), *(path for path in files.values() if path.is_file())]
        assert len(sources) == 9
        rows = [(row["source"], row["name"]) for row in plan_json(plan)["plan"]]
        assert sorted(rows) == sorted((str(path), name) for path in sources for name in open_tensorfile(path).tensors)
        assert (plan.release, plan.variant) == ("2.0", "dev")
        check_plan(plan)

    def test_shards_hold_whole_blocks(self, plan: Plan) -> None:
        made = component_files(plan, plan.components["transformer"], 5 * 10**9)
        shards = [file for file in made if isinstance(file, WeightFile)]
        assert [s.name for s in shards] == [f"model-{n:05d}-of-00009.safetensors" for n in range(1, 10)]
        assert all(4 * 10**9 < s.size <= 5 * 10**9 for s in shards[:-1])
        keys = [key for shard in shards for key in shard.tensors]
        assert sorted(keys) == sorted(m.key for m in plan.moves("transformer"))
        blocks = [key.split(".")[1] for key in keys if key.startswith("transformer_blocks.")]
        assert [block for block, _ in groupby(blocks)] == sorted(map(str, range(48)))  # whole, in the file's own order
        held = [{key.split(".")[1] for key in s.tensors if key.startswith("transformer_blocks.")} for s in shards]
        assert sum(map(len, held)) == 48  # no block in two shards

    def test_sources_are_read_from_begin_to_end(self, plan: Plan) -> None:
        """All but small tensors that belong to a block further on, and blocks that Gemma's files split."""
        entries = stream_order(plan.all_moves)
        assert stream_order(entries) == entries
        position: dict[Path, int] = {}
        back = 0
        for entry in entries:
            back += entry.tensor.nbytes if entry.tensor.start < position.get(entry.file.path, 0) else 0
            position[entry.file.path] = max(entry.tensor.end, position.get(entry.file.path, 0))
        assert 0 < back < 0.02 * sum(entry.tensor.nbytes for entry in entries)


class TestPlanJson:
    def test_rows(self, plan: Plan, files: dict[str, Path]) -> None:
        rows = {row["name"]: row for row in plan_json(plan)["plan"]}
        monolith = str(files[published.MONOLITH])

        def check(name: str, component: str, key: str, transform: str, shape: list[int], out: list[int]) -> None:
            dtype = "F32" if "scale_shift_table" in name else "BF16"
            assert rows[name] == {
                "source": monolith, "name": name, "shape": shape, "dtype": dtype, "component": component, "key": key,
                "transform": [transform], "out_shape": out, "out_dtype": dtype,
            }  # fmt: skip

        block = "model.diffusion_model.transformer_blocks.7."
        check(block + "attn1.to_out.0.bias", "transformer", "transformer_blocks.7.attn1.to_out.bias", "copy",
              [4096], [4096])  # fmt: skip
        check(block + "audio_ff.net.0.proj.bias", "transformer", "transformer_blocks.7.audio_ff.proj_in.bias", "copy",
              [8192], [8192])  # fmt: skip
        check(block + "ff.net.2.weight", "transformer", "transformer_blocks.7.ff.proj_out.weight", "copy",
              [4096, 16384], [4096, 16384])  # fmt: skip
        check(block + "scale_shift_table", "transformer", "transformer_blocks.7.scale_shift_table", "copy",
              [6, 4096], [6, 4096])  # fmt: skip
        check("model.diffusion_model.video_embeddings_connector.learnable_registers", "connectors",
              "video_connector.learnable_registers", "copy", [128, 3840], [128, 3840])  # fmt: skip
        check("text_embedding_projection.aggregate_embed.weight", "connectors",
              "text_projection.aggregate_embed.weight", "copy", [3840, 188160], [3840, 188160])  # fmt: skip
        check("vae.per_channel_statistics.std-of-means", "video_vae", "per_channel_statistics.std", "copy",
              [128], [128])  # fmt: skip
        check("vae.encoder.conv_in.conv.weight", "video_vae", "encoder.conv_in.conv.weight", "transpose(0,2,3,4,1)",
              [128, 48, 3, 3, 3], [128, 3, 3, 3, 48])  # fmt: skip
        check("audio_vae.per_channel_statistics.mean-of-means", "audio_vae", "per_channel_statistics.mean", "copy",
              [128], [128])  # fmt: skip
        check("vocoder.ups.0.weight", "vocoder", "ups.0.weight", "transpose(1,2,0)", [1024, 512, 16], [512, 16, 1024])
        check("vocoder.conv_pre.weight", "vocoder", "conv_pre.weight", "transpose(0,2,1)",
              [1024, 128, 7], [1024, 7, 128])  # fmt: skip
        assert rows["vae.per_channel_statistics.channel"] == {
            "source": monolith, "name": "vae.per_channel_statistics.channel", "dropped": rules.UNUSED_STATISTIC,
        }  # fmt: skip

    def test_lora_rows(self, plan: Plan) -> None:
        rows = {row["name"]: row for row in plan_json(plan)["plan"]}
        row = rows["diffusion_model.transformer_blocks.3.attn2.to_out.0.lora_A.weight"]
        assert row["component"] == "loras/ltx-2-19b-distilled-lora-384"
        assert row["key"] == "transformer.transformer_blocks.3.attn2.to_out.lora_A.weight"
        row = rows["text_embedding_projection.aggregate_embed.lora_B.weight"]
        assert row["key"] == "connectors.text_projection.aggregate_embed.lora_B.weight"

    def test_cast(self) -> None:
        """--dtype casts every float but the tables kept in F32."""
        rows = plan_json(demo_plan(dtype="f16"))["plan"]
        tables = [row for row in rows if "scale_shift_table" in row["name"]]
        others = [row for row in rows if "dropped" not in row and "scale_shift_table" not in row["name"]]
        assert {(row["out_dtype"], *row["transform"]) for row in tables} == {("F32", "copy")}
        assert {(row["out_dtype"], row["transform"][-1]) for row in others} == {("F16", "cast(f16)")}
        assert ["transpose(0,2,3,4,1)", "cast(f16)"] in [row["transform"] for row in others]

    def test_cast_to_the_own_dtype_is_a_copy(self) -> None:
        assert plan_json(demo_plan(dtype="bf16")) == plan_json(demo_plan())

    def test_only(self) -> None:
        plan = plan_of(MONOLITH, UPSCALER, only=("video_vae", "spatial_upscaler"))
        assert set(plan.components) == {"video_vae", "spatial_upscaler"} and plan.variant is None
        assert len(plan.entries) == 928 + 25  # the others are listed as dropped
        reasons = {e.reason for e in plan.entries if isinstance(e, Drop)}
        assert "transformer is not selected (--only)" in reasons

    def test_json_is_serialisable(self) -> None:
        assert json.loads(json.dumps(plan_json(demo_plan()))) == plan_json(demo_plan())


class TestCompleteness:
    """A plan that does not fill its networks is an error that names the tensors."""

    def changed(self, change: Callable[[Move], Move | None]) -> Plan:
        plan = demo_plan()
        entries = [change(e) if isinstance(e, Move) else e for e in plan.entries]
        return replace(plan, entries=tuple(e for e in entries if e is not None))

    def test_missing(self) -> None:
        key = "transformer_blocks.5.attn1.to_k.bias"
        with pytest.raises(CheckpointError, match=f"transformer.*1 missing: {key}"):
            check_plan(self.changed(lambda m: None if m.key == key else m))

    def test_extra(self) -> None:
        with pytest.raises(CheckpointError, match=r"1 missing: ups\.4\.bias; 1 not part of the network: ups\.9\.bias"):
            check_plan(self.changed(lambda m: replace(m, key="ups.9.bias") if m.key == "ups.4.bias" else m))

    def test_wrong_shape(self) -> None:
        with pytest.raises(CheckpointError, match=r"conv_post\.weight \[2, 2, 7\] for \[2, 7, 2\]"):
            check_plan(self.changed(lambda m: replace(m, steps=()) if m.key == "conv_post.weight" else m))

    def test_twice(self) -> None:
        with pytest.raises(CheckpointError, match=r"vocoder/ups\.0\.bias"):
            check_plan(self.changed(lambda m: replace(m, key="ups.0.bias") if m.key == "ups.1.bias" else m))
