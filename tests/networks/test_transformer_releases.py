"""The transformer of every release: against diffusers where that computes the same, else against formulas."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from ltx2.runtime.errors import UnsupportedError
from ltx2.runtime.layers.linear import LinearLayer
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.networks.load import load_network
from ltx2.runtime.networks.transformer.config import TransformerConfig
from ltx2.runtime.networks.transformer.inputs import NOTHING, Levels, Skips, StreamInput, Text
from ltx2.runtime.networks.transformer.model import Transformer
from ltx2.runtime.sampling.latents import Grid, Scales, audio_positions, video_positions
from ltx2.runtime.streams import Streams
from tests.support.calls import inputs
from tests.support.formulas import Formulas, Given
from tests.support.golden import golden_25
from tests.support.official import Official, Split
from tests.support.parity import relative_l2, require

Figure = Callable[..., None]
Arrays = dict[str, np.ndarray]
RELEASES = ("2.0", "2.3", "2.5")
SCALES = Scales(spatial=32, temporal=8, audio_hop=0.01, audio_temporal=4)
GRID = Grid(channels=32, frames=3, height=2, width=3, audio_channels=2, audio_frames=13)
FRAME = GRID.height * GRID.width
POSITIONS = Streams(video_positions(GRID, 24.0, SCALES), audio_positions(GRID, SCALES))
GOLDEN = (("stage1.video", "stage1.audio"), ("video_context", "audio_context"))
GOLDEN_GRID = Grid(channels=32, frames=4, height=2, width=3, audio_channels=2, audio_frames=26)
BLOCK = frozenset({1})
SKIPS: dict[str, tuple[Skips, dict[str, Any]]] = {
    "self-attention in a block": (Skips(values=Streams(BLOCK, BLOCK)), {"spatio_temporal_guidance_blocks": [1]}),
    "exchange": (Skips(exchange=True), {"isolate_modalities": True}),
}


class Case:
    """One release's network with random weights, and inputs for it."""

    def __init__(self, folder: Path) -> None:
        self.network = load_network(ModelFolder.open(folder), "transformer", Transformer)
        self.config = ModelFolder.open(folder).config("transformer")
        rng = np.random.default_rng(5)
        sizes = {"video": GRID.tokens, "audio": GRID.audio_frames}
        streams = {"video": self.network.config.video, "audio": self.network.config.audio}
        self.tokens = {name: rng.standard_normal((count, 32)).astype(np.float32) for name, count in sizes.items()}
        self.text = {name: rng.standard_normal((20, s.context_dim)).astype(np.float32) for name, s in streams.items()}

    def given(self, sigma: float) -> Streams[StreamInput]:
        """One noise level for all tokens."""
        tokens, text = (Streams(*(mx.array(part[n])[None] for n in part)) for part in (self.tokens, self.text))
        return inputs(self.network, tokens, text, POSITIONS, sigma)

    def run(self, given: Streams[StreamInput], skips: Skips = NOTHING) -> Arrays:
        return {name: np.array(velocity[0]) for name, velocity in self.network(given, skips).items()}

    def formulas(self, given: Streams[StreamInput], skips: Skips = NOTHING, strength: Any = None) -> Arrays:
        """The same by formulas; `strength` (tokens, tokens) of the video's self-attention."""
        streams = {}
        for name, stream in given.items():
            levels = np.array(stream.levels.values)
            index = (
                np.zeros(len(self.tokens[name]), int) if stream.levels.index is None else np.array(stream.levels.index)
            )
            streams[name] = Given(
                self.tokens[name],
                levels[index],
                float(np.array(stream.levels.sigma)),
                self.text[name],
                dict(POSITIONS.items())[name],
                None if stream.marked is None else np.array(stream.marked)[0, :, 0] > 0,
                strength if name == "video" else None,
                set(dict(skips.values.items()).get(name, ())),
                dict(skips.idle.items()).get(name, False),
            )
        parameters: Any = tree_flatten(self.network.parameters())
        made = Formulas({name: np.array(value) for name, value in parameters}, self.config)
        return made.velocities(streams, exchange=not skips.exchange)


