"""Properties of reading strangers' files, on random inputs: briefly here, at length with `make test-fuzz`."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ltx2.convert.output.journal import JOURNAL, Partial
from ltx2.runtime.errors import CheckpointError
from ltx2.runtime.files.tensors import open_tensorfile
from tests.support.command import Here
from tests.support.hostile import ESCAPES, HANGS, VALUES, content, entry, harmless, paths, put, raw

pytestmark = pytest.mark.usefixtures("in_time")
# A property is tried on a few inputs, the same in every run, and with `make test-fuzz` on many, other ones each time.
EXAMPLES = pytest.mark.parametrize(
    "examples", [pytest.param(60, id="short"), pytest.param(20_000, id="long", marks=pytest.mark.fuzz)]
)


def tried(examples: int, strategy: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    """Try a property on so many inputs; the few of the suite are the same in every run."""

    def watched(value: Any) -> None:
        signal.alarm(HANGS)
        check(value)

    few = examples < 1000
    limits = settings(
        max_examples=examples, derandomize=few, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    limits(given(strategy)(watched))()


Anything = st.SearchStrategy[Any]
DTYPES: Anything = st.sampled_from(["F32", "BF16", "U8", "F8_E4M3", "F4", "BOOL", "C64", "F33", "", None, 3])
NUMBERS: Anything = st.sampled_from([0, 1, 2, 3, 4, 8, -1, *(1 << n for n in (31, 62, 63, 64)), 1.0, True, None, "1"])
HEADER_NAMES = st.one_of(st.sampled_from(["a", "b", "__metadata__", "", ESCAPES, "../x"]), st.text(max_size=3))
METADATA = st.one_of(
    st.none(), st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2), st.sampled_from(VALUES)
)
WIDTHS = {"F32": 4, "BF16": 2, "C64": 8}


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A valid file with up to three tensors, and up to three things wrong with it."""
    pairs: list[tuple[str, Any]] = []
    offset = 0
    for name in draw(st.lists(HEADER_NAMES, max_size=3)):
        dtype, shape = draw(DTYPES), draw(st.lists(st.integers(0, 3), max_size=3))
        size = int(np.prod(shape)) * WIDTHS.get(dtype, 1)
        pairs.append((name, entry(offset, offset + size, shape, dtype)))
        offset += size
    for _ in range(draw(st.integers(0, 3)) if pairs else 0):
        name, tensor = pairs.pop(draw(st.integers(0, len(pairs) - 1)))
        change = draw(st.sampled_from(["move", "shape", "offset", "drop", "add", "value", "twice", "order"]))
        if change == "move":
            tensor = tensor | {"data_offsets": [n + draw(st.sampled_from([-4, -1, 1, 4])) for n in (0, 4)]}
        elif change == "shape":
            tensor = tensor | {"shape": draw(st.lists(NUMBERS, max_size=3))}
        elif change == "offset":
            tensor = tensor | {"data_offsets": draw(st.lists(NUMBERS, max_size=3))}
        elif change == "drop":
            tensor = {key: tensor[key] for key in list(tensor)[1:]}
        elif change == "add":
            tensor = tensor | {"x": draw(st.sampled_from(VALUES))}
        elif change == "value":
            tensor = tensor | {draw(st.sampled_from(list(tensor) or ["x"])): draw(st.sampled_from(VALUES))}
        pairs += [(name, tensor)] * (2 if change == "twice" else 1)
    if draw(st.booleans()):
        pairs.insert(draw(st.integers(0, len(pairs))), ("__metadata__", draw(METADATA)))
    text = "{" + ",".join(f"{json.dumps(name)}:{json.dumps(value)}" for name, value in pairs) + "}"
    text = draw(st.sampled_from(["", "", "", " ", "\n"])) + text + draw(st.sampled_from(["", "", "", "  ", "\0", "x"]))
    extra = draw(st.sampled_from([0, 0, 0, 0, 1, -1]))
    length = draw(st.sampled_from([None, None, None, None, len(text) - 1, len(text) + 1]))
    return raw(text.encode(), bytes(max(0, offset + extra)), length)


def library(path: Path) -> dict[str, Any] | None:
    """Name, dtype and shape of every tensor as the safetensors library reads them; None when it rejects the file."""
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (piece.get_dtype(), tuple(piece.get_shape())) for name, piece in slices.items()}
    except (SafetensorError, OSError):
        return None


