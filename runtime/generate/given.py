"""The pictures, clips and sounds of a request, and how their files become latents. Their effect in a stage is their
conditioning (sampling/conditioning.py)."""

import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ltx2.runtime.errors import InputError
from ltx2.runtime.files.tensors import open_tensorfile
from ltx2.runtime.generate.options.request import Request
from ltx2.runtime.generate.options.values import Extension, Span
from ltx2.runtime.generate.records.exchange import read_tensors
from ltx2.runtime.media.picture import compressed, covering, read_picture
from ltx2.runtime.media.sound import resample
from ltx2.runtime.media.source import count_frames, media_facts, read_frames, read_sound, unevenness
from ltx2.runtime.media.video import AudioTrack
from ltx2.runtime.networks.audio.vae import AudioAutoencoder
from ltx2.runtime.networks.video_vae.config import Size
from ltx2.runtime.networks.video_vae.encode import VideoCoder
from ltx2.runtime.networks.video_vae.tiles import Tiling
from ltx2.runtime.sampling.conditioning import (
    REFERENCE,
    Conditioning,
    FirstFrame,
    Frozen,
    Kept,
    Keyframe,
    Place,
    Slots,
    slot_frames,
)  # fmt: skip
from ltx2.runtime.sampling.conditioning import Reference as Reference_
from ltx2.runtime.sampling.latents import Scales, Sizes
from ltx2.runtime.streams import Streams

Pixels = np.ndarray[Any, np.dtype[np.float32]]
UNEVEN = 0.5  # of a frame: more is told
RATE = 24.0  # of latents that do not say theirs
ENCODING = Tiling(768, 768, 64, 80, 24)  # Lightricks' tiles for clips


@dataclass(frozen=True)
class SourceClip:
    """A clip that is given: a media file, or a latents file that stands for one."""

    path: Path
    sizes: Sizes
    latents: bool
    sound: bool

    @classmethod
    def open(cls, path: Path, scales: Scales, fps: float | None) -> "SourceClip":
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
        sizes = Sizes(facts.width, facts.height, count_frames(path), facts.fps)
        if facts.rate:
            read_sound(path, 0.0, sizes.frames / max(1.0, sizes.fps))  # a damaged one is found now
        return cls(path, sizes, False, facts.rate > 0)

    def check(self, scales: Scales, smallest: int) -> None:
        """`smallest`: pixels of the shortest side that can be decoded. Raises InputError for a clip that cannot be
        encoded as it is, with the command that makes one that can."""
        try:
            self.sizes.check(scales, 1, smallest)
        except InputError as error:
            fit = self.sizes.fitting(scales, 1, smallest)
            if fit == self.sizes:  # it is the rate
                raise
            scale = f"scale={fit.width}:{fit.height}:force_original_aspect_ratio=increase,crop={fit.width}:{fit.height}"
            command = ["ffmpeg", "-i", str(self.path), "-vf", scale, "-frames:v", str(fit.frames), "-crf", "10"]
            fix = f"make one that can: {shlex.join([*command, f'{self.path.stem}-fit.mp4'])}"
            raise InputError(f"{self.path} cannot be used as it is", f"{error.what}: {error.why}", fix) from error

    def doubts(self, retake: Span | None) -> Iterator[str]:
        """Warnings where frames come unevenly, as from some phones and screen recorders, since they are used evenly;
        and where it ends before the span of a retake does."""
        if (off := 0.0 if self.latents else unevenness(self.path)) > UNEVEN:
            late = f"some are {off / self.sizes.fps:.2f} s from their time"
            yield f"the frames of {self.path.name} come unevenly and are used evenly: {late}"
        ends = self.sizes.frames / self.sizes.fps
        if retake is not None and retake.end > ends + 1 / self.sizes.fps:
            yield f"{self.path.name} ends at {ends:.2f} s: what is made anew ends there, not at {retake.end:g} s"

    def added(self, sizes: Sizes, extend: Extension) -> str:
        """Says how much is made beside it for a clip of these sizes: whole latent frames."""
        more, where = sizes.frames - self.sizes.frames, "after" if extend.seconds > 0 else "before"
        least = ", the fewest there can be" if abs(extend.seconds) * sizes.fps < more / 2 else ""
        return f"{more} frames ({more / sizes.fps:.2f} s{least}) are made {where} {self.path.name}"

    def video(self, vae: VideoCoder | None) -> mx.array:
        """Normalised latents (1, C, F, H, W) of all frames; latents need no network."""
        if self.latents:
            return read_tensors(self.path, ("video",))["video"]
        assert vae is not None, "as encodes_video says"
        return encode_clip(
            vae, (covering(group, self.sizes.height, self.sizes.width) for group in read_frames(self.path))
        )

    def audio(self, vae: AudioAutoencoder | None, frames: int, silence: float = 0.0) -> mx.array:
        """Normalised latents (1, A, frames, 16) of its sound, with so many seconds of silence before it and zeros
        behind; latents need no network."""
        if self.latents:
            found = read_tensors(self.path, ("audio",))["audio"]
            late = round(silence * found.shape[2] * self.sizes.fps / self.sizes.frames)
            found = mx.pad(found, [(0, 0), (0, 0), (late, 0), (0, 0)])[:, :, :frames]
            return mx.pad(found, [(0, 0), (0, 0), (0, frames - found.shape[2]), (0, 0)])
        assert vae is not None, "as encodes_audio says"
        track = read_sound(self.path, 0.0, self.sizes.frames / self.sizes.fps)
        samples = np.pad(track.samples, ((0, 0), (round(silence * track.sample_rate), 0)))
        return encode_sound(vae, AudioTrack(samples, track.sample_rate), frames)