@pytest.fixture(scope="module")
def cases(model: Path, model_23: Path, model_25: Path) -> dict[str, Case]:
    return dict(zip(RELEASES, map(Case, (model, model_23, model_25)), strict=True))


@pytest.fixture(scope="module")
def references(official: Official, official_23: Official, official_25: Split) -> dict[str, Any]:
    require("torch"), require("diffusers")
    from tests.support.reference_transformer import reference_transformer

    monoliths = [(part.tensors(part.monolith), part.config(part.monolith)) for part in (official, official_23)]
    files = [*monoliths, (official_25.tensors("transformer"), official_25.config("transformer"))]
    found = (reference_transformer(tensors, config["transformer"]) for tensors, config in files)
    return dict(zip(RELEASES, found, strict=True))


def diffusers_run(module: Any, case: Case, sigma: float, **options: Any) -> Arrays:
    import torch

    def batch(part: Arrays) -> list[Any]:
        return [torch.from_numpy(part[name])[None] for name in ("video", "audio")]

    (video, audio), (text, audio_text), level = batch(case.tokens), batch(case.text), torch.tensor([1000 * sigma])
    with torch.no_grad():
        found = module(
            hidden_states=video,
            audio_hidden_states=audio,
            encoder_hidden_states=text,
            audio_encoder_hidden_states=audio_text,
            timestep=level.expand(1, GRID.tokens),
            audio_timestep=level.expand(1, GRID.audio_frames),
            sigma=level,
            audio_sigma=level,
            num_frames=GRID.frames,
            height=GRID.height,
            width=GRID.width,
            fps=24.0,
            audio_num_frames=GRID.audio_frames,
            return_dict=False,
            **options,
        )
    return dict(zip(("video", "audio"), (values[0].numpy() for values in found), strict=True))


def agree(what: str, ours: Arrays, theirs: Arrays, figure: Figure) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        figure(f"{what}, {name} velocity, rel L2", relative_l2(ours[name], theirs[name]), limit=1e-4)


def first_frame(given: Streams[StreamInput], **changes: Any) -> Streams[StreamInput]:
    """The video's first frame is given: level 0, the rest as it was; `changes` of the video's input."""
    video = given.video
    assert video is not None
    index = mx.concatenate([mx.zeros(FRAME, mx.int32), mx.ones(GRID.tokens - FRAME, mx.int32)])
    levels = Levels(mx.concatenate([mx.zeros(1), video.levels.values]), index, video.levels.sigma)
    return Streams(replace(video, levels=levels, **changes), given.audio)


def marks() -> np.ndarray:
    """(1, tokens, 1): the first latent frame is a single frame."""
    return (np.arange(GRID.tokens) < FRAME).astype(np.float32)[None, :, None]


class TestAgainstDiffusers:
    @pytest.mark.parametrize("sigma", [1.0, 0.421875])
    @pytest.mark.parametrize("release", RELEASES)
    def test_velocity(
        self, cases: dict[str, Case], references: dict[str, Any], figure: Figure, release: str, sigma: float
    ) -> None:
        case = cases[release]
        theirs = diffusers_run(references[release], case, sigma)
        agree(f"{release} against diffusers at {sigma}", case.run(case.given(sigma)), theirs, figure)

    @pytest.mark.parametrize("release", RELEASES)
    @pytest.mark.parametrize("left_out", SKIPS)
    def test_skips(
        self, cases: dict[str, Case], references: dict[str, Any], figure: Figure, release: str, left_out: str
    ) -> None:
        case, (skips, options) = cases[release], SKIPS[left_out]
        ours = case.run(case.given(0.725), skips)
        theirs = diffusers_run(references[release], case, 0.725, **options)
        agree(f"{release} against diffusers without {left_out}", ours, theirs, figure)
        assert relative_l2(ours["video"], case.run(case.given(0.725))["video"]) > 1e-2

    def test_marked_frame_and_mask(self, cases: dict[str, Case], references: dict[str, Any], figure: Figure) -> None:
        import torch

        case, seen = cases["2.5"], np.ones((GRID.tokens, GRID.tokens), np.float32)
        seen[:FRAME, FRAME:] = seen[FRAME:, :FRAME] = 0
        given = case.given(0.725)
        assert given.video is not None
        mask = mx.where(mx.array(seen) > 0, 0, -mx.inf)[None, None]
        video = replace(given.video, marked=mx.array(marks()), attention=mask)
        options = {"video_keyframes_mask": marks(), "video_self_attention_mask": seen[None]}
        theirs = diffusers_run(references["2.5"], case, 0.725, **{k: torch.from_numpy(v) for k, v in options.items()})
        agree("2.5 against diffusers, marked and masked", case.run(Streams(video, given.audio)), theirs, figure)


