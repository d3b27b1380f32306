"""Codes chosen one column after the other, each in view of what those before it have done: GPTQ (arXiv:2210.17323).

Rounding a column errs in the layer's output. Columns that are not rounded yet are changed so that they make up for it,
as far as the layer's inputs go together: how far is what the inverse of their correlations says. A group's scale is
searched when its turn comes, for the values as they are then. Groups whose inputs vary most come first, and within a
group such columns: then most of the others are left.

Rows do not depend on each other, so codes do not depend on how many there are at a time, but for the order in which a
machine's matrix product adds up."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ltx2.quant.codes.arithmetic import Values
from ltx2.quant.codes.correlations import Feedback
from ltx2.quant.codes.pack import Loss, Packed, check_form, dtype_of, search_of, unpack, what_is_wrong
from ltx2.quant.codes.search import Search
from ltx2.runtime.files.tensors import Array, to_float32
from ltx2.runtime.model.forms import Form
from ltx2.runtime.model.hadamard import rotated_rows


class Chosen(NamedTuple):
    """Scales, biases and errors of a search (groups, rows), and codes (width, rows), uint32."""

    scale: Values
    bias: Values
    error: Values
    codes: Values


def pack_in_turn(rows: Array, form: Form, feedback: Feedback, multiplier: float = 1.0) -> tuple[Packed, Loss]:
    """As `pack`, with codes chosen by GPTQ. Where the form is rotated, so are the inputs that `feedback` is of."""
    check_form(rows.shape[1], form, multiplier)
    on, dtype, values = feedback.on, dtype_of(rows), stored_values(rows, form)
    columns = on.block(values, values.shape[1], 1 / multiplier)  # (width, rows)
    search = search_of(columns, form, (), dtype, on)
    with np.errstate(all="ignore"):  # what is not finite shows in the errors
        scale, bias, error, codes = choose_codes(search, feedback, form.group_size)
        scale, bias, error = (np.ascontiguousarray(on.numpy(part).T) for part in (scale, bias, error))
    if np.isnan(error).any():
        raise ValueError(what_is_wrong(rows))
    words = on.numpy(on.words(_by_group(codes, form.group_size), form.bits)).reshape(len(rows), -1)
    packed = Packed(words, *search.stored(scale, bias))
    change = values - unpack(packed, form, multiplier)
    drift = None if feedback.mean is None else (change @ feedback.mean.astype(np.float64)).astype(np.float32)
    return packed._replace(drift=drift), output_loss(values, change, feedback)


def stored_values(rows: Array, form: Form) -> Array:
    """Rows of a weight as float32, rotated where the form is."""
    values = to_float32(rows, dtype_of(rows))
    return rotated_rows(values, form.rotation) if form.rotation else values


def output_loss(values: Array, change: Array, feedback: Feedback) -> Loss:
    """What changing a weight's values (rows, width) costs in its output, but for its mean where that is made up for."""
    mean = 0.0 if feedback.mean is None else np.square(values @ feedback.mean, dtype=np.float64).sum()
    return Loss(feedback.squares(change), feedback.squares(values) + float(mean))


def choose_codes(search: Search, feedback: Feedback, group_size: int) -> Chosen:
    """For the columns (width, rows) that are the search's values. Errors are not numbers where a value is none, or too
    large for what scales can express."""
    on, upper, counts = feedback.on, feedback.upper, feedback.counts
    rest, groups = search.values[on.array(feedback.order)], []
    for start in range(0, len(feedback.order), group_size):
        stop = start + group_size
        weights = on.xp.broadcast_to(counts[start:stop, None], (group_size, rest.shape[1]))
        group = replace(search, values=rest[:group_size], weights=(weights,))
        chosen, errors = _round_group(group, upper[start:stop, start:stop])
        rest = rest[group_size:] - upper[start:stop, stop:].T @ errors
        on.evaluate(rest, *chosen)
        groups.append(chosen)
    place = np.argsort(feedback.order)
    turn = on.array(place[::group_size] // group_size)
    scale, bias, error, codes = (on.xp.concatenate(parts) for parts in zip(*groups, strict=True))
    return Chosen(scale[turn], bias[turn], error[turn], codes[on.array(place)])


def _round_group(group: Search, upper: Values) -> tuple[Chosen, Values]:
    """What is chosen, and the columns' errors (columns, rows) in units of `upper`'s diagonal."""
    xp, fit, rest = group.on.xp, group.best(), group.values
    ones, codes, errors = xp.ones_like(rest[:1]), [], []
    for index in range(len(rest)):
        column, rest = replace(group, values=rest[:1], weights=()), rest[1:]
        codes.append(xp.array(column.codes(fit)))
        errors.append(column.drift(fit, ones)[None] / upper[index, index])
        rest = rest - upper[index, index + 1 :, None] * errors[-1]
    scale, bias, error = (part[None] for part in fit)
    return Chosen(scale, bias, error, xp.concatenate(codes)), xp.concatenate(errors)


def _by_group(codes: Values, group_size: int) -> Values:
    """Codes (width, rows) as a block of groups (group size, rows * groups of a row)."""
    groups = codes.reshape(-1, group_size, codes.shape[1])
    return groups.transpose(1, 2, 0).reshape(group_size, -1)
