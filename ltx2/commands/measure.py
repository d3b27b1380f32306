"""Measuring."""

from pathlib import Path
from typing import Any

import click

from ltx2.commands.shared import PATH
from ltx2.console import Output, common, refuse_given

COMPARING = ("reference", "prompts", "seed", "plot")  # options that only a comparison has
TIMING = ("repeat", "warmup")


@click.command()
@click.argument("model", required=False, type=PATH)
@click.option("--width", type=int, help="As for generate.")
@click.option("--height", type=int, help="As for generate.")
@click.option("--frames", type=int, help="As for generate.")
@click.option("--fps", type=float, help="As for generate.")
@click.option("--no-audio", is_flag=True, default=None, help="Leave out the sound's decoding.")
@click.option("--no-upscale", is_flag=True, default=None, help="One stage at full size.")
@click.option("--repeat", type=int, default=3, show_default=True, help="Measured runs.")
@click.option("--warmup", type=int, default=1, show_default=True, help="Runs before, not measured.")
@click.option("--out", type=PATH, help="Write the receipt (JSON).")
@click.option("--quality", "compared", metavar="MODEL", type=PATH, help="Compare this model with --reference.")
@click.option("--reference", metavar="MODEL", type=PATH, help="The model that the one of --quality was made from.")
@click.option("--prompts", metavar="FILE", type=PATH, help="One prompt a line, with --quality; default: one of ours.")
@click.option("--seed", type=int, help="Of the first prompt's noise, with --quality.")
@click.option("--plot", metavar="FILE", type=PATH, help="Draw what --quality finds (.png or .svg).")
@common
def bench(output: Output, model: Path | None, compared: Path | None, out: Path | None, **options: Any) -> None:
    """Measure time and memory, or what quantizing has cost.

    Runs whole generations, phase by phase and per denoise step: the median and the spread ((slowest - fastest) /
    median) of --repeat runs. With --quality and --reference both models make the same clips: the error of every layer
    and step on the reference's inputs, and how far latents, frames and sound are apart.
    """
    from ltx2.runtime.paths import check_output

    if out is not None:
        check_output(out)
    given = {name: value for name, value in options.items() if value is not None}
    if compared is not None:
        _compare(output, model, compared, out, given)
        return
    refuse_given(COMPARING, "--quality")
    if model is None:
        raise click.UsageError("Missing argument 'MODEL'.")
    _time(output, model, out, given)


def _compare(output: Output, model: Path | None, compared: Path, out: Path | None, options: dict[str, Any]) -> None:
    from ltx2.bench.plot import check_plot
    from ltx2.bench.quality import Compared, read_prompts, run_quality, tables
    from ltx2.bench.quality_plot import plot_quality
    from ltx2.bench.run import PROMPT
    from ltx2.bench.stats import write_receipt
    from ltx2.render import print_table

    refuse_given(TIMING, "a MODEL to be timed")
    if model is not None:
        raise click.UsageError("MODEL has no effect with --quality.")
    if "reference" not in options:
        raise click.UsageError("Missing option '--reference', which --quality needs.")
    reference, prompts, plot = (options.pop(name, None) for name in ("reference", "prompts", "plot"))
    if plot is not None:
        check_plot(plot)
    texts = (PROMPT,) if prompts is None else read_prompts(prompts)
    for name in TIMING:
        del options[name]
    done = output.follow(run_quality(compared, reference, texts, options))
    assert isinstance(done, Compared), "a comparison ends with its receipt"
    if out is not None:
        write_receipt(out, done.receipt)
    if plot is not None:
        plot_quality(plot, done.receipt, done.strips)
    if not output.quiet and not output.as_json:
        for table in tables(done.receipt):
            print_table(*table)
    output.result(done.receipt)


def _time(output: Output, model: Path, out: Path | None, options: dict[str, Any]) -> None:
    from ltx2.bench.run import Benched, Case, run_bench, table
    from ltx2.bench.stats import write_receipt
    from ltx2.render import print_table

    repeat, warmup = (options.pop(name) for name in TIMING)
    done = output.follow(run_bench(Case(model, options, repeat, warmup)))
    assert isinstance(done, Benched), "a benchmark ends with its receipt"
    if out is not None:
        write_receipt(out, done.receipt)
    if not output.quiet and not output.as_json:
        facts = done.receipt["machine"]
        print_table(f"{model} on {facts['device']}, mlx {facts['mlx']}", *table(done.receipt))
    output.result(done.receipt)
