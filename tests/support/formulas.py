"""The audio-video transformer as formulas in float64 numpy: an independent implementation of what diffusers computes in
another way or not at all (noise levels per token, kept streams, attention strengths)."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
EPS = 1e-6


@dataclass
class Given:
    """One stream at one call. Arrays have no batch axis."""

    tokens: Array  # (tokens, channels)
    levels: Array  # (tokens,) noise level of each
    sigma: float
    text: Array  # (text tokens, width) as the connectors give it
    positions: Array  # (axes, tokens)
    marked: Array | None = None  # (tokens,) bool
    strength: Array | None = None  # (tokens, tokens) of self-attention, 0 to 1
    passing: set[int] = field(default_factory=set)  # blocks that skip self-attention
    idle: bool = False


class Formulas:
    """`parameters` by our names, `config` the transformer's section."""

    def __init__(self, parameters: dict[str, Array], config: dict[str, Any]) -> None:
        self.parameters = {name: np.asarray(value, np.float64) for name, value in parameters.items()}
        self.config = config

    def velocities(self, given: dict[str, Given], exchange: bool = True) -> dict[str, Array]:
        """By stream name."""
        x, config = {}, self.config
        for name, stream in given.items():
            x[name] = self.linear(_prefix(name) + "patchify_proj", stream.tokens)
            if stream.marked is not None and "keyframes_abs_pos_embedding" in self.parameters:
                x[name][stream.marked] += self.parameters["keyframes_abs_pos_embedding"][0]
        for number in range(config["num_layers"]):
            block = f"transformer_blocks.{number}."
            for name, stream in given.items():
                if not stream.idle:
                    x[name] = self.alone(block, name, stream, x[name], number in stream.passing)
            if exchange and len(given) == 2:
                x = self.exchanged(block, given, x)
            for name, stream in given.items():
                if not stream.idle:
                    shift, scale, gate = self.modulation(block, name, stream)[3:6]
                    x[name] = x[name] + gate * self.feed(
                        block + _prefix(name) + "ff", rms(x[name]) * (1 + scale) + shift
                    )
        return {name: self.head(name, stream, x[name]) for name, stream in given.items() if not stream.idle}

    def alone(self, block: str, name: str, stream: Given, x: Array, passing: bool) -> Array:
        """Self-attention and attention to the text."""
        prefix, rows = _prefix(name), self.modulation(block, name, stream)
        normed, rope = rms(x) * (1 + rows[1]) + rows[0], self.rope(name, stream.positions, name)
        bias = None if stream.strength is None else np.log(np.maximum(stream.strength, 1e-300))
        attn1 = block + prefix + "attn1"
        x = x + rows[2] * self.attention(attn1, name, normed, normed, (rope, rope), bias=bias, passing=passing)
        text, query, gate = self.text(name, stream.text), rms(x), 1.0
        if self.config.get("cross_attention_adaln"):
            query, gate = query * (1 + rows[7]) + rows[6], rows[8]
            table = self.parameters[f"{block}{prefix}prompt_scale_shift_table"]
            if self.config.get("use_prompt_adaln_single", True):
                sigma = 1000 * np.array([stream.sigma])
                table = table + self.adaln(prefix + "prompt_adaln_single", sigma)[0][0]
            text = text * (1 + table[1]) + table[0]
        return x + gate * self.attention(f"{block}{prefix}attn2", name, query, text)

    def exchanged(self, block: str, given: dict[str, Given], x: dict[str, Array]) -> dict[str, Array]:
        """Both directions, from the streams before either."""
        updated, directions = dict(x), (("video", "audio", "audio_to_video"), ("audio", "video", "video_to_audio"))
        for number, (to, of, layer) in enumerate(directions):
            if given[to].idle:
                continue
            sides = {}
            for name in (to, of):
                table = self.parameters[f"{block}scale_shift_table_a2v_ca_{name}"]
                levels, _ = self.adaln(f"av_ca_{name}_scale_shift_adaln_single", 1000 * given[name].levels)
                scale, shift = (table[row] + levels[:, row] for row in (2 * number, 2 * number + 1))
                sides[name] = rms(x[name]) * (1 + scale) + shift
            sigma = self.config["av_ca_timestep_scale_multiplier"] * np.array([given[of].sigma])
            network = f"av_ca_{'a2v' if number == 0 else 'v2a'}_gate_adaln_single"
            gate = self.parameters[f"{block}scale_shift_table_a2v_ca_{to}"][4] + self.adaln(network, sigma)[0][0, 0]
            ropes = tuple(self.rope("audio", given[name].positions[:1], "cross") for name in (to, of))
            attended = self.attention(f"{block}{layer}_attn", "audio", sides[to], sides[of], ropes)
            updated[to] = x[to] + gate * attended
        return updated

    def attention(
        self,
        layer: str,
        size: str,
        x: Array,
        context: Array,
        ropes: Any = None,
        *,
        bias: Any = None,
        passing: bool = False,
    ) -> Array:
        heads = self.config[f"{_prefix(size)}num_attention_heads"]

        def split(values: Array) -> Array:
            return values.reshape(len(values), heads, -1).transpose(1, 0, 2)

        q, k = (
            rms(self.linear(f"{layer}.to_{part}", of)) * self.parameters[f"{layer}.{part}_norm.weight"]
            for part, of in (("q", x), ("k", context))
        )
        q, k, v = split(q), split(k), split(self.linear(f"{layer}.to_v", context))
        if ropes is not None:
            q, k = rotate(q, ropes[0]), rotate(k, ropes[1])
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1]) + (0 if bias is None else bias)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out = v if passing else (weights / weights.sum(axis=-1, keepdims=True)) @ v
        if self.config.get("apply_gated_attention"):
            out = out * (2 / (1 + np.exp(-self.linear(f"{layer}.to_gate_logits", x)))).T[:, :, None]
        return self.linear(f"{layer}.to_out", out.transpose(1, 0, 2).reshape(len(x), -1))

    def modulation(self, block: str, name: str, stream: Given) -> Array:
        """(rows, tokens, dim)"""
        table = self.parameters[f"{block}{_prefix(name)}scale_shift_table"]
        levels, _ = self.adaln(_prefix(name) + "adaln_single", 1000 * stream.levels)
        return (table + levels).transpose(1, 0, 2)

    def adaln(self, network: str, timesteps: Array) -> tuple[Array, Array]:
        """(timesteps, rows, dim) and the embedded timesteps (timesteps, dim)."""
        angles = timesteps[:, None] * 10000.0 ** (-np.arange(128) / 128)
        embedder = f"{network}.emb.timestep_embedder.linear_"
        embedded = self.linear(f"{embedder}1", np.concatenate([np.cos(angles), np.sin(angles)], axis=1))
        embedded = self.linear(f"{embedder}2", silu(embedded))
        return self.linear(f"{network}.linear", silu(embedded)).reshape(len(timesteps), -1, embedded.shape[1]), embedded

    def rope(self, size: str, positions: Array, kind: str) -> tuple[Array, Array]:
        """Cosines and sines (heads, tokens, half a head)."""
        config, limits = self.config, {"video": [20, 2048, 2048], "audio": [20], "cross": [20]}[kind]
        heads, head_dim = (config[f"{_prefix(size)}{key}"] for key in ("num_attention_heads", "attention_head_dim"))
        count = heads * head_dim // (2 * len(limits))
        frequencies = (10000.0 ** np.linspace(0, 1, count) * np.pi / 2).astype(np.float32).astype(np.float64)
        fractions = 2 * positions.T / np.array(limits) - 1  # (tokens, axes)
        angles = (frequencies[None, :, None] * fractions[:, None]).reshape(positions.shape[1], -1)
        angles = np.pad(angles, [(0, 0), (heads * head_dim // 2 - angles.shape[1], 0)])
        angles = angles.reshape(len(angles), heads, -1).transpose(1, 0, 2)
        return np.cos(angles), np.sin(angles)

    def text(self, name: str, text: Array) -> Array:
        projection = f"{_prefix(name)}caption_projection.linear_"
        if f"{projection}1.weight" not in self.parameters:
            return text
        return self.linear(f"{projection}2", gelu(self.linear(f"{projection}1", text)))

    def feed(self, layer: str, x: Array) -> Array:
        return self.linear(f"{layer}.proj_out", gelu(self.linear(f"{layer}.proj_in", x)))

    def head(self, name: str, stream: Given, x: Array) -> Array:
        _, embedded = self.adaln(_prefix(name) + "adaln_single", 1000 * stream.levels)
        shift, scale = self.parameters[_prefix(name) + "scale_shift_table"][:, None] + embedded
        centred = x - x.mean(axis=1, keepdims=True)
        normed = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + EPS)
        return self.linear(_prefix(name) + "proj_out", normed * (1 + scale) + shift)

    def linear(self, layer: str, x: Array) -> Array:
        return x @ self.parameters[f"{layer}.weight"].T + self.parameters.get(f"{layer}.bias", 0)


def _prefix(name: str) -> str:
    return "audio_" if name == "audio" else ""


def rms(x: Array) -> Array:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + EPS)


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def rotate(x: Array, rope: tuple[Array, Array]) -> Array:
    a, b = np.split(x, 2, axis=-1)
    cos, sin = rope
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
