"""The values of a model folder against the checkpoints it was made from: the conversion is repeated as a stream and
compared with what is stored, in the memory that converting takes."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from ltx2.convert.output.files import stream_order
from ltx2.convert.output.pieces import Rows, in_order, rows_of
from ltx2.convert.plan.entries import Layer, Move, Plan, decoded, kept_layers, packed_key
from ltx2.convert.plan.make import Options, make_plan
from ltx2.convert.sources.source import VARIANTS, Source
from ltx2.convert.tensors.steps import Cast, Parts
from ltx2.runtime.errors import UnsupportedError
from ltx2.runtime.events import BytesDone, Event
from ltx2.runtime.files.ranges import RangeReader
from ltx2.runtime.files.tensors import FLOATS, Array, TensorFile
from ltx2.runtime.model.layout import ModelFolder, is_lora

# Packs the layers of a plan as the folder's layers are packed; quantization supplies it.
Repack = Callable[[Plan, ModelFolder], Plan]
SPELLINGS = {dtype: option for option, dtype in FLOATS.items()}
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
        if not any(isinstance(e, Move) and e.file in source.files and e.component in components for e in plan.entries)
    ]
    stored = {name: {t: f for f in model.tensor_files(name) for t in f.tensors} for name in components}
    assets = list(_asset_differences(plan, model))
    plan = decoded(plan, _decoded_alike(plan, model, stored))
    plan = _packed_alike(replace(plan, entries=tuple(_cast_alike(plan, stored))), model, stored, repack)
    moves = [e for e in plan.entries if isinstance(e, Move)]
    comparison = _Comparison()
    for move in stream_order(moves):
        comparison.add(move, stored[move.component])
    yield from comparison.run()
    differences += comparison.differences()
    filled = {move.component for move in moves}
    left = [f"{name}: tensor {key} is not in the sources" for name in sorted(filled) for key in sorted(stored[name])]
    return comparison.equal(), differences + left + _strength_differences(plan, model, filled) + assets


def _strength_differences(plan: Plan, model: ModelFolder, filled: set[str]) -> list[str]:
    """LoRAs whose config.json is not what their source says: its alpha tensors are values too."""
    loras = [name for name in sorted(filled) if is_lora(name)]
    return [
        f"{name}: config.json does not say what the source says"
        for name in loras
        if model.config(name) != plan.components[name].config
    ]


def _asset_differences(plan: Plan, model: ModelFolder) -> Iterator[str]:
    """Files that a source holds as tensors."""
    for component in model.manifest.components:
        for asset in plan.assets(component):
            path = model.path / component / asset.name
            if not path.is_file() or path.read_bytes() != asset.file.array(asset.tensor.name).tobytes():
                yield f"{component}: {asset.name} differs from the source"


def _given_dtypes(plan: Plan, stored: dict[str, Stored]) -> dict[str, str]:
    """The float type that --dtype gave a component: that of a stored tensor which is another in the source."""
    return {
        move.component: dtype
        for move in plan.entries
        if isinstance(move, Move) and move.packing is None and move.component in stored
        if (dtype := _stored_dtype(stored[move.component], move.key)) != move.spec.dtype and dtype in SPELLINGS
    }


def _decoded_alike(plan: Plan, model: ModelFolder, stored: dict[str, Stored]) -> dict[Layer, str]:
    """The layers of codes that the folder holds decoded, or quantized further, and in which float type."""
    layers, given = {}, _given_dtypes(plan, stored)
    for (component, layer), keep in kept_layers(plan).items():
        dtype = _stored_dtype(stored.get(component, {}), f"{layer}.weight")
        if dtype in SPELLINGS:
            layers[component, layer] = SPELLINGS[dtype]
        elif dtype and model.quantization(component).of(layer).mode != keep.form.mode:
            layers[component, layer] = SPELLINGS[given.get(component, "BF16")]
    return layers


def _cast_alike(plan: Plan, stored: dict[str, Stored]) -> Iterator[Move]:
    """The moves into components of the folder, with the float type that is stored (--dtype is not recorded)."""
    given = _given_dtypes(plan, stored)
    for move in plan.entries:
        if not isinstance(move, Move) or move.component not in stored:
            continue
        dtype = _stored_dtype(stored[move.component], move.key)
        if dtype not in SPELLINGS and move.packing is None:  # packed, with scales that are no floats
            dtype = given.get(move.component, dtype) if move.key.endswith(".weight") else dtype
        casts = dtype != move.spec.dtype and dtype in SPELLINGS and move.spec.dtype in FLOATS.values()
        yield replace(move, steps=(*move.steps, Cast(SPELLINGS[dtype]))) if casts else move


def _stored_dtype(stored: Stored, key: str) -> str:
    """The dtype of a tensor; of a packed weight that of its scales, which in affine mode keep its float type."""
    names = (packed_key(key, "scales"), key) if key.endswith(".weight") else (key,)
    return next((stored[name].tensors[name].dtype for name in names if name in stored), "")


def _packed_alike(plan: Plan, model: ModelFolder, stored: dict[str, Stored], repack: Repack | None) -> Plan:
    kept = kept_layers(plan)
    quantized = [
        component
        for component in sorted({entry.component for entry in plan.entries if isinstance(entry, Move)})
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
    """Where a tensor is stored, and how many of its values are not what they should be."""

    component: str
    key: str
    values: int
    reader: RangeReader
    start: int
    row_bytes: int
    wrong: int = 0

    def unequal(self, row: int, expected: Array) -> int:
        """Number of values from a row on whose bits differ (NaN equals itself)."""
        start, bits = self.start + row * self.row_bytes, np.dtype(f"u{expected.itemsize}")
        stored = self.reader.read(start, start + expected.nbytes).view(bits)
        return int(np.count_nonzero(stored != np.ascontiguousarray(expected).reshape(-1).view(bits)))


@dataclass(frozen=True)
class _Check:
    """A piece of a source, and the places of what becomes of it by name."""

    piece: Rows
    places: Mapping[str, _Place]

    @property
    def memory(self) -> int:
        return 2 * self.piece.memory

    def prepare(self) -> Callable[[], Parts]:
        """What should be stored; see `Rows.prepare`."""
        return self.piece.prepare(self.piece.read())

    def run(self, parts: Mapping[str, Array]) -> list[tuple[_Place, int]]:
        """For every place how many values differ, of those made from the piece."""
        row = self.piece.row
        return [(place, place.unequal(row, parts[key])) for key, place in self.places.items() if key in parts]


class _Comparison:
    """What is compared, and what is found to differ."""

    def __init__(self) -> None:
        self._misfits: list[str] = []
        self._places: list[_Place] = []
        self._checks: list[_Check] = []

    def add(self, move: Move, stored: Stored) -> None:
        """Compare all that becomes of one tensor, and take it from `stored`."""
        places = {}
        for key, spec in move.stored().items():
            file = stored.pop(key, None)
            if file is None:
                self._misfits.append(f"{move.component}: tensor {key} is not stored")
                continue
            info = file.tensors[key]
            if (info.shape, info.dtype) != (spec.shape, spec.dtype):
                wanted = f"{spec.dtype} {list(spec.shape)}"
                self._misfits.append(f"{move.component}: tensor {key} is {info.dtype} {list(info.shape)}, not {wanted}")
                continue
            row_bytes = info.nbytes // max(1, spec.shape[0]) if spec.shape else 0
            places[key] = _Place(move.component, key, prod(spec.shape), file.reader, info.start, row_bytes)
        self._places += places.values()
        self._checks += [_Check(piece, places) for piece in rows_of(move)]

    def run(self) -> Iterator[Event]:
        """Compare everything, with progress events."""
        done, total = 0, sum(check.piece.stored for check in self._checks)
        with closing(in_order(_Check.prepare, self._checks)) as results:
            for check, prepared in zip(self._checks, results, strict=True):
                for place, wrong in check.run(prepared()()):
                    place.wrong += wrong
                done += check.piece.stored
                yield BytesDone("comparing with the sources", done, total)

    def equal(self) -> int:
        """Number of tensors without a difference."""
        return sum(not place.wrong for place in self._places)

    def differences(self) -> list[str]:
        """What differs."""
        wrong = [place for place in self._places if place.wrong]
        return self._misfits + [
            f"{p.component}: {p.wrong} of {p.values} values of tensor {p.key} differ from the source" for p in wrong
        ]
