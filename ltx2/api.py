"""The Python interface: every function is a command, its arguments the command's options."""

from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path

from ltx2.convert.checkpoint import open_sources
from ltx2.convert.plan import Options, Plan, make_plan
from ltx2.convert.write import SHARD_GB, WriteOptions, write_plan

StrPath = str | PathLike[str]


def plan_conversion(
    sources: Iterable[StrPath], *, variant: str | None = None, dtype: str | None = None, only: Sequence[str] = ()
) -> Plan:
    """What `convert` would do, from headers alone."""
    return make_plan(open_sources([Path(s) for s in sources]), Options(variant, dtype, tuple(only)))


def convert(
    sources: Iterable[StrPath],
    out: StrPath,
    *,
    variant: str | None = None,
    dtype: str | None = None,
    only: Sequence[str] = (),
    shard_size: float = SHARD_GB,
    force: bool = False,
) -> Path:
    """Convert published checkpoints into a model folder; returns its path."""
    plan = plan_conversion(sources, variant=variant, dtype=dtype, only=only)
    for _ in write_plan(plan, Path(out), WriteOptions(shard_size, force)):
        pass
    return Path(out)
