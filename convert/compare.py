"""Compares the values of a model folder with the checkpoints it was made from: repeats the conversion as a stream, in
the memory that converting takes, and compares it with what is stored."""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from ltx2.convert.output.files import stream_order
from ltx2.convert.output.pieces import Rows, in_order, rows_of
from ltx2.convert.plan.entries import Layer, Move, Plan, decoded, kept_layers, packed_key
from ltx2.convert.plan.make import Options, make_plan
from ltx2.convert.sources.source import VARIANTS, Source
from ltx2.convert.tensors.steps import SPELLINGS, Cast, Parts
from ltx2.runtime.errors import UnsupportedError
from ltx2.runtime.events import BytesDone, Event
from ltx2.runtime.files.tensors import Array, TensorFile, TensorInfo
from ltx2.runtime.model.layout import ModelFolder, is_lora

# Packs the layers of a plan as the folder's layers are packed; quantization supplies it.
Repack = Callable[[Plan, ModelFolder], Plan]
Stored = dict[str, TensorFile]  # tensor name -> its file


def compare_values(
    model: ModelFolder, sources: Sequence[Source], repack: Repack | None
) -> Generator[Event, None, tuple[int, list[str]]]:
    """Compare every stored tensor of the components the sources fill, and every file that was a tensor.

    Returns how many tensors are equal, and the differences. Raises UnsupportedError for quantized layers without
    `repack`.
    """
    components = model.manifest.components
    if with_lora := [name for name, record in components.items() if record.fused]:
        what = f"the values of {', '.join(with_lora)} cannot be compared: LoRAs are fused into them"
        why = "sums of products depend on how a machine adds up, so another one would find other values"
        raise UnsupportedError(what, why, "verify without sources: every byte is checked by the hashes")
    plan = make_plan(sources, Options(model.manifest.variant or VARIANTS[0]))  # no value depends on the variant
    differences = [
        f"{source.path.name} holds nothing of this model"
        for source in sources
        if not any(move.file in source.files and move.component in components for move in plan.all_moves)
    ]
    stored = {name: {t: f for f in model.tensor_files(name) for t in f.tensors} for name in components}
    assets = list(_asset_differences(plan, model))
    given = _given_dtypes(plan, stored)
    plan = decoded(plan, _decoded_alike(plan, model, stored, given))
    plan = _packed_alike(replace(plan, entries=tuple(_cast_alike(plan, stored, given))), model, stored, repack)
    equal, wrong = yield from _compare(stream_order(plan.all_moves), stored)
    filled = sorted({move.component for move in plan.all_moves})
    left = [f"{name}: tensor {key} is not in the sources" for name in filled for key in sorted(stored[name])]
    return equal, differences + wrong + left + _strength_differences(plan, model, filled) + assets


def _strength_differences(plan: Plan, model: ModelFolder, filled: Sequence[str]) -> list[str]:
    """LoRAs whose config.json differs from their source, whose alpha tensors are values too."""
    return [
        f"{name}: config.json does not say what the source says"
        for name in filled
        if is_lora(name) and model.config(name) != plan.components[name].config
    ]


def _asset_differences(plan: Plan, model: ModelFolder) -> Iterator[str]:
    """Files that a source holds as tensors."""
    for component in model.manifest.components:
        for asset in plan.assets(component):
            path = model.path / component / asset.name
            if not path.is_file() or path.read_bytes() != asset.file.array(asset.tensor.name).tobytes():
                yield f"{component}: {asset.name} differs from the source"


def _given_dtypes(plan: Plan, stored: dict[str, Stored]) -> dict[str, str]:
    """Component -> the float type that --dtype gave it, known by a tensor stored in another type than the source's."""
    return {
        move.component: dtype
        for move in plan.all_moves
        if move.packing is None and move.component in stored
        if (dtype := _stored_dtype(stored[move.component], move.key)) != move.spec.dtype and dtype in SPELLINGS
    }


def _decoded_alike(
    plan: Plan, model: ModelFolder, stored: dict[str, Stored], given: Mapping[str, str]
) -> dict[Layer, str]:
    """The layers of codes that the folder holds decoded, or quantized further, and in which float type."""
    layers = {}
    for (component, layer), keep in kept_layers(plan).items():
        dtype = _stored_dtype(stored.get(component, {}), f"{layer}.weight")
        if dtype in SPELLINGS:
            layers[component, layer] = SPELLINGS[dtype]
        elif dtype and model.quantization(component).of(layer).mode != keep.form.mode:
            layers[component, layer] = SPELLINGS[given.get(component, "BF16")]
    return layers


