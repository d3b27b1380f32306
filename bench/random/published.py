"""What a published model's networks are: their configurations, and a prompt's usual length, as data (fullsize.json)."""

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any


@cache
def published() -> Mapping[str, Any]:
    """The release, and class and configuration of every network by component."""
    return dict(json.loads(resources.files(__package__).joinpath("fullsize.json").read_text()))
