"""LTX-2 audio-video models on Apple Silicon with MLX: download, convert, quantize, generate, bench.

pipe = ltx2.load("weights/ltx-2-distilled-q4")
pipe.generate("a red kite over dunes").save("kite.mp4")

Functions are the commands, arguments their options. Expected failures are Ltx2Error: what, why, fix. What takes long
tells its progress by the dataclasses in ltx2.events.
"""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ltx2 import events as events
    from ltx2.api import bench as bench  # as convert
    from ltx2.api import calibrate as calibrate
    from ltx2.api import convert as convert  # the function; the sub-package is what `from ltx2.convert import` reaches
    from ltx2.api import download as download
    from ltx2.api import inspect as inspect
    from ltx2.api import load as load
    from ltx2.api import plan as plan
    from ltx2.api import quantize as quantize
    from ltx2.api import verify as verify
    from ltx2.runtime.errors import CheckpointError as CheckpointError
    from ltx2.runtime.errors import ConfigError as ConfigError
    from ltx2.runtime.errors import DeviceError as DeviceError
    from ltx2.runtime.errors import DoesNotFitError as DoesNotFitError
    from ltx2.runtime.errors import DownloadError as DownloadError
    from ltx2.runtime.errors import InputError as InputError
    from ltx2.runtime.errors import Ltx2Error as Ltx2Error
    from ltx2.runtime.errors import MachinesError as MachinesError
    from ltx2.runtime.errors import MediaError as MediaError
    from ltx2.runtime.errors import MismatchError as MismatchError
    from ltx2.runtime.errors import ModelFolderError as ModelFolderError
    from ltx2.runtime.errors import NumericsError as NumericsError
    from ltx2.runtime.errors import UnsupportedError as UnsupportedError
    from ltx2.runtime.errors import UsageError as UsageError
    from ltx2.runtime.errors import VerificationError as VerificationError
    from ltx2.runtime.generate.pipeline import Pipeline as Pipeline
    from ltx2.runtime.generate.records.clip import Clip as Clip

__version__ = "0.1.0"

if sys.platform == "darwin":
    # MLX transforms what it convolves (Winograd): as many frames at once as three quarters of the GPU's memory hold,
    # three times over, and where that is too much Metal ends the command. So a frame at a time, or a few small ones.
    # MLX reads this variable at every convolution; another number that is set stays.
    from ltx2.runtime.machine import winograd as _winograd

    def _tell(frames: int) -> None:
        os.environ["MLX_CONV_WINOGRAD_TILE_BATCH"] = str(frames)

    if os.environ.setdefault("MLX_CONV_WINOGRAD_TILE_BATCH", "1") == "1":
        _winograd.tell = _tell

# Module -> public names that it has. Imported on first use, so that `import ltx2` and `ltx2 --help` stay instant.
_PUBLIC = {
    "ltx2.api": ("load", "download", "convert", "calibrate", "quantize", "plan", "bench", "verify", "inspect"),
    "ltx2.runtime.generate.pipeline": ("Pipeline",),
    "ltx2.runtime.generate.records.clip": ("Clip",),
    "ltx2.runtime.errors": (
        "Ltx2Error", "CheckpointError", "ConfigError", "DeviceError", "DoesNotFitError", "DownloadError", "InputError",
        "MachinesError", "MediaError", "MismatchError", "ModelFolderError", "NumericsError", "UnsupportedError",
        "UsageError", "VerificationError",
    ),
}  # fmt: skip
_LAZY = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = ["__version__", "events", *_LAZY]


def __getattr__(name: str) -> Any:
    """The public names on first use."""
    if name == "events":
        return import_module("ltx2.events")
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
