"""A plan against the networks it fills: every parameter once, with the right shape, and nothing else."""

import warnings
from collections import Counter
from collections.abc import Mapping

from ltx2.convert.plan import LORAS, Plan
from ltx2.runtime.errors import CheckpointError, ConfigError
from ltx2.runtime.load import build_network, parameter_shapes

LISTED = 5  # tensors named in an error
Shapes = Mapping[str, tuple[int, ...]]


def check_plan(plan: Plan) -> None:
    """Compare every planned component with its network.

    Raises CheckpointError naming missing, unknown and misshapen tensors; ConfigError or UnsupportedError when the
    configuration is not one this version computes.
    """
    for name, component in plan.components.items():
        planned = planned_shapes(plan, name)
        if name.startswith(f"{LORAS}/"):
            continue
        try:
            wanted = parameter_shapes(build_network(component.cls, component.config))
        except (ModuleNotFoundError, ConfigError) as error:  # TEMPORARY: until every network has landed
            warnings.warn(f"{name} is not checked: {error}", stacklevel=2)
            continue
        _compare(name, wanted, planned)


def planned_shapes(plan: Plan, component: str) -> Shapes:
    """Shape of every tensor the component gets, before packing. Raises CheckpointError when two get one name."""
    moves = plan.moves(component)
    keys = Counter(key for move in moves for key in move.keys)
    twice = [key for key, count in keys.items() if count > 1]
    if twice:
        raise CheckpointError(
            f"two source tensors become {component}/{twice[0]}",
            f"{len(twice)} tensors would be stored twice",
            "use the checkpoint as published",
        )
    return {key: move.form.shape for move in moves for key in move.keys}


def _compare(component: str, wanted: Shapes, planned: Shapes) -> None:
    wrong = {
        "missing": sorted(wanted.keys() - planned.keys()),
        "not part of the network": sorted(planned.keys() - wanted.keys()),
        "of the wrong shape": [
            f"{key} {list(planned[key])} for {list(shape)}"
            for key, shape in wanted.items()
            if key in planned and planned[key] != shape
        ],
    }
    if any(wrong.values()):
        raise CheckpointError(
            f"the source does not fit its {component}",
            "; ".join(_listed(kind, keys) for kind, keys in wrong.items() if keys),
            "use the checkpoint as published, complete and unchanged",
        )


def _listed(kind: str, keys: list[str]) -> str:
    more = f" and {len(keys) - LISTED} more" if len(keys) > LISTED else ""
    return f"{len(keys)} {kind}: {', '.join(keys[:LISTED])}{more}"
