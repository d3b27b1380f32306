"""The table of names: every published tensor has its place in a model folder, one meaning a row."""

import pytest

from ltx2.convert.names import rules
from ltx2.runtime.model.names import folder_name, modules
from tests.support import published

WHOLE = ["ltx-2-19b", "ltx-2.3-22b"]  # with all components in one file


@pytest.mark.parametrize("header", WHOLE)
def test_every_published_tensor_has_a_place_of_its_own(header: str) -> None:
    _, _, tensors = published.read_header(header)
    targets = {name: rules.target("checkpoint", name) for name in tensors}
    kept = {name: target for name, target in targets.items() if target is not None and not target.dropped}
    assert None not in targets.values()
    assert len({(target.component, target.key) for target in kept.values()}) == len(kept)
    assert sum(not name.endswith(target.key) for name, target in kept.items()) > 1000


def test_rows_are_one_to_one() -> None:
    paths = [(m.component, m.published) for m in modules()]
    assert len(set(paths)) == len(paths) == len({(m.component, m.folder) for m in modules()}) > 100
    spelled = [path for m in modules() if m.lora for path in {m.published, m.folder, m.diffusers}]
    assert len(set(spelled)) == len(spelled)


@pytest.mark.parametrize(
    ("component", "name"),
    [("transformer", "transformer_blocks.0.ff.net.0.proj_extra.weight"), ("transformer", "x.ff.net.2.weight"),
     ("transformer", "transformer_blocks.0.attn9.to_out.0.weight"),
     ("video_vae", "a.per_channel_statistics.mean-of-means"),
     ("text_encoder", "model.layers.0.ff.net.2.weight"), ("vocoder", "conv_pre.weight")],
)  # fmt: skip
def test_no_other_name_changes(component: str, name: str) -> None:
    """A row means whole names, not parts of others."""
    assert folder_name(component, name) == name
