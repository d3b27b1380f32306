"""GPTQ (arXiv:2210.17323): codes are chosen column by column, and each column makes up for errors of those before it.

Rounding a column changes the layer's output. The columns that are not rounded yet are changed to make up for it, as far
as the layer's inputs correlate, by the inverse of their correlations. A group's scale is searched when its turn comes,
for its values at that time. Groups whose inputs vary most come first, and within a group such columns: then most others
are left to make up for their errors.

Rows are independent, so codes do not depend on the number of rows at a time, except for the order of additions in a
machine's matrix product."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np

from ltx2.quant.codes.arithmetic import Arithmetic, Values
from ltx2.quant.codes.correlations import Feedback
from ltx2.quant.codes.pack import Loss, Packed, check_form, dtype_of, search_of, unpack, what_is_wrong
from ltx2.quant.codes.search import Fit, Search
from ltx2.runtime.files.tensors import Array, to_float32
from ltx2.runtime.model.forms import Form
from ltx2.runtime.model.hadamard import rotated_rows

FEW_VALUES = 1 << 23  # of a tensor whose loss is computed at a time


class Chosen(NamedTuple):
    """Scales, biases and errors of a search, (rows,) for a group, and its codes as stored (rows, words)."""

    scale: Values
    bias: Values
    error: Values
    words: Values


def pack_in_turn(rows: Array, form: Form, feedback: Feedback, multiplier: float = 1.0) -> tuple[Packed, Loss]:
    """As `pack`, of rows (rows, width), with codes chosen by GPTQ. For a rotated form `feedback` is of rotated
    inputs."""
    check_form(rows.shape[1], form, multiplier)
    on, dtype = feedback.on, dtype_of(rows)
    columns = on.block(stored_values(rows, form), rows.shape[1], 1 / multiplier)  # (width, rows)
    columns = columns[on.array(feedback.order)]
    with np.errstate(all="ignore"):  # what is not finite shows in the errors
        scale, bias, error, words = choose_codes(columns, form, dtype, feedback)
    if np.isnan(error).any():
        raise ValueError(what_is_wrong(rows))
    scales = search_of(columns[:0], form, (), dtype, on).stored(scale, bias)
    packed, loss, drift = Packed(words.reshape(len(rows), -1), *scales), Loss(), []
    for part in _few_rows(rows):
        values = stored_values(rows[part], form)
        change = values - unpack(Packed(*(p[part] for p in packed if p is not None)), form, multiplier)
        drift.append(mean_change(change, feedback))
        loss += output_loss(values, change, drift[-1], feedback)
    return packed if feedback.mean is None else packed._replace(drift=np.concatenate(drift, dtype=np.float32)), loss


def _few_rows(rows: Array) -> Iterator[slice]:
    """Ranges of rows (rows, width) that have at most FEW_VALUES values."""
    count, width = rows.shape
    step = max(1, FEW_VALUES // width)
    return (slice(start, start + step) for start in range(0, count, step))


def stored_values(rows: Array, form: Form) -> Array:
    """Rows of a weight (rows, width) as float32, rotated if the form is."""
    values = to_float32(rows, dtype_of(rows))
    return rotated_rows(values, form.rotation) if form.rotation else values


def mean_change(change: Array, feedback: Feedback) -> Array:
    """How much a change of a weight (rows, width) changes the mean output, (rows,) float64; 0 without a bias to make up
    for it."""
    return np.zeros(len(change)) if feedback.mean is None else change @ feedback.mean.astype(np.float64)


def output_loss(values: Array, change: Array, made_up: Array, feedback: Feedback) -> Loss:
    """The loss in the output of a weight `values` (rows, width) that gets this `change`, less `made_up`, its
    `mean_change`."""
    return Loss(max(0.0, feedback.squares(change) - float(np.square(made_up).sum())), feedback.squares(values))


def choose_codes(columns: Values, form: Form, dtype: str, feedback: Feedback) -> Chosen:
    """For columns (width, rows) in the order of rounding, which are overwritten. Returns numpy arrays (rows, groups)
    and (rows, groups, words). An error is NaN where a value is not finite, or too large for a scale."""
    on, size, counts = feedback.on, form.group_size, feedback.counts
    groups, round_group = feedback.order.reshape(-1, size), _rounding(type(feedback.on), form, dtype)
    chosen: list[Chosen] = []
    for turn, group in enumerate(groups):
        start, stop = turn * size, (turn + 1) * size
        factors = on.array(feedback.upper[start:stop, start:])
        turns = on.array(np.argsort(group))
        errors, *found = round_group(columns[:size], factors[:, :size], on.array(counts[start:stop]), turns)
        columns = columns[size:]
        if len(columns):  # after the last group there are none, and CUDA ends a process that multiplies nothing
            columns = on.less_product(columns, factors[:, size:], errors)
        on.begin(columns, *found)
        if chosen:
            on.finish(*chosen[-1])  # one group behind: the device is not idle while this one is prepared
        chosen.append(Chosen(*found))
    place = on.array(np.argsort(groups[:, 0] // size))
    stacked = (on.numpy(on.xp.stack(parts)[place]) for parts in zip(*chosen, strict=True))
    return Chosen(*(np.ascontiguousarray(np.moveaxis(part, 0, 1)) for part in stacked))


@cache
def _rounding(kind: type[Arithmetic], form: Form, dtype: str) -> Callable[..., tuple[Values, ...]]:
    """A function of a group's columns (columns, rows), which it overwrites, their part (columns, columns) of
    `Feedback.upper`, the weight of each column's errors (columns,), and each column's turn in stored order (columns,).
    Returns the errors (columns, rows) in units of that part's diagonal, and the fields of Chosen."""
    on = kind()

    def rounded(columns: Values, upper: Values, counts: Values, turns: Values) -> tuple[Values, ...]:
        weights = on.xp.broadcast_to(counts[:, None], columns.shape)
        fit = search_of(columns, form, (weights,), dtype, on).best()
        diagonal = on.xp.diagonal(upper)[:, None]
        group = search_of(columns, form, (), dtype, on)
        group = replace(group, values=_in_turn(group, fit, upper, diagonal))
        words = on.words(group.codes(fit)[turns], form.bits)
        return group.rest(fit) / diagonal, *fit, words

    return on.compiled(rounded)


def _in_turn(group: Search, fit: Fit, upper: Values, diagonal: Values) -> Values:
    """The group's values (columns, rows), each as it is when its turn comes; `upper` (columns, columns) and its
    `diagonal` (columns, 1)."""
    values, later = group.values, group.on.xp.triu(upper, 1).T
    for index in range(len(values) - 1):
        one = slice(index, index + 1)
        error = replace(group, values=values[one]).rest(fit) / diagonal[one]
        values = group.on.less_outer(values, index, later[:, one], error)
    return values
