"""All commands, in the order of their use."""

import click

from ltx2.commands import clips, fetch, machine, measure, models
from ltx2.console import InOrder


def _version(context: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked:
        from ltx2.runtime.version import tool_version

        click.echo(f"ltx2, version {tool_version()}")
        context.exit()


@click.group(cls=InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_version, help="Show the version.")
def cli() -> None:
    """LTX-2 video with sound on Apple Silicon: convert, quantize, generate and benchmark with MLX."""


for command in (
    fetch.download,
    models.convert,
    models.calibrate,
    models.quantize,
    machine.plan,
    clips.generate,
    clips.upscale,
    machine.doctor,
    measure.bench,
    models.inspect,
    models.verify,
    clips.demo,
):
    cli.add_command(command)
