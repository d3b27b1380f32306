"""Machines by their ranks, numbers from 0 on, and the share of each."""

RANK = "MLX_RANK"  # the environment variable of a process that is one of several: `mlx.launch` sets it


def share_of(total: int, rank: int, size: int) -> slice:
    """The part of `total` things in a row that machine `rank` of `size` has. Parts follow one another; their lengths
    differ by one at most."""
    return slice(rank * total // size, (rank + 1) * total // size)
