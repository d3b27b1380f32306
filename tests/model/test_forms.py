"""How config.json says that layers are packed."""

from dataclasses import replace

import pytest

from ltx2.runtime.errors import ModelFolderError
from ltx2.runtime.model.forms import MODES, Form, Quantization

Q4, Q8 = Form(4, 64), Form(8, 32, "mxfp8")


def test_of() -> None:
    """As mlx-lm writes it: one form for all, others by path, False where a layer is not packed."""
    quantization = Quantization.from_config(
        Q4.entry() | {"a.b": Q8.entry(), "c": False, "d": {"group_size": 32, "bits": 6}}
    )
    assert [quantization.of(layer) for layer in ("a.b", "a", "d")] == [Q8, Q4, Form(6, 32)]
    with pytest.raises(ModelFolderError, match="c is packed"):
        quantization.of("c")


def test_without() -> None:
    with pytest.raises(ModelFolderError, match=r"a\.b is packed"):
        Quantization.from_config(None).of("a.b")


@pytest.mark.parametrize(
    "form", [Form(b, g, n) for n, m in MODES.items() for b in m.bits for g in m.group_sizes], ids=str
)
def test_entries(form: Form) -> None:
    """What is written is read as it was; a rotation is said only where there is one."""
    rotated = Form(form.bits, form.group_size, form.mode, rotation=64)
    assert Form.from_entry(form.entry()) == form and set(form.entry()) == {"group_size", "bits", "mode"}
    assert Form.from_entry(rotated.entry()) == rotated and rotated.block == max(64, form.group_size)
    regular = replace(rotated, hadamard="regular")
    assert Form.from_entry(regular.entry()) == regular and "hadamard" not in rotated.entry()


@pytest.mark.parametrize(
    ("data", "why"),
    [({}, "bits"), ({"bits": 4}, "group size"), ({"bits": 7, "group_size": 64}, "bits"),
     ({"bits": 4.0, "group_size": 64}, "bits"), ({"bits": 4, "group_size": 16}, "group size"),
     ({"bits": 4, "group_size": 64, "mode": "int4"}, "mode"),
     (Q4.entry() | {"rotation": 64, "hadamard": "random"}, "matrices sylvester, regular, not 'random'"),
     (Q4.entry() | {"rotation": 64, "hadamard": []}, "matrices"),
     (Q4.entry() | {"a": {"bits": 8, "group_size": 32, "mode": "nvfp4"}}, "nvfp4 has bits 4, not 8")],
)  # fmt: skip
def test_impossible(data: dict[str, object], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Quantization.from_config(data)
