"""Strict configuration classes: a key is a field, a checked constant, or listed as having no effect on inference.

Checkpoints describe themselves, so an unknown key means a network that we would compute wrongly: it is an error that
names the key. Field defaults are the behaviour of the oldest release, which did not write the key yet."""

import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import Annotated, Any, ClassVar, Self, Union, cast, get_args, get_origin, get_type_hints

from ltx2.runtime.errors import ConfigError, UnsupportedError
from ltx2.runtime.model.origin import ORIGIN_KEYS

# Keys that describe storage, not the network; they may stand in every component's config.json.
STORAGE_KEYS = frozenset({"quantization", "quantization_config"})
# Upper bounds: a network is built from these numbers before any tensor is checked, and must be built in an instant.
NUMBERS = range(1, 1 << 24)
MAX_ITEMS = 16  # published lists have up to 9
Repeats = Annotated[int, range(129)]  # of a block; published networks have up to 48
AS_PUBLISHED = "use the checkpoint as published; its metadata holds the configuration"
SUPPORTED_ONLY = "use a published LTX-2 checkpoint of a supported release"


@dataclass(frozen=True)
class Config:
    """Base of every network configuration.

    `FIXED` maps keys to the values this code implements; another value raises UnsupportedError.
    `IGNORED` lists keys without effect on inference. A field of a Config type is a nested section.
    """

    FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    IGNORED: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Build from a checkpoint's own configuration section. Raises ConfigError for an unknown, missing or wrongly
        typed key, UnsupportedError for a constant that this code does not implement."""
        hints = _hints(cast(Any, cls))  # mypy takes a class for its instances
        known = {f.name: f for f in fields(cls)}
        kwargs: dict[str, Any] = {}
        for key, value in data.items():
            if key in known:
                kwargs[key] = _checked(cls.__name__, key, _freeze(value), hints[key])
            elif key in cls.FIXED:
                _check_constant(cls.__name__, key, value, cls.FIXED[key])
            elif key not in cls.IGNORED | STORAGE_KEYS | ORIGIN_KEYS:
                raise ConfigError(
                    f"{cls.__name__}: unknown configuration key {key!r}",
                    "a key this version does not know may change what the network computes",
                    "update ltx2, or check that the file is an LTX-2 checkpoint of a supported release",
                )
        missing = [n for n, f in known.items() if n not in kwargs and f.default is f.default_factory is MISSING]
        if missing:
            raise ConfigError(
                f"{cls.__name__}: configuration key {missing[0]!r} is missing",
                f"the file's configuration lacks {', '.join(missing)}",
                AS_PUBLISHED,
            )
        return cls(**kwargs)


@cache  # a plan of memory reads a hundred configurations
def _hints(cls: type[Config]) -> Mapping[str, Any]:
    return get_type_hints(cls, include_extras=True)


def _freeze(value: Any) -> Any:
    return tuple(_freeze(v) for v in value) if isinstance(value, list | tuple) else value


def _check_constant(owner: str, key: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if _freeze(value) not in allowed:
        raise UnsupportedError(
            f"{owner}: {key} = {value!r} is not supported",
            f"this version implements {key} = {' or '.join(repr(a) for a in allowed)} only",
            SUPPORTED_ONLY,
        )


def _checked(owner: str, key: str, value: Any, hint: Any) -> Any:
    if isinstance(hint, type) and issubclass(hint, Config) and isinstance(value, Mapping):
        return hint.from_dict(value)
    if not _matches(value, hint):
        raise ConfigError(
            f"{owner}: configuration key {key!r} has the wrong type or is out of range",
            f"expected {_described(hint)}, got {value!r}",
            AS_PUBLISHED,
        )
    return float(value) if hint is float else value


def _described(hint: Any) -> str:
    if hint is int or get_origin(hint) is Annotated:
        allowed = NUMBERS if hint is int else get_args(hint)[1]
        return f"int from {allowed[0]} to {allowed[-1]}"
    return getattr(hint, "__name__", str(hint))


def _matches(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin is Annotated:
        return type(value) is int and value in get_args(hint)[1]
    if origin in (Union, types.UnionType):
        return any(_matches(value, arg) for arg in get_args(hint))
    if origin is tuple:
        args = get_args(hint)
        if not isinstance(value, tuple):
            return False
        if len(args) == 2 and args[1] is Ellipsis:
            return len(value) <= MAX_ITEMS and all(_matches(v, args[0]) for v in value)
        return len(args) == len(value) and all(map(_matches, value, args))
    if hint is Any:
        return True
    if hint is float:
        return isinstance(value, float) or (type(value) is int and abs(value) < NUMBERS.stop)
    if hint is int:
        return type(value) is int and value in NUMBERS
    return isinstance(value, origin or hint)
