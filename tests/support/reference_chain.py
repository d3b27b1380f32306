"""Generations as diffusers does them: its own pipelines, over networks with given weights."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.ltx2 import LTX2LatentUpsamplePipeline, LTX2Pipeline
from diffusers.pipelines.ltx2.utils import DISTILLED_SIGMA_VALUES, STAGE_2_DISTILLED_SIGMA_VALUES
from transformers import AutoTokenizer

from tests.support.official import Official
from tests.support.reference_audio import ReferenceAudioVAE, ReferenceVocoder
from tests.support.reference_text import connectors, gemma
from tests.support.reference_transformer import reference_transformer
from tests.support.reference_vae import reference_upsampler, reference_video_vae

Array = np.ndarray[Any, np.dtype[Any]]
NO_GUIDANCE = {
    "guidance_scale": 1.0, "stg_scale": 0.0, "modality_scale": 1.0, "guidance_rescale": 0.0,
    "audio_guidance_scale": 1.0, "audio_stg_scale": 0.0, "audio_modality_scale": 1.0, "audio_guidance_rescale": 0.0,
}  # fmt: skip


@dataclass(frozen=True)
class Size:
    """Of the finished clip."""

    width: int
    height: int
    frames: int
    fps: float


@dataclass(frozen=True)
class Clip:
    """What a generation makes, and the noise it began with. Latents are normalised."""

    noise: dict[str, Array]
    contexts: dict[str, Array]
    stage1: dict[str, Array]
    latents: dict[str, Array]
    frames: Array  # (F, H, W, 3) in [0, 1]
    sound: Array  # (channels, samples)


class ReferenceChain:
    """All networks of a checkpoint set in the official layout."""

    def __init__(self, official: Official) -> None:
        tensors, config = official.tensors(official.monolith), official.config(official.monolith)
        self.vae = reference_video_vae(official.section("vae."), config["vae"])
        self.audio_vae = ReferenceAudioVAE(official.section("audio_vae."), config["audio_vae"]).module
        self.vocoder = ReferenceVocoder(official.section("vocoder."), config["vocoder"]).module
        text = json.loads((official.gemma / "config.json").read_text())
        encoder = gemma(text.get("text_config", text), official.tensors(official.gemma / "model.safetensors"))
        self.pipeline = cast(Any, LTX2Pipeline)(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=False, shift_terminal=None),
            vae=self.vae,
            audio_vae=self.audio_vae,
            text_encoder=encoder,
            tokenizer=AutoTokenizer.from_pretrained(official.gemma),
            connectors=connectors(config["transformer"], tensors),
            transformer=reference_transformer(tensors, config["transformer"]),
            vocoder=self.vocoder,
        )
        upsampler = reference_upsampler(official.tensors(official.upscaler), official.config(official.upscaler))
        self.upscaling = cast(Any, LTX2LatentUpsamplePipeline)(vae=self.vae, latent_upsampler=upsampler)
        for pipeline in (self.pipeline, self.upscaling):
            pipeline.set_progress_bar_config(disable=True)
        self._encode, self._encoded = self.pipeline.encode_prompt, dict[str, Any]()
        self.pipeline.encode_prompt = self._encode_once

    def _encode_once(self, prompt: Any = None, negative_prompt: Any = None, **options: Any) -> Any:
        """What the text encoder makes of prompts, once for all runs."""
        key = repr((prompt, negative_prompt, options.get("do_classifier_free_guidance")))
        if key not in self._encoded:
            self._encoded[key] = self._encode(prompt, negative_prompt, **options)
        return self._encoded[key]

    @torch.no_grad()
    def generate(self, prompt: str, size: Size, seed: int) -> Clip:
        """Half-size stage, latent upscaling, renoised full-size stage, decoding."""
        small = Size(size.width // 2, size.height // 2, size.frames, size.fps)
        first = self._stage(prompt, small, DISTILLED_SIGMA_VALUES, torch.Generator().manual_seed(seed))
        upscaled = self.upscaling(latents=first[0], output_type="latent", return_dict=False)[0]
        generator, sigmas = torch.Generator().manual_seed(seed + 1), STAGE_2_DISTILLED_SIGMA_VALUES
        start = {"latents": upscaled, "audio_latents": first[1], "noise_scale": sigmas[0]}
        video, audio = self._stage(prompt, size, sigmas, generator, **start)
        pictures = self.pipeline.video_processor.postprocess_video(self.vae.decode(video).sample, output_type="np")
        return Clip(
            self._noise(seed, first, (video, audio)),
            self._contexts(prompt),
            self._normalised(*first),
            self._normalised(video, audio),
            pictures[0],
            self.vocoder(self.audio_vae.decode(audio).sample)[0].numpy(),
        )

    @torch.no_grad()
    def guided(
        self, prompt: str, size: Size, sigmas: Sequence[float], options: Mapping[str, Any], seed: int
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Noise and normalised latents of one guided stage; `options` are the pipeline's own."""
        video, audio = self._stage(prompt, size, sigmas, torch.Generator().manual_seed(seed), **options)
        return self._noise(seed, (video, audio)), self._normalised(video, audio)

    @torch.no_grad()
    def refined(
        self, prompt: str, size: Size, sigmas: Sequence[float], options: Mapping[str, Any], seed: int, changed: Any
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Of two-stage: a guided stage of half size, then stage 2 with the transformer `changed`. The sound is stage
        1's."""
        small = Size(size.width // 2, size.height // 2, size.frames, size.fps)
        first = self._stage(prompt, small, sigmas, torch.Generator().manual_seed(seed), **options)
        upscaled = self.upscaling(latents=first[0], output_type="latent", return_dict=False)[0]
        generator, levels = torch.Generator().manual_seed(seed + 1), STAGE_2_DISTILLED_SIGMA_VALUES
        start = {"latents": upscaled, "audio_latents": first[1], "noise_scale": levels[0]}
        usual, self.pipeline.transformer = self.pipeline.transformer, changed
        second = self._stage(prompt, size, levels, generator, **start)
        self.pipeline.transformer = usual
        return self._noise(seed, first, second), self._normalised(second[0], first[1])

    def _stage(
        self, prompt: str, size: Size, sigmas: Sequence[float], generator: torch.Generator, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Video and audio latents without normalisation."""
        return cast(
            tuple[torch.Tensor, torch.Tensor],
            self.pipeline(
                prompt=prompt,
                width=size.width,
                height=size.height,
                num_frames=size.frames,
                frame_rate=size.fps,
                num_inference_steps=len(sigmas),
                sigmas=list(sigmas),
                generator=generator,
                output_type="latent",
                return_dict=False,
                **(NO_GUIDANCE | options),
            ),
        )

    def _contexts(self, prompt: str) -> dict[str, Array]:
        states, mask, *_ = self.pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
        video, audio, _ = self.pipeline.connectors(states, mask, padding_side="left")
        return {"video": video.numpy(), "audio": audio.numpy()}

    def _normalised(self, video: torch.Tensor, audio: torch.Tensor) -> dict[str, Array]:
        tokens = LTX2Pipeline._pack_audio_latents(audio)
        tokens = LTX2Pipeline._normalize_audio_latents(tokens, self.audio_vae.latents_mean, self.audio_vae.latents_std)
        audio = LTX2Pipeline._unpack_audio_latents(tokens, audio.shape[2], audio.shape[3])
        video = LTX2Pipeline._normalize_latents(video, self.vae.latents_mean, self.vae.latents_std)
        return {"video": video.numpy(), "audio": audio.numpy()}

    def _noise(self, seed: int, *stages: tuple[torch.Tensor, torch.Tensor]) -> dict[str, Array]:
        """The draws of the stages' generators again: latents in stage 1, tokens in stage 2; video, then audio."""
        noise = {}
        for number, (video, audio) in enumerate(stages, start=1):
            generator = torch.Generator().manual_seed(seed + number - 1)
            as_tokens = number > 1
            shapes = [
                LTX2Pipeline._pack_latents(video).shape if as_tokens else video.shape,
                LTX2Pipeline._pack_audio_latents(audio).shape if as_tokens else audio.shape,
            ]
            pictures, sound = (torch.randn(shape, generator=generator) for shape in shapes)
            if as_tokens:
                pictures = LTX2Pipeline._unpack_latents(pictures, *video.shape[2:])
                sound = LTX2Pipeline._unpack_audio_latents(sound, *audio.shape[2:])
            noise[f"stage{number}.video"] = pictures.contiguous().numpy()
            noise[f"stage{number}.audio"] = sound.contiguous().numpy()
        return noise
