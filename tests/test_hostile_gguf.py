"""Truncated, flipped and forged GGUF files end in a `CheckpointError`, soon and in little memory.

A tiny valid file is cut at every byte of its header and has bits flipped all over it; forged
headers claim absurd counts, lengths, shapes and places. What still loads is whole and finite.
"""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
from checkpoints import byte_tokenizer, piece_tokenizer, torch_model, write_gguf

from jquant import models
from jquant.errors import CheckpointError
from jquant.models.gguf_file import read_gguf
from jquant.models.tokenizing import tokenizer_named

UINT32, FLOAT32, STRING, ARRAY = 4, 6, 8, 9


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "valid.gguf"
    model = torch_model(
        tie_word_embeddings=True, hidden_size=32, intermediate_size=32, num_hidden_layers=1
    )
    kinds = {"ffn": "Q4_1", "attn": "Q8_0", "token": "F16"}
    return write_gguf(path, model, kinds, tokenizer=byte_tokenizer()).read_bytes()


def header_end(path: Path) -> int:
    return min(info.start for info in read_gguf(path).tensors.values())


def test_every_truncation_is_refused(valid: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(valid)
    models.load(path)
    end = header_end(path)
    cuts = [*range(end), *range(end, len(valid) - 1, 997)]
    for cut in cuts:
        path.write_bytes(valid[:cut])
        with pytest.raises(CheckpointError, match="cut.gguf"):
            (models.load if cut % 50 == 0 else read_gguf)(path)


# A flip in the key's own name leaves a file without it, of which the user is told.
@pytest.mark.filterwarnings("ignore:the file has no tokenizer.ggml.pre")
def test_flipped_bits_are_refused_or_harmless(valid: bytes, tmp_path: Path) -> None:
    path = tmp_path / "flipped.gguf"
    path.write_bytes(valid)
    end = header_end(path)
    shapes = jax.tree.map(np.shape, models.load(path)[1])
    rng = np.random.default_rng(0)
    refused = 0
    # numbers hide between long names: half of the flips go to bytes below 16
    small = [i for i in range(end) if valid[i] < 16]
    places = [
        *rng.choice(small, 250),
        *rng.integers(0, end, 150),
        *rng.integers(end, len(valid), 50),
    ]
    for place in places:
        damaged = bytearray(valid)
        damaged[place] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            fn, params, _ = models.load(path)
        except CheckpointError as error:
            assert "flipped.gguf" in str(error)
            refused += 1
        else:
            assert jax.tree.map(np.shape, params) == shapes
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert refused > 100


def test_flipped_bits_of_pieces_and_scores_are_refused_or_harmless(
    valid: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "pieces.gguf"
    network = torch_model(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    write_gguf(path, network, tokenizer=piece_tokenizer("the there then"))
    whole = path.read_bytes()
    start, end = whole.index(b"tokenizer.ggml.model"), whole.index(b"output_norm.weight")
    rng = np.random.default_rng(0)
    refused = 0
    for place in rng.integers(start, end, 200):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            tokenizer_named(path)("the then<|go|>there é")
        except CheckpointError:
            refused += 1
    assert refused > 20


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def entry(key: bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def tensor(name: bytes, shape: list[int], kind: int = 0, offset: int = 0) -> bytes:
    axes = struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
    return string(name) + axes + struct.pack("<IQ", kind, offset)


def forged(
    tensors: list[bytes] = [],  # noqa: B006
    entries: list[bytes] = [],  # noqa: B006
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    data: int = 4096,
) -> bytes:
    counts = counts or (len(tensors), len(entries))
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join([*entries, *tensors])
    return head + bytes(-len(head) % 32) + bytes(data)


HUGE = 2**64 - 1
FORGED = {
    "empty": (b"", "0 bytes"),
    "magic only": (b"GGUF", "4 bytes"),
    "another file": (b"PK\x03\x04" + bytes(100), "starts with b'PK"),
    "noise": (np.random.default_rng(1).bytes(5000), "starts with"),
    "noise behind the magic": (b"GGUF\x03\0\0\0" + np.random.default_rng(2).bytes(5000), "claims"),
    "old": (forged(version=1), "GGUF version 1"),
    "big-endian": (forged(version=0x03000000), "big-endian"),
    "many tensors": (forged(counts=(HUGE, 0)), f"claims {HUGE} tensors"),
    "many entries": (forged(counts=(0, 2**40)), "metadata entries"),
    "entries of a large file": (forged(counts=(0, 2**20), data=2**24), "at most 65536"),
    "long key": (forged(entries=[struct.pack("<Q", HUGE)]), "a metadata key claims"),
    "key over the end": (forged(entries=[struct.pack("<Q", 900)], data=64), "needs 900 bytes"),
    "key not text": (forged(entries=[entry(b"\xff\xfe", UINT32, bytes(4))]), "not UTF-8"),
    "same key": (forged(entries=[entry(b"a", UINT32, bytes(4))] * 2), "'a' appears twice"),
    "unknown kind": (forged(entries=[entry(b"a", 99, b"")]), "unknown type 99"),
    "long string": (forged(entries=[entry(b"a", STRING, struct.pack("<Q", 2**62))]), "needs"),
    "many strings": (
        forged(entries=[entry(b"a", ARRAY, struct.pack("<IQ", STRING, 2**50))]),
        "strings in 'a'",
    ),
    "strings of a large file": (
        forged(entries=[entry(b"a", ARRAY, struct.pack("<IQ", STRING, 3 << 20))], data=32 << 20),
        "at most 2097152",
    ),
    "many numbers": (
        forged(entries=[entry(b"a", ARRAY, struct.pack("<IQ", FLOAT32, 2**61))]),
        "numbers in 'a'",
    ),
    "nested arrays": (
        forged(entries=[entry(b"a", ARRAY, struct.pack("<IQ", ARRAY, 2) * 100)]),
        "array of type 9",
    ),
    "alignment 0": (
        forged(entries=[entry(b"general.alignment", UINT32, struct.pack("<I", 0))]),
        "power of two",
    ),
    "alignment 24": (
        forged(entries=[entry(b"general.alignment", UINT32, struct.pack("<I", 24))]),
        "power of two",
    ),
    "no axes": (forged([tensor(b"t", [])]), "has 0 axes"),
    "many axes": (forged([string(b"t") + struct.pack("<I", 2**32 - 1)]), "axes"),
    "empty axis": (forged([tensor(b"t", [4, 0])]), r"shape \[4, 0\]"),
    "endless axis": (forged([tensor(b"t", [HUGE, HUGE])]), "has the shape"),
    "overflowing product": (forged([tensor(b"t", [2**40, 2**40, 2**40, 2**40])]), "claims bytes"),
    "past the end": (forged([tensor(b"t", [32], offset=1 << 20)]), "claims bytes"),
    "offset that wraps": (forged([tensor(b"t", [32], offset=2**64 - 32)]), "claims bytes"),
    "offset off the grid": (forged([tensor(b"t", [32], offset=4)]), "aligned to 32"),
    "unknown tensor type": (forged([tensor(b"t", [32], kind=200)]), "unknown type 200"),
    "part of a block": (forged([tensor(b"t", [33], kind=8)]), "packs blocks of 32"),
    "same tensor": (forged([tensor(b"t", [8]), tensor(b"t", [8], offset=32)]), "appears twice"),
    "overlap": (forged([tensor(b"t", [16]), tensor(b"u", [8], offset=32)]), "overlap"),
    "nothing inside": (forged(), "general.architecture is missing"),
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_headers_are_refused(case: str, tmp_path: Path) -> None:
    content, message = FORGED[case]
    path = tmp_path / "forged.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=message) as caught:
            models.load(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 1000


def llama(**changes: bytes) -> bytes:
    """A header that is well formed, with `changes` to what it says of the network."""
    said = {
        "block_count": struct.pack("<II", UINT32, 1),
        "embedding_length": struct.pack("<II", UINT32, 32),
        "feed_forward_length": struct.pack("<II", UINT32, 32),
        "attention.head_count": struct.pack("<II", UINT32, 4),
    }
    said.update({key.replace("__", "."): value for key, value in changes.items()})
    entries = [entry(b"general.architecture", STRING, string(b"llama"))]
    entries += [string(f"llama.{key}".encode()) + value for key, value in said.items()]
    return forged([tensor(b"token_embd.weight", [32, 8])], entries)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "'output_norm.weight' is missing"),
        (dict(block_count=struct.pack("<II", UINT32, 2**32 - 1)), "block_count"),
        (dict(block_count=struct.pack("<If", FLOAT32, 1.0)), "block_count = 1.0"),
        (dict(attention__head_count=struct.pack("<II", UINT32, 0)), "head_count = 0"),
        (dict(attention__head_count=struct.pack("<II", UINT32, 5)), "head_dim|heads|rope|missing"),
        (dict(attention__key_length=struct.pack("<II", UINT32, 2**31)), "key_length"),
        (dict(attention__head_count=struct.pack("<IIQII", ARRAY, UINT32, 2, 4, 4)), "head_count"),
        (dict(embedding_length=struct.pack("<II", UINT32, 64)), "token_embd.weight.*has shape"),
        (dict(expert_count=struct.pack("<II", UINT32, 8)), "expert_count = '8' is not supported"),
        (dict(rope__freq_base=struct.pack("<If", FLOAT32, float("nan"))), "freq_base = nan"),
        (dict(rope__dimension_count=struct.pack("<II", UINT32, 4)), "dimension_count"),
        (dict(rope__scaling__type=struct.pack("<I", STRING) + string(b"yarn")), "yarn"),
    ],
)
def test_false_networks_are_refused(changes: dict, message: str, tmp_path: Path) -> None:
    path = tmp_path / "false.gguf"
    path.write_bytes(llama(**changes))
    with pytest.raises(CheckpointError, match=message):
        models.load(path)


def test_weights_of_a_type_without_values(valid: bytes, tmp_path: Path) -> None:
    path = tmp_path / "kinds.gguf"
    path.write_bytes(valid)
    at = valid.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8
    assert struct.unpack_from("<I", valid, at) == (0,)
    path.write_bytes(valid[:at] + struct.pack("<I", 26) + valid[at + 4 :])  # F32 becomes I32
    with pytest.raises(CheckpointError, match="'output_norm.weight' has type I32"):
        models.load(path)


def test_a_type_that_holds_no_numbers_is_refused_before_it_is_read(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("codes", np.zeros((4, 32), np.int8))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"m.gguf: tensor 'codes' has type I8, .* convert"):
        read_gguf(tmp_path / "m.gguf").tensor("codes")
