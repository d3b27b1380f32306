"""LTX-2 audio-video models on Apple Silicon with MLX: download, convert, quantize, generate, bench.

pipe = ltx2.load("weights/ltx-2-distilled-q4")
pipe.generate("a red kite over dunes").save("kite.mp4")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ltx2 import events as events
    from ltx2.api import calibrate as calibrate
    from ltx2.api import convert as convert  # the function; the sub-package is what `from ltx2.convert import` reaches
    from ltx2.api import download as download
    from ltx2.api import inspect as inspect
    from ltx2.api import load as load
    from ltx2.api import quantize as quantize
    from ltx2.api import verify as verify
    from ltx2.runtime.errors import InputError as InputError
    from ltx2.runtime.errors import Ltx2Error as Ltx2Error
    from ltx2.runtime.errors import UsageError as UsageError
    from ltx2.runtime.generate.clip import Clip as Clip

__version__ = "0.1.0"

# Name -> module that has it. Imported on first use, so that `import ltx2` and `ltx2 --help` stay instant.
_LAZY = {
    "calibrate": "ltx2.api", "convert": "ltx2.api", "download": "ltx2.api", "load": "ltx2.api", "quantize": "ltx2.api",
    "inspect": "ltx2.api", "verify": "ltx2.api",
    "Ltx2Error": "ltx2.runtime.errors", "InputError": "ltx2.runtime.errors", "UsageError": "ltx2.runtime.errors",
    "Clip": "ltx2.runtime.generate.clip",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """The public names on first use."""
    if name == "events":
        return import_module("ltx2.events")
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, "events"})
