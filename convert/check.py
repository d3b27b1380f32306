"""A plan against the networks it fills: every parameter once, with the right shape, and nothing else."""

from collections import Counter
from collections.abc import Mapping

from ltx2.convert.plan import Plan
from ltx2.runtime.errors import CheckpointError
from ltx2.runtime.layout import is_lora
from ltx2.runtime.load import Shapes, build_network, parameter_shapes, shape_differences

LISTED = 5  # tensors named in an error


def check_plan(plan: Plan) -> None:
    """Compare every planned component with its network.

    Raises CheckpointError naming missing, unknown and misshapen tensors; ConfigError or UnsupportedError when the
    configuration is not one this version computes.
    """
    planned = {name: planned_shapes(plan, name) for name in plan.components}
    for name, component in plan.components.items():
        if is_lora(name):
            _check_lora(name, planned)
        else:
            _compare(name, parameter_shapes(build_network(component.cls, component.config)), planned[name])


def planned_shapes(plan: Plan, component: str) -> Shapes:
    """Shape of every tensor the component gets, before packing. Raises CheckpointError when two get one name."""
    moves = plan.moves(component)
    keys = Counter(move.key for move in moves)
    twice = [key for key, count in keys.items() if count > 1]
    if twice:
        raise CheckpointError(
            f"two source tensors become {component}/{twice[0]}",
            f"{len(twice)} tensors would be stored twice",
            "use the checkpoint as published",
        )
    return {move.key: move.form.shape for move in moves}


def lora_misfits(lora: str, shapes: Mapping[str, Shapes]) -> tuple[list[str], list[str]]:
    """All layers a LoRA changes, and those where it cannot.

    Every A needs its B of the same rank, and both must fit the layer where its component is among `shapes`.
    """
    layers = sorted({key.rpartition(".lora_")[0] for key in shapes[lora]})
    return layers, [layer for layer in layers if not _fits(layer, shapes[lora], shapes)]


def _check_lora(lora: str, planned: Mapping[str, Shapes]) -> None:
    layers, wrong = lora_misfits(lora, planned)
    if wrong:
        raise CheckpointError(
            f"{lora} does not fit the model",
            f"{len(layers) - len(wrong)} of {len(layers)} layers match; {_listed('do not', wrong)}",
            "use a LoRA made for this release",
        )


def _fits(layer: str, factors: Shapes, planned: Mapping[str, Shapes]) -> bool:
    down, up = factors.get(f"{layer}.lora_A.weight", ()), factors.get(f"{layer}.lora_B.weight", ())
    if len(down) != 2 or len(up) != 2 or down[0] != up[1]:
        return False
    component, _, path = layer.partition(".")
    return component not in planned or planned[component].get(f"{path}.weight") == (up[0], down[1])


def _compare(component: str, wanted: Shapes, planned: Shapes) -> None:
    wrong = shape_differences(wanted, planned)
    if wrong:
        raise CheckpointError(
            f"the source does not fit its {component}",
            "; ".join(_listed(kind, keys) for kind, keys in wrong.items()),
            "use the checkpoint as published, complete and unchanged",
        )


def _listed(kind: str, keys: list[str]) -> str:
    more = f" and {len(keys) - LISTED} more" if len(keys) > LISTED else ""
    return f"{len(keys)} {kind}: {', '.join(keys[:LISTED])}{more}"
