"""What will run on this Mac or another one, and whether it computes right."""

import click

from ltx2.commands.shared import Gigabytes, generate_options
from ltx2.console import Output, common

SIZES = ("width", "height", "frames")


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--memory", type=Gigabytes(), help="Plan for a Mac of so much memory; default: this computer.")
@click.option("--bits", type=int, help="Only so many bits (16: as it is); default: as it is, and all presets.")
@generate_options(*SIZES)
@common
def plan(output: Output, names: tuple[str, ...], memory: float | None, bits: int | None, **sizes: int | None) -> None:
    """Say what will run here, before any download.

    NAME is a bundle, as `ltx2 download --list` shows them, or a model folder; default: all bundles. For each one and
    every preset: whether it stays in memory or is read from disk in every step, the peak, and the disk that it takes.
    No network is needed.
    """
    from ltx2.bench.plan.rows import plan_models
    from ltx2.bench.plan.table import advice, tables

    made = plan_models(names, memory, bits, {name: value for name, value in sizes.items() if value is not None})
    output.tables(tables(made, overview=not names))
    output.result(made.to_dict(), advice(made))


@click.command()
@common
def doctor(output: Output) -> None:
    """Say what this computer is, and whether it computes right.

    Every kernel that generating uses is compared with float32 on the CPU, then the embedded model with its golden
    latents. Takes under a minute.
    """
    from ltx2.doctor import Diagnosed, diagnose, doctor_tables

    done = output.follow(diagnose())
    assert isinstance(done, Diagnosed), "a diagnosis ends with its result"
    output.tables(doctor_tables(done))
    if (error := done.error) is not None:
        output.failed(error, done.to_dict())
    output.result(done.to_dict(), f"all {len(done.kernels)} kernels and the embedded model are right")
