"""Strict configuration: what a checkpoint says is used, checked or known to be without effect; never dropped."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest

from ltx2.runtime.errors import ConfigError, UnsupportedError
from ltx2.runtime.model.config import Config


@dataclass(frozen=True)
class Inner(Config):
    IGNORED: ClassVar[frozenset[str]] = frozenset({"dropout"})

    width: int


@dataclass(frozen=True)
class Outer(Config):
    FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"norm": ("rms", "pixel"), "blocks": ((), (1, 2))}

    depth: int
    scale: float
    rates: tuple[int, ...]
    inner: Inner
    pair: tuple[int, str] = (1, "a")
    nested: tuple[tuple[int, ...], ...] = ()
    limit: int | None = None
    causal: bool = True
    name: str = "x"
    table: Mapping[str, Any] = field(default_factory=dict)


GOOD: dict[str, Any] = {"depth": 2, "scale": 1.5, "rates": [6, 5], "inner": {"width": 8}}


def test_values_are_read() -> None:
    config = Outer.from_dict({**GOOD, "nested": [[1, 3], [5]], "limit": 7, "causal": False, "table": {"a": [1]}})
    assert (config.depth, config.scale, config.rates) == (2, 1.5, (6, 5))
    assert config.inner == Inner(8)
    assert (config.nested, config.limit, config.causal) == (((1, 3), (5,)), 7, False)
    assert config.table == {"a": [1]}
    assert hash(config.rates) is not None  # lists became tuples


def test_defaults_are_used_for_absent_keys() -> None:
    config = Outer.from_dict(GOOD)
    assert (config.limit, config.causal, config.table) == (None, True, {})


def test_unknown_key_is_named() -> None:
    with pytest.raises(ConfigError, match=r"Outer.*'gated'"):
        Outer.from_dict({**GOOD, "gated": True})


def test_unknown_key_of_a_nested_section_is_named() -> None:
    with pytest.raises(ConfigError, match=r"Inner.*'gated'"):
        Outer.from_dict({**GOOD, "inner": {"width": 8, "gated": True}})


def test_missing_keys_are_named() -> None:
    with pytest.raises(ConfigError, match=r"'scale' is missing.*scale, rates"):
        Outer.from_dict({"depth": 2, "inner": {"width": 8}})
    with pytest.raises(ConfigError, match=r"Inner.*'width' is missing"):
        Outer.from_dict({**GOOD, "inner": {}})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("depth", "2"), ("depth", 2.0), ("depth", True), ("depth", None),
        ("scale", "1"), ("scale", True), ("scale", None),
        ("rates", 6), ("rates", [6, 5.5]), ("rates", [6, True]), ("rates", "65"), ("rates", [[6], 5]),
        ("inner", 8), ("inner", [8]), ("inner", None),
        ("pair", [1]), ("pair", [1, 2]), ("pair", [1, "a", 3]),
        ("nested", [1, 3]), ("limit", "7"), ("limit", 7.5), ("causal", 1), ("causal", "true"),
        ("name", 3), ("table", [1]),
    ],
)  # fmt: skip
def test_wrong_type_is_named(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"'{key}' has the wrong type"):
        Outer.from_dict({**GOOD, key: value})


def test_whole_number_for_a_float_becomes_one() -> None:
    scale = Outer.from_dict({**GOOD, "scale": 2}).scale
    assert type(scale) is float and scale == 2.0


def test_constant_with_a_supported_value_passes() -> None:
    for norm, blocks in (("rms", []), ("pixel", [1, 2])):
        Outer.from_dict({**GOOD, "norm": norm, "blocks": blocks})


@pytest.mark.parametrize(("key", "value"), [("norm", "group"), ("norm", None), ("blocks", [1]), ("blocks", {"a": 1})])
def test_constant_with_another_value_is_unsupported(key: str, value: Any) -> None:
    with pytest.raises(UnsupportedError, match=f"{key} = "):
        Outer.from_dict({**GOOD, key: value})


def test_ignored_and_storage_keys_pass() -> None:
    Outer.from_dict({**GOOD, "inner": {"width": 8, "dropout": 0.1}, "quantization": {"bits": 4}})
    with pytest.raises(ConfigError, match="dropout"):
        Outer.from_dict({**GOOD, "dropout": 0.1})  # ignored in the nested section only


def test_errors_say_what_why_and_how() -> None:
    with pytest.raises(ConfigError) as caught:
        Outer.from_dict({**GOOD, "gated": True})
    assert all(len(caught.value.to_dict()[part]) > 10 for part in ("what", "why", "fix"))
    assert caught.value.to_dict()["kind"] == "config"
