"""`ltx2 bench --random` without the command line's libraries: published sizes with random weights, on machines that
have MLX, numpy and safetensors only; on several together, if it is started so (bench/ranks.py).
`python -m ltx2.bench.fullsize --bits 16 4 --out receipt.json`"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ltx2.bench.random.published import published
from ltx2.bench.speed.cases import RandomWeights, bench_cases
from ltx2.bench.speed.receipt import tables
from ltx2.bench.speed.run import Benched, Case, run_bench
from ltx2.bench.speed.stats import write_receipt
from ltx2.bench.speed.suite import DEFAULT, PARTS, Suite, load_suite
from ltx2.quant.apply import Settings
from ltx2.runtime.distributed.machines import join
from ltx2.runtime.errors import Ltx2Error, MachinesError
from ltx2.runtime.events import Event, Noted, PhaseDone, Warned
from ltx2.runtime.model.forms import AFFINE, MODES


def run(cases: Sequence[Case], suite: Suite, show: Callable[[Event], None]) -> dict[str, Any]:
    """Measure, passing every event to `show`; returns the receipt, which is empty on a machine that does not lead."""
    receipt: dict[str, Any] = {}
    machines = join(os.environ, end_at_once)
    for event in run_bench(cases, suite.schedule, suite.name, machines=machines):
        show(event)
        if isinstance(event, Benched):
            receipt = event.receipt
    return receipt


def end_at_once(error: MachinesError) -> NoReturn:
    """From another thread, when this one waits for a machine that does not answer."""
    sys.stderr.write(f"error: {error}\n")
    sys.stderr.flush()
    os._exit(error.exit_code)


def show_event(event: Event) -> None:
    """One line on stdout."""
    match event:
        case Noted(message=message) | Warned(message=message):
            line = message
        case PhaseDone():
            line = f"  {event.name:18s} {event.seconds:8.2f} s  peak {event.mlx_peak_bytes / 2**30:6.2f} GiB"
        case _:
            return
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def show_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Columns as wide as what is in them."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    lines = ("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (columns, *rows))
    sys.stdout.write("\n".join([title, *lines, "", ""]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default=published()["name"], help="the published model")
    parser.add_argument("--model", type=Path, help="a model folder in place of random weights")
    parser.add_argument("--bits", type=int, nargs="*", default=[], help="of the weights; 16 for none packed")
    parser.add_argument("--mode", choices=list(MODES), default=AFFINE, help="kind of codes")
    parser.add_argument("--suite", default=DEFAULT, help="a suite's name or file")
    parser.add_argument("--part", choices=list(PARTS), help="only this of every case")
    parser.add_argument("--repeat", type=int, help="measured runs of every case")
    parser.add_argument("--out", type=Path, required=True, help="receipt to write, after every round")
    args = parser.parse_args()
    suite = load_suite(args.suite).changed(args.part, {}, {"repeat": args.repeat})

    def show(event: Event) -> None:
        show_event(event)
        if isinstance(event, Benched):
            write_receipt(args.out, event.receipt)

    try:
        weights = RandomWeights(args.name, tuple(args.bits), Settings(mode=args.mode))
        cases = bench_cases([], weights, suite) if args.model is None else bench_cases([args.model], None, suite)
        receipt = run(cases, suite, show)
    except Ltx2Error as error:
        parser.exit(error.exit_code, f"error: {error}\n")
    for table in tables(receipt) if receipt else ():
        show_table(*table)


if __name__ == "__main__":
    main()