@dataclass(frozen=True)
class Given:
    """One thing that is given, and what it does in the stages."""

    conditioning: Conditioning
    encodes_video = False
    encodes_audio = False

    def in_stage(self, number: int) -> bool:
        """Whether stage `number` has it."""
        return True

    def encoded(self, place: Place) -> Size:
        """Frames, height and width, in pixels, that are encoded for a stage's picture."""
        return place.size

    def latents(self, place: Place) -> Streams[mx.array] | None:
        """Latents that need no encoding: (1, C, F, H, W) of the picture, (1, A, T, 16) of the sound."""
        return None

    def video(self, vae: VideoCoder, place: Place) -> mx.array | None:
        """Normalised latents (1, C, f, h, w), encoded for a stage's picture."""
        return None

    def audio(self, vae: AudioAutoencoder, place: Place) -> mx.array | None:
        """Normalised latents (1, A, T, 16), encoded for a stage's sound."""
        return None


@dataclass(frozen=True)
class GivenPicture(Given):
    """An image, as in training: compressed at its own size, then cut to the stage's."""

    path: Path
    crf: int
    encodes_video = True

    def encoded(self, place: Place) -> Size:
        return 1, *place.size[1:]

    def video(self, vae: VideoCoder, place: Place) -> mx.array:
        pixels = covering(compressed(read_picture(self.path), self.crf), *place.size[1:])
        return vae.encode(mx.array(pixels)[None, None].transpose(0, 4, 1, 2, 3))


@dataclass(frozen=True)
class GivenReference(Given):
    """A control or source video for an IC-LoRA, in stage 1: its first frames, every `every`-th after the first two."""

    path: Path
    frames: int  # of the clip
    downscale: int
    every: int
    encodes_video = True

    def in_stage(self, number: int) -> bool:
        return number == 1

    def encoded(self, place: Place) -> Size:
        frames, height, width = place.size
        kept = kept_frames(min(frames, self.frames), self.every)
        return kept, height // self.downscale, width // self.downscale

    def video(self, vae: VideoCoder, place: Place) -> mx.array:
        _, height, width = self.encoded(place)

        def wanted() -> Iterator[Pixels]:
            at = 0
            for group in read_frames(self.path):
                kept = [i for i in range(len(group)) if at + i < self.frames and keeps(at + i, self.every)]
                at += len(group)
                if kept:
                    yield covering(group[kept], height, width)
                if at >= self.frames:
                    return

        return encode_clip(vae, wanted())


def keeps(frame: int, every: int) -> bool:
    """Whether a reference's frame is used: the first one, and every `every`-th from the second on."""
    return frame == 0 or (frame - 1) % every == 0


def kept_frames(frames: int, every: int) -> int:
    """The number of them."""
    return sum(keeps(frame, every) for frame in range(frames))


@dataclass(frozen=True)
class GivenClip(Given):
    """A source clip whose streams are kept, all or in part."""

    clip: SourceClip
    streams: tuple[str, ...] = ("video", "audio")
    before: int = 0  # frames that are made before the clip's

    def latents(self, place: Place) -> Streams[mx.array] | None:
        return Streams(self.video(None, place), self.audio(None, place)) if self.clip.latents else None

    @property
    def encodes_video(self) -> bool:  # type: ignore[override]
        return "video" in self.streams and not self.clip.latents

    def encoded(self, place: Place) -> Size:
        return self.clip.sizes.frames, *place.size[1:]

    @property
    def encodes_audio(self) -> bool:  # type: ignore[override]
        return "audio" in self.streams and self.clip.sound and not self.clip.latents

    def video(self, vae: VideoCoder | None, place: Place) -> mx.array | None:
        if "video" not in self.streams:
            return None
        latents, wanted = self.clip.video(vae), place.grid.frames
        if self.before:
            latents = latents[:, :, 1:]
            return mx.pad(latents, [(0, 0), (0, 0), (wanted - latents.shape[2], 0), (0, 0), (0, 0)])
        return mx.pad(latents, [(0, 0), (0, 0), (0, wanted - latents.shape[2]), (0, 0), (0, 0)])

    def audio(self, vae: AudioAutoencoder | None, place: Place) -> mx.array | None:
        if "audio" not in self.streams or not self.clip.sound:
            return None
        return self.clip.audio(vae, place.grid.audio_frames, self.before / self.clip.sizes.fps)


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
        fitting = (int(has * sizes.fps) - 1) // step * step + 1
        why = f"it has {has:.2f} s from there, and {sizes.frames} frames take {seconds:.2f} s"
        fix = f"use --frames {fitting}" if fitting > 0 else "begin earlier in it"
        raise InputError(f"{path} is too short", why, fix)
    return track