class TestAgainstFormulas:
    @pytest.mark.parametrize("release", RELEASES)
    def test_formulas_are_the_networks(self, cases: dict[str, Case], figure: Figure, release: str) -> None:
        case = cases[release]
        agree(f"{release} against formulas", case.run(case.given(0.725)), case.formulas(case.given(0.725)), figure)

    @pytest.mark.parametrize("release", RELEASES)
    def test_a_given_frame(self, cases: dict[str, Case], figure: Figure, release: str) -> None:
        """Scales and shifts follow each token's own level, gates and text the streams' sigmas."""
        case = cases[release]
        given = first_frame(case.given(0.725), marked=mx.array(marks()))
        agree(f"{release}, a given frame", case.run(given), case.formulas(given), figure)

    @pytest.mark.parametrize("frozen", ["video", "audio"])
    @pytest.mark.parametrize("release", RELEASES)
    def test_a_kept_stream(self, cases: dict[str, Case], figure: Figure, release: str, frozen: str) -> None:
        case = cases[release]
        given = dict(case.given(0.725).items())
        given[frozen] = replace(given[frozen], levels=Levels(mx.zeros(1)))
        agree(f"{release}, {frozen} kept", case.run(Streams(**given)), case.formulas(Streams(**given)), figure)

    @pytest.mark.parametrize("release", RELEASES)
    def test_attention_strength(self, cases: dict[str, Case], figure: Figure, release: str) -> None:
        case, strength = cases[release], np.ones((GRID.tokens, GRID.tokens))
        strength[:FRAME, FRAME:] = strength[FRAME:, :FRAME] = 0.3
        given = first_frame(case.given(0.725), attention=mx.log(mx.array(strength.astype(np.float32)))[None, None])
        agree(f"{release}, attention strength", case.run(given), case.formulas(given, strength=strength), figure)

    @pytest.mark.parametrize("idle", ["video", "audio"])
    def test_an_idle_stream(self, cases: dict[str, Case], figure: Figure, idle: str) -> None:
        """It gets no velocity, and the other one still attends to its tokens."""
        case, skips = cases["2.3"], Skips(idle=Streams(**{idle: True}))
        ours = case.run(case.given(0.725), skips)
        assert idle not in ours
        agree(f"{idle} idle", ours, case.formulas(case.given(0.725), skips), figure)

    @pytest.mark.parametrize("release", RELEASES)
    @pytest.mark.parametrize("alone", ["video", "audio"])
    def test_one_stream_alone(self, cases: dict[str, Case], figure: Figure, release: str, alone: str) -> None:
        """An absent stream is as good as no exchange."""
        case, both = cases[release], cases[release].given(0.725)
        given = Streams(**{name: stream for name, stream in both.items() if name == alone})
        ours = case.run(given)
        agree(f"{release}, {alone} alone", ours, case.formulas(given), figure)
        np.testing.assert_array_equal(ours[alone], case.run(both, Skips(exchange=True))[alone])

    def test_one_stream_passes_its_values(self, cases: dict[str, Case], figure: Figure) -> None:
        case, skips = cases["2.3"], Skips(values=Streams(audio=frozenset({0, 2})))
        agree("audio passes", case.run(case.given(0.725), skips), case.formulas(case.given(0.725), skips), figure)

    def test_text_modulated_by_tables_alone(self, cases: dict[str, Case], figure: Figure) -> None:
        """Without the network that follows the noise level."""
        case = Case.__new__(Case)
        case.__dict__ |= vars(cases["2.5"])
        case.config = case.config | {"use_prompt_adaln_single": False}
        case.network = Transformer(TransformerConfig.from_dict(case.config))
        values: Any = tree_flatten(cases["2.5"].network.parameters())
        case.network.load_weights([pair for pair in values if "prompt_adaln_single" not in pair[0]], strict=True)
        agree("tables alone", case.run(case.given(0.725)), case.formulas(case.given(0.725)), figure)


