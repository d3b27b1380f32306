"""Guidance: several predictions of one step, combined. In x0 space and float32 (MODEL.md §4, §15.1, §15.2)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from ltx2.runtime.networks.transformer.inputs import NOTHING, Skips
from ltx2.runtime.streams import Streams

TEXT, NEGATIVE = "text", "negative"
PERTURBED, APART = "perturbed", "apart"
CLOSE = 1e-9  # a scale this near to its neutral value needs no pass


@dataclass(frozen=True)
class Guidance:
    """How one stream is guided. The defaults are neutral: one pass.

    `cfg` weighs the text against the negative text, `stg` against a pass in which the self-attention of some `blocks`
    passes its values through, `modality` against one in which the streams do not see each other. `rescale` (0 to 1)
    brings the result's deviation back towards that of the text's prediction. Between guided steps `skip` steps keep
    the last result.
    """

    cfg: float = 1.0
    stg: float = 0.0
    modality: float = 1.0
    rescale: float = 0.0
    blocks: tuple[int, ...] = ()
    skip: int = 0

    @property
    def _scales(self) -> dict[str, float]:
        """The weight of every pass beside the text's that counts."""
        scales = {NEGATIVE: self.cfg - 1, PERTURBED: self.stg, APART: self.modality - 1}
        return {name: scale for name, scale in scales.items() if abs(scale) > CLOSE}

    @property
    def wanted(self) -> frozenset[str]:
        """Names of the passes beside the text's."""
        return frozenset(self._scales)

    def combined(self, x0: Mapping[str, mx.array]) -> mx.array:
        """The guided prediction of x0s by pass, each (1, tokens, channels): c + (cfg - 1)(c - negative) + stg (c -
        perturbed) + (modality - 1)(c - apart), then rescaled by unbiased deviations over the whole tensor."""
        text = x0[TEXT]
        terms = [scale * (text - x0[name]) for name, scale in self._scales.items()]
        if not terms:
            return text
        guided = sum(terms, start=text)
        if self.rescale:
            ratio = mx.std(text, ddof=1) / mx.std(guided, ddof=1)
            guided = guided * (self.rescale * ratio + (1 - self.rescale))
        return guided

    def skipped(self, step: int) -> bool:
        """Whether step number `step` (from 0) keeps the last result."""
        return step % (self.skip + 1) != 0


NEUTRAL = Guidance()


class Pass(NamedTuple):
    """One call of the transformer: which text each stream sees, and which attentions are left out."""

    contexts: Streams[str]
    skips: Skips = NOTHING


def passes(guidance: Streams[Guidance], frozen: Streams[bool], step: int = 0) -> dict[str, Pass]:
    """The calls that a step needs, by name; none where every stream keeps its last result.

    A frozen stream keeps its text in the negative pass. A stream that keeps its last result is idle in the others.
    """
    idle = guidance.map(lambda g: g.skipped(step))
    idle = idle.zip(frozen).map(lambda pair: pair[0] and not pair[1])
    active = [name for name, kept in idle.items() if not kept]
    if not any(name in active for name, kept in frozen.items() if not kept):
        return {}
    wanted = frozenset[str]().union(*(g.wanted for name, g in guidance.items() if name in active))
    text = guidance.map(lambda _: TEXT)
    calls = {TEXT: Pass(text, Skips(idle=idle))}
    if NEGATIVE in wanted:
        calls[NEGATIVE] = Pass(frozen.map(lambda kept: TEXT if kept else NEGATIVE), Skips(idle=idle))
    if PERTURBED in wanted:
        blocks = guidance.map(lambda g: frozenset(g.blocks) if PERTURBED in g.wanted else frozenset[int]())
        calls[PERTURBED] = Pass(text, Skips(values=blocks, idle=idle))
    if APART in wanted:
        calls[APART] = Pass(text, Skips(exchange=True, idle=idle))
    return calls
