"""Measuring."""

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ltx2.commands.shared import PATH, generate_options, given
from ltx2.console import Dependent, Output, common, end_at_once
from ltx2.runtime.errors import UsageError
from ltx2.runtime.generate.options.table import COSTS
from ltx2.runtime.model.forms import MODES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ltx2.runtime.events import Event

when_timing = partial(click.option, cls=Dependent, unless=("compared",))
with_random = partial(click.option, cls=Dependent, needs=("random",))
with_quality = partial(click.option, cls=Dependent, needs=("compared",))


@click.command()
@click.argument("models", nargs=-1, metavar="[MODEL]...", type=PATH)
@when_timing("--random", metavar="NAME", help="A published model's shapes, with random weights.")
@with_random("--bits", type=int, multiple=True, help="Of --random's weights, 16 for none packed; repeatable.")
@with_random("--mode", type=click.Choice(list(MODES)), help="Kind of codes of --random's weights.")
@with_random("--group-size", type=int, help="Of --random's weights, as for quantize.")
@with_random("--recipe", metavar="NAME|FILE", help="Of --random's weights, as for quantize.")
@when_timing(
    "--suite",
    metavar="NAME|FILE",
    help="Cases: quick (default), full, parts, sizes, bits, guided, machines, or a file.",
)
@when_timing("--part", type=click.Choice(["clip", "text", "denoise", "decode"]), help="Only this of every case.")
@generate_options(*COSTS)
@when_timing("--repeat", type=int, help="Measured runs of every case; default: the suite's.")
@when_timing("--warmup", type=int, help="Runs before, not measured; default: the suite's.")
@when_timing("--cooldown", type=float, metavar="SECONDS", help="Rest before every run.")
@when_timing("--compare", metavar="OLD.json", type=PATH, help="What became faster or slower since that receipt.")
@click.option("--out", type=PATH, help="Write the receipt (JSON).")
@when_timing("--verbose", is_flag=True, help="Show all that the receipt says of every phase.")
@click.option("--plot", metavar="FILE", type=PATH, help="Draw the receipt (.png or .svg).")
@click.option("--quality", "compared", metavar="MODEL", type=PATH, help="Compare this model with --reference.")
@with_quality("--reference", metavar="MODEL", type=PATH, help="The model that the one of --quality was made from.")
@with_quality("--prompts", metavar="FILE", type=PATH, help="As for calibrate, with --quality; default: three of ours.")
@with_quality("--seed", type=int, help="Of the first prompt's noise, with --quality.")
@common
def bench(output: Output, models: tuple[Path, ...], compared: Path | None, **options: Any) -> None:
    """Measure time and memory, or what quantizing has cost.

    Runs every case of a suite with every MODEL and with --random's weights, in turns: medians and spreads, (slowest -
    fastest) / median. --random NAME (as in `ltx2 download --list`) needs no download. With --quality and --reference
    both models make the same clips: the error of every layer and step on the reference's inputs, the distance of
    latents, frames and sound.
    """
    from ltx2.runtime.files.paths import check_output

    out, plot, verbose = (options.pop(name) for name in ("out", "plot", "verbose"))
    if out is not None:
        check_output(out)
    if plot is not None:
        from ltx2.bench.plots.plot import check_plot

        check_plot(plot)
    asked = given(options)
    if compared is not None:
        _compare(output, models, compared, (out, plot), asked)
        return
    if not (models or "random" in asked):
        raise UsageError("there is nothing to measure", "no model is named", "name a MODEL, or use --random")
    _time(output, models, (out, plot), asked, verbose)


Files = tuple[Path | None, Path | None]  # of the receipt and of its picture


def _compare(output: Output, models: tuple[Path, ...], compared: Path, files: Files, options: dict[str, Any]) -> None:
    from ltx2.bench.plots.quality import plot_quality
    from ltx2.bench.quality.quality import Compared, built_in_prompts, run_quality, tables
    from ltx2.bench.speed.stats import write_receipt
    from ltx2.runtime.generate.options.prompts import read_prompts

    if models:
        raise UsageError("MODEL has no effect with --quality", "that names the models itself", "leave out MODEL")
    if "reference" not in options:
        why = "the models are compared with one that is not quantized"
        raise UsageError("--quality needs --reference", why, "add --reference MODEL")
    reference, prompts = (options.pop(name, None) for name in ("reference", "prompts"))
    texts = built_in_prompts() if prompts is None else read_prompts(prompts)
    done = output.follow(run_quality(compared, reference, texts, options))
    assert isinstance(done, Compared), "a comparison ends with its receipt"
    out, plot = files
    if out is not None:
        write_receipt(out, done.receipt)
    if plot is not None:
        plot_quality(plot, done.receipt, done.strips)
    output.tables(tables(done.receipt))
    output.result(done.receipt)


def _time(
    output: Output, models: tuple[Path, ...], files: Files, options: dict[str, Any], verbose: bool = False
) -> None:
    from ltx2.bench.plots.receipt import plot_receipt
    from ltx2.bench.speed.cases import bench_models
    from ltx2.bench.speed.compare import table
    from ltx2.bench.speed.receipt import tables
    from ltx2.bench.speed.run import Benched
    from ltx2.bench.speed.stats import write_receipt
    from ltx2.runtime.distributed.machines import join

    machines = join(os.environ, end_at_once)
    out, plot = files

    def events() -> "Iterator[Event]":
        for event in bench_models(models, options, machines):
            if isinstance(event, Benched) and out is not None:
                write_receipt(out, event.receipt)  # after every round: what is interrupted leaves what it measured
            yield event

    done = output.follow(events())
    if not machines.leads:
        return
    assert isinstance(done, Benched), "a benchmark ends with its receipt"
    if plot is not None:
        plot_receipt(plot, done.receipt)
    compared = [table(done.receipt["comparison"])] if "comparison" in done.receipt else []
    output.tables([*tables(done.receipt, verbose), *compared])
    output.result(done.receipt)
