"""Machines by their numbers, ranks from 0 on, and what each one's share of things is."""

RANK = "MLX_RANK"  # the environment variable that says that a process is one of several: `mlx.launch` sets it


def share_of(total: int, rank: int, size: int) -> slice:
    """The part of `total` things in a row that machine `rank` of `size` has. Parts follow one another, and no two
    differ by more than one."""
    return slice(rank * total // size, (rank + 1) * total // size)
