"""Guided pipelines from noise to latents: against diffusers where it does the same, else against formulas."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import load_file, save_file

from ltx2.runtime.generate.job import CONTEXTS, LATENTS, Job
from ltx2.runtime.generate.options.request import Request
from ltx2.runtime.generate.pipeline import Pipeline
from ltx2.runtime.generate.records.clip import Sampled
from ltx2.runtime.networks.load import build_component, load_network, parameter_shapes
from ltx2.runtime.networks.transformer.model import Transformer
from ltx2.runtime.networks.upsampler import LatentUpsampler
from ltx2.runtime.networks.video_vae.model import VideoAutoencoder
from ltx2.runtime.sampling.latents import audio_positions, video_positions
from ltx2.runtime.sampling.schedule import shifted
from tests.support.formulas import Formulas, Given
from tests.support.loras import Factors, random_factors, write_lora
from tests.support.official import Official
from tests.support.parity import relative_l2
from tests.support.res2s import res_2s

if TYPE_CHECKING:
    from tests.support.reference_chain import ReferenceChain

Figure = Callable[..., None]
Latents = dict[str, np.ndarray]
PROMPT, NEGATIVE = "a yellow triangle moves up with a high tone", "blurry, a low tone"
SIZE: dict[str, Any] = {"width": 128, "height": 64, "frames": 17, "fps": 30.0}  # stage 1 of two: a latent row
STEPS, BLOCK, STRENGTH, LIMIT = 2, 4, 0.6, 3e-4
SIGMAS = shifted(STEPS, 4096)[:-1]
# By stream: cfg, stg, modality, rescale. Diffusers has no stream without one that the other has.
COMBINATIONS = {
    "rescaled cfg": ((3.0, 0.0, 1.0, 0.7), (7.0, 0.0, 1.0, 0.4)),
    "stg": ((1.0, 1.0, 1.0, 0.0), (1.0, 0.6, 1.0, 0.0)),
    "modality": ((1.0, 0.0, 3.0, 0.0), (1.0, 0.0, 2.0, 0.0)),
    "all": ((3.0, 1.0, 3.0, 0.7), (7.0, 0.8, 2.5, 0.5)),
}


@pytest.fixture(scope="module")
def embeddings(model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of both prompts."""
    file = tmp_path_factory.mktemp("guided") / "embeddings.safetensors"
    options = {"prompt": PROMPT, "save_embeddings": str(file), "pipeline": "one-stage", **ours("all")}
    request = Request.from_options(options)
    list(Pipeline(model).events(request, CONTEXTS))
    return str(file)


def theirs(name: str) -> dict[str, Any]:
    """A combination as diffusers' pipeline takes it."""
    names = ("guidance_scale", "stg_scale", "modality_scale", "guidance_rescale")
    video, audio = COMBINATIONS[name]
    numbers = dict(zip(names, video, strict=True)) | {f"audio_{n}": v for n, v in zip(names, audio, strict=True)}
    return numbers | {"spatio_temporal_guidance_blocks": [BLOCK], "negative_prompt": NEGATIVE}


def ours(name: str) -> dict[str, Any]:
    names = ("cfg", "stg", "modality_scale", "rescale")
    video, audio = COMBINATIONS[name]
    numbers = dict(zip(names, video, strict=True)) | {f"audio_{n}": v for n, v in zip(names, audio, strict=True)}
    return numbers | {"stg_blocks": [BLOCK], "negative_prompt": NEGATIVE, "steps": STEPS, **SIZE}


def latents(model: Path, noise: Latents, folder: Path, **options: Any) -> Latents:
    """Of a whole run with this noise."""
    save_file(noise, folder / "noise.safetensors")
    request = Request.from_options({"noise": str(folder / "noise.safetensors"), **options})
    *_, last = Pipeline(model).events(request, LATENTS)
    assert isinstance(last, Sampled)
    return {name: np.array(value) for name, value in last.latents.items()}


