"""A model folder, ready to generate: a request becomes a clip."""

from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from ltx2.runtime.distributed.machines import ALONE, Machines
from ltx2.runtime.errors import InputError
from ltx2.runtime.events import Event
from ltx2.runtime.generate.clip import Clip, Generated, Sampled
from ltx2.runtime.generate.job import LENGTH, Job
from ltx2.runtime.generate.kinds import StrPath
from ltx2.runtime.generate.phases.order import components, phases
from ltx2.runtime.generate.places import check_places
from ltx2.runtime.generate.planning import MemoryPlan, plan_memory
from ltx2.runtime.generate.preset import load_preset
from ltx2.runtime.generate.request import Request, draw_seed, takes
from ltx2.runtime.generate.resume import Started
from ltx2.runtime.generate.run import Observe, Run
from ltx2.runtime.generate.values import Auto
from ltx2.runtime.layers.matmul import Choice
from ltx2.runtime.model.layout import ModelFolder
from ltx2.runtime.networks.text.duration_head import Duration
from ltx2.runtime.sampling.latents import as_numpy


class Pipeline:
    """A model folder, ready to generate. Headers are read here; weights are read phase by phase.

    `observe` is called with every phase's component and network, before the network is used: to watch its layers.
    Whoever observes sees a new network in every phase, and every call of it: nothing is kept from one to the next.
    With several `machines` all of them make the same calls. Raises ModelFolderError for another folder,
    UnsupportedError for a release that is only converted so far.
    """

    def __init__(
        self, model: str | Path | ModelFolder, observe: Observe | None = None, machines: Machines = ALONE
    ) -> None:
        self.machines = machines
        self.folder = model if isinstance(model, ModelFolder) else ModelFolder.open(Path(model))
        self.observe = observe
        self.products: Mapping[str, Choice] = {}  # how each form of packed weights is multiplied in the latest run
        load_preset(self.folder.manifest.release)

    @takes(Request)
    def generate(self, request: Request) -> Clip:
        """Run `stream` to its end and return the clip, with all its frames in memory."""
        if request.output is not None:
            fix = "leave it out and use clip.save, or use stream, which writes frames as they are decoded"
            raise InputError("generate has no output", "it returns the clip with all its frames", fix)
        for event in self.events(request):
            if isinstance(event, Generated):
                return event.clip
        raise RuntimeError("the generation ended without a clip")

    @takes(Request)
    def stream(self, request: Request) -> Generator[Event, None, None]:
        """Typed progress events; closing the stream ends the work. Options are the command's, underscored. The last
        event is Generated with the clip or, with `output`, Saved: then frames went into that file as they were decoded,
        and were never in memory together.

        The request is checked before this returns; raises InputError, UnsupportedError, ModelFolderError or
        DoesNotFitError.
        """
        return self.events(request)

    def events(self, request: Request, until: str | None = None) -> Generator[Event, None, None]:
        """As `stream`. With `until` "contexts" or "latents" the last event is Sampled, and nothing is decoded. On
        machines that do not lead the only one is Followed."""
        length = None
        if request.resume and request.state is not None:  # what an earlier run has drawn and predicted
            started = Started.read(Path(request.state))
            request = request if request.seed is not None else replace(request, seed=started.seed)
            leading, *_ = self.machines.everyone(None if started.length is None else asdict(started.length))
            length = None if leading is None else Duration(**leading)
        run = Run(Job(self.folder, self._seeded(request), until, length), self.observe, self.machines)
        self.products = run.products
        events = run.events()
        return events if request.progress is None else _watched(events, request.progress)

    def _seeded(self, request: Request) -> Request:
        """With the same seed on all machines."""
        if not self.machines.several or request.noise is not None:
            return request
        leading, *_ = self.machines.everyone(draw_seed() if request.seed is None else request.seed)
        return replace(request, seed=leading) if request.seed is None else request

    def upscale(
        self, source: StrPath, *, temporal: bool = False, prompt: str | None = None, **options: Any
    ) -> Clip | dict[str, np.ndarray]:
        """A clip with twice the sides, refined where a prompt says what it shows, or with twice the frame rate. A
        latents file's are returned as such: "video" (1, C, F, 2H, 2W) or (1, C, 2F - 1, H, W) float32, "audio" as it
        is. `options` are those of `generate` that do not say what is made: seed, distilled_lora, memory_limit, ...
        """
        asked = {"upscale": source, "temporal_upscale": temporal, "prompt": prompt, **options}
        *_, last = self.events(Request.from_options(asked))
        assert isinstance(last, Generated | Sampled), "there is no output"
        return last.clip if isinstance(last, Generated) else as_numpy(last.latents)

    @takes(Request)
    def plan(self, request: Request) -> MemoryPlan:
        """How much memory every phase of a generation would take; reads headers only. Raises as `stream`, but not for
        what does not fit: `MemoryPlan.check` does."""
        return self.planned(request)

    def duration(
        self,
        prompt: str | None = None,
        *,
        fps: float | None = None,
        embeddings: str | Path | None = None,
        min_seconds: float = 1,
        max_seconds: float = 20,
    ) -> Duration:
        """How long the clip of a prompt, or of saved embeddings, should be: the seconds that the duration head answers,
        and the frames that `generate` would make of them between these bounds. Raises InputError for a model without
        such a network, and as `stream`."""
        asked = {"prompt": prompt, "fps": fps, "embeddings": embeddings, "frames": Auto(min_seconds, max_seconds)}
        run = Run(Job(self.folder, Request.from_options(asked), LENGTH), self.observe)
        for _ in run.events():
            pass
        assert run.job.length is not None, "predicted in the last phase"
        return run.job.length

    def planned(self, request: Request, until: str | None = None) -> MemoryPlan:
        """As `plan`, of what `events` would do."""
        request = self._seeded(request)
        job = Job(self.folder, request, until)
        if job.auto is not None:  # whatever will be predicted
            job = Job(self.folder, request, until, job.predicted(job.auto.most))
        job.check(components(phases(job)))
        if self.machines.leads:
            check_places(job)
        return plan_memory(job, self.machines)


def _watched(events: Generator[Event, None, None], watch: Callable[[Event], object]) -> Generator[Event, None, None]:
    with closing(events):
        for event in events:
            watch(event)
            yield event
