"""What a request gives beside its text, and how it comes from files to latents: pictures, clips, sounds. What each does
in a stage is its conditioning (sampling/conditioning.py)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ltx2.runtime.errors import InputError
from ltx2.runtime.files.tensors import open_tensorfile
from ltx2.runtime.generate.exchange import read_tensors
from ltx2.runtime.media.source import (
    compressed, count_frames, covering, media_facts, read_frames, read_picture, read_sound,
)  # fmt: skip
from ltx2.runtime.media.sound import resample
from ltx2.runtime.media.video import AudioTrack
from ltx2.runtime.networks.audio.vae import AudioAutoencoder
from ltx2.runtime.networks.video_vae.model import VideoAutoencoder
from ltx2.runtime.networks.video_vae.tiles import Tiling
from ltx2.runtime.sampling.conditioning import Conditioning, Place
from ltx2.runtime.sampling.latents import Scales, Sizes, audio_latent_count

Pixels = np.ndarray[Any, np.dtype[np.float32]]
RATE = 24.0  # of latents that do not say theirs
ENCODING = Tiling(768, 768, 64, 80, 24)  # Lightricks' tiles for clips


@dataclass(frozen=True)
class Clip:
    """A source clip: a media file, or a latents file that stands for one."""

    path: Path
    sizes: Sizes
    latents: bool
    sound: bool

    @classmethod
    def open(cls, path: Path, scales: Scales, fps: float | None) -> "Clip":
        """Reads headers, and counts a media file's frames. `fps` replaces that of a latents file. Raises InputError
        for what is neither."""
        if path.suffix == ".safetensors":
            file = open_tensorfile(path)
            shape = file.tensors["video"].shape if "video" in file.tensors else ()
            if len(shape) != 5:
                raise InputError(f"{path} has no clip", "it holds no latents named video", "use --save-latents")
            _, _, frames, height, width = shape
            rate = fps or float(file.metadata.get("fps", RATE))
            sides = width * scales.spatial, height * scales.spatial
            return cls(path, Sizes(*sides, (frames - 1) * scales.temporal + 1, rate), True, "audio" in file.tensors)
        facts = media_facts(path)
        if not facts.width:
            raise InputError(f"{path} has no picture", "it holds sound alone", "name a clip")
        return cls(path, Sizes(facts.width, facts.height, count_frames(path), facts.fps), False, facts.rate > 0)

    def video(self, vae: VideoAutoencoder) -> mx.array:
        """Normalised latents (1, C, F, H, W) of all frames."""
        if self.latents:
            return read_tensors(self.path, ("video",))["video"]
        return encode_clip(vae, (covering(group, self.sizes.height, self.sizes.width) for group in read_frames(self.path)))

    def audio(self, vae: AudioAutoencoder, frames: int) -> mx.array | None:
        """Normalised latents (1, A, frames, 16) of its sound, with zeros behind a shorter one; None without sound."""
        if not self.sound:
            return None
        if self.latents:
            found = read_tensors(self.path, ("audio",))["audio"][:, :, :frames]
            return mx.pad(found, [(0, 0), (0, 0), (0, frames - found.shape[2]), (0, 0)])
        return encode_sound(vae, read_sound(self.path, 0.0, self.sizes.frames / self.sizes.fps), frames)


@dataclass(frozen=True)
class Given(ABC):
    """One thing that is given, and what it does in the stages."""

    conditioning: Conditioning
    encodes_video = False
    encodes_audio = False

    def in_stage(self, number: int) -> bool:
        """Whether stage `number` has it."""
        return True

    def video(self, vae: VideoAutoencoder, place: Place) -> mx.array | None:
        """What is encoded of it for a stage's picture, normalised latents."""
        return None

    def audio(self, vae: AudioAutoencoder, place: Place) -> mx.array | None:
        """What is encoded of it for a stage's sound, normalised latents."""
        return None


