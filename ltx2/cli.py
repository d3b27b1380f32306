"""The command line. Commands import what they need when they run, so that help is instant.

With --json, stdout carries exactly one JSON object; everything for people goes to stderr. Expected failures print what,
why and how to fix it, and exit with their class's code."""

import json
import sys
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ltx2 import __version__
from ltx2.runtime.errors import Ltx2Error

if TYPE_CHECKING:
    from ltx2.runtime.events import Event

EXIT_USAGE, EXIT_INTERRUPTED = 2, 130
Command = Callable[..., None]


class Output:
    """Where a command's results go: people on stderr, one JSON object on stdout with --json."""

    def __init__(self, quiet: bool, as_json: bool) -> None:
        self.quiet = quiet
        self.as_json = as_json

    def follow(self, events: "Iterable[Event]") -> "Event":
        """Show events as they come; returns the last one."""
        from ltx2.render import Progress

        last = None
        with Progress(silent=self.quiet) as progress:
            for last in events:
                progress.show(last)
        assert last is not None, "a stream ends with its result"
        return last

    def result(self, data: dict[str, Any], text: str | None = None) -> None:
        """The command's result: `data` as the JSON object, or `text` for people."""
        if self.as_json:
            click.echo(json.dumps(data, indent=2))
        elif text and not self.quiet:
            click.echo(text)


def common(command: Command) -> Command:
    """Add -q/--quiet and --json; the command gets an `Output` as its first argument."""

    @click.option("-q", "--quiet", is_flag=True, help="Print nothing on success.")
    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
    @wraps(command)
    def wrapped(quiet: bool, as_json: bool, **options: Any) -> None:
        command(Output(quiet, as_json), **options)

    return wrapped


def main() -> None:
    """Entry point of the `ltx2` script."""
    sys.exit(run(sys.argv[1:]))


def run(args: list[str]) -> int:
    """Run a command line and return its exit code."""
    as_json = "--json" in args
    try:
        cli.main(args, prog_name="ltx2", standalone_mode=False)
    except Ltx2Error as error:
        _show_error(error.to_dict(), as_json)
        return error.exit_code
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except click.ClickException as error:
        usage = error.ctx.get_usage() if isinstance(error, click.UsageError) and error.ctx else "ltx2 --help"
        fix = f"see {error.ctx.command_path} --help" if isinstance(error, click.UsageError) and error.ctx else usage
        _show_error({"kind": "usage", "what": error.format_message(), "why": usage, "fix": fix}, as_json)
        return EXIT_USAGE
    except (KeyboardInterrupt, click.Abort):
        stopped = {"kind": "interrupted", "what": "interrupted", "why": "Ctrl-C", "fix": "run the same command again"}
        _show_error(stopped, as_json)
        return EXIT_INTERRUPTED
    return 0


def _show_error(error: dict[str, str], as_json: bool) -> None:
    click.echo(f"error: {error['what']}\n  why: {error['why']}\n  fix: {error['fix']}", err=True)
    if as_json:
        click.echo(json.dumps({"error": error}, indent=2))


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="ltx2")
def cli() -> None:
    """LTX-2 video with sound on Apple Silicon: convert, quantize, generate and benchmark with MLX."""


@cli.command()
@click.argument("prompt", required=False)
@click.option("-m", "--model", type=click.Path(path_type=Path), required=True, help="Model folder.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The clip, e.g. clip.mp4.")
@click.option("--width", type=int, help="Pixels; a multiple of 64 (32 with --no-upscale).")
@click.option("--height", type=int, help="Pixels; a multiple of 64 (32 with --no-upscale).")
@click.option("--frames", type=int, help="8k+1, e.g. 121.")
@click.option("--fps", type=float, help="Frames per second.")
@click.option("--seed", type=int, help="Same seed, same clip.")
@click.option("--no-audio", is_flag=True, default=None, help="Write no sound. The picture stays the same.")
@click.option("--no-upscale", is_flag=True, default=None, help="One stage at full size, without the upscaler.")
@click.option("--embeddings", metavar="FILE", help="Use saved prompt embeddings; skips the text encoder.")
@click.option("--save-embeddings", metavar="FILE", help="Save the prompt's embeddings.")
@click.option("--noise", metavar="FILE", help="Start from these noises instead of the seed.")
@click.option("--save-latents", metavar="FILE", help="Save the latents before they are decoded.")
@click.option("--latents", metavar="FILE", help="Decode these latents only.")
@click.option("--from", "sidecar", metavar="CLIP.json", type=click.Path(path_type=Path), help="Repeat a run.")
@common
def generate(output: Output, model: Path, sidecar: Path | None, **options: Any) -> None:
    """Make a video with sound from PROMPT.

    PROMPT is not needed with --latents, --embeddings or --from. Beside clip.mp4, clip.json records the run.
    """
    from ltx2.runtime.clip import read_request, sidecar_path
    from ltx2.runtime.events import Generated
    from ltx2.runtime.media import check_target
    from ltx2.runtime.pipeline import Pipeline

    target = options.pop("output")
    given = {name: value for name, value in options.items() if value is not None}
    request = {**(read_request(sidecar) if sidecar else {}), **given}
    check_target(target)
    done = output.follow(Pipeline(model).stream(**request))
    assert isinstance(done, Generated)
    done.clip.save(target)
    seconds = done.clip.record["seconds"]
    data = {"clip": str(target), "sidecar": str(sidecar_path(target)), **done.clip.record}
    output.result(data, f"{target}  ({len(done.clip.frames)} frames, {seconds:.1f} s)")
