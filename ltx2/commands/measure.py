"""Measuring."""

from pathlib import Path
from typing import Any

import click

from ltx2.commands.shared import PATH
from ltx2.console import Output, common


@click.command()
@click.argument("model", type=PATH)
@click.option("--width", type=int, help="As for generate.")
@click.option("--height", type=int, help="As for generate.")
@click.option("--frames", type=int, help="As for generate.")
@click.option("--fps", type=float, help="As for generate.")
@click.option("--no-audio", is_flag=True, default=None, help="Leave out the sound's decoding.")
@click.option("--no-upscale", is_flag=True, default=None, help="One stage at full size.")
@click.option("--repeat", type=int, default=3, show_default=True, help="Measured runs.")
@click.option("--warmup", type=int, default=1, show_default=True, help="Runs before, not measured.")
@click.option("--out", type=PATH, help="Write the receipt (JSON).")
@common
def bench(output: Output, model: Path, repeat: int, warmup: int, out: Path | None, **options: Any) -> None:
    """Measure time and memory, phase by phase and per denoise step.

    Runs whole generations: the median and the spread ((slowest - fastest) / median) of --repeat runs.
    """
    from ltx2.bench.run import Benched, Case, run_bench, table
    from ltx2.bench.stats import write_receipt
    from ltx2.render import print_table
    from ltx2.runtime.paths import check_output

    if out is not None:
        check_output(out)
    given = {name: value for name, value in options.items() if value is not None}
    done = output.follow(run_bench(Case(model, given, repeat, warmup)))
    assert isinstance(done, Benched), "a benchmark ends with its receipt"
    if out is not None:
        write_receipt(out, done.receipt)
    if not output.quiet and not output.as_json:
        facts = done.receipt["machine"]
        print_table(f"{model} on {facts['device']}, mlx {facts['mlx']}", *table(done.receipt))
    output.result(done.receipt)
