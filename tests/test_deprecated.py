"""Old names: each works as the new one does, and warns of it where it is used."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant.allocation.candidates import key_of_file, key_of_scheme
from jquant.deprecated import RENAMED, attribute
from jquant.grids import Uniform
from jquant.io.schemes import from_json, to_json

W = jnp.linspace(-1.0, 1.0, 32).reshape(4, 8)
LAYOUT = jq.Layout.of(W.shape, in_axes=(1,))


def scheme(**choices: Any) -> Any:
    return jq.Scheme(Uniform(4), **choices)


def qtensor(**choices: Any) -> Any:
    q = jq.quantize_weight(W, scheme(groups=4), LAYOUT)[0]
    return jq.QTensor(q.codes, q.params, q.grid, layout=q.layout, dtype=q.dtype, **choices)


def inputs(**choices: Any) -> Any:
    return jq.Activations(Uniform(8), **choices)


def stored(**choices: Any) -> Any:
    return jq.io.Stored((4, 8), "float32", 16, **choices)


def rounded(**choices: Any) -> Any:
    return np.asarray(jq.rounding.Nearest()(W, Uniform(4), **choices).codes).tolist()


def stages(**choices: Any) -> Any:
    params, x = {"w": W, "v": W.T}, jnp.ones((16, 4))
    fn = lambda p, x: x @ p["w"] @ p["v"]  # noqa: E731
    plan = jq.plan(jq.find_weights(fn, params, x), {".*": jq.presets.int4_gptq()})
    return jq.quantize(fn, params, plan, [x], **choices)[1].stages


# How each keyword is used, and with what.
USES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "Scheme": (scheme, {"blocks": jq.Groups("out", 2)}),
    "QTensor": (qtensor, {"blocks": jq.Groups("in", 4)}),
    "Stored": (stored, {"blocks": jq.Groups("in", 4)}),
    "Activations": (inputs, {"path": "integer"}),
    "a rounding": (rounded, {"blocks": jq.Groups("in", 2)}),
    "quantize": (stages, {"granularity": "block"}),
}

# What takes an old value by a keyword.
VALUES: dict[str, Callable[..., Any]] = {
    "quantize.sequential": stages,
    "Activations.compute": inputs,
    "LoRC.metric": lambda metric: jq.LoRC(2, metric=metric),
}
ROWS = [(place, old, new) for place, names in RENAMED.items() for old, new in names.items()]


def rows(kind: Callable[[str], bool]) -> Any:
    chosen = [row for row in ROWS if kind(row[0])]
    return pytest.mark.parametrize(
        ("place", "old", "new"), chosen, ids=[f"{p}-{old}" for p, old, _ in chosen]
    )


@rows(lambda place: place.startswith("jquant"))
def test_old_attributes_of_modules(place: str, old: str, new: str) -> None:
    module = importlib.import_module(place)
    with pytest.warns(DeprecationWarning, match=f"{place}: '{old}' is deprecated, write '{new}'"):
        value = getattr(module, old)
    assert value is getattr(module, new)
    assert old not in dir(module) and new in dir(module)


@rows(lambda place: place in USES)
def test_old_keywords_and_fields(place: str, old: str, new: str) -> None:
    make, values = USES[place]
    expected = make(**{new: values[old]})
    with pytest.warns(DeprecationWarning, match=f"{place}: '{old}' .* '{new}'") as caught:
        value = make(**{old: values[old]})
    assert [warning.filename for warning in caught] == [__file__]  # not a line of jquant
    if not dataclasses.is_dataclass(value):
        assert value == expected
        return
    assert getattr(value, new) == getattr(expected, new)
    with pytest.warns(DeprecationWarning, match=f"{place}: '{old}' .* '{new}'"):
        assert getattr(value, old) == values[old]
    with pytest.warns(DeprecationWarning, match=f"{place}: '{old}' .* '{new}'"):
        assert getattr(dataclasses.replace(value, **{old: values[old]}), new) == values[old]


@rows(lambda place: place in VALUES)
def test_old_values(place: str, old: str, new: Any) -> None:
    make, name = VALUES[place], place.rpartition(".")[2]
    expected = make(**{name: new})
    with pytest.warns(DeprecationWarning, match=f"{place}: '{old}' .* {new!r}") as caught:
        assert make(**{name: old}) == expected
    assert [warning.filename for warning in caught] == [__file__]


def test_the_old_option_of_the_command_line() -> None:
    pytest.importorskip("cyclopts")
    from jquant.app.quantizing import sequential_of

    assert sequential_of("block", None) == "block"
    for old, new in (("weight", "weight"), ("block", "block"), ("all", None)):
        with pytest.warns(DeprecationWarning, match="--granularity is deprecated, write --seq"):
            assert sequential_of("weight", old) == new


def test_every_row_is_tried() -> None:
    modules = {place for place, _, _ in ROWS if place.startswith("jquant")}
    tried = modules | USES.keys() | VALUES.keys()
    assert tried == set(RENAMED)


def test_names_that_never_were_are_no_attributes() -> None:
    assert not hasattr(jq, "Bloks")
    with pytest.raises(AttributeError, match="module 'jquant' has no attribute 'Bloks'"):
        attribute("jquant", "Bloks")


def test_files_keep_their_words() -> None:
    """Those of version 1: old files are read, and new ones by older versions."""
    words = {
        "Activations": {
            "grid": to_json(Uniform(8)),
            "granularity": "token",
            "range": {"MinMax": {}},
            "path": "simulated",
        }
    }
    for choice, written in (
        (jq.Groups("out", 4), {"Blocks": {"axis": "out", "size": 4}}),
        (inputs(compute="fake_quant"), words),
    ):
        assert to_json(choice) == written
        assert from_json(written) == choice


def test_scores_in_older_files_are_of_todays_schemes() -> None:
    scheme = jq.Scheme(Uniform(4), jq.Groups("in", 8), compensation=jq.LoRC(2, metric="hessian"))
    key = key_of_scheme(scheme)
    old = key.replace("Groups(", "Blocks(").replace("'hessian'", "'evidence'")
    assert old != key and key_of_file(old) == key == key_of_file(key)


def test_files_keep_their_words_for_fields(tmp_path) -> None:
    jq.save(tmp_path / "x.jq", {"w": jq.quantize_weight(W, scheme(groups=4), LAYOUT)[0]})
    raw = (tmp_path / "x.jq").read_bytes()
    assert rb"\"blocks\":" in raw and rb"\"Blocks\":" in raw
    assert b"groups" not in raw and b"Groups" not in raw
