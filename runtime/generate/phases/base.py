"""The interface of a phase, and its tools."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import mlx.core as mx
import numpy as np

from ltx2.runtime.distributed.machines import Machines
from ltx2.runtime.events import Event
from ltx2.runtime.generate.job import Job
from ltx2.runtime.generate.networks import Networks
from ltx2.runtime.media.video import AudioTrack
from ltx2.runtime.memory.flops import PhaseWork
from ltx2.runtime.memory.meter import Phase as Meter
from ltx2.runtime.memory.plan import Headers, Need, PhasePlan
from ltx2.runtime.networks.video_vae.tiles import Tiling
from ltx2.runtime.sampling.denoise import Step
from ltx2.runtime.sampling.latents import Sizes
from ltx2.runtime.sampling.noise import Noise
from ltx2.runtime.streams import Streams


@dataclass
class Made:
    """The results of a run's phases so far. `step` is the running stage's last one; `latents` are those of the
    last finished stage or upscaler, (1, C, F, H, W) and (1, A, T, 16); `sound` are the clip's audio latents where a
    later stage makes others."""

    hidden: Sequence[mx.array] = ()
    contexts: Mapping[str, Streams[mx.array]] = field(default_factory=dict)
    seconds: float | None = None  # that the duration head gives the clip
    latents: Streams[mx.array] = field(default_factory=Streams)
    sound: mx.array | None = None
    encoded: dict[str, mx.array] = field(default_factory=dict)  # "number of the given thing.stage.stream"
    step: Step | None = None
    mel: mx.array | None = None
    track: AudioTrack | None = None


Texts = tuple[tuple[str, str], ...]  # names of contexts, and the texts that they are made of


@dataclass
class Prompts:
    """The prompts of the clips that are made together: those of the `jobs` that have them to encode are encoded in one
    pass over the text encoder's layers, equal ones once."""

    jobs: Sequence[Job] = ()
    hidden: dict[Texts, Sequence[mx.array]] = field(default_factory=dict)
    contexts: dict[Texts, Mapping[str, Streams[mx.array]]] = field(default_factory=dict)


class Tools(Protocol):
    """A run, as its phases see it: the machines and how they share the phase, a stopwatch, the phase's part of the
    memory plan, networks, the prompts, noise, and where frames (F, H, W, 3) uint8 go."""

    machines: Machines
    split: str
    meter: Meter
    plan: PhasePlan
    noise: Noise

    @property
    def tiling(self) -> Tiling | None: ...

    @property
    def networks(self) -> Networks: ...

    @property
    def prompts(self) -> Prompts: ...

    @property
    def write(self) -> Callable[[np.ndarray], None]: ...


@dataclass(frozen=True)
class Phase(ABC):
    """One step of a generation. `components`: of the model folder."""

    job: Job

    @property
    @abstractmethod
    def name(self) -> str:
        """Unique among the phases of a run."""

    @property
    @abstractmethod
    def title(self) -> str:
        """Its work in plain words."""

    @property
    @abstractmethod
    def components(self) -> tuple[str, ...]: ...

    @abstractmethod
    def need(self, headers: Headers, sizes: Sizes, tiling: Tiling | None) -> Need:
        """Its memory, for these sizes in place of the job's."""

    @abstractmethod
    def work(self, headers: Headers) -> PhaseWork:
        """Its operations in all, and the bytes that it moves at least."""

    @abstractmethod
    def run(self, tools: Tools, made: Made) -> Iterator[Event]:
        """Do it; results go into `made`."""