def encode_sound(vae: AudioAutoencoder, track: AudioTrack, frames: int) -> mx.array:
    """Normalised latents (1, A, frames, 16)."""
    samples = resample(track.samples, track.sample_rate, vae.config.sampling_rate)
    return vae.encode(mx.array(samples)[None], frames)


def encode_clip(vae: VideoCoder, groups: Iterator[Pixels]) -> mx.array:
    """Normalised latents (1, C, f, h, w) of frames (n, H, W, 3) that come in groups."""
    return vae.encode_video((mx.array(group).transpose(3, 0, 1, 2)[None] for group in groups), ENCODING)


@dataclass(frozen=True)
class Setting:
    """For gathering the given things of a clip: its request, source clip, and geometry."""

    request: Request
    clip: SourceClip | None
    sizes: Sizes
    scales: Scales
    factors: tuple[int, int]  # of IC-LoRAs: downscale, and every so many frames


def gather(at: Setting) -> tuple[Given, ...]:
    """All that a request gives, in the order in which it is applied: own tokens first, then appended ones as images,
    keyframes, slots, references. Raises InputError for what does not go together."""
    request, frames, crf = at.request, at.sizes.frames, at.request.image_crf or 0
    pictures = [(p, p.frame > 0) for p in request.image] + [(p, True) for p in request.keyframe]
    for picture, _ in pictures:
        read_picture(Path(picture.path))  # a wrong or damaged one is found now
        if picture.frame >= frames:
            what = f"frame {picture.frame} of {picture.path} is outside the clip"
            raise InputError(what, f"its frames are 0 to {frames - 1}", f"use {frames - 1} for the last")
    first = [p for p, appended in pictures if not appended]
    if len(first) > 1:
        what = f"{first[0].path} and {first[1].path} are both for frame 0"
        raise InputError(what, "a clip has one first frame", "give the other one a frame: PATH@FRAME")
    found: list[Given] = [GivenPicture(FirstFrame(p.strength), Path(p.path), crf) for p in first]
    found += _kept(at)
    found += [GivenPicture(Keyframe(p.frame, p.strength), Path(p.path), crf) for p, appended in pictures if appended]
    if slots := request.keyframe_slots:
        found.append(Given(Slots(slot_frames(slots, frames))))  # made along
    return (*found, *_references(at))


def _kept(at: Setting) -> Iterator[Given]:
    """A source clip or sound."""
    request, clip = at.request, at.clip
    if request.audio is not None:
        sound = request.audio
        yield GivenSound(Frozen("audio"), partial(sound_track, Path(sound.path), sound.start, at.sizes, at.scales))
    if clip is None:
        return
    if request.upscale is not None:
        if clip.sound:
            yield GivenClip(Frozen("audio"), clip, ("audio",))
    elif request.video is not None:
        yield GivenClip(Frozen("video"), clip, ("video",))
    elif request.retake is not None:
        span, step = request.retake, 1 / clip.sizes.fps
        if span.start >= clip.sizes.frames * step:
            why = f"the clip ends at {clip.sizes.frames * step:.2f} s"
            raise InputError(f"the span {span.start:g}-{span.end:g} touches no frame", why, "use an earlier one")
        if request.keep == "audio" and not clip.sound:
            what = f"{clip.path} has no sound to keep"
            raise InputError(what, "it holds a picture alone", "leave out --keep: a sound is made along")
        yield GivenClip(Kept(span.start, span.end, (request.keep,) if request.keep else ()), clip)
    elif request.extend is not None:
        made = at.sizes.frames - clip.sizes.frames
        if request.extend.seconds > 0:
            yield GivenClip(Kept(clip.sizes.frames / clip.sizes.fps, inf), clip)
        else:
            # The clip's first frame has a latent of its own: in the longer clip it is made along, as all before it.
            yield GivenClip(Kept(-inf, (made + 1) / clip.sizes.fps), clip, before=made)


def _references(at: Setting) -> Iterator[Given]:
    request, (downscale, every) = at.request, at.factors
    for number, reference in enumerate(request.reference, start=1):
        path, many = Path(reference.path), len(request.reference) > 1
        if not media_facts(path).width:
            raise InputError(f"{path} has no picture", "it holds sound alone", "name a clip")
        height, width = at.sizes.height // 2 // downscale, at.sizes.width // 2 // downscale
        if request.no_upscale:
            height, width = 2 * height, 2 * width
        given = min(count_frames(path), at.sizes.frames)
        step, scale = at.scales.temporal, at.scales.spatial
        shape = ((kept_frames(given, every) - 1) // step + 1, height // scale, width // scale)
        attention = 1.0 if request.reference_attention is None else request.reference_attention
        name = f"{REFERENCE}.{number}" if many else REFERENCE
        conditioning = Reference_(shape, downscale, every, reference.strength, attention, name)
        yield GivenReference(conditioning, path, given, downscale, every)
