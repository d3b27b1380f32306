"""Pictures as files."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

SIGNATURE = b"\x89PNG\r\n\x1a\n"
EIGHT_BITS, RGB, NO_FILTER, FAST = 8, 2, 0, 1


def write_picture(path: str | Path, picture: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    """A PNG file of uint8 (H, W, 3). Raises OSError."""
    height, width, _ = picture.shape
    lines = np.pad(picture.reshape(height, -1), ((0, 0), (1, 0)), constant_values=NO_FILTER)  # each says its filter
    header = struct.pack(">2I5B", width, height, EIGHT_BITS, RGB, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), FAST)), (b"IEND", b""))
    Path(path).write_bytes(SIGNATURE + b"".join(_chunk(name, data) for name, data in chunks))


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
