"""What pyproject.toml cannot say: versions that name their commit, and sdists that are the whole repository."""

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

from setuptools import setup
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent
PARTS = ("bench", "convert", "quant", "runtime")  # symlinks in ltx2/


def version() -> str:
    """That of ltx2/__init__.py; in a clone with the commit as build metadata (0.1.0+g1a2b3c4), `.dirty` if files
    differ from it, unless the commit is tagged v0.1.0. An sdist keeps the version it was built with."""
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "ltx2" / "__init__.py").read_text(), re.MULTILINE)
    assert found is not None, "ltx2/__init__.py states the version"
    if (ROOT / "PKG-INFO").is_file():
        stated = re.search(r"^Version: (.+)$", (ROOT / "PKG-INFO").read_text(), re.MULTILINE)
        return stated[1] if stated else found[1]
    if not (ROOT / ".git").exists():  # else it could be the commit of a repository around this folder
        return found[1]
    command = ["git", "describe", "--always", "--dirty=.dirty", "--exclude=*"]
    try:
        commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        tags = subprocess.run(["git", "tag", "--points-at"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return found[1]
    return found[1] if f"v{found[1]}" in tags and "dirty" not in commit else f"{found[1]}+g{commit}"


class WholeSdist(sdist):
    """With the symlinks of the repository in place of second copies of what they point to."""

    def make_release_tree(self, base_dir: str, files: Iterable[str]) -> None:
        links = tuple(f"ltx2/{part}/" for part in PARTS)
        super().make_release_tree(base_dir, [name for name in files if not Path(name).as_posix().startswith(links)])
        for part in PARTS:
            (Path(base_dir) / "ltx2" / part).symlink_to(Path("..", part))


setup(version=version(), cmdclass={"sdist": WholeSdist})
