"""One clip of a run: phase by phase, as a stream of events.

Text encoder, connectors, transformer, upscaler and decoders are never in memory together: each phase loads its network,
uses it and frees it. The consumer of the events decides what to show."""

import json
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ltx2.runtime.distributed.machines import ALONE, Machines
from ltx2.runtime.distributed.split import NONE
from ltx2.runtime.events import Event, Finishing, Noted, PhaseDone, PhaseStarted, Previewed, StepDone, Warned
from ltx2.runtime.files.atomic import UNLOCKED, claimed
from ltx2.runtime.files.paths import write_failure
from ltx2.runtime.generate.job import LATENTS
from ltx2.runtime.generate.networks import Networks
from ltx2.runtime.generate.phases.base import Made, Phase, Prompts
from ltx2.runtime.generate.phases.decode import CopyVideo, DecodeSound, DecodeVideo, Vocode
from ltx2.runtime.generate.phases.order import components, phases
from ltx2.runtime.generate.phases.sample import Denoise
from ltx2.runtime.generate.phases.text import Connect, EncodeText, PredictLength
from ltx2.runtime.generate.phases.together import (
    begin_shared,
    check_same,
    finish,
    follow,
    keep_waiting,
    splits,
    tell_seconds,
)  # fmt: skip
from ltx2.runtime.generate.planning import MemoryPlan
from ltx2.runtime.generate.records.clip import Clip, Followed, FrameBuffer, Generated, Sampled, Saved
from ltx2.runtime.generate.records.exchange import write_embeddings, write_latents
from ltx2.runtime.generate.records.places import write_beside
from ltx2.runtime.generate.records.resume import Owner, State, StateFile
from ltx2.runtime.generate.records.sidecar import make_record, make_settings, sidecar_path, write_sidecar
from ltx2.runtime.machine.facts import available_memory
from ltx2.runtime.media.formats import format_of
from ltx2.runtime.media.picture import write_picture
from ltx2.runtime.media.video import video_writer, write_wav
from ltx2.runtime.memory.meter import Phase as Meter
from ltx2.runtime.memory.meter import explained
from ltx2.runtime.model.layout import TRANSFORMER
from ltx2.runtime.networks.video_vae.tiles import Tiling
from ltx2.runtime.sampling.latents import as_numpy
from ltx2.runtime.streams import Streams
from ltx2.runtime.units import gb

DECODES = DecodeSound | Vocode | DecodeVideo | CopyVideo


@dataclass(frozen=True)
class Predicted(Event):
    """A clip's length is known, from the duration head's answer. It goes on once it is planned."""

    seconds: float


class Common:
    """Shared by clips that are made together: networks, and contexts of their prompts."""

    def __init__(self, runs: Sequence["Run"], networks: Networks) -> None:
        self.networks = networks
        self.prompts = Prompts([run.job for run in runs if any(isinstance(phase, EncodeText) for phase in run.phases)])
        self._left = Counter(phase.name for run in runs for phase in run.phases)

    def leave(self, phase: Phase, memory: MemoryPlan) -> None:
        """A clip has finished a phase: networks that no clip needs now are freed."""
        self._left[phase.name] -= 1
        kept = {TRANSFORMER} if phase.name in memory.keeps_transformer else set[str]()
        self.networks.keep(kept | set(phase.components) if self._left[phase.name] else kept)


