"""Whatever bytes a checkpoint has, reading it ends soon, in the tree or in a `CheckpointError`."""

import copy
import json
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant import io
from jquant.errors import CheckpointError
from jquant.grids import Uniform
from jquant.io import native
from jquant.io.container import MAX_HEADER


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file with a weight of 3-bit codes -3..3, its scales, and a plain array."""
    grid, blocks = Uniform(3, symmetric=True, convention="S3"), jq.Groups("in", 8)
    layout = jq.Layout.of((16, 4), in_axes=(0,))
    codes = jnp.asarray((np.arange(64).reshape(4, 16) % 7 - 3).astype(jnp.int4))
    scale = jnp.asarray(np.arange(1, 9, dtype=np.float32).reshape(4, 2))
    q = jq.QTensor(codes, {"scale": scale}, grid, blocks, layout, jnp.dtype("float32"))
    path = tmp_path_factory.mktemp("good") / "w"
    jq.save(path, {"w": q, "b": [jnp.arange(4.0), jnp.ones((), bool)]})
    return path.read_bytes()


def refuse(path: Path, raw: bytes, match: str = ".") -> None:
    """Every way of reading these bytes must end in a `CheckpointError`, soon and cheaply."""
    path.write_bytes(raw)
    for read in (jq.load, io.read_header, lambda p: io.load_matching(p, ".*")):
        start = time.perf_counter()
        with pytest.raises(CheckpointError, match=match):
            read(path)
        assert time.perf_counter() - start < 1.0


def forge(raw: bytes, edit: Callable[[dict[str, Any], dict[str, Any]], None]) -> bytes:
    """The file with its tensors' header and jquant's body edited, and a checksum that fits."""
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    metadata = header.pop("__metadata__")
    body = json.loads(metadata["jquant"])
    edit(header, body)
    metadata["jquant"] = json.dumps(body)
    claims = {n: (e.get("dtype"), e.get("shape")) for n, e in header.items()}
    metadata["jquant.crc32"] = native._checksum(metadata, claims)
    rendered = json.dumps({"__metadata__": metadata, **header}).encode()
    return len(rendered).to_bytes(8, "little") + rendered + raw[8 + length :]


def container(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def test_the_forger_changes_nothing_by_itself(good: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(forge(good, lambda header, body: None))
    assert jq.load(tmp_path / "x")["b"][0].tolist() == [0.0, 1.0, 2.0, 3.0]


# Damage


def test_truncated_anywhere(good: bytes, tmp_path: Path) -> None:
    for size in {*range(0, len(good), 97), *range(16), *range(len(good) - 9, len(good))}:
        refuse(tmp_path / "x", good[:size])
    refuse(tmp_path / "x", good + b"\0")


@hypothesis.settings(max_examples=300)
@hypothesis.given(data=st.data())
def test_any_flipped_bit_is_noticed(good: bytes, tmp_path_factory, data) -> None:
    """Or changes nothing, as in the spaces that pad the header."""
    path = tmp_path_factory.getbasetemp() / "flipped"
    raw = bytearray(good)
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(raw)
    try:
        tree = jq.load(path)
    except CheckpointError:
        return
    path.write_bytes(good)
    expected = jq.load(path)
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for got, wanted in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        assert np.asarray(got).tobytes() == np.asarray(wanted).tobytes()


@hypothesis.given(raw=st.binary(max_size=300), fitting=st.booleans())
def test_random_bytes(raw: bytes, fitting: bool, tmp_path_factory) -> None:
    refuse(tmp_path_factory.getbasetemp() / "random", container(raw) if fitting else raw)


# Headers that lie about sizes


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (container(b"{}", length=2**63), "claims 9223372036854775808"),
        (container(b"{}", length=2**64 - 1), "claims"),
        (container(b"{}", length=3), "claims 3"),
        (container(b""), "not JSON"),
        (container(b"[]"), "not a JSON object"),
        (container(b"\xff\xfe"), "not JSON"),
        (container(b'{"a":1,"a":2}'), "repeats a key"),
        (container(b'{"a":' * 100_000), "nested too deeply|not JSON"),
        (container(b"[" * 5_000_000), "nested too deeply|not JSON"),
        (container(b'{"a":' + b"9" * 1_000_000 + b"}"), "not JSON"),
        (container(b'{"__metadata__":{"a":1}}'), "__metadata__"),
        (container(b'{"__metadata__":3}'), "__metadata__"),
        (container(b"{}"), "jquant did not write"),
        (container(json.dumps({"a": F32}).encode(), b"\0" * 8), "jquant did not write"),
        (b"\x80\x04\x95" + b"cos\nsystem\n" * 9, "not a safetensors file"),
    ],
)
def test_containers_that_are_none(raw: bytes, match: str, tmp_path: Path) -> None:
    refuse(tmp_path / "x", raw, match)


@pytest.mark.parametrize(
    ("claim", "match"),
    [
        ({"dtype": "F31"}, "unknown dtype"),
        ({"dtype": ["F32"]}, "unknown dtype"),
        ({"shape": [3]}, "takes 12 bytes"),
        ({"shape": [-2]}, "malformed shape"),
        ({"shape": [True, 2]}, "malformed shape"),
        ({"shape": [2.0]}, "malformed shape"),
        ({"shape": [2**62, 2**62]}, "malformed shape"),
        ({"shape": [2**40, 2**40, 2**40]}, "takes"),
        ({"shape": [0] * 100}, "malformed shape"),
        ({"shape": 2}, "malformed shape"),
        ({"data_offsets": [8, 0]}, "takes 8 bytes"),
        ({"data_offsets": [0, 2**60]}, "malformed data_offsets"),
        ({"data_offsets": [8, 16]}, "begins at byte"),
        ({"data_offsets": [-8, 0]}, "malformed data_offsets"),
        ({"extra": 1}, "expected dtype, shape and data_offsets"),
    ],
)
def test_tensors_that_are_none(claim: dict[str, Any], match: str, tmp_path: Path) -> None:
    header = json.dumps({"a": {**F32, **claim}}).encode()
    refuse(tmp_path / "x", container(header, b"\0" * 8), match)


def test_overlaps_gaps_and_leftovers(tmp_path: Path) -> None:
    second = {**F32, "data_offsets": [4, 12]}
    header = json.dumps({"a": F32, "b": second}).encode()
    refuse(tmp_path / "x", container(header, b"\0" * 12), "begins at byte")
    second["data_offsets"] = [12, 20]
    header = json.dumps({"a": F32, "b": second}).encode()
    refuse(tmp_path / "x", container(header, b"\0" * 20), "begins at byte")
    refuse(tmp_path / "x", container(json.dumps({"a": F32}).encode(), b"\0" * 9), "tensors end")


def test_a_header_larger_than_any_real_one_is_not_parsed(tmp_path: Path) -> None:
    refuse(tmp_path / "x", container(b" " * (MAX_HEADER + 8)), "at most")


# Bodies that lie about the tree: the checksums fit, as an attacker's would


def edits() -> dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], Any], str]]:
    def weight(body: dict[str, Any]) -> dict[str, Any]:
        return body["tree"]["dict"][0][1]

    def scheme(body: dict[str, Any]) -> dict[str, Any]:
        return body["static"][0]

    def codes(body: dict[str, Any]) -> dict[str, Any]:
        return weight(body)["fields"]["codes"]

    def set_uniform(**fields: Any) -> Callable[[dict[str, Any], dict[str, Any]], Any]:
        return lambda header, body: scheme(body)["grid"]["Uniform"].update(fields)

    def deep(header: dict[str, Any], body: dict[str, Any]) -> None:
        for _ in range(300):
            body["tree"] = {"list": [body["tree"]]}

    def moved(header: dict[str, Any], body: dict[str, Any]) -> None:
        header["w/params/scale"]["shape"] = [2, 4]

    def layout(body: dict[str, Any]) -> list[Any]:
        return scheme(body)["layout"]["Layout"]["axes"]

    wide = {"Factor": {"role": "out", "place": 1, "size": 2**40}}
    return {
        "newer version": (lambda h, b: b.update(version=2), "version 2; this jquant reads"),
        "no version": (lambda h, b: b.pop("version"), "version None"),
        "no tree": (lambda h, b: b.pop("tree"), "belong to no leaf"),
        "a tree of numbers": (lambda h, b: b.update(tree=3), "malformed"),
        "schemes that are none": (lambda h, b: b.update(static=3), "list of schemes"),
        "unknown class": (lambda h, b: weight(b).update({"class": "Popen"}), "unknown class"),
        "unknown grid": (
            lambda h, b: scheme(b).update(grid={"os.system": {"command": "x"}}), "does not have",
        ),
        "a dunder": (lambda h, b: scheme(b).update(grid={"__class__": {}}), "does not have"),
        "grid without fields": (lambda h, b: scheme(b).update(grid={"Uniform": {}}), "fields"),
        "grid that is a number": (lambda h, b: scheme(b).update(grid=4), "makes no sense"),
        "grid that is blocks": (
            lambda h, b: scheme(b).update(grid=scheme(b)["blocks"]), "makes no sense",
        ),
        "bits as text": (set_uniform(bits="3"), "refuses"),
        "bits without end": (set_uniform(bits=10**30), "integer of 100 bits"),
        "many bits": (set_uniform(bits=10**9), "refuses"),
        "other bits": (set_uniform(bits=4), "not a stream of codes"),
        "other convention": (set_uniform(convention="S1"), "not a stream of codes -4..3"),
        "unhashable grid": (set_uniform(convention={"x": []}), "scheme names 'x'|refuses"),
        "unknown dtype": (lambda h, b: scheme(b).update(dtype={"dtype": "object"}), "dtype"),
        "dtype of ints": (lambda h, b: scheme(b).update(dtype={"dtype": "int8"}), "dtype"),
        "dtype as text": (lambda h, b: scheme(b).update(dtype="object"), "makes no sense"),
        "no such scheme": (lambda h, b: weight(b).update(static=1), "no scheme of the file"),
        "negative scheme": (lambda h, b: weight(b).update(static=-1), "no scheme of the file"),
        "missing scheme field": (lambda h, b: scheme(b).pop("blocks"), "has not the fields"),
        "missing field": (lambda h, b: weight(b)["fields"].pop("codes"), "has not the fields"),
        "no parameters": (
            lambda h, b: weight(b)["fields"].update(params=None), "makes no sense|belong",
        ),
        "other parameter": (
            lambda h, b: weight(b)["fields"]["params"]["dict"][0].__setitem__(0, "zero"),
            "makes no sense",
        ),
        "parameters of another shape": (moved, "makes no sense"),
        "group of another size": (
            lambda h, b: scheme(b)["blocks"]["Blocks"].update(size=4), "makes no sense",
        ),
        "group of no size": (lambda h, b: scheme(b)["blocks"]["Blocks"].update(size=0), "refuses"),
        "layout of another size": (
            lambda h, b: layout(b)[0][0]["Factor"].update(size=17), "makes no sense",
        ),
        "layout of a negative size": (
            lambda h, b: layout(b)[0][0]["Factor"].update(size=-16), "makes no sense",
        ),
        "huge layout": (lambda h, b: layout(b)[0].append(wide), "makes no sense"),
        "layout of text": (lambda h, b: layout(b).__setitem__(0, "in"), "makes no sense"),
        "codes of another width": (lambda h, b: codes(b).update(bits=2), "does not fit"),
        "codes of no width": (lambda h, b: codes(b).update(bits=0), "does not fit"),
        "codes beyond their dtype": (lambda h, b: codes(b).update(low=-9), "does not fit"),
        "codes shifted": (lambda h, b: codes(b).update(low=-4), "not a stream of codes"),
        "codes of floats": (lambda h, b: codes(b).update(dtype="float32"), "does not fit"),
        "codes of objects": (lambda h, b: codes(b).update(dtype="object"), "malformed dtype"),
        "more codes": (lambda h, b: codes(b).update(shape=[4, 32]), "does not fit"),
        "huge codes": (lambda h, b: codes(b).update(shape=[2**46, 2**46]), "does not fit"),
        "codes of rank 1": (lambda h, b: codes(b).update(shape=[64]), "makes no sense"),
        "codes without checksum": (lambda h, b: codes(b).pop("crc32"), "no checksum"),
        "codes that are missing": (lambda h, b: codes(b).update(array="v"), "is missing"),
        "codes used twice": (lambda h, b: codes(b).update(array="b/0"), "does not fit|used twice"),
        "an array of no name": (lambda h, b: codes(b).update(array=[]), "is missing"),
        "a weight in a weight": (
            lambda h, b: weight(b)["fields"].update(codes=copy.deepcopy(weight(b))),
            "makes no sense|used twice",
        ),
        "unused tensor": (lambda h, b: b["tree"]["dict"].pop(), "belong to no leaf"),
        "unknown node": (lambda h, b: b["tree"].update(set=[]), "no known kind"),
        "a set": (lambda h, b: b.update(tree={"set": []}), "unknown kind"),
        "repeated key": (
            lambda h, b: b["tree"]["dict"].append(["b", None]), "malformed or repeated keys",
        ),
        "unhashable key": (lambda h, b: b["tree"]["dict"].append([[], None]), "malformed"),
        "deep tree": (deep, "nested too deeply"),
    }  # fmt: skip


@pytest.mark.parametrize("name", edits())
def test_bodies_that_lie(name: str, good: bytes, tmp_path: Path) -> None:
    edit, match = edits()[name]
    refuse(tmp_path / "x", forge(good, edit), match)


def test_codes_off_their_grid(good: bytes, tmp_path: Path) -> None:
    """3-bit code 7 is the eighth of seven values; its checksum fits."""
    length = int.from_bytes(good[:8], "little")
    entry = json.loads(good[8 : 8 + length])["w/codes"]
    begin, end = (8 + length + at for at in entry["data_offsets"])
    raw = good[:begin] + b"\xff" * (end - begin) + good[end:]

    def edit(header: dict[str, Any], body: dict[str, Any]) -> None:
        crc = f"{zlib.crc32(raw[begin:end]):08x}"
        body["tree"]["dict"][0][1]["fields"]["codes"]["crc32"] = crc

    (tmp_path / "x").write_bytes(forge(raw, edit))
    with pytest.raises(CheckpointError, match="code 4 is off its grid"):
        jq.load(tmp_path / "x")


def test_lies_about_size_allocate_nothing(good: bytes, tmp_path: Path) -> None:
    lies = [edits()[name][0] for name in ("huge codes", "huge layout", "bits without end")]
    for lie in lies:
        (tmp_path / "x").write_bytes(forge(good, lie))
        tracemalloc.start()
        with pytest.raises(CheckpointError):
            jq.load(tmp_path / "x")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 20e6


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        jq.load(tmp_path / "x")
    with pytest.raises(IsADirectoryError):
        jq.load(tmp_path)
