"""Which build of ltx2 this is."""

from importlib import metadata
from pathlib import Path

from ltx2 import __version__


def tool_version() -> str:
    """`ltx2.__version__`, with the commit that it was built from (0.1.0+g1a2b3c4) where it was installed from a build.
    In a clone, files may be newer than any commit that was noted."""
    try:
        installed = metadata.distribution("ltx2")
    except metadata.PackageNotFoundError:
        return __version__
    place = Path(str(installed.locate_file("ltx2/runtime/version.py")))
    # A clone's egg-info, which python -m finds beside it, has no RECORD.
    built = place.is_file() and place.samefile(__file__) and installed.read_text("RECORD") is not None
    return installed.version if built and installed.version.startswith(__version__) else __version__
