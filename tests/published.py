"""The real files' headers (tests/headers/*.json): sparse files of full size without data, so that the code under test
reads them as it would read the published ones.

A header file maps published file names to their sizes (null: unknown), and tensor names to [dtype, *shape]; `{0-47}`
in a name is a range. `<license text omitted, N chars>` in the metadata stands for N characters."""

import json
import re
import struct
from collections.abc import Iterator
from math import prod
from pathlib import Path

HEADERS = Path(__file__).parent / "headers"
MONOLITH = "ltx-2-19b"
SPATIAL = "ltx-2-spatial-upscaler-x2-1.0"
TEMPORAL = "ltx-2-temporal-upscaler-x2-1.0"
LORA = "ltx-2-19b-distilled-lora-384"
GEMMA = tuple(f"gemma-3-12b-it-{n}" for n in range(1, 6))
# In the order in which the safetensors library lays tensors out, with their bytes per value.
SIZES = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1}
LINES = 420  # line ends in the licence text: escaped in JSON, so they count twice in the file's size
Tensors = dict[str, tuple[str, tuple[int, ...]]]


def read_header(name: str) -> tuple[dict[str, int | None], dict[str, str], Tensors]:
    """Published file names with their sizes, metadata and tensors of one header file."""
    data = json.loads((HEADERS / f"{name}.json").read_text())
    metadata = {key: _filled(value) for key, value in data["metadata"].items()}
    tensors = {full: (dtype, tuple(shape)) for key, (dtype, *shape) in data["tensors"].items() for full in expand(key)}
    return data["files"], metadata, tensors


def expand(name: str) -> Iterator[str]:
    """`a.{0-2}.b` -> a.0.b, a.1.b, a.2.b"""
    match = re.search(r"\{(.+?)\}", name)
    if match is None:
        yield name
        return
    for part in match[1].split(","):
        first, _, last = part.partition("-")
        for number in range(int(first), int(last or first) + 1):
            yield name[: match.start()] + str(number) + name[match.end() :]


def _filled(value: str) -> str:
    match = re.fullmatch(r"<license text omitted, (\d+) chars>", value)
    return "\n" * LINES + "x" * (int(match[1]) - LINES) if match else value


def write_sparse(path: Path, tensors: Tensors, metadata: dict[str, str]) -> Path:
    """A safetensors file of full apparent size whose data are a hole."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name in sorted(tensors, key=lambda n: (list(SIZES).index(tensors[n][0]), n)):
        dtype, shape = tensors[name]
        end = offset + SIZES[dtype] * prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + offset)
    return path


def write_published(folder: Path, name: str) -> list[Path]:
    """The sparse look-alikes of one header file's published files."""
    files, metadata, tensors = read_header(name)
    return [write_sparse(folder / file, tensors, metadata) for file in files]


def write_gemma(folder: Path) -> Path:
    """The published Gemma folder: five shards, index and configuration."""
    folder.mkdir()
    shards = {name: path for name in GEMMA for path in write_published(folder, name)}
    where = {tensor: shards[name].name for name in GEMMA for tensor in read_header(name)[2]}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_bytes((HEADERS / "gemma-3-12b-it-config.json").read_bytes())
    return folder
