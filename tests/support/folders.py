"""Model folders in tests: what is in one, whether it is sound, and how somebody who edits one would hide that."""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ltx2.convert.compare import Repack
from ltx2.convert.verify import Verified, verify
from ltx2.runtime.events import Event
from ltx2.runtime.files.tensors import TensorInfo, open_tensorfile, write_tensorfile


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes by its path inside the folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def accept(folder: Path) -> None:
    """Make ltx2.json agree with the files."""
    data = json.loads((folder / "ltx2.json").read_text())
    for name, component in data["components"].items():
        for file in component["files"]:
            content = (folder / name / file["name"]).read_bytes()
            file |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "ltx2.json").write_text(json.dumps(data))


def verified(folder: Path, sources: Sequence[Path] = (), repack: Repack | None = None) -> Verified:
    """What a verification ends with."""
    *_, last = verify(folder, sources, repack)
    assert isinstance(last, Verified)
    return last


def rewrite(path: Path, change: Mapping[str, TensorInfo | None]) -> None:
    """Write a safetensors file again with tensors renamed, reshaped (TensorInfo) or left out (None)."""
    file = open_tensorfile(path)
    changed = {name: change.get(name, tensor) for name, tensor in file.tensors.items()}
    tensors = {new.name: (new.dtype, file.array(name).reshape(new.shape)) for name, new in changed.items() if new}
    write_tensorfile(path.with_name("new"), tensors, {"format": "mlx"})
    path.with_name("new").replace(path)


def interrupt(run: Iterator[Event], out: Path, components: str) -> None:
    """Follow the writing of a model folder `out` until the weights of a component whose name matches are there."""
    while not list(out.with_name(f"{out.name}.partial").glob(f"{components}/model.safetensors")):
        next(run)
        time.sleep(0.01)  # files are finished by another thread
    assert not out.exists()
