"""Folders of the `sources` that a module of tests has as a fixture: codes that are kept, and the same decoded."""

from pathlib import Path

import pytest

import ltx2


@pytest.fixture(scope="module")
def kept(sources: list[Path]) -> Path:
    return ltx2.convert(sources, sources[0].with_name("kept"))


@pytest.fixture(scope="module")
def plain(sources: list[Path]) -> Path:
    """The same, decoded."""
    return ltx2.convert(sources, sources[0].with_name("plain"), dtype="f32")
