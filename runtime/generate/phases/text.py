"""Prompts to contexts."""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from ltx2.runtime.events import Event, Warned
from ltx2.runtime.generate.job import Job
from ltx2.runtime.generate.phases.base import Made, Phase, Texts, Tools
from ltx2.runtime.layers.checks import check_finite
from ltx2.runtime.memory import activations as network
from ltx2.runtime.memory import cpu, flops, metal
from ltx2.runtime.memory.flops import PhaseWork, Work
from ltx2.runtime.memory.plan import Headers, Need, on_cpu, on_metal
from ltx2.runtime.model.layout import DURATION_HEAD
from ltx2.runtime.networks.load import read_weights
from ltx2.runtime.networks.text.config import ConnectorsConfig, gemma_config
from ltx2.runtime.networks.text.connectors import EmbeddingsConnectors
from ltx2.runtime.networks.text.duration_head import DurationHead, DurationHeadConfig
from ltx2.runtime.networks.text.gemma import TextEncoder
from ltx2.runtime.networks.text.tokenizer import Encoded
from ltx2.runtime.networks.video_vae.tiles import Tiling
from ltx2.runtime.sampling.guidance import TEXT
from ltx2.runtime.sampling.latents import Sizes
from ltx2.runtime.streams import Streams

EMBEDDING = "model.embed_tokens."  # of which only the prompt's rows are read


class EncodeText(Phase):
    """Prompts to the text encoder's hidden states, all in one load of it."""

    name = "text_encoder"
    title = "reading the prompt"
    components = ("text_encoder",)

    def need(self, headers: Headers, sizes: Sizes, tiling: Tiling | None) -> Need:
        embedding, layer = headers.text_parts
        config = gemma_config(headers.config(self.name))
        used = network.text_encoder(config, layer, embedding, _tokens(self.job), headers.itemsize(self.name))
        return Need(self.name, max(embedding, layer), used)

    def work(self, headers: Headers) -> PhaseWork:
        config = gemma_config(headers.config(self.name))
        work = sum((flops.encode_text(config, _length(tokens)) for tokens in self.job.tokens.values()), Work())
        moved = headers.weights(self.name) - headers.weights(self.name, EMBEDDING)
        return work.moving(headers.itemsize(self.name), moved)

    def run(self, tools: Tools, made: Made) -> Iterator[Event]:
        for tokens in self.job.tokens.values():
            if tokens.truncated:
                yield Warned(f"the prompt is {tokens.truncated} tokens too long; its end is ignored")
        texts, prompts = texts_of(self.job), tools.prompts
        if texts not in prompts.hidden:
            batches = {texts_of(job): _batch(job) for job in prompts.jobs}
            encoder = tools.networks.load(self.name, TextEncoder)
            yield tools.meter.loaded(encoder.config.num_hidden_layers + 1)
            layers = []
            for states in encoder.states_of(list(batches.values()), release=True):
                layers.append(states)
                yield tools.meter.step()
            prompts.hidden |= dict(zip(batches, zip(*layers, strict=True), strict=True))
        made.hidden = prompts.hidden[texts]


class Connect(Phase):
    """Hidden states to the contexts that the transformer attends to."""

    name = "connectors"
    title = "preparing the prompt"
    components = ("connectors",)

    def need(self, headers: Headers, sizes: Sizes, tiling: Tiling | None) -> Need:
        config, width = ConnectorsConfig.from_dict(headers.config(self.name)), headers.itemsize(self.name)
        length = self.job.preset.text_tokens
        used = network.connectors(
            config, _tokens(self.job), length, width, unpacked=width * headers.unpacked(self.name)
        )
        used = used.beside(on_cpu(cpu.connectors(config, length, width)))
        used = used.beside(on_metal(metal.connectors(config, _tokens(self.job))))
        return Need(self.name, headers.weights(self.name), used)

    def work(self, headers: Headers) -> PhaseWork:
        config, length = ConnectorsConfig.from_dict(headers.config(self.name)), self.job.preset.text_tokens
        work = sum((flops.connect(config, _length(tokens), length) for tokens in self.job.tokens.values()), Work())
        return work.moving(headers.itemsize(self.name), headers.weights(self.name))

    def run(self, tools: Tools, made: Made) -> Iterator[Event]:
        texts, prompts = texts_of(self.job), tools.prompts
        if texts in prompts.contexts:
            made.hidden, made.contexts = (), prompts.contexts[texts]
            return
        connectors = tools.networks.load(self.name, EmbeddingsConnectors)
        read_weights(connectors)
        yield tools.meter.loaded()
        both = connectors(made.hidden, _batch(self.job)[1])
        made.hidden = prompts.hidden[texts] = ()
        for stream, context in both.items():
            check_finite(context, f"the prompt's {stream} embeddings")
        names = list(self.job.prompts)
        made.contexts = {
            name: Streams(*(context[row : row + 1] for context in both.values())) for row, name in enumerate(names)
        }
        prompts.contexts[texts] = made.contexts
        yield tools.meter.step()


class PredictLength(Phase):
    """The prompt's contexts to the seconds that its clip takes."""

    name = DURATION_HEAD
    title = "choosing the clip's length"
    components = (DURATION_HEAD,)

    def need(self, headers: Headers, sizes: Sizes, tiling: Tiling | None) -> Need:
        config = DurationHeadConfig.from_dict(headers.config(self.name))
        return Need(self.name, headers.weights(self.name), network.predict_length(config, self.job.preset.text_tokens))

    def work(self, headers: Headers) -> PhaseWork:
        config = DurationHeadConfig.from_dict(headers.config(self.name))
        work = flops.predict_length(config, self.job.preset.text_tokens)
        return work.moving(network.FLOAT32, headers.weights(self.name))

    def run(self, tools: Tools, made: Made) -> Iterator[Event]:
        head = tools.networks.load(self.name, DurationHead)
        read_weights(head)
        yield tools.meter.loaded()
        made.seconds = head.seconds(made.contexts[TEXT])
        yield tools.meter.step()


def texts_of(job: Job) -> Texts:
    """The texts that are encoded together."""
    return tuple(job.prompts.items())


def hidden_bytes(job: Job) -> int:
    """Bytes of all hidden states of a job's prompts."""
    config = gemma_config(job.folder.config(EncodeText.name))
    itemsize = Headers(job.folder).itemsize(EncodeText.name)
    return (config.num_hidden_layers + 1) * _tokens(job) * config.hidden_size * itemsize


def _tokens(job: Job) -> int:
    """Tokens of all prompts together, each as long as the longest."""
    return len(job.tokens) * max(map(_length, job.tokens.values()))


def _length(tokens: Encoded) -> int:
    return int(tokens.mask.sum())


def _batch(job: Job) -> tuple[mx.array, mx.array]:
    """ids and mask of all prompts, (prompts, tokens) int32 both."""
    tokens = job.tokens.values()
    return mx.array(np.concatenate([t.ids for t in tokens])), mx.array(np.concatenate([t.mask for t in tokens]))
