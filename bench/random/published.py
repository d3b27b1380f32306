"""What published models' networks are: their configurations, and a prompt's usual length, as data (fullsize*.json), a
file per release."""

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from ltx2.runtime.errors import UnsupportedError


@cache
def published(release: str | None = None) -> Mapping[str, Any]:
    """The release (None: the first one), and class and configuration of every network by component. Raises
    UnsupportedError for a release whose networks are not known."""
    files = (file for file in resources.files(__package__).iterdir() if file.name.startswith("fullsize"))
    known = {data["release"]: data for data in map(json.loads, (file.read_text() for file in files))}
    name = min(known) if release is None else release
    if name not in known:
        why = f"no data say their sizes; they are known of {', '.join(sorted(known))}"
        raise UnsupportedError(f"the networks of release {name} are not known", why, "download it")
    return dict(known[name])
