"""From published checkpoints to a model folder: recognise, plan, stream, verify, inspect.

The package is callable: `ltx2.convert([...], "out")` is `ltx2.api.convert`."""

import sys
from types import ModuleType
from typing import Any


class _CallableModule(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from ltx2.api import convert

        return convert(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
