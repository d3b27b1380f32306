"""Sizes for many things at once, against every combination there is."""

from itertools import product

import numpy as np
import pytest

from ltx2.quant.choose.knapsack import Option, allocate, hull

Options = dict[str, list[Option]]


def random_options(seed: int) -> Options:
    """Six things of up to four sizes; larger ones mostly lose less."""
    draw = np.random.default_rng(seed)
    return {
        name: [Option(bits, int(draw.integers(1, 9)) * bits, float(draw.uniform(1, 3) * 4.0**-bits)) for bits in sizes]
        for name, sizes in zip("abcdef", [(3, 4, 5, 6), (3, 4, 8), (4,), (3, 5, 6), (4, 6, 8), (3, 8)], strict=True)
    }


def totals(chosen: list[Option]) -> tuple[int, float]:
    return sum(option.bytes for option in chosen), sum(option.loss for option in chosen)


@pytest.mark.parametrize("seed", range(5))
def test_nothing_of_these_bytes_loses_less(seed: int) -> None:
    options = random_options(seed)
    everything = [totals(list(choice)) for choice in product(*options.values())]
    least = min(size for size, _ in everything)
    for budget in range(least, max(size for size, _ in everything) + 2, 5):
        found = allocate(options, budget)
        assert found is not None and list(found) == list(options)
        size, loss = totals(list(found.values()))
        assert size <= budget
        assert loss == pytest.approx(min(other for bytes_, other in everything if bytes_ <= size))
    assert allocate(options, least - 1) is None


def test_more_bytes_never_lose_more() -> None:
    options = random_options(9)
    losses = [totals(list(found.values()))[1] for n in range(300) if (found := allocate(options, n)) is not None]
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]


def test_only_what_is_worth_its_bytes_is_bought() -> None:
    cheap, useless, dear, best = (
        Option(3, 10, 1.0), Option(4, 12, 1.1), Option(5, 20, 0.9), Option(8, 24, 0.1),
    )  # fmt: skip
    assert hull([best, dear, useless, cheap]) == [cheap, best]
    assert allocate({"a": [cheap, useless, dear, best]}, 23) == {"a": cheap}


def test_what_counts_more_is_served_first() -> None:
    def sizes(weight: float) -> list[Option]:
        return [Option(4, 40, weight), Option(8, 80, 0.0)]

    chosen = allocate({"a": sizes(1.0), "b": sizes(9.0), "c": sizes(2.0)}, 200)
    assert chosen is not None and {name: option.bits for name, option in chosen.items()} == {"a": 4, "b": 8, "c": 8}


def test_equals_are_served_in_their_order() -> None:
    same = [Option(4, 40, 1.0), Option(8, 80, 0.0)]
    chosen = allocate({"b": same, "a": same}, 120)
    assert chosen is not None and (chosen["b"].bits, chosen["a"].bits) == (8, 4)
