"""Shared by several commands."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ltx2.console import Command, Output
from ltx2.runtime.generate.options.kinds import Choice, Flag, Number, Option, Several, Whole
from ltx2.runtime.generate.options.table import ROWS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ltx2.convert.plan.entries import Plan
    from ltx2.quant.apply import Settings
    from ltx2.quant.choose.fitted import Fit
    from ltx2.runtime.events import Event

PATH = click.Path(path_type=Path, readable=False)  # what is wrong with a file is said by what reads it
TYPES = {Whole: int, Number: float}


class Gigabytes(click.ParamType):  # type: ignore[type-arg]  # not generic in older clicks
    """A number of GB, the unit written or not."""

    name = "GB"

    def __init__(self, kind: type[int] | type[float] = float) -> None:
        self._kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | float:
        try:
            number = float(re.sub(r"(?i)\s*(gb|g)$", "", str(value)))
            if self._kind is float or number == int(number):
                return self._kind(number)
        except (ValueError, OverflowError):
            pass
        whole = "whole " if self._kind is int else ""
        self.fail(f"{str(value)!r} is not a {whole}number of GB, such as 24.", param, ctx)


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value not in (None, ())}


def generate_options(*names: str, without: Sequence[str] = ()) -> Callable[[Command], Command]:
    """Add options of `generate` to a command, by their table: those `names`, else all of the command line except
    `without`. Options that are not given are None."""

    def add(command: Command) -> Command:
        every = [name for name, row in ROWS.items() if row.command and name not in without]
        for name in reversed(names or every):
            command = _option(ROWS[name], not names)(command)
        return command

    return add


def _option(row: Option[Any, Any], explained: bool) -> Callable[[Command], Command]:
    text = row.help if explained else "As for generate."
    if isinstance(row, Flag):
        return click.option(row.flag, is_flag=True, default=None, help=text)
    return click.option(row.flag, type=_type(row), metavar=row.metavar, multiple=isinstance(row, Several), help=text)


def _type(row: Option[Any, Any]) -> Any:
    if row.metavar == Gigabytes.name:
        return Gigabytes()
    return _Name(row) if isinstance(row, Choice) else TYPES.get(type(row)) or _reader(row)


class _Name(click.Choice):  # type: ignore[type-arg]  # which older versions do not take
    """One of a row's names; for one that is not built, why."""

    def __init__(self, row: Choice[Any]) -> None:
        super().__init__(row.choices)
        self._row = row

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value in self._row.unbuilt:
            self._row.read(value)
        return super().convert(value, param, ctx)


def _reader(row: Option[Any, Any]) -> Callable[[str], str]:
    """Refuse a text that the row cannot read; the request reads it."""

    def read(text: str) -> str:
        try:
            row.read(text)
        except (TypeError, ValueError):
            raise click.BadParameter(f"{text!r} is not {row.kind}.") from None
        return text

    return read


def follow_model(output: Output, events: "Iterable[Event]", report: Path | None = None) -> tuple[dict[str, Any], str]:
    """Follow a conversion or quantization, and the removal of its sources if that comes next; the finished folder, as
    data and for people."""
    from ltx2.convert.delete import SourcesDeleted
    from ltx2.quant.report import Quantized
    from ltx2.runtime.events import Written
    from ltx2.runtime.files.atomic import write_text

    seen = output.follow_all(events, Quantized, Written, SourcesDeleted)
    (done,) = (event for event in seen if isinstance(event, Written))
    quantized = next((event.report for event in seen if isinstance(event, Quantized)), None)
    deleted = next((event for event in seen if isinstance(event, SourcesDeleted)), None)
    size = f"{done.bytes / 1e9:.2f} GB"
    lines = [
        f"{done.path} is already there ({size})" if done.reused else f"{done.path}  ({size}, {done.seconds:.1f} s)"
    ]
    data = {"model": done.path, "bytes": done.bytes, "seconds": round(done.seconds, 3), "reused": done.reused}
    if quantized is not None:
        data["report"] = quantized.to_dict()
        total = quantized.total
        lines.append(f"{total.bits_per_weight:.2f} bits per weight, {total.bytes_before / 1e9:.2f} GB before")
        if report is not None:
            write_text(report, json.dumps(data["report"], indent=2) + "\n")
        if (fit := quantized.fit) is not None:
            output.tables([fit.table()])
            lines += fit.reasons()
    if deleted is not None:
        data["deleted"] = {"files": list(deleted.files), "bytes": deleted.bytes}
        lines.append(f"{len(deleted.files)} files of the sources removed, {deleted.bytes / 1e9:.2f} GB freed")
    return data, "\n".join(lines)


def follow_fit(output: Output, plan: "Plan", settings: "Settings") -> "Fit":
    """Choose bits for --fit."""
    from ltx2.quant.apply import fitted
    from ltx2.quant.choose.fitted import Fitted

    done = output.follow(fitted(plan, settings))
    assert isinstance(done, Fitted), "fitting ends with its choice"
    output.tables([done.fit.table()])
    return done.fit