@pytest.mark.parametrize("name", [name for name in COMBINATIONS if name != "all"])
def test_guidance(
    chain: "ReferenceChain", model: Path, embeddings: str, tmp_path: Path, figure: Figure, name: str
) -> None:
    """All steps of one stage; every part of the guidance alone."""
    from tests.support.reference_chain import Size

    noise, want = chain.guided(PROMPT, Size(**SIZE), SIGMAS, theirs(name), seed=5)
    found = latents(model, noise, tmp_path, pipeline="one-stage", embeddings=embeddings, **ours(name))
    for stream, values in want.items():
        figure(f"guided by {name}: {stream} latents, rel L2", relative_l2(found[stream], values), limit=LIMIT)


def test_two_stages_with_a_lora(
    chain: "ReferenceChain", official: Official, model: Path, embeddings: str, tmp_path: Path, figure: Figure
) -> None:
    """Stage 1 guided by all together and without the LoRA, stage 2 with it; the sound is stage 1's."""
    from tests.support.reference_chain import Size
    from tests.support.reference_transformer import PREFIX, reference_transformer

    shapes = parameter_shapes(build_component(Pipeline(model).folder, "transformer", {}))
    blocks = {n.removesuffix(".weight"): s for n, s in shapes.items() if ".attn" in n and len(s) == 2}
    lora = write_lora(tmp_path / "lora.safetensors", random_factors(blocks))
    changed, published = dict(official.tensors(official.monolith)), load_file(lora)
    for name in [n for n in published if n.endswith(".lora_A.weight")]:
        delta = published[name.replace("lora_A", "lora_B")] @ published[name]
        key = name.replace("diffusion_model.", PREFIX).replace("lora_A.weight", "weight")
        changed[key] = changed[key] + STRENGTH * delta
    network = reference_transformer(changed, official.config(official.monolith)["transformer"])
    noise, want = chain.refined(PROMPT, Size(**SIZE), SIGMAS, theirs("all"), 5, network)
    options = ours("all") | {"pipeline": "two-stage", "distilled_lora": (str(lora), STRENGTH)}
    found = latents(model, noise, tmp_path, embeddings=embeddings, **options)
    for stream, values in want.items():
        figure(f"two-stage with a LoRA: {stream} latents, rel L2", relative_l2(found[stream], values), limit=LIMIT)


CONTEXT = 16  # tokens of a text