# What is refused here and not there; "list" is a spelling of no writer, and of no library that the rest agrees on.
OURS = ("occurs twice", "is not a name")


@EXAMPLES
def test_headers_mean_what_the_library_reads(examples: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"

    def check(file: bytes) -> None:
        path.write_bytes(file)
        wanted = library(path)
        try:
            got = {name: (t.dtype, t.shape) for name, t in open_tensorfile(path).tensors.items()}
        except CheckpointError as error:
            assert wanted is None or any(reason in error.why for reason in OURS), error
        else:
            assert got == wanted

    tried(examples, headers(), check)


# Where (a share of the file's first bytes), what (a byte to write, to insert, or none to cut it out).
HOW = st.sampled_from(["write", "insert", "cut", "end"])
EDITS = st.lists(st.tuples(st.floats(0, 1), HOW, st.sampled_from(b'0129"[]{}:,\\ \0\xff')), min_size=1, max_size=4)


def edited(content: bytes, edits: list[tuple[float, str, int]], first: int) -> bytes:
    """The file with some of its first bytes changed; "end" ends it there."""
    changed = bytearray(content)
    for share, how, byte in edits:
        place = int(share * min(first, max(0, len(changed) - 1)))
        if how == "insert":
            changed.insert(place, byte)
        elif how == "end":
            del changed[place:]
        else:
            changed[place : place + 1] = bytes([byte]) if how == "write" else b""
    return bytes(changed)


def small_lora(path: Path) -> Path:
    """A LoRA of one layer of the published transformer."""
    layer, width = "diffusion_model.transformer_blocks.0.attn1.to_q", 4096
    factors = {"lora_A": (1, width), "lora_B": (width, 1)}
    tensors = {f"{layer}.{name}.weight": np.ones(shape, np.float16) for name, shape in factors.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return path


@EXAMPLES
def test_edited_sources(examples: int, here: Here, tmp_path: Path) -> None:
    path, out = small_lora(tmp_path / "x.safetensors"), tmp_path / "out"
    whole = path.read_bytes()
    assert here("convert", path, "-o", out).code == 0
    shutil.rmtree(out)

    def check(edits: list[tuple[float, str, int]]) -> None:
        path.write_bytes(edited(whole, edits, 400))
        harmless(here("inspect", path))
        if harmless(here("convert", path, "-o", out)).code == 0:
            shutil.rmtree(out)
        assert list(tmp_path.iterdir()) == [path]

    tried(examples, EDITS, check)


JSON_EDITS = st.one_of(EDITS, st.tuples(st.integers(0, 1000), st.sampled_from(VALUES)))


@EXAMPLES
@pytest.mark.parametrize("name", ["ltx2.json", "vocoder/config.json"])
def test_edited_model_folders(examples: int, here: Here, stranger: Path, name: str) -> None:
    path, out = stranger / name, stranger.parent / "out"
    whole = path.read_bytes()
    places = paths(json.loads(whole))
    before = content(stranger.parent)

    def check(change: Any) -> None:
        if isinstance(change, tuple):
            number, value = change
            path.write_text(json.dumps(put(json.loads(whole), places[number % len(places)], value)))
        else:
            path.write_bytes(edited(whole, change, len(whole)))
        sound = harmless(here("verify", stranger)).code == 0
        if not sound and harmless(here("quantize", stranger, "-o", out)).code == 0:
            shutil.rmtree(out)
        path.write_bytes(whole)
        assert content(stranger.parent) == before

    tried(examples // 3, JSON_EDITS, check)


@EXAMPLES
def test_edited_journals(examples: int, here: Here, stranger: Path) -> None:
    """A damaged journal starts anew, continues, or is refused; it leads nowhere else."""
    out, partial = stranger.parent / "out", stranger.parent / "out.partial"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Partial, "finish", stop)
        assert here("quantize", stranger, "-o", out).code == 130
    kept = Path(shutil.copytree(partial, stranger.parent / "kept"))
    journal = kept / JOURNAL
    assert len(journal.read_text().splitlines()) > 3
    before = content(stranger) | content(kept)

    def check(edits: list[tuple[float, str, int]]) -> None:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(kept, partial)
        whole = journal.read_bytes()
        (partial / journal.name).write_bytes(edited(whole, edits, len(whole)))
        harmless(here("quantize", stranger, "-o", out))
        assert content(stranger) | content(kept) == before

    tried(examples // 6, EDITS, check)