def test_blocks_that_do_not_exist_pass_nothing(cases: dict[str, Case]) -> None:
    case = cases["2.0"]
    skips = Skips(values=Streams(frozenset({99}), frozenset({99})))
    np.testing.assert_array_equal(case.run(case.given(0.6), skips)["video"], case.run(case.given(0.6))["video"])


def test_golden_velocity(demo_25: Path, figure: Figure) -> None:
    """What Lightricks' own modules computed with the trained 2.5 demo model, the first frame marked."""
    network = load_network(ModelFolder.open(demo_25), "transformer", Transformer)
    noise, contexts = (Streams(*(mx.array(golden_25(f"a.{name}")) for name in names)) for names in GOLDEN)
    positions = Streams(video_positions(GOLDEN_GRID, 24.0, SCALES), audio_positions(GOLDEN_GRID, SCALES))
    given = inputs(network, noise, contexts, positions, 0.725)
    frame = GOLDEN_GRID.height * GOLDEN_GRID.width
    assert given.video is not None
    video = replace(given.video, marked=(mx.arange(GOLDEN_GRID.tokens) < frame)[None, :, None])
    for name, velocity in network(Streams(video, given.audio)).items():
        error = relative_l2(velocity, golden_25(f"a.velocity_at_0.725.{name}"))
        figure(f"2.5 demo model, {name} velocity, rel L2", error, limit=1e-4)
    unmarked = network(given).video
    assert relative_l2(unmarked, golden_25("a.velocity_at_0.725.video")) > 1e-3


@pytest.mark.parametrize("key", ["caption_proj_before_connector", "caption_proj_input_norm"])
def test_contradicting_text_projections(cases: dict[str, Case], key: str) -> None:
    config = cases["2.3"].config
    with pytest.raises(UnsupportedError, match="contradict"):
        TransformerConfig.from_dict(config | {key: not config[key]})


class TestTextThatIsKept:
    def text_keys(self, case: Case, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """The text's layers that make keys, as they are called from now on."""
        called: list[str] = []

        def around(path: str, layer: LinearLayer, x: mx.array) -> mx.array:
            called.append(path)
            return layer.multiply(x)

        for path, layer in case.network.named_modules():
            if path.endswith("attn2.to_k"):
                monkeypatch.setattr(layer, "around", partial(around, path))
        return called

    @pytest.mark.parametrize(("release", "times"), [("2.0", 1), ("2.5", 2)])
    def test_same_bits_from_fewer_products(
        self, cases: dict[str, Case], monkeypatch: pytest.MonkeyPatch, release: str, times: int
    ) -> None:
        """Made once per noise level where that modulates the text, else once."""
        case = cases[release]
        calls = [(sigma, skips) for sigma in (0.9, 0.4) for skips in (NOTHING, Skips(exchange=True))]
        plain = [case.run(case.given(sigma), skips) for sigma, skips in calls]
        keys = self.text_keys(case, monkeypatch)
        text = case.given(0.9).map(lambda stream: Text(stream.text.tokens, stream.text.context, kept=True))
        for (sigma, skips), velocity in zip(calls, plain, strict=True):
            given = case.given(sigma).map(lambda stream, kept: replace(stream, text=kept), text)
            for name, values in case.run(given, skips).items():
                np.testing.assert_array_equal(values, velocity[name])
        assert len(keys) == times * 2 * case.network.config.num_layers == times * len(set(keys))
