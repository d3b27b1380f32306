"""What is built of this repository: an sdist that is the whole of it, and versions that name their commit."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

import ltx2
from ltx2.runtime.version import tool_version

ROOT = Path(ltx2.__file__).resolve().parent.parent
FOLDERS = ("bench", "convert", "quant", "runtime", "tests", "docs", "ltx2")
IGNORED = {"__pycache__", ".DS_Store"}


def setup(*arguments: str) -> str:
    command = [sys.executable, "setup.py", "-q", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def test_everything_is_in_the_sdist(tmp_path: Path) -> None:
    """Of ltx2's symlinks a copy is listed too, which setup.py leaves out for the link."""
    setup("egg_info", "--egg-base", str(tmp_path))
    listed = set((tmp_path / "ltx2.egg-info" / "SOURCES.txt").read_text().splitlines())
    here = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    wanted = {path.relative_to(ROOT).as_posix() for path in here if not IGNORED & {*path.parts}}
    wanted |= {"README.md", "CHANGELOG.md", "LICENSE", "Makefile", "MANIFEST.in", "setup.py", "weights/README.md"}
    assert sorted(wanted - listed) == []
    assert not [name for name in listed if name.endswith((".pyc", ".DS_Store"))]
    assert {name for name in listed if name.startswith("weights/")} <= {"weights/README.md", "weights/.gitignore"}


def test_version() -> None:
    """Of a build; a clone has no one commit."""
    assert re.fullmatch(re.escape(ltx2.__version__) + r"(\+g[0-9a-f]{7,}(\.dirty)?)?", setup("--version"))
    assert tool_version() == ltx2.__version__


@pytest.mark.parametrize("record", ["ltx2/__init__.py,,", None], ids=["wheel", "clone"])
def test_version_of_a_build(record: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """An egg-info in a clone tells of the commit that it was made at, which may be long ago."""
    version = f"{ltx2.__version__}+g1a2b3c4"
    built = SimpleNamespace(version=version, locate_file=ROOT.joinpath, read_text=lambda _: record)
    monkeypatch.setattr(metadata, "distribution", lambda _: built)
    assert tool_version() == (version if record else ltx2.__version__)