@dataclass(frozen=True)
class GivenNothing(Given):
    """Tokens that are made along: slots."""


@dataclass(frozen=True)
class GivenPicture(Given):
    """An image, as in training: compressed at its own size, then cut to the stage's."""

    path: Path
    crf: int
    encodes_video = True

    def video(self, vae: VideoAutoencoder, place: Place) -> mx.array:
        scale = place.scales.spatial
        pixels = covering(compressed(read_picture(self.path), self.crf), place.grid.height * scale, place.grid.width * scale)
        return vae.encode(mx.array(pixels)[None, None].transpose(0, 4, 1, 2, 3))


@dataclass(frozen=True)
class GivenReference(Given):
    """A control or source video for an IC-LoRA, in stage 1: its first frames, every `every`-th after the first two."""

    path: Path
    frames: int  # of the clip
    height: int
    width: int
    every: int
    encodes_video = True

    def in_stage(self, number: int) -> bool:
        return number == 1

    def video(self, vae: VideoAutoencoder, place: Place) -> mx.array:
        def wanted() -> Iterator[Pixels]:
            at = 0
            for group in read_frames(self.path):
                kept = [i for i in range(len(group)) if at + i < self.frames and self._keeps(at + i)]
                at += len(group)
                if kept:
                    yield covering(group[kept], self.height, self.width)
                if at >= self.frames:
                    return

        return encode_clip(vae, wanted())

    def _keeps(self, frame: int) -> bool:
        return frame == 0 or (frame - 1) % self.every == 0


@dataclass(frozen=True)
class GivenClip(Given):
    """A source clip whose streams are kept, all or in part."""

    clip: Clip
    streams: tuple[str, ...] = ("video", "audio")
    encodes_video = True
    encodes_audio = True

    def video(self, vae: VideoAutoencoder, place: Place) -> mx.array | None:
        return self.clip.video(vae) if "video" in self.streams else None

    def audio(self, vae: AudioAutoencoder, place: Place) -> mx.array | None:
        return self.clip.audio(vae, place.grid.audio_frames) if "audio" in self.streams else None


@dataclass(frozen=True)
class GivenSound(Given):
    """A sound that the picture is made to."""

    track: Callable[[], AudioTrack]
    encodes_audio = True

    def audio(self, vae: AudioAutoencoder, place: Place) -> mx.array:
        return encode_sound(vae, self.track(), place.grid.audio_frames)


def sound_track(path: Path, start: float, sizes: Sizes, scales: Scales) -> AudioTrack:
    """The given sound for a clip of these sizes, at its own rate. Raises InputError for one that is too short."""
    seconds = sizes.frames / sizes.fps
    track = read_sound(path, start, seconds)
    has = track.samples.shape[1] / track.sample_rate
    if track.samples.shape[1] < round(seconds * track.sample_rate):
        step = scales.temporal
        fitting = max(1, (int(has * sizes.fps) - 1) // step * step + 1)
        why = f"it has {has:.2f} s from there, and {sizes.frames} frames take {seconds:.2f} s"
        raise InputError(f"{path} is too short", why, f"use --frames {fitting}")
    return track


def encode_sound(vae: AudioAutoencoder, track: AudioTrack, frames: int) -> mx.array:
    """Normalised latents (1, A, frames, 16)."""
    samples = resample(track.samples, track.sample_rate, vae.config.sample_rate)
    return vae.encode(mx.array(samples)[None], frames)


def encode_clip(vae: VideoAutoencoder, groups: Iterator[Pixels]) -> mx.array:
    """Normalised latents (1, C, f, h, w) of frames (n, H, W, 3) that come in groups."""
    return vae.encode_video((mx.array(group).transpose(3, 0, 1, 2)[None] for group in groups), ENCODING)


def audio_frames(sizes: Sizes, scales: Scales) -> int:
    """Audio latents of a clip."""
    return audio_latent_count(sizes.frames, sizes.fps, scales)
