"""Shared by all commands: their output, their failures and exit codes.

Stdout carries the result alone, with --json exactly one JSON object; everything else goes to stderr. Expected failures
print what, why and how to fix it, and exit with their class's code."""

import json
import os
import shlex
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from ltx2 import interrupt
from ltx2.runtime.distributed.ranks import RANK
from ltx2.runtime.errors import InputError, Ltx2Error, UsageError, printable, reason

if TYPE_CHECKING:
    from ltx2.runtime.events import Event

# Options of other tools that make clips, and ours.
OURS = {
    "--guidance": "--cfg", "--guidance-scale": "--cfg", "--cfg-scale": "--cfg", "--video-cfg-guidance-scale": "--cfg",
    "--audio-cfg-guidance-scale": "--audio-cfg", "--stg-scale": "--stg", "--num-frames": "--frames",
    "--num-inference-steps": "--steps", "--frame-rate": "--fps", "--output-path": "--output",
    "--model-path": "--model", "--checkpoint-path": "--model", "--prompt-file": "--prompts", "--images": "--image",
}  # fmt: skip
EXIT_USAGE = 2
Command = Callable[..., None]
Kind = TypeVar("Kind", bound="Event")


def follower() -> str | None:
    """The name of this machine if it is one of several and does not lead: then it prints its errors alone."""
    rank = os.environ.get(RANK, "0")
    return None if rank == "0" else f"{socket.gethostname()} (rank {rank})"


class Output:
    """A command's output: tables and text for people on stdout, or one JSON object with --json."""

    def __init__(self, quiet: bool, as_json: bool) -> None:
        self.quiet = quiet or follower() is not None
        self.as_json = as_json and follower() is None

    def follow(self, events: "Iterable[Event]") -> "Event":
        """Show events as they come; returns the last one."""
        (last,) = deque(self._shown(events), maxlen=1)
        return last

    def follow_all(self, events: "Iterable[Event]", *kinds: type[Kind]) -> list[Kind]:
        """Show events as they come; returns all of some kinds."""
        return [event for event in self._shown(events) if isinstance(event, kinds)]

    def _shown(self, events: "Iterable[Event]") -> "Iterator[Event]":
        from ltx2.progress import Progress
        from ltx2.runtime.machine.process import awake

        interrupt.begin()
        with awake(), Progress(silent=self.quiet) as progress:
            for event in events:
                progress.show(event)
                yield event

    def result(self, data: dict[str, Any], text: str | None = None) -> None:
        """The command's result: `data` as the JSON object, or `text` for people."""
        if self.as_json:
            click.echo(json.dumps(data, indent=2))
        else:
            self.text(text or "")

    def text(self, text: str) -> None:
        """A part of the result for people alone."""
        if text and not (self.quiet or self.as_json):
            click.echo("\n".join(map(printable, text.split("\n"))))

    def tables(self, tables: "Iterable[tuple[str, list[str], list[list[str]]]]") -> None:
        """Tables of the result (title, columns, rows), for people alone."""
        from ltx2.render import print_table

        for table in () if self.quiet or self.as_json else tables:
            print_table(*table)

    def failed(self, error: Ltx2Error, data: dict[str, Any]) -> NoReturn:
        """The command has failed, with a result: `data` goes beside the error."""
        _show_error(error.to_dict(), as_json=False)
        if self.as_json:
            click.echo(json.dumps(data | {"error": error.to_dict()}, indent=2))
        raise click.exceptions.Exit(error.exit_code)


def common(command: Command) -> Command:
    """Add -q/--quiet and --json; the command gets an `Output` as its first argument."""

    @click.option("-q", "--quiet", is_flag=True, help="Print nothing on success.")
    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
    @wraps(command)
    def wrapped(quiet: bool, as_json: bool, **options: Any) -> None:
        command(Output(quiet, as_json), **options)

    return wrapped


def run_group(group: click.Group, args: list[str]) -> int:
    """Run a command line and return its exit code."""
    as_json = "--json" in args
    try:
        code = group.main(args, prog_name="ltx2", standalone_mode=False, obj=args)
        return code if isinstance(code, int) else 0  # an Exit that click has caught
    except Ltx2Error as error:
        _show_error(error.to_dict(), as_json)
        return error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return EXIT_USAGE
    except click.ClickException as error:
        what, why = _refused(error)
        _show_error({"kind": "usage", "what": what, "why": why, "fix": _usage_fix(error)}, as_json)
        return EXIT_USAGE
    except (KeyboardInterrupt, click.Abort) as error:
        fix = (str(error) if isinstance(error, click.Abort) else "") or "run the same command again"
        number = interrupt.cause(error)
        stopped = {"kind": "interrupted", "what": "interrupted", "why": interrupt.WHY[number], "fix": fix}
        _show_error(stopped, as_json)
        return interrupt.SHELL + number
    except BrokenPipeError:  # the reader of our output (head, less) has gone: drop what is still buffered
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.filename is None:  # not from the file system: a bug
            raise
        what, why = f"cannot use {error.filename}", reason(error)
        _show_error(InputError(what, why, "check the path and its permissions").to_dict(), as_json)
        return InputError.exit_code


