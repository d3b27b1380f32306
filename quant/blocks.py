"""Arithmetic on blocks of groups that gives the same bits on every MLX backend.

A block is (group size, groups): values of a group lie along axis 0, so that all work is elementwise over groups, also
the additions of a sum, in an order that is ours. No expression that is compiled adds to a product it
rounded: a compiler that fuses the two (CUDA, ARM) changes nothing. GPUs run compiled functions, which saves trips to
memory; on CPUs MLX's own vectorised operations are faster than what it compiles (2.6 against 8.9 ns a value)."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import mlx.core as mx

Function = TypeVar("Function", bound=Callable[..., Any])

ROUND = float(3 << 22)  # adding and taking it away rounds to the nearest integer, half to even, below 2**22
FAN_IN = 8  # values added at once on a GPU: a kernel has a limited number of arguments


def compiled_on_gpu(function: Function) -> Function:
    """The function, compiled where that pays."""
    fused = mx.compile(function)

    def call(*args: Any) -> Any:
        return (fused if on_gpu() else function)(*args)

    return cast(Function, call)


def on_gpu() -> bool:
    """Whether work of this thread goes to a GPU."""
    return mx.default_device().type == mx.DeviceType.gpu


def group_sums(values: mx.array) -> mx.array:
    """Sums over axis 0, added one after the other. That is the order of MLX's own sum on CPUs, not on GPUs."""
    if not on_gpu():
        return values.sum(axis=0)
    total, *rest = mx.split(values, range(FAN_IN, len(values), FAN_IN))
    total = _added(*mx.unstack(total))
    for part in rest:
        total = _added(total, *mx.unstack(part))
    return total


@compiled_on_gpu
def _added(first: mx.array, *rest: mx.array) -> mx.array:
    for value in rest:
        first = first + value
    return first


def to_block(rows: mx.array, group_size: int) -> mx.array:
    """Rows (rows, width) as a float32 block (group size, rows * width / group size)."""
    grouped = rows.reshape(-1, group_size).T
    return mx.contiguous(grouped).astype(mx.float32)


def tiled(weights: mx.array, rows: int, group_size: int) -> mx.array:
    """One weight per column (width,) as the block of `rows` rows that all have these weights."""
    columns = weights.reshape(-1, group_size).T[:, None]
    repeated = mx.broadcast_to(columns, (group_size, rows, columns.shape[2]))
    return mx.contiguous(repeated).reshape(group_size, -1)


def pack_words(codes: mx.array, bits: int) -> mx.array:
    """Codes (group size, groups), uint32, as MLX stores them: (groups, words), each row a stream of bits that starts
    with the lowest of the first word."""
    while bits <= 16:  # two codes become one of twice the bits
        codes = codes[0::2] | codes[1::2] << bits
        bits *= 2
    return mx.contiguous((codes if bits == 32 else _joined(codes, bits)).T)


def _joined(codes: mx.array, bits: int) -> mx.array:
    """The stream of codes of 17 to 31 bits, cut into words."""
    rows = 32 // (bits & -bits)  # codes after which words and codes end together
    codes = codes.reshape(-1, rows, codes.shape[1])
    words = [_word(codes, bits, 32 * index) for index in range(rows * bits // 32)]
    return mx.stack(words, axis=1).reshape(-1, codes.shape[2])


def _word(codes: mx.array, bits: int, start: int) -> mx.array:
    """The word that begins `start` bits after the first code."""
    word = codes[:, start // bits] >> (start % bits)
    for index in range(start // bits + 1, -(-(start + 32) // bits)):
        word = word | codes[:, index] << (index * bits - start)
    return word
