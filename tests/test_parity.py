"""Parity tests are skipped only where that is allowed."""

import pytest

from tests.support import parity


@pytest.fixture(autouse=True)
def neutral(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (parity.REQUIRE, "CI"):
        monkeypatch.delenv(name, raising=False)


def test_an_installed_package_is_returned() -> None:
    assert parity.require("json").loads("1") == 1


def test_a_missing_package_skips_on_a_developers_machine() -> None:
    with pytest.raises(pytest.skip.Exception):
        parity.require("no_such_reference")


@pytest.mark.parametrize("name", [parity.REQUIRE, "CI"])
def test_a_missing_package_fails_where_parity_is_required(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "true")
    with pytest.raises(ImportError):
        parity.require("no_such_reference")
