"""Checks that sources belong to one model."""

from collections.abc import Sequence

from ltx2.convert.names.release import releases, titles
from ltx2.convert.sources.source import Source
from ltx2.runtime.errors import CheckpointError


def common_release(sources: Sequence[Source]) -> str | None:
    """The name of the one release that all sources belong to; None when they leave it open. Raises CheckpointError
    naming two that cannot go together."""
    fitting = list(releases())
    limited: list[Source] = []
    for source in sources:
        if not source.releases:
            continue
        limited.append(source)
        fitting = [release for release in fitting if release in source.releases]
        if not fitting:
            raise _different(_contradiction(limited))
    return fitting[0].name if limited and len(fitting) == 1 else None


def _different(sources: Sequence[Source]) -> CheckpointError:
    names = "; ".join(f"{source.path.name} belongs to {titles(source.releases)}" for source in sources)
    fix = "use files of one release"
    if any(source.kind == "gemma" for source in sources):
        readers = [release for source in sources if source.kind != "gemma" for release in source.releases]
        fix = "; ".join(f"{release.title} reads text with {release.text_encoder}" for release in readers)
    return CheckpointError("the sources belong to different releases", names, fix)


def _contradiction(sources: Sequence[Source]) -> list[Source]:
    """The first source without a release in common with the last, and the last; all where each has one with it."""
    *others, last = sources
    for source in others:
        if not any(release in last.releases for release in source.releases):
            return [source, last]
    return list(sources)
