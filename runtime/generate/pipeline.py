"""A model folder, ready to generate: a request becomes a clip."""

from collections.abc import Container, Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np

from ltx2.runtime.distributed.machines import ALONE, Machines
from ltx2.runtime.errors import InputError, of
from ltx2.runtime.events import Event, watched
from ltx2.runtime.generate.batch import make_all
from ltx2.runtime.generate.job import LENGTH, Job
from ltx2.runtime.generate.networks import Networks, Observe
from ltx2.runtime.generate.options.kinds import StrPath
from ltx2.runtime.generate.options.preset import load_preset
from ltx2.runtime.generate.options.request import Request, check_common, draw_seed, takes
from ltx2.runtime.generate.options.values import Auto
from ltx2.runtime.generate.phases.order import components, phases
from ltx2.runtime.generate.planning import MemoryPlan, plan_all
from ltx2.runtime.generate.records.clip import Clip, Followed, Generated, Sampled, Saved
from ltx2.runtime.generate.records.places import check_places, check_space
from ltx2.runtime.generate.records.resume import Started, finished
from ltx2.runtime.generate.run import Run
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

    def __repr__(self) -> str:
        manifest = self.folder.manifest
        facts = " ".join(fact for fact in (manifest.release and f"LTX {manifest.release}", manifest.variant) if fact)
        return f"<Pipeline: {self.folder.path}{facts and f', {facts}'}>"

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
        and were never in memory together. With `resume`, a clip that is there already is not made again.

        The request is checked before this returns; raises InputError, UnsupportedError, ModelFolderError or
        DoesNotFitError.
        """
        return self.events(request)

    def stream_all(self, clips: Iterable[Mapping[str, Any]]) -> Generator[Event, None, None]:
        """As `stream`, of several clips, each given by its options: phase by phase over all of them, so that every
        network is loaded once. Each ends with its own Generated or Saved event. With `resume`, clips that are there
        already are not made again.

        Nothing is done where one of them is refused; raises as `stream`.
        """
        return self.events_all([Request.from_options(options) for options in clips])

    def events(self, request: Request, until: str | None = None) -> Generator[Event, None, None]:
        """As `stream`. With `until` "contexts" or "latents" the last event is Sampled, and nothing is decoded. On
        machines that do not lead the only one is Followed."""
        return self.events_all([request], until)

    def events_all(self, requests: Sequence[Request], until: str | None = None) -> Generator[Event, None, None]:
        """As `events`, of several clips. Raises UsageError if they differ in an option of the whole run."""
        _, events = self._begin(requests, until)
        watch = next((request.progress for request in requests if request.progress is not None), None)
        return watched(events, watch)

    def _begin(self, requests: Sequence[Request], until: str | None) -> tuple[list[Run], Generator[Event, None, None]]:
        """The clips that are to be made, checked and planned, and their events."""
        jobs = self._jobs(requests, until)
        names = {job: f"clip {number} of {len(jobs)}" for number, job in enumerate(jobs, 1) if len(jobs) > 1}
        made = {job: record for job in jobs if (record := self._finished(job)) is not None}
        plans, built = self._ready([job for job in jobs if job not in made])
        whole = frozenset(built)
        runs = [Run(plan, self.machines, jobs.index(plan.job), names.get(plan.job, "")) for plan in plans]
        there: list[Saved | Followed] = [Saved(Path(str(job.request.output)), record) for job, record in made.items()]
        if not self.machines.leads:
            there = [Followed() for _ in there]
        networks = Networks(self.folder, requests[0].matmul if requests else "auto", self.observe, built)
        self.products = networks.products
        return runs, make_all(runs, there, networks, lambda jobs: self._ready(jobs, whole)[0])

    def _ready(self, jobs: Sequence[Job], whole: Container[str] = ()) -> tuple[list[MemoryPlan], dict[str, nn.Module]]:
        """Plans of jobs that can be made here, and their networks, uninitialised, but for components that are known to
        be `whole`."""
        with self.machines.all_or_none():
            built = self._check(jobs, whole)
        plans = plan_all(jobs, self.machines)
        with self.machines.all_or_none():
            if plans:
                max(plans, key=lambda plan: plan.own).check()
            self._places(jobs)
        return plans, built

    def finished(self, requests: Sequence[Request], until: str | None = None) -> bool:
        """Whether `events_all` has nothing to do: all clips are continued, and there."""
        if not requests[0].resume:  # which all share
            return False
        return all(self._finished(job) is not None for job in self._jobs(requests, until))

    def _finished(self, job: Job) -> Mapping[str, Any] | None:
        """The leading machine's record of a clip that is continued and there."""
        if not job.request.resume:
            return None
        leading: Mapping[str, Any] | None = self.machines.everyone(finished(job) if self.machines.leads else None)[0]
        return leading

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
        """The memory of every phase of a generation; reads headers only. Raises as `stream`, except DoesNotFitError,
        which `MemoryPlan.check` raises."""
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
        (run,), events = self._begin([Request.from_options(asked)], LENGTH)
        for _ in events:
            pass
        assert run.job.length is not None, "predicted in the last phase"
        return run.job.length

    def planned(self, request: Request, until: str | None = None) -> MemoryPlan:
        """As `plan`, for `events`."""
        return self.planned_all([request], until)

    def planned_all(self, requests: Sequence[Request], until: str | None = None, new: Path | None = None) -> MemoryPlan:
        """As `planned`, for `events_all`; its job is the largest clip that is not finished, if there is one. `new`: a
        folder that will be made."""
        jobs = self._jobs(requests, until)
        left = [job for job in jobs if self._finished(job) is None]
        with self.machines.all_or_none():
            jobs = [job.longest() if job.waits else job for job in left or jobs]
            self._check(jobs)
            self._places(jobs if left else [], new)
        return max(plan_all(jobs, self.machines), key=lambda plan: plan.own)

    def _jobs(self, requests: Sequence[Request], until: str | None) -> list[Job]:
        check_common(requests, self.machines.several)
        jobs = []
        for number, request in enumerate(requests, 1):
            length = None
            if request.resume and request.state is not None:  # what an earlier run has drawn and predicted
                with self.machines.all_or_none():
                    started = Started.read(Path(request.state), request.output)
                request = request if request.seed is not None else replace(request, seed=started.seed)
                leading, *_ = self.machines.everyone(None if started.length is None else asdict(started.length))
                length = None if leading is None else Duration(**leading)
            request = self._seeded(request)
            if len(requests) > 1 and request.name is None:
                request = replace(request, name=f"clip {number}")
            with self.machines.all_or_none(), of(request.name):
                jobs.append(Job(self.folder, request, until, length))
        return jobs

    def _check(self, jobs: Sequence[Job], whole: Container[str] = ()) -> dict[str, nn.Module]:
        built = dict[str, nn.Module]()
        for job in jobs:
            with of(job.request.name):
                names = (name for name in components(phases(job)) if name not in built and name not in whole)
                built |= job.check(list(names))
        return built

    def _places(self, jobs: Sequence[Job], new: Path | None = None) -> None:
        if not self.machines.leads:
            return
        for job in jobs:
            with of(job.request.name):
                check_places(job.request, self.folder.path, new)
        check_space(jobs)