def _refused(error: click.ClickException) -> tuple[str, str]:
    """What click has refused, and why."""
    what, context = error.format_message(), error.ctx if isinstance(error, click.UsageError) else None
    command = context.command_path if context else "ltx2"
    if isinstance(error, click.MissingParameter):
        return what, f"{command} needs it"
    if isinstance(error, click.BadParameter):
        what, _, why = what.partition(": ")
        return what, why
    if isinstance(error, click.BadOptionUsage):
        return what, "nothing follows it" if "requires" in what else "a value follows it"
    if what.startswith("No such"):  # command, or option
        return what, f"{command} has no {what.split()[2]} of that name"
    pieces = context.command.collect_usage_pieces(context) if context else ["a command"]
    return what, f"{command} takes {' '.join(pieces)}"


def _usage_fix(error: click.ClickException) -> str:
    if not isinstance(error, click.UsageError) or error.ctx is None:
        return "ltx2 --help"
    see, flags = f"see {error.ctx.command_path} --help", {flag for p in error.ctx.command.params for flag in p.opts}
    if isinstance(error, click.NoSuchOption) and (ours := OURS.get(error.option_name, "")) in flags:
        return f"here it is {ours}; {see}"
    if isinstance(error, click.NoSuchOption) and error.option_name in ("--quantize", "--quantization"):
        return f"a model folder is quantized once: ltx2 quantize MODEL -o MODEL2 --bits 4; {see}"
    if "unexpected extra argument" in error.format_message() and "prompt" in error.ctx.params:
        return f'put the prompt in quotes: ltx2 {error.ctx.command.name} "a red kite over dunes"; {see}'
    return see


def _show_error(error: dict[str, str], as_json: bool) -> None:
    name = follower()
    where = f"{name}: " if name else ""
    click.echo(f"{where}error: {error['what']}\n  why: {error['why']}\n  fix: {error['fix']}", err=True)
    if as_json and not name:
        click.echo(json.dumps({"error": error}, indent=2))


class InOrder(click.Group):
    """Commands in the order of their use, not of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


class Dependent(click.Option):
    """An option that has no effect without one of the parameters `needs`, or beside one of `unless`: then it is wrong
    usage."""

    def __init__(self, *args: Any, needs: Sequence[str] = (), unless: Sequence[str] = (), **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.needs, self.unless = needs, unless

    def handle_parse_result(
        self, ctx: click.Context, opts: Mapping[str, Any], args: list[str]
    ) -> tuple[Any, list[str]]:
        """`opts` are the parameters that were given, as text."""
        if self.name in opts:
            flags = {parameter.name: parameter.opts[-1] for parameter in ctx.command.params}
            flag, why = flags[self.name], f"what it is for: {(self.help or '').rstrip('.')}"
            if self.needs and not opts.keys() & set(self.needs):
                needed = alternatives([flags[name] for name in self.needs])
                raise UsageError(f"{flag} has no effect without {needed}", why, f"add {needed}, or leave out {flag}")
            for name in opts.keys() & set(self.unless):
                raise UsageError(f"{flag} has no effect with {flags[name]}", why, f"leave out {flag} or {flags[name]}")
        return super().handle_parse_result(ctx, opts, args)


def alternatives(words: Sequence[str]) -> str:
    """a, b or c"""
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def say_how_to_continue(error: Ltx2Error | KeyboardInterrupt, added: Mapping[str, str | None]) -> NoReturn:
    """Raise a failure that says how to continue: by the same command with the options (and values) of `added`."""
    said = f"this continues: {continuation(click.get_current_context().obj, added)}"
    if isinstance(error, Ltx2Error):
        error.fix += f"; what is done is kept, {said}"
        raise error
    raise click.Abort(said) from error


def continuation(args: Sequence[str], added: Mapping[str, str | None]) -> str:
    """The command of these arguments, with `added` options and their values."""
    words = (word for option, value in added.items() for word in (option, value))
    return shlex.join(["ltx2", *args, *(word for word in words if word is not None)])


def end_at_once(error: Ltx2Error) -> NoReturn:
    """End the process with this failure, from any thread: another one is stuck forever."""
    _show_error(error.to_dict(), "--json" in sys.argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(error.exit_code)