def _cast_alike(plan: Plan, stored: dict[str, Stored], given: Mapping[str, str]) -> Iterator[Move]:
    """The moves into components of the folder, with the float type that is stored (--dtype is not recorded)."""
    for move in plan.all_moves:
        if move.component not in stored:
            continue
        dtype = _stored_dtype(stored[move.component], move.key)
        if dtype not in SPELLINGS and move.packing is None:  # packed, with scales that are no floats
            dtype = given.get(move.component, dtype) if move.key.endswith(".weight") else dtype
        casts = dtype != move.spec.dtype and {dtype, move.spec.dtype} <= SPELLINGS.keys()
        yield replace(move, steps=(*move.steps, Cast(SPELLINGS[dtype]))) if casts else move


def _stored_dtype(stored: Stored, key: str) -> str:
    """The dtype of a tensor; for a packed weight its scales', which in affine mode keep its float type."""
    names = (packed_key(key, "scales"), key) if key.endswith(".weight") else (key,)
    return next((stored[name].tensors[name].dtype for name in names if name in stored), "")


def _packed_alike(plan: Plan, model: ModelFolder, stored: dict[str, Stored], repack: Repack | None) -> Plan:
    kept = kept_layers(plan)
    quantized = [
        component
        for component in sorted({move.component for move in plan.all_moves})
        if any(n.endswith(".scales") and (component, n.removesuffix(".scales")) not in kept for n in stored[component])
    ]
    if not quantized:
        return plan
    if repack is None:
        raise UnsupportedError(
            f"{model.path} is quantized",
            f"the values of {', '.join(quantized)} cannot be compared without quantizing again",
            "verify without sources",
        )
    return repack(plan, model)


@dataclass
class _Place:
    """Where a tensor is stored, and how many of its values differ from the source."""

    component: str
    file: TensorFile
    tensor: TensorInfo
    wrong: int = 0

    def count(self, row: int, expected: Array) -> None:
        """Compare the rows (n, ...) from `row` on, bit by bit: NaN equals itself."""
        rows, bits = self.tensor.shape[0] if self.tensor.shape else 1, np.dtype(f"u{expected.itemsize}")
        start = self.tensor.start + row * (self.tensor.nbytes // max(1, rows))
        stored = self.file.reader.read(start, start + expected.nbytes).view(bits)
        self.wrong += int(np.count_nonzero(stored != np.ascontiguousarray(expected).reshape(-1).view(bits)))


@dataclass(frozen=True)
class _Check:
    """A piece of a source, and the places of the tensors that it becomes, by name."""

    piece: Rows
    places: Mapping[str, _Place]

    @property
    def memory(self) -> int:
        return 2 * self.piece.memory

    def prepare(self) -> Callable[[], Parts]:
        """The values that should be stored; called as `Rows.prepare`."""
        return self.piece.prepare(self.piece.read())


def _compare(moves: Iterable[Move], stored: dict[str, Stored]) -> Generator[Event, None, tuple[int, list[str]]]:
    """Compare everything that tensors become, with progress events, and take it from `stored`. Returns how many tensors
    are equal, and the differences."""
    places: list[_Place] = []
    checks: list[_Check] = []
    differences: list[str] = []
    for move in moves:
        found, wrong = _places(move, stored[move.component])
        places += found.values()
        checks += [_Check(piece, found) for piece in rows_of(move)]
        differences += wrong
    done, total = 0, sum(check.piece.stored for check in checks)
    with closing(in_order(_Check.prepare, checks)) as results:
        for check, prepared in zip(checks, results, strict=True):
            for key, values in prepared()().items():
                if key in check.places:
                    check.places[key].count(check.piece.row, values)
            done += check.piece.stored
            yield BytesDone("comparing with the sources", done, total)
    differences += [
        f"{place.component}: {place.wrong} of {prod(place.tensor.shape)} values of tensor {place.tensor.name} differ "
        "from the source"
        for place in places
        if place.wrong
    ]
    return sum(not place.wrong for place in places), differences


def _places(move: Move, stored: Stored) -> tuple[dict[str, _Place], list[str]]:
    """The places of all tensors that one becomes, by name, and differences: missing and misshapen ones."""
    places, differences = {}, []
    for key, spec in move.stored().items():
        file = stored.pop(key, None)
        tensor = file.tensors[key] if file else None
        if file is None or tensor is None:
            differences.append(f"{move.component}: tensor {key} is not stored")
        elif (tensor.shape, tensor.dtype) != (spec.shape, spec.dtype):
            wanted = f"{spec.dtype} {list(spec.shape)}"
            differences.append(f"{move.component}: tensor {key} is {tensor.dtype} {list(tensor.shape)}, not {wanted}")
        else:
            places[key] = _Place(move.component, file, tensor)
    return places, differences