class Run:
    """One clip: the checked job, how memory is used, and what its phases took. What its phases use of it is
    `phases.Tools`. `number` and `name` tell it from the others that are made with it."""

    common: Common  # with the clips that are made beside it; given by `batch.make_all`
    phases: list[Phase]  # what it does, without what an earlier run has done
    ahead: list[Phase]  # what is still to do

    def __init__(self, plan: MemoryPlan, machines: Machines = ALONE, number: int = 0, name: str = "") -> None:
        self.machines, self.number, self.name = machines, number, name
        self.done: list[PhaseDone] = []
        self.seconds = 0.0  # so far, and of an earlier run that this one continues
        self.resumed = time.perf_counter()
        self.made = Made()
        self.take(plan)
        earlier = self.state.read() if self.state is not None and self.request.resume else None
        if earlier is not None:
            self.made, self.done, self.seconds = earlier.made, list(earlier.done), earlier.seconds
            names = [phase.name for phase in self.ahead]
            sampled = sum(not isinstance(phase, DECODES) for phase in self.ahead)
            self.phases = self.ahead = self.ahead[sampled if earlier.phase is None else names.index(earlier.phase) :]

    def take(self, plan: MemoryPlan) -> None:
        """Make the clip of this plan. Raises MachinesError if other machines would make another one."""
        self.job = job = plan.job
        self.request, self.memory, self.noise = job.request, plan, job.noise()
        self.phases = phases(job)
        self.ahead = self.phases[len(self.done) :]
        self.splits, self.split = splits(job, self.machines, plan.tiling), NONE
        self.state: StateFile | None = None
        used = components(self.phases)
        if job.request.state is not None and job.request.latents is None and self.machines.leads:
            self.state = StateFile(Path(job.request.state), Owner.of(job, used), job.length)
        if self.machines.several:
            check_same(self.machines, job, used, plan.tiling)

    @property
    def tiling(self) -> Tiling | None:
        return self.memory.tiling

    @property
    def networks(self) -> Networks:
        return self.common.networks

    @property
    def prompts(self) -> Prompts:
        return self.common.prompts

    def events(self) -> Generator[Event, None, None]:
        """All phases, then the event that says what was made."""
        if not self.machines.leads:
            yield from self._follow()
            return
        with ExitStack() as held:  # the names of the clip and of its record, or of latents alone, from the start
            output, self._claim, self._record_claim = self.request.output, None, None
            result = self.request.save_latents if output is None and self.job.until == LATENTS else output
            if result is not None:
                self._claim = held.enter_context(claimed(Path(result).absolute()))
                if not self._claim.locked:
                    yield Warned(UNLOCKED.format(Path(result).absolute().parent))
            if output is not None:
                self._record_claim = held.enter_context(claimed(sidecar_path(Path(output).absolute())))
            if self.request.preview is not None and self.job.stages:
                Path(self.request.preview).mkdir(parents=True, exist_ok=True)
            yield Noted(self._about())
            yield from self._warnings()
            yield from self._all()

    def _follow(self) -> Iterator[Event]:
        """The share of a machine that does not lead in shared phases."""
        self.write = lambda _: None
        while (following := follow(self.machines)) is not None:
            name, self.made = following
            if self.made.seconds is not None:
                yield Predicted(self.made.seconds)
                continue
            yield from self._measured(next(phase for phase in self.phases if phase.name == name))
        yield Followed()

    def _about(self) -> str:
        """Says what will be made, and how."""
        sizes, row, seed = self.job.output(), self.job.row, self.request.seed
        how = ("upscaling" if self.request.upscale else "decoding") if row is None else f"{row.name} pipeline"
        noise = f", seed {seed}" if seed is not None and self.job.draws() else ""
        frames = "frames by the duration head, each" if self.job.waits else f"{sizes.frames} frames"
        return f"{self._whose}{how}: {frames} of {sizes.width}x{sizes.height} at {sizes.fps:g} fps{noise}"

    @property
    def _whose(self) -> str:
        """The beginning of a message about this clip among others."""
        file = "" if self.request.output is None else f", {Path(self.request.output).name}"
        return f"{self.name}{file}: " if self.name else ""

    def _settled(self, seconds: float) -> Iterator[Event]:
        """Set the clip's length by the duration head's answer."""
        if self.machines.several:
            tell_seconds(self.machines, seconds)
        yield Predicted(seconds)
        length, allowed = self.job.predicted(seconds), self.job.auto
        bounds = ""
        if length.clamped and allowed is not None:
            bounds = f", and --frames allows {allowed.least:g} to {allowed.most:g} s"
        yield Noted(f"{self._whose}the duration head gives the clip {seconds:.2f} s{bounds}: {length.frames} frames")
        yield from map(Warned, self.memory.warnings())

    def _all(self) -> Iterator[Event]:
        yield from self._sampled()
        decoding = self.ahead
        if not decoding:
            self._finished()
            self._release()
            yield Sampled(self.made.contexts, self.made.latents)
            return
        video = None if self.request.no_video else decoding[-1]
        for phase in decoding:
            if phase is not video:
                yield from self._measured(phase)
        self.made.track = self.made.track or self.job.track()
        if self.request.output is None:
            yield from self._generated(video)
        else:
            yield from self._saved(video, Path(self.request.output))

    def _sampled(self) -> Iterator[Event]:
        """The phases up to the latents, without those that an earlier run has done."""
        request = self.request
        if request.latents is not None:
            self.made.latents = self.job.read_latents(request.latents)
        elif request.embeddings is not None and not self.made.contexts:
            self.made.contexts = self.job.read_contexts(request.embeddings)
        clip = self.job.clip if request.upscale is not None and self.made.latents.video is None else None
        if clip is not None and clip.latents:
            given = self.job.read_latents(str(clip.path), sound=clip.sound)
            self.made.latents, self.made.sound = Streams(given.video), given.audio
        while self.ahead and not isinstance(self.ahead[0], DECODES):
            phase, *self.ahead = self.ahead
            yield from self._measured(phase)
            if isinstance(phase, PredictLength) and self.made.seconds is not None:
                yield from self._settled(self.made.seconds)
            following = self.ahead[0].name if self.ahead and not isinstance(self.ahead[0], DECODES) else None
            if following is None and self.made.sound is not None:
                self.made.latents = Streams(self.made.latents.video, self.made.sound)
            if isinstance(phase, Connect) and request.save_embeddings:
                yield from write_beside(request.save_embeddings, partial(write_embeddings, contexts=self.made.contexts))
            if following is None or (request.checkpoint_every and self.made.latents.video is not None):
                yield from self._keep(following)
        if request.save_latents and self.job.until in (None, LATENTS):
            claim = self._claim if request.output is None else None
            fps = self.job.output().fps
            write = partial(write_latents, latents=self.made.latents, fps=fps, claim=claim)
            if claim is None:
                yield from write_beside(request.save_latents, write)
                return
            try:
                write(request.save_latents)
            except OSError as error:  # they are all that was asked for
                raise write_failure(error, Path(request.save_latents)) from error

    def _measured(self, phase: Phase) -> Iterator[Event]:
        """One phase. All clips reach it before any continues."""
        yield PhaseStarted(phase.name, self.number)
        yield from self._done(phase)

    def _done(self, phase: Phase) -> Iterator[Event]:
        """A phase that has started."""
        self.meter, self.plan = Meter(phase.name), self.memory.phase(phase.name)
        if self.networks.observed:
            self.plan = replace(self.plan, text=0)
        self.split = self.splits[phase.name]
        alone = self.split == NONE
        if self.machines.several and self.machines.leads and not alone:
            begin_shared(self.machines, phase, self.made)
        sent, waited = self.machines.sent_bytes, self.machines.seconds
        with self.plan.applied(), explained(phase.name):
            for event in phase.run(self, self.made):
                if isinstance(event, StepDone) and isinstance(phase, Denoise) and self._due(phase):
                    yield from self._keep(phase.name)
                    self.meter.pause()
                if self.machines.several and alone:
                    keep_waiting(self.machines)
                if isinstance(event, Previewed):
                    yield from write_beside(event.path, partial(write_picture, picture=event.picture))
                yield event
        self.common.leave(phase, self.memory)
        sent, waited = self.machines.sent_bytes - sent, self.machines.seconds - waited
        self.done.append(replace(self.meter.finish(), sent_bytes=sent, exchange_seconds=waited))
        yield self.done[-1]

    def _due(self, phase: Denoise) -> bool:
        """Whether the state is kept after the running stage's latest step: every N steps, counted over all stages. A
        stage's last step has a state of its own."""
        every, step = self.request.checkpoint_every, self.made.step
        if not every or step is None or step.number == self.job.course(phase.number).steps:
            return False
        return (sum(self.job.course(n).steps for n in range(1, phase.number)) + step.number) % every == 0

    def _keep(self, phase: str | None) -> Iterator[Event]:
        if (file := self.state) is not None:
            state = State(phase, self.made, self.done, self._seconds())
            yield from write_beside(file.path, lambda _: file.write(state))

    def _generated(self, phase: Phase | None) -> Iterator[Event]:
        """The clip in memory."""
        sizes = self.job.output()
        frames = None
        if phase is not None:
            buffer = FrameBuffer(sizes)
            self.write, frames = buffer.write, buffer.frames
            yield from self._measured(phase)
        track, state = self.made.track, self.state.path if self.state is not None else None
        samples, rate = (None, 0) if track is None else (track.samples, track.sample_rate)
        latents = as_numpy(self.made.latents)
        self._release()
        yield Generated(Clip(frames, samples, rate, sizes.fps, latents, self._record(), state))

    def _saved(self, phase: Phase | None, path: Path) -> Iterator[Event]:
        """The clip in its file: frames are written as they are decoded, so that only those of a tile are in memory."""
        if phase is None:
            assert self.made.track is not None, "a sound is made"
            write_wav(path, self.made.track, self._claim)
            yield from self._concluded(path)
            return
        comment = "" if self.request.no_metadata else json.dumps(self._settings)
        fps, track, claim = self.job.output().fps, self.made.track, self._claim
        yield PhaseStarted(phase.name, self.number)  # before its files are opened, which many clips have not at once
        if track is not None and not format_of(path).audio:
            yield Warned(f"{path.name} has no sound: a {path.suffix} cannot hold any")
        crf = self.request.crf or 0
        with video_writer(path, fps=fps, audio=track, crf=crf, comment=comment, claim=claim) as writer:
            self.write = writer.write
            yield from self._done(phase)
            yield Finishing("writing the end of the file")
        yield from self._concluded(path)

    def _concluded(self, path: Path) -> Iterator[Event]:
        """The clip is there: its record beside it."""
        record = self._record()
        yield from write_beside(sidecar_path(path), partial(write_sidecar, record=record, claim=self._record_claim))
        self._finished()
        self._release()
        yield Saved(path, record)

    def _release(self) -> None:
        """The other machines have nothing left to do."""
        if self.machines.several:
            finish(self.machines)

    def _finished(self) -> None:
        """There is nothing left to continue."""
        if self.state is not None:
            self.state.path.unlink(missing_ok=True)

    @cached_property
    def _settings(self) -> dict[str, Any]:
        return make_settings(self.job)

    def _record(self) -> dict[str, Any]:
        record = make_record(self._settings, self.done, self._seconds())
        record["memory_plan"] = self.memory.to_dict()
        if self.machines.several:
            record["machines"] = {"count": self.machines.size, "splits": self.splits}
        record["products"] = {form: dict(choice.by_rows) for form, choice in self.networks.products.items()}
        return record

    def _seconds(self) -> float:
        return self.seconds + time.perf_counter() - self.resumed

    def _warnings(self) -> Iterator[Event]:
        messages = [*self.request.without_effect(), *self.job.warnings()]
        messages += [] if self.job.waits else self.memory.warnings()
        for message in messages:
            yield Warned(message)
        if self.machines.several:
            shared = ", ".join(f"{name} by {how}" for name, how in self.splits.items() if how != NONE) or "nothing"
            yield Noted(f"{self.machines.size} machines share {shared}")
        elif self.request.split is not None:
            yield Warned("--split has no effect on one machine: see docs/several-machines.md")
        yield from map(Noted, self.job.notes())
        if self.request.memory_limit is not None and self.memory.limit > (has := available_memory()):
            yield Warned(f"--memory-limit {self.request.memory_limit:g} is more than the {gb(has)} there are")
        if self.state is None:
            return
        there = self.state.path.exists()
        if self.request.resume and not there:
            yield Warned(f"there is no {self.state.path.name} to continue: this run starts from the beginning")
        elif there and not self.request.resume:
            yield Warned(f"{self.state.path.name} is of a run that was cut off: --resume would continue it")
