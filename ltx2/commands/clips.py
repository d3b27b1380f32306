"""Making clips."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ltx2.commands.shared import PATH, generate_options, given
from ltx2.console import Output, common, continuation, end_at_once, say_how_to_continue
from ltx2.runtime.errors import DoesNotFitError, Ltx2Error
from ltx2.runtime.units import gb

if TYPE_CHECKING:
    from ltx2.generation import Generation
    from ltx2.runtime.generate.records.clip import Saved

LATENTS = ".safetensors"


@click.command()
@click.argument("prompt", required=False)
@click.option("-m", "--model", type=PATH, help="Model folder, or its name in weights/. [default: the only one there]")
@click.option(
    "-o",
    "--output",
    "target",
    type=PATH,
    help="Clip: .mp4, .mov, .gif; .wav with --no-video. [default: outputs/PROMPT-SEED.mp4]",
)
@click.option(
    "--prompts", metavar="FILE", type=PATH, help="Make many clips: a prompt a line, or JSON lines with options."
)
@click.option("--count", metavar="N", type=click.IntRange(1), help="So many clips of each prompt.")
@click.option(
    "--seed",
    "seeds",
    type=int,
    multiple=True,
    help="Same seed, same clip; repeatable. Of several clips the first one's: others count on. [default: random]",
)
@generate_options(without=("seed",))
@click.option("--from", "sidecar", metavar="CLIP", type=PATH, help="Repeat the run that made this clip, or its .json.")
@click.option("--dry-run", is_flag=True, help="Show each phase's memory from headers, and whether it fits; do nothing.")
@common
def generate(
    output: Output,
    target: Path | None,
    model: Path | None,
    sidecar: Path | None,
    dry_run: bool,
    prompts: Path | None,
    count: int | None,
    seeds: tuple[int, ...],
    **options: Any,
) -> None:
    """Make a video with sound from PROMPT.

    PROMPT is not needed with --latents, --embeddings or --from. Beside clip.mp4, clip.json records the run. A run that
    is cut off can be continued: the state is kept after every denoise step until the clip is written. With
    --save-latents and no -o the clip is not decoded.
    """
    from ltx2.generation import Generation, Wanted
    from ltx2.runtime.distributed.machines import join

    args: list[str] = click.get_current_context().obj
    started: list[Generation] = []

    def late(error: Ltx2Error) -> None:
        for generation in started:
            if generation.left:
                error.fix += f"; what is done is kept, this continues: {continuation(args, generation.continuing())}"
        end_at_once(error)

    wanted = Wanted(target, prompts, count, seeds)
    generation = Generation(wanted, model, sidecar, given(options), join(os.environ, late))
    started.append(generation)
    _make(output, generation, dry_run)


@click.command()
@click.argument("source", metavar="INPUT", type=PATH)
@click.option("-m", "--model", type=PATH, help="Model folder, or its name in weights/. [default: the only one there]")
@click.option(
    "-o", "--output", "target", type=PATH, required=True, help="Clip (.mp4, .mov, .gif), or latents (.safetensors)."
)
@click.option("--spatial/--temporal", "spatial", default=True, help="Twice the size, or the frame rate. [spatial]")
@click.option("--prompt", metavar="TEXT", help="What the clip shows: refine it, as generate's stage 2 does.")
@generate_options("seed", "distilled_lora", "memory_limit", "low_memory", "resume", "preview", "force", "crf")
@click.option("--dry-run", is_flag=True, help="Show each phase's memory from headers, and whether it fits; do nothing.")
@common
def upscale(
    output: Output, source: Path, target: Path, model: Path | None, spatial: bool, dry_run: bool, **options: Any
) -> None:
    """Make a clip twice as large, or twice the frame rate.

    INPUT is a clip, or the latents of one (.safetensors). A clip keeps its sound. Latents become latents, and their
    sound is copied bit for bit.
    """
    from ltx2.generation import Generation, Wanted

    asked = given(options) | {"upscale": source, "temporal_upscale": not spatial}
    clip: Path | None = target
    if source.suffix == LATENTS:
        asked, clip = asked | {"save_latents": target}, None
    _make(output, Generation(Wanted(clip), model, None, asked), dry_run)


def _make(output: Output, generation: "Generation", dry_run: bool) -> None:
    """Make a clip or latents, or show the plan of it."""
    from ltx2.runtime.generate.records.clip import Saved

    if dry_run and not generation.finished:  # else there is nothing to plan, and nothing is done
        _show_plans(output, generation)
        return
    try:
        done = output.follow_all(generation.events(), Saved)
    except (Ltx2Error, KeyboardInterrupt) as error:
        if generation.left or (generation.machines.leads and isinstance(error, KeyboardInterrupt)):
            say_how_to_continue(error, generation.continuing())
        raise
    if not generation.machines.leads:
        return
    if not done:
        request = generation.requests[0]
        latents = str(request.save_latents)
        output.result({"latents": latents, "seed": request.seed}, latents)
    elif generation.several:
        data, texts = zip(*map(_told, done), strict=True)
        output.result({"clips": data}, "\n".join(texts))
    else:
        output.result(*_told(done[0]))


def _told(clip: "Saved") -> tuple[dict[str, Any], str]:
    """A clip that is made, as data and for people."""
    from ltx2.runtime.generate.records.sidecar import sidecar_path

    data = {"clip": str(clip.path), "sidecar": str(sidecar_path(clip.path)), **clip.record}
    request = clip.record["request"]
    seeded = clip.record["stages"] and request["seed"] is not None
    said = [f"{request['frames']} frames", *([f"seed {request['seed']}"] if seeded else [])]
    return data, f"{clip.path}  ({', '.join(said)}, {clip.record['seconds']:.1f} s)"


def _show_plans(output: Output, generation: "Generation") -> None:
    """The memory plan of every machine, also when it does not fit; then that is the command's failure."""
    from ltx2.render import memory_table
    from ltx2.runtime.generate.phases.together import splits

    plan, machines = generation.plan(), generation.machines
    plans = machines.everyone([plan.to_dict(), [*plan.job.warnings(), *plan.warnings()]])
    for name, (data, warnings) in zip(machines.names, plans, strict=True):
        title, columns, rows = memory_table(data)
        if plan.job.auto is not None and plan.job.length == plan.job.longest().length:
            title += f"\nthe most frames that --frames {plan.job.auto} may choose for the prompt"
        output.tables([(f"{name}: {title}" if machines.several else title, columns, rows)])
        if not output.quiet:
            for message in warnings:
                click.echo(f"warning: {message}", err=True)
    for note in () if output.quiet else plan.job.notes():
        click.echo(note, err=True)
    plan.check()
    for name, (data, _) in zip(machines.names, plans, strict=True):
        if not data["fits"]:
            why = f"its plan takes {gb(data['peak'])}, and its limit is {gb(data['limit'])}"
            raise DoesNotFitError(f"it does not fit on {name}", why, "use what that machine says would fit")
    several = {
        "machines": [{"name": n} | data for n, (data, _) in zip(machines.names, plans, strict=True)],
        "splits": splits(plan.job, machines, plan.tiling),
    }
    text = f"fits: {gb(plan.peak)} of {gb(plan.limit)}"
    output.result({"plan": plan.to_dict()} | (several if machines.several else {}), text)


@click.command()
@click.argument("folder", metavar="[DIR]", default="ltx2-demo", type=PATH)
@click.option("--release", metavar="NAME", help="Of the tiny model: 2.0 (default); from a clone also 2.5.")
@common
def demo(output: Output, folder: Path, release: str | None) -> None:
    """Run the whole chain on an embedded tiny model.

    It draws coloured shapes that move, with tones. Converted, quantized to 8 and 4 bits, used and measured in DIR
    (default: ltx2-demo), without a network.
    """
    from dataclasses import asdict

    from ltx2.bench.speed.receipt import tables
    from ltx2.demo import Demonstrated, run_demo

    done = output.follow(run_demo(folder, release))
    assert isinstance(done, Demonstrated), "a demo ends with its summary"
    output.tables(tables(done.receipt))
    made = [f"model {name:5s} {path}" for name, path in done.models.items()]
    made += [f"clip  {name:5s} {path}" for name, path in done.clips.items()]
    output.result(asdict(done), "\n".join([f'"{done.prompt}"', *made]))