class ByFormulas:
    """A whole hq run in float64: res_2s in both stages, the first one guided by cfg and modality, both with a LoRA."""

    def __init__(self, job: Job, texts: Latents, noise: Latents, factors: Factors) -> None:
        network = load_network(job.folder, "transformer", Transformer)
        parameters: Any = tree_flatten(network.parameters())
        self.parameters = {name: np.array(value, np.float64) for name, value in parameters}
        self.job, self.texts, self.noise, self.factors = job, texts, noise, factors

    def stage(self, number: int, levels: Sequence[float], strength: float, start: Latents, guided: bool) -> Latents:
        """Latents at its end."""
        weights = {
            f"{path}.weight": self.parameters[f"{path}.weight"] + strength * up @ down.astype(np.float64)
            for path, (down, up) in self.factors.items()
        }
        made = Formulas(self.parameters | weights, self.job.folder.config("transformer"))
        grid = self.job.stage_grid(number)
        segments = dict(grid.segments.items())
        places = {"video": video_positions(grid, SIZE["fps"], self.job.scales)}
        places["audio"] = audio_positions(grid, self.job.scales)
        split = {name: segment.tokens for name, segment in segments.items()}

        def tokens(name: str, values: np.ndarray) -> np.ndarray:
            return np.array(segments[name].to_tokens(mx.array(values)), np.float64)[0]

        def joined(parts: Mapping[str, np.ndarray]) -> np.ndarray:
            return np.concatenate([parts[name] for name in split])

        def apart(x: np.ndarray) -> Latents:
            return {"video": x[: split["video"]], "audio": x[split["video"] :]}

        def x0(x: np.ndarray, sigma: float, kind: str, exchange: bool = True) -> Latents:
            given = {
                name: Given(
                    part, np.full(len(part), sigma), sigma, self.texts[f"{kind}{name}_context"][0], places[name]
                )
                for name, part in apart(x).items()
            }
            return {name: given[name].tokens - sigma * v for name, v in made.velocities(given, exchange).items()}

        def predict(x: np.ndarray, sigma: float) -> np.ndarray:
            text = x0(x, sigma, "")
            if not guided:
                return joined(text)
            other, alone = x0(x, sigma, "negative_"), x0(x, sigma, "", exchange=False)
            found = {}
            for name, (cfg, rescale) in {"video": (3.0, 0.45), "audio": (7.0, 1.0)}.items():
                c = text[name]
                p = c + (cfg - 1) * (c - other[name]) + 2.0 * (c - alone[name])
                found[name] = p * (rescale * c.std(ddof=1) / p.std(ddof=1) + 1 - rescale)
            return joined(found)

        def draw(purpose: str, row: int) -> np.ndarray:
            drawn = {}
            for name in split:
                value = tokens(name, self.noise[f"stage{number}.{purpose}.{name}"][row : row + 1])
                drawn[name] = (value - value.mean()) / value.std(ddof=1)
            return joined(drawn)

        begun = joined({name: tokens(name, self.noise[f"stage{number}.{name}"]) for name in split})
        if start:
            before = joined({name: tokens(name, value) for name, value in start.items()})
            begun = before + levels[0] * (begun - before)
        ended = apart(res_2s(begun, levels, predict, draw))
        values = {name: mx.array(part.astype(np.float32))[None] for name, part in ended.items()}
        return {name: np.array(segments[name].from_tokens(value)) for name, value in values.items()}


def test_hq(demo_dev: Path, tmp_path: Path, figure: Figure) -> None:
    """Both stages from noise to latents, against formulas: diffusers has no res_2s."""
    pipeline, rng = Pipeline(demo_dev), np.random.default_rng(4)
    shapes = parameter_shapes(build_component(pipeline.folder, "transformer", {}))
    factors = random_factors(
        {n.removesuffix(".weight"): s for n, s in shapes.items() if ".attn1.to_" in n and len(s) == 2}
    )
    lora = write_lora(tmp_path / "lora.safetensors", factors)
    texts = {
        f"{kind}{name}_context": rng.standard_normal((1, CONTEXT, width)).astype(np.float32)
        for kind in ("", "negative_")
        for name, width in pipeline.plan(PROMPT).job.transformer_config.context_dims.items()
    }
    save_file(texts, tmp_path / "texts.safetensors")
    options = {"pipeline": "hq", "steps": 3, "distilled_lora": str(lora), **SIZE}
    options["embeddings"] = str(tmp_path / "texts.safetensors")
    job = pipeline.plan(**options).job
    noise = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in job.draws().items()}
    found = latents(demo_dev, noise, tmp_path, **options)
    formulas = ByFormulas(job, texts, noise, factors)
    first = formulas.stage(1, shifted(3, job.stage_grid(1).tokens)[:-1], 0.25, {}, guided=True)
    statistics = load_network(job.folder, "video_vae", VideoAutoencoder).per_channel_statistics
    upscaler = load_network(job.folder, "spatial_upscaler", LatentUpsampler)
    larger = np.array(statistics.normalise(upscaler(statistics.unnormalise(mx.array(first["video"])))))
    second = formulas.stage(2, (0.909375, 0.725, 0.421875), 0.5, first | {"video": larger}, guided=False)
    for stream, values in {"video": second["video"], "audio": first["audio"]}.items():
        figure(f"hq: {stream} latents, rel L2 vs formulas", relative_l2(found[stream], values), limit=LIMIT)
