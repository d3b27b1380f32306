"""Model folders in tests: what is in one, and how somebody who edits one would put its manifest right."""

import hashlib
import json
from pathlib import Path


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
