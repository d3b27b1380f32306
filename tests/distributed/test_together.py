"""Two and three processes that compute one thing, beside what each computes by itself."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import ended, start

PROGRAM = "import json; from tests.support.rank_work import results; print(json.dumps(results(), default=bool))"
RANKS = [2, 3]


@pytest.fixture(scope="module", params=RANKS)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank says."""
    processes = start(request.param, tmp_path_factory.mktemp("ranks"), PROGRAM)
    results = [ended(process) for process in processes]
    assert [done.code for done in results] == [0] * request.param, [done.err for done in results]
    return [done.json for done in results]


@pytest.mark.parametrize("part", ["exchanges", "guided", "tiles"])
def test_same_bits(found: list[dict[str, Any]], part: str) -> None:
    for results in found:
        assert results[part] and all(results[part].values()), json.dumps(results[part])


def test_sequence(found: list[dict[str, Any]]) -> None:
    """To rounding: a kernel may sum in another order for fewer rows."""
    for results in found:
        assert results["sequence"] and max(results["sequence"].values()) < 1e-5, results["sequence"]


def test_all_machines_have_the_same(found: list[dict[str, Any]], tmp_path: Path) -> None:
    assert all(results["sequence"] == found[0]["sequence"] for results in found)
