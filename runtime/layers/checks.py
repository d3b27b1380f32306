"""Values that cannot become a picture or sound are an error where they arise, before they cost more time."""

import mlx.core as mx

from ltx2.runtime.errors import NumericsError

FLAT = 1e-6  # standard deviation of what counts as constant


def check_finite(value: mx.array, what: str) -> None:
    """Raises NumericsError when `value` holds NaN or infinite values; `what` is its name, in the plural."""
    if not mx.isfinite(value).all().item():
        raise _garbage(f"{what} contain NaN or infinite values")


def check_varied(value: mx.array, what: str) -> None:
    """Raises NumericsError when `value` is not finite or constant."""
    check_finite(value, what)
    if float(mx.std(value)) < FLAT:
        raise _garbage(f"{what} are constant")


def _garbage(what: str) -> NumericsError:
    return NumericsError(
        what,
        "the network computed garbage: damaged weights, or a fault of the GPU or its memory",
        "run ltx2 verify MODEL; if the model is sound, try a smaller size and report the problem",
    )
