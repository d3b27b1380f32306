"""A SentencePiece model (tokenizer.model, or the `spiece_model` inside ComfyUI's files) as the tokenizer.json that
generating reads: the same pieces, merged in the same order.

The file is a protocol buffer; its fields are those of sentencepiece_model.proto."""

import json
import struct
from collections.abc import Iterator
from typing import Any

from ltx2.runtime.errors import CheckpointError, reason

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # types of pieces
BPE = 2  # type of model
IDS = {"unk": 40, "bos": 41, "eos": 42, "pad": 43}  # fields of the trainer's settings
SPACE = "\u2581"
Piece = tuple[str, float, int]  # text, score, type


def tokenizer_files(model: bytes, name: str) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json of a model's bytes. Raises CheckpointError unless it is a byte-pair
    model."""
    try:
        fields = list(_fields(model))
        pieces = [_piece(dict(_fields(value))) for number, value in fields if number == 1]
        trainer = dict(_fields(next((value for number, value in fields if number == 2), b"")))
        if trainer.get(3) != BPE or not pieces:
            raise ValueError("it is no byte-pair model")
        tokens = {name: pieces[trainer.get(number, number - 40)][0] for name, number in IDS.items()}
    except (ValueError, IndexError, TypeError, struct.error) as error:
        fix = "add a folder with tokenizer.json and tokenizer_config.json, as google/gemma-3-12b-it has them"
        raise CheckpointError(f"{name} is no tokenizer", reason(error), fix) from error
    return tokenizer_of(pieces, tokens)


def tokenizer_of(pieces: list[Piece], tokens: dict[str, str]) -> dict[str, bytes]:
    """The same two files, made of pieces in the order of their ids and the special tokens by name (unk, bos, eos,
    pad)."""
    config = {f"{name}_token": token for name, token in tokens.items()} | {"add_bos_token": True}
    files = {"tokenizer.json": _tokenizer(pieces, tokens), "tokenizer_config.json": config}
    return {name: json.dumps(content, ensure_ascii=False).encode() for name, content in files.items()}


def _tokenizer(pieces: list[Piece], tokens: dict[str, str]) -> dict[str, Any]:
    vocab = {text: number for number, (text, _, _) in enumerate(pieces)}
    bos = tokens["bos"]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": number, "content": text, "special": kind != USER_DEFINED} | special
        for number, (text, _, kind) in enumerate(pieces)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    first = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    decoders = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": first,
            "pair": [*first, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {bos: {"id": bos, "ids": [vocab[bos]], "tokens": [bos]}},
        },
        "decoder": {"type": "Sequence", "decoders": [*decoders, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": tokens["unk"],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": any(kind == BYTE for _, _, kind in pieces),
            "ignore_merges": False,
            "vocab": vocab,
            "merges": _merges(pieces, vocab),
        },
    }


def _merges(pieces: list[Piece], vocab: dict[str, int]) -> list[list[str]]:
    """Every way to make a piece of two others, the pieces of higher scores first."""
    found: list[tuple[float, int, int]] = []
    for text, score, kind in pieces:
        if kind in (NORMAL, USER_DEFINED):
            cuts = [i for i in range(1, len(text)) if text[:i] in vocab and text[i:] in vocab]
            found += [(-score, left, right) for left, right in sorted((vocab[text[:i]], vocab[text[i:]]) for i in cuts)]
    found.sort(key=lambda merge: merge[0])  # stable: equal scores stay in the model's order
    return [[pieces[left][0], pieces[right][0]] for _, left, right in found]


def _piece(fields: dict[int, Any]) -> Piece:
    return fields[1].decode(), struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0, fields.get(3, NORMAL)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of every field of a message. Raises ValueError for anything else."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        if key & 7 == 0:
            value, position = _varint(data, position)
            yield key >> 3, value
            continue
        size = {1: 8, 5: 4}.get(key & 7)
        if key & 7 == 2:
            size, position = _varint(data, position)
        if size is None or position + size > len(data) or key < 8:
            raise ValueError("it is no SentencePiece model")
        yield key >> 3, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(data) and shift < 64:
        byte = data[position]
        value, shift, position = value | (byte & 127) << shift, shift + 7, position + 1
        if byte < 128:
            return value, position
    raise ValueError("it ends too early")
