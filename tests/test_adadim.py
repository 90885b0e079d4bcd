"""AdaDim: what each weight is compared on, the choice against a naive reference, per-IC groups."""

from __future__ import annotations

import functools
import io
import json
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from oracles import gptq as gptq_oracle
from oracles.adadim import a2_fit, a2_round, fake_quantize

import jquant as jq
from jquant.calibration import segments
from jquant.calibration.cutting import Recording
from jquant.calibration.data import Data
from jquant.calibration.walk import Walk
from jquant.errors import EvidenceError, PlanError, WeightError
from jquant.grids import Uniform
from jquant.models.config import DecoderConfig
from jquant.models.decoder import Decoder
from jquant.rounding import GPTQ
from jquant.weights.leaves import Leaves
from tests.cases import layer
from tests.marks import mostly_slow
from tests.networks import NETWORKS

BITS, GROUP = 3, 4
A2 = Uniform(BITS, convention="A2")
SCHEME = jq.Scheme(A2, GROUP)
adadim = jq.allocation.adadim


def normal(seed: int, *shape: int, scale: float = 1.0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale, jnp.float32)


def plan_of(fn: Any, params: Any, batch: Any, scheme: jq.Scheme = SCHEME) -> jq.Plan:
    """Every weight that has inputs."""
    weights = jq.find_weights(fn, params, *(batch if isinstance(batch, tuple) else (batch,)))
    return jq.plan(weights, {re.escape(p): scheme for p, w in weights.items() if w.has_inputs})


# When per-IC wins: the four cases of the specification, 3 bit, groups of 128, 512 × 512. Five input
# channels carry activations 20 times as large. Over 12 seeds the ratios of per-IC to per-OC error
# were 1.009 ± 0.039, 0.285 ± 0.006, 6.03 ± 0.69 and 2.21 ± 0.23 (mean and deviation of one seed);
# the tolerance is three deviations of the mean of the seeds below, and what the figures of the
# specification are off from that.

CASES = {
    "homogeneous": (1.02, 0.06),
    "outliers 4x smaller": (0.28, 0.012),
    "outliers 4x larger": (6.3, 1.1),
    "rows of unlike scale": (2.3, 0.37),
}
SEEDS = range(6)


def case(name: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A weight `[out, in]` and inputs `[tokens, in]`."""
    random = np.random.default_rng(seed)
    w, x = random.normal(size=(512, 512)), random.normal(size=(512, 512))
    channels = random.choice(512, 5, replace=False)
    x[:, channels] *= 20
    if name == "outliers 4x smaller":
        w[:, channels] /= 4
    elif name == "outliers 4x larger":
        w[:, channels] *= 4
    elif name == "rows of unlike scale":
        w *= np.exp(0.7 * random.normal(size=(512, 1)))
    return w.astype(np.float32), x.astype(np.float32)


@pytest.mark.parametrize("name", CASES)
def test_the_four_cases(name: str) -> None:
    def fn(params: Any, x: jax.Array) -> jax.Array:
        return x @ params["w"].T

    wanted, tolerance = CASES[name]
    ratios = []
    for seed in SEEDS:
        w, x = case(name, seed)
        params, batches = {"w": jnp.asarray(w)}, [jnp.asarray(x[:256]), jnp.asarray(x[256:])]
        plan = plan_of(fn, params, batches[0], jq.Scheme(A2, 128))
        found, choices = adadim(fn, params, plan, batches)
        losses = [
            np.mean((x.astype(float) @ (fake_quantize(w, BITS, 128, axis) - w).T) ** 2)
            for axis in ("in", "out")
        ]
        np.testing.assert_allclose(choices["w"].losses, losses, rtol=1e-4)
        axis = "out" if losses[1] < losses[0] else "in"
        assert choices["w"].axis == axis
        assert found["w"] == jq.Scheme(A2, jq.Groups(axis, 128))
        ratios.append(losses[1] / losses[0])
    assert abs(np.mean(ratios) - wanted) < tolerance


# The choice against a reference that runs the whole network for every candidate. Networks are told
# apart from their taps: `tap(name, value)` names a value, and by hand it is written which of them
# each weight is to be compared on, and which weights are decided beside each other.

Tap = Callable[[str, jax.Array], jax.Array]


class Tapped(NamedTuple):
    run: Callable[[Any, jax.Array, Tap], jax.Array]
    params: dict[str, jax.Array]
    batches: list[jax.Array]
    levels: list[tuple[str, ...]]
    taps: dict[str, str]

    def fn(self) -> Callable[..., Any]:
        return lambda params, x: self.run(params, x, lambda name, value: value)


def norm(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)


def rotated(x: jax.Array) -> jax.Array:
    """Rotary positions: an addition of two values that both come from the projection."""
    angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * jnp.array([1.0, 0.3], jnp.float32)
    one, two = jnp.split(x, 2, -1)
    cos, sin = (jnp.repeat(f(angle), x.shape[-1] // 4, -1) for f in (jnp.cos, jnp.sin))
    return jnp.concatenate([one * cos - two * sin, two * cos + one * sin], -1)


def attention(p: Any, k: int, h: jax.Array) -> jax.Array:
    q, key, v = (h @ p[f"{k}_{name}"] + p[f"{k}_{name}_bias"] for name in "qkv")
    scores = jnp.einsum("btd,bsd->bts", rotated(q), rotated(key))
    time = jnp.arange(h.shape[1])
    causal = jnp.where(time[:, None] >= time, 0.0, -1e9)  # added, but carries no data
    return jnp.einsum("bts,bsd->btd", jax.nn.softmax(scores + causal), v) @ p[f"{k}_o"]


def mlp(p: Any, k: int, h: jax.Array) -> jax.Array:
    return (jax.nn.silu(h @ p[f"{k}_gate"]) * (h @ p[f"{k}_up"])) @ p[f"{k}_down"]


def transformer(depth: int = 2, width: int = 8, parallel: bool = False) -> Tapped:
    """Inputs are the residual stream itself; `parallel`: attention and MLP on one norm."""
    params, levels, taps = {}, [], {}
    for k in range(depth):
        shapes = dict.fromkeys("qkvo", (width, width)) | {
            "gate": (width, 12), "up": (width, 12), "down": (12, width)
        }  # fmt: skip
        for seed, (name, shape) in enumerate(shapes.items()):
            params[f"{k}_{name}"] = normal(100 * k + seed, *shape, scale=shape[0] ** -0.5)
            taps[f"{k}_{name}"] = f"{k}_{'attention' if name in 'qkvo' else 'mlp'}"
        for seed, name in enumerate("qkv"):
            params[f"{k}_{name}_bias"] = normal(100 * k + 50 + seed, width, scale=0.1)
        first, second = tuple(f"{k}_{name}" for name in "qkv"), (f"{k}_gate", f"{k}_up")
        out, down = (f"{k}_o",), (f"{k}_down",)
        levels += [first + second, out + down] if parallel else [first, out, second, down]
    params["head"] = normal(99, width, 6)
    levels.append(("head",))
    taps["head"] = "head"

    def run(p: Any, x: jax.Array, tap: Tap) -> jax.Array:
        for k in range(depth):
            if parallel:
                h = norm(x)
                x = x + tap(f"{k}_attention", attention(p, k, h)) + tap(f"{k}_mlp", mlp(p, k, h))
            else:
                x = x + tap(f"{k}_attention", attention(p, k, norm(x)))
                x = x + tap(f"{k}_mlp", mlp(p, k, norm(x)))
        return tap("head", norm(x) @ p["head"])

    uneven = jnp.asarray(np.exp(np.random.default_rng(7).normal(size=width)), jnp.float32)
    batches = [normal(k, rows, 6, width) * uneven for k, rows in enumerate((4, 4, 2))]
    return Tapped(run, params, batches, levels, taps)


def plain() -> Tapped:
    """No residual stream: everything is compared on what comes out.

    That takes a value of the first stage to the last one, which no weight's input needs.
    """
    params = {"a": normal(0, 8, 12), "b": normal(1, 12, 10), "c": normal(2, 10, 6)}

    def run(p: Any, x: jax.Array, tap: Tap) -> jax.Array:
        h = jnp.tanh(x @ p["a"])
        return tap("y", (jnp.tanh(h @ p["b"]) @ p["c"]) * (1 + h[:, :6] ** 2))

    levels = [("a",), ("b",), ("c",)]
    batches = [normal(3, 9, 8), normal(4, 5, 8)]
    return Tapped(run, params, batches, levels, dict.fromkeys("abc", "y"))


def dense() -> Tapped:
    """Concatenated skips, as in DenseNet: nothing is added, so all lead to what comes out."""
    params = {"a": normal(0, 8, 4), "b": normal(1, 12, 4), "c": normal(2, 16, 6)}

    def run(p: Any, x: jax.Array, tap: Tap) -> jax.Array:
        x = jnp.concatenate([x, jnp.tanh(x @ p["a"])], -1)
        x = jnp.concatenate([x, jnp.tanh(x @ p["b"])], -1)
        return tap("y", x @ p["c"])

    levels = [("a",), ("b",), ("c",)]
    batches = [normal(3, 9, 8), normal(4, 5, 8)]
    return Tapped(run, params, batches, levels, dict.fromkeys("abc", "y"))


def fused() -> Tapped:
    """One kernel feeds two branches that are added to the stream one after the other."""
    params = {"in": normal(0, 8, 20), "one": normal(1, 8, 8), "two": normal(2, 12, 8)}

    def run(p: Any, x: jax.Array, tap: Tap) -> jax.Array:
        one, two = jnp.split(norm(x) @ p["in"], [8], -1)
        one, two = tap("one", jnp.tanh(one) @ p["one"]), tap("two", jnp.tanh(two) @ p["two"])
        tap("both", jnp.stack([one, two]))
        return jnp.tanh(x + one + two)

    taps = {"in": "both", "one": "one", "two": "two"}
    return Tapped(run, params, [normal(3, 30, 8)], [("in",), ("one", "two")], taps)


MADE: dict[str, Callable[[], Tapped]] = {
    "transformer": transformer,
    "parallel": partial(transformer, parallel=True),
    "plain": plain,
    "dense": dense,
    "fused": fused,
}


def reference(tapped: Tapped, *, siblings: bool = True) -> dict[str, tuple[float, float]]:
    """Both losses of every weight; `siblings`: with those rounded that its level has decided."""
    run = jax.jit(
        lambda params, x: (seen := {}, tapped.run(params, x, lambda n, v: seen.setdefault(n, v)))[0]
    )
    losses = {}
    for level in tapped.levels:
        decided: dict[str, jax.Array] = {}
        for path in level:
            base = {**tapped.params, **(decided if siblings else {})}
            found, rounded = [], {}
            for axis in ("in", "out"):
                kernel = np.asarray(tapped.params[path])
                rounded[axis] = jnp.asarray(fake_quantize(kernel.T, BITS, GROUP, axis).T)
                total, count = 0.0, 0
                for batch in tapped.batches:
                    one, two = (
                        np.asarray(run(params, batch)[tapped.taps[path]], float)
                        for params in (base, {**base, path: rounded[axis]})
                    )
                    total, count = total + ((one - two) ** 2).sum(), count + one.size
                found.append(total / count)
            losses[path] = tuple(found)
            decided[path] = rounded["out" if found[1] < found[0] else "in"]
    return losses


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_each_choice_is_that_of_the_reference(make: Callable[[], Tapped]) -> None:
    tapped = make()
    fn, wanted = tapped.fn(), reference(tapped)
    plan = plan_of(fn, tapped.params, tapped.batches[0])
    found, choices = adadim(fn, tapped.params, plan, tapped.batches)
    assert set(choices) == set(plan) == set(wanted)
    for path, losses in wanted.items():
        np.testing.assert_allclose(choices[path].losses, losses, rtol=2e-4, err_msg=path)
        best = {"in": losses[0], "out": losses[1]}
        assert best[choices[path].axis] == min(losses), path
        assert found[path] == jq.Scheme(A2, jq.Groups(choices[path].axis, GROUP))
    # It can fail: both axes occur, and so does what the order of deciding changes.
    assert {choice.axis for choice in choices.values()} == {"in", "out"} or make is not transformer
    if make is transformer:
        alone = reference(tapped, siblings=False)
        others = [path for path in wanted if not np.allclose(alone[path], wanted[path], rtol=0.02)]
        assert {"0_k", "0_v", "0_up", "1_k", "1_v", "1_up"} >= set(others) and len(others) >= 4


# What is compared, in words, on networks that others have drawn.

OWN, RESULT = "its own output", "what the function returns"
BY_NAME = {str(network): network for network in NETWORKS}
WORDS: dict[str, dict[str, str]] = {
    "linen-scan-attention": {
        "params/blocks/(query|key|value)/.*": "the output of params/blocks/out/kernel",
        "params/blocks/(gate|up)/.*": "the output of params/blocks/down/kernel",
        "params/blocks/(out|down)/.*": OWN,
        "params/head/.*": RESULT,
    },
    "nnx-list": {
        "blocks/0/up/.*": "the output of blocks/0/down/kernel/value",
        ".*/down/.*": OWN,
        "(enter|leave)/.*": RESULT,  # what enters is the stream itself
    },
    "equinox-parallel": {
        "blocks/1/attention/(query|key|value)_proj/.*": "the output of "
        "blocks/1/attention/output_proj/weight",
        "blocks/0/up/.*": "the output of blocks/0/down/weight",
        ".*/(output_proj|down)/.*": OWN,
        "head/.*": RESULT,
    },
    "tied-encoder": {"layers/1/(q|k|v)": "the output of layers/1/o", "embed": RESULT},
    "conv-stored-statistics": {
        ".*Residual_1/Conv_0/.*": "the output of params/_Residual_1/Conv_1/kernel",
        ".*Residual_1/Conv_[12]/.*": OWN,  # the branch, and the convolution in its skip
        "params/Conv_0/.*": RESULT,
    },
    "moe-ragged": {
        "layers/0/(router|up|down)": "the output of layers/0/down, layers/0/router",
        "layers/0/shared/up": "the output of layers/0/shared/down",
        "layers/0/shared/down": OWN,
    },
    "unet": {
        "enc_0/a": OWN,  # the time's embedding joins it
        "time/a": "the output of time/b",
        "(enc|dec)_1/.*|mid|skip|head": RESULT,
    },
    "recurrent": {".*": RESULT},
    "shared-blocks": {
        "block/[qkv]": "the output of block/o", "block/up": "the output of block/down",
        "block/(o|down)|leap": OWN, "enter|pool|head": RESULT,
    },
    "odd": {".*": RESULT},
}  # fmt: skip


def planned(name: str) -> tuple[Any, Any, Any, jq.Plan]:
    network = BY_NAME[name]
    weights = jq.find_weights(network.fn, network.params, *network.batches[0])
    plan = jq.plan(weights, dict.fromkeys(network.paths, jq.Scheme(A2, 2)))
    return network.fn, network.params, network.batches, plan


@pytest.mark.parametrize("name", WORDS)
def test_what_is_compared_is_found_without_names(name: str) -> None:
    fn, params, batches, plan = planned(name)
    stacks = {path: plan.weights[path].stack_axes for path in plan}
    recording = Recording(stacks, level="residual")
    walk = Walk.start(fn, Leaves.of(params), Data.of(batches), recording)
    cut = next(iter(walk.cuts.kinds.values()))
    words = {piece.path: one.words for piece, one in cut.comparisons.items()}
    assert set(words) == set(plan)
    for pattern, wanted in WORDS[name].items():
        found = {path: words[path] for path in plan if re.fullmatch(pattern, path)}
        assert found and set(found.values()) == {wanted}, found


def test_masks_are_no_stream_and_data_is() -> None:
    def fn(params: Any, tokens: jax.Array) -> jax.Array:
        x = params["embed"][tokens]
        mask = jnp.where(tokens == 0, -1e9, 0.0)[:, None, :]  # of tokens alone
        scores = jnp.einsum("btd,bsd->bts", x @ params["q"], x @ params["k"]) + mask
        return x + jax.nn.softmax(scores) @ (x @ params["v"])

    params = {"embed": normal(0, 9, 8), **{n: normal(k, 8, 8) for k, n in enumerate("qkv")}}
    tokens = jnp.asarray(np.random.default_rng(0).integers(9, size=(3, 7)))
    _, choices = adadim(fn, params, plan_of(fn, params, tokens), [tokens])
    # With the mask for a stream, q and k would be compared on the scores.
    assert {choice.compared for choice in choices.values()} == {"the output of v, q, k"}

    def biased(params: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ params["w"] + params["b"]) + 2 * x

    params = {"w": normal(0, 8, 8), "b": normal(1, 8, 8)}
    x = normal(2, 8, 8)
    _, choices = adadim(biased, params, plan_of(biased, params, x), [x])
    assert choices["w"].compared == OWN
    q = fake_quantize(np.asarray(params["w"]).T, BITS, GROUP, "in").T
    one, two = (np.tanh(x @ w + params["b"]) for w in (params["w"], q))  # before the stream
    np.testing.assert_allclose(choices["w"].losses[0], np.mean((one - two) ** 2), rtol=1e-4)


def test_nothing_floating_is_returned() -> None:
    """Compared on its own product, then."""
    params, x = {"w": normal(0, 8, 8)}, normal(1, 20, 8)

    def fn(params: Any, x: jax.Array) -> jax.Array:
        return jnp.argmax(x @ params["w"], -1)

    plan = plan_of(fn, params, x)
    _, choices = adadim(fn, params, plan, [x])
    assert choices["w"].compared == "its own product"
    assert choices["w"].losses == adadim(fn, params, plan, [x], level="weight")[1]["w"].losses


# Level "weight": the error of a product is known from the second moment of its inputs.


@pytest.mark.parametrize("name", ["linen-scan-axis-1", "tied-encoder", "conv-batch-statistics"])
def test_at_level_weight_it_is_the_product_alone(name: str) -> None:
    fn, params, batches, plan = planned(name)
    evidence = jq.capture(fn, params, batches)
    _, choices = adadim(fn, params, plan, batches, level="weight")
    leaves = Leaves.of(params).arrays
    for path, choice in choices.items():
        w = np.asarray(plan.weights[path].layout.canonical(leaves[path]))
        w = w.reshape(-1, *w.shape[-2:])
        moment = np.asarray(evidence[path].second_moment, float)
        moment = moment.reshape(-1, *moment.shape[-2:])
        tokens = np.asarray(evidence[path].count, float).reshape(-1)
        losses = []
        for axis in ("in", "out"):
            e = np.stack([fake_quantize(one, BITS, 2, axis) - one for one in w]).astype(float)
            total = np.einsum("lij,ljk,lik->l", e, moment, e) / tokens / w.shape[1]
            losses.append(total.sum())
        np.testing.assert_allclose(choice.losses, losses, rtol=1e-3, err_msg=path)
        assert choice.axis == ("out" if losses[1] < losses[0] else "in")
        assert choice.compared == "its own product"


# A decoder, and stacks.


@functools.cache
def decoders() -> tuple[Decoder, Decoder, Any, Any, list[jax.Array]]:
    config = DecoderConfig(vocab=32, width=16, hidden=24, layers=3, heads=4, kv_heads=2)
    listed, scanned = Decoder(config), Decoder(config, scan_layers=True)
    params = listed.init(jax.random.key(0))
    layers = [params["layers"][str(k)] for k in range(3)]
    stacked = {**params, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}
    random = np.random.default_rng(0)
    tokens = [jnp.asarray(random.integers(32, size=size), jnp.int32) for size in ((3, 9), (2, 9))]
    return listed, scanned, params, stacked, tokens


def test_a_decoder_by_its_own_modules() -> None:
    fn, _, params, _, batches = decoders()
    plan = plan_of(fn, params, batches[0])
    _, choices = adadim(fn, params, plan, batches)
    at, names = "layers/1", ["q", "k", "v"]
    assert choices["head/kernel"].compared == RESULT
    assert choices[f"{at}/mlp/down/kernel"].compared == OWN
    for name in ("gate", "up"):
        assert choices[f"{at}/mlp/{name}/kernel"].compared == f"the output of {at}/mlp/down/kernel"

    # Its attention, called by itself on what enters it in the unquantized network.
    @jax.jit
    def attention(kernels: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
        module = fn._module(params)
        steps = jnp.arange(tokens.shape[1])[:, None]
        angles = steps.astype(jnp.float32) * module.config.rope_frequencies()
        rope, mask = (jnp.cos(angles), jnp.sin(angles)), steps.T <= steps
        x, _ = module.layers[0](module.embed(tokens), rope, mask, None, 0)
        block = module.layers[1]
        for name, kernel in kernels.items():
            getattr(block.attention, name).kernel[...] = kernel
        return block.attention(block.attention_norm(x), rope, mask, None, 0)[0]

    decided: dict[str, jax.Array] = {}
    for name in names:
        kernel = np.asarray(params["layers"]["1"]["attention"][name]["kernel"])
        losses, rounded = [], {}
        for axis in ("in", "out"):
            rounded[axis] = jnp.asarray(fake_quantize(kernel.T, BITS, GROUP, axis).T)
            pairs = [
                (attention(decided, batch), attention({**decided, name: rounded[axis]}, batch))
                for batch in batches
            ]
            total = sum(float(jnp.sum((one - two) ** 2)) for one, two in pairs)
            losses.append(total / sum(one.size for one, _ in pairs))
        choice = choices[f"{at}/attention/{name}/kernel"]
        np.testing.assert_allclose(choice.losses, losses, rtol=1e-3, err_msg=name)
        assert choice.compared == f"the output of {at}/attention/out/kernel"
        decided[name] = rounded["out" if losses[1] < losses[0] else "in"]


def test_the_losses_of_a_stack_are_the_sum_of_its_layers() -> None:
    listed, scanned, params, stacked, batches = decoders()
    _, apart = adadim(listed, params, plan_of(listed, params, batches[0]), batches)
    plan, together = adadim(scanned, stacked, plan_of(scanned, stacked, batches[0]), batches)
    mixed = 0
    for path, choice in together.items():
        if not path.startswith("layers/"):
            np.testing.assert_allclose(choice.losses, apart[path].losses, rtol=1e-3)
            continue
        layers = [apart[path.replace("layers", f"layers/{k}", 1)] for k in range(3)]
        losses = np.sum([one.losses for one in layers], axis=0)
        np.testing.assert_allclose(choice.losses, losses, rtol=1e-3, err_msg=path)
        assert choice.axis == ("out" if losses[1] < losses[0] else "in") == plan[path].groups.axis
        assert choice.layers == 3
        assert choice.layers_out == sum(one.axis == "out" for one in layers)
        assert f"{choice.layers_out} would choose out" in choice.why
        mixed += 0 < choice.layers_out < 3
    assert mixed  # layers of one stack differ


# Ties, and what is done with the plan.


def test_ties_go_to_in() -> None:
    x = normal(0, 30, 8)

    def fn(params: Any, x: jax.Array) -> jax.Array:
        return x @ params["w"]

    # Every row and every column holds the same values: one scale everywhere, whichever the axis.
    values = np.random.default_rng(0).normal(size=8)
    square = {"w": jnp.asarray(np.stack([np.roll(values, k) for k in range(8)]), jnp.float32)}
    # The values of a grid that is fitted to them exactly, along both axes.
    exact = {"w": jnp.asarray(np.add.outer(np.arange(8), np.arange(8)) % 8, jnp.float32)}
    for params, lossless in ((square, False), (exact, True)):
        plan = plan_of(fn, params, x, jq.Scheme(A2, jq.Groups("out", None)))
        found, choices = adadim(fn, params, plan, [x])
        inward, outward = choices["w"].losses
        assert inward == outward and (inward == 0) == lossless
        assert choices["w"].axis == found["w"].groups.axis == "in"
        assert choices["w"].why == "a tie" and choices["w"].ratio == 1


@pytest.mark.parametrize("rounding", mostly_slow([jq.rounding.Nearest(), GPTQ()], [GPTQ()]))
def test_the_plan_is_quantized_as_chosen(rounding: Any) -> None:
    tapped = transformer()
    fn = tapped.fn()
    scheme = jq.Scheme(A2, GROUP, rounding)
    plan, choices = adadim(
        fn, tapped.params, plan_of(fn, tapped.params, tapped.batches[0], scheme), tapped.batches
    )
    q, report = jq.quantize(fn, tapped.params, plan, tapped.batches)
    for path, choice in choices.items():
        assert q[path].groups == jq.Groups(choice.axis, GROUP)
        assert report[path].scheme.rounding == rounding
    # The choice is by nearest rounding, whatever comes after.
    plain_plan = plan_of(fn, tapped.params, tapped.batches[0])
    nearest = adadim(fn, tapped.params, plain_plan, tapped.batches)[1]
    assert nearest.weights == choices.weights


def test_the_choices_as_table_and_json() -> None:
    fn, params, batches, plan = planned("recurrent")
    _, choices = adadim(fn, params, plan, batches, level="weight")
    out = io.StringIO()
    rich.console.Console(file=out, width=200).print(choices.table())
    said = out.getvalue()
    assert "of 8 weights along the output axis, 6 left as planned" in said
    assert "it is used inside a scan" in said and "less error" in said
    data = json.loads(json.dumps(choices.to_json()))
    assert data["level"] == "weight" and set(data["weights"]) == set(plan)
    assert data["weights"]["forth/x"]["losses"] is None


# What it costs.


def test_the_number_of_programs_does_not_depend_on_depth(compiles: Any) -> None:
    counts = []
    for depth in (4, 2):
        tapped = transformer(depth)
        fn, plan = tapped.fn(), None
        plan = plan_of(fn, tapped.params, tapped.batches[0])
        jax.clear_caches()
        segments._PROGRAMS.clear()
        with compiles() as log:
            adadim(fn, tapped.params, plan, tapped.batches)
        counts.append(len(log))
    assert counts[0] == counts[1] > 0
    with compiles() as log:
        adadim(fn, tapped.params, plan, tapped.batches, budget=0)
    assert log == []


def test_both_axes_and_all_blocks_share_programs() -> None:
    """Per kind of weight one program for what depends on it, and at most one for the rest."""
    tapped = transformer(3)
    fn = tapped.fn()
    plan = plan_of(fn, tapped.params, tapped.batches[0])
    adadim(fn, tapped.params, plan, tapped.batches)
    first = len(segments._PROGRAMS)
    deeper = transformer(5)
    adadim(deeper.fn(), deeper.params, plan_of(deeper.fn(), deeper.params, deeper.batches[0]),
           deeper.batches)  # fmt: skip
    assert len(segments._PROGRAMS) == first


def test_what_is_kept_alive_does_not_grow_with_depth() -> None:
    most = []
    for depth in (2, 5):
        tapped = transformer(depth)
        stacks = dict.fromkeys(tapped.params, ())
        recording = Recording(stacks, level="residual")
        data = Data.of(tapped.batches)
        walk = Walk.start(tapped.fn(), Leaves.of(tapped.params), data, recording)
        most.append(max(walk.alive_bytes(stage) for stage in range(len(walk.stages))))
    assert most[0] == most[1] > 0


def test_lazy_leaves_and_waiting_values_change_nothing() -> None:
    tapped = transformer()
    fn = tapped.fn()
    plan = plan_of(fn, tapped.params, tapped.batches[0])
    wanted = adadim(fn, tapped.params, plan, tapped.batches)[1]
    reads: list[str] = []

    def lazy(path: str, leaf: jax.Array) -> jq.Lazy:
        held = np.asarray(leaf)
        return jq.Lazy(leaf.shape, held.dtype, lambda w: (reads.append(path), held[w])[1], path)

    params = {path: lazy(path, leaf) for path, leaf in tapped.params.items()}
    moves: list[jq.Progress] = []
    found = adadim(fn, params, plan, iter(tapped.batches), budget=0, progress=moves.append)[1]
    assert found.weights == wanted.weights
    assert set(reads) == set(params)
    assert [move.fraction for move in moves] == sorted(move.fraction for move in moves)
    assert moves[-1].stage == moves[-1].stages - 1 and 0 < moves[-1].ratio <= 1


# What is left as planned, and what is refused.


def test_what_cannot_be_chosen_is_left_as_planned_and_says_why() -> None:
    params = {
        "table": normal(0, 9, 8), "depthwise": normal(1, 3, 1, 8), "narrow": normal(2, 8, 3),
        "w": normal(3, 8, 8),
    }  # fmt: skip

    def fn(params: Any, tokens: jax.Array) -> Any:
        x = params["table"][tokens]
        x = jax.lax.conv_general_dilated(
            x, params["depthwise"], (1,), "SAME", feature_group_count=8,
            dimension_numbers=("NWC", "WIO", "NWC"),
        )  # fmt: skip
        return x @ params["narrow"], x @ params["w"]

    tokens = jnp.asarray(np.random.default_rng(0).integers(9, size=(3, 7)))
    weights = jq.find_weights(fn, params, tokens)
    plan = jq.plan(weights, {"narrow": jq.Scheme(A2, jq.Groups("out", 8)), ".*": jq.Scheme(A2, 8)})
    found, choices = adadim(fn, params, plan, [tokens])
    assert "only looked up" in choices["table"].why
    assert "no output axis" in choices["depthwise"].why
    assert "its output axis has 3 weights, fewer than a group of 8" in choices["narrow"].why
    assert choices["w"].losses is not None
    for path in ("table", "depthwise", "narrow"):
        assert choices[path].losses is None and found[path] == plan[path]
        assert np.isnan(choices[path].ratio)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["odd"])  # a loop and a branch
def test_inside_loops_and_branches(name: str) -> None:
    """Compared on what comes out of them; at level "weight" there is nothing to compare."""
    fn, params, batches, plan = planned(name)
    inner = {"recurrent": "(forth|back|second)/.*", "odd": "loop/.*|yes/.*|no"}[name]
    for level in ("residual", "weight"):
        found, choices = adadim(fn, params, plan, batches, level=level)
        for path, choice in choices.items():
            nested = re.fullmatch(inner, path) is not None
            assert (choice.losses is None) == (nested and level == "weight"), path
            if choice.losses is None:
                assert found[path] == plan[path]
                assert re.match("it is used inside a (scan|while|cond)", choice.why)


def test_bad_calls_are_refused_in_words() -> None:
    params, x = {"w": normal(0, 8, 8), "table": normal(1, 9, 8)}, normal(2, 20, 8)

    def fn(params: Any, x: jax.Array) -> jax.Array:
        return x @ params["w"] + params["table"][jnp.arange(20) % 9]

    weights = jq.find_weights(fn, params, x)
    plan = jq.plan(weights, {"w": SCHEME, ".*": jq.keep})
    with pytest.raises(EvidenceError, match="no batches"):
        adadim(fn, params, plan, [])
    with pytest.raises(PlanError, match="'residual' or 'weight', got 'block'"):
        adadim(fn, params, plan, [x], level="block")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="expected what jq.plan returns, got dict"):
        adadim(fn, params, dict(plan), [x])  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"made for 'w' of shape \(8, 8\), got \(8, 6\)"):
        adadim(fn, {**params, "w": normal(0, 8, 6)}, plan, [x])
    nothing = jq.plan(weights, {".*": jq.keep})
    with pytest.raises(PlanError, match="nothing to choose in this plan of 0 weights"):
        adadim(fn, params, nothing, [x])
    lookups = jq.plan(weights, {"table": SCHEME, ".*": jq.keep})
    with pytest.raises(PlanError, match=r"nothing to choose.*'table': it is only looked up"):
        adadim(fn, params, lookups, [x])
    dynamic = jq.plan(weights, {"w": jq.Scheme(A2, GROUP, GPTQ(groups="dynamic")), ".*": jq.keep})
    with pytest.raises(PlanError, match=r"cannot run along the input axis.*pass GPTQ\(\)"):
        adadim(fn, params, dynamic, [x])
    with pytest.raises(WeightError, match="'w' holds NaN or infinite"):
        adadim(fn, {**params, "w": params["w"].at[0, 0].set(jnp.nan)}, plan, [x])
    for level in ("residual", "weight"):
        with pytest.raises(EvidenceError, match=r"weight 'w': the error of .* is nan"):
            adadim(fn, params, plan, [x, x.at[3, 3].set(jnp.nan)], level=level)
    with pytest.raises(EvidenceError, match="too large to square"):
        adadim(fn, {**params, "w": params["w"] * 1e30}, plan, [x])
    with pytest.raises(EvidenceError, match="'w' is not used by the function on these batches"):
        adadim(lambda p, x: x @ p["table"].T, params, plan, [x])


# Per-IC groups: the specification's properties, and GPTQ along them.

CONVENTIONS = {
    name: Uniform(3, symmetric=name[0] == "S", convention=name)
    for name in ("A1", "A2", "A3", "S1", "S2", "S3")
}


def dequantized(w: jax.Array, grid: Uniform, groups: jq.Groups, rounding: Any = None) -> np.ndarray:
    """`w[out, in]` on the grid."""
    layout = jq.Layout.of(w.shape, in_axes=(1,))
    scheme = jq.Scheme(grid, groups, rounding or jq.rounding.Nearest())
    return np.asarray(jq.dequantize(jq.quantize_weight(w, scheme, layout)[0]))


@pytest.mark.parametrize(
    ("grid", "size"),
    [(grid, 7) for grid in CONVENTIONS.values()] + [(A2, 6), (A2, None)],
    ids=[*CONVENTIONS, "even", "whole"],
)
def test_out_is_in_of_the_transpose(grid: Uniform, size: int | None) -> None:
    w = normal(0, 18, 24)
    out = dequantized(w, grid, jq.Groups("out", size))
    np.testing.assert_array_equal(out, dequantized(w.T, grid, jq.Groups("in", size)).T)
    assert (out != dequantized(w, grid, jq.Groups("in", size))).any()
    symmetric = w[:, :18] + w[:, :18].T
    both = [dequantized(symmetric, grid, jq.Groups(axis, size)) for axis in ("in", "out")]
    np.testing.assert_array_equal(both[0], both[1].T)


@pytest.mark.parametrize("factor", [2.0**-3, 2.0**5])
def test_a_scaled_input_channel_stays_by_itself_per_ic_only(factor: float) -> None:
    w = normal(0, 18, 24)
    scaled = w.at[:, 5].multiply(factor)
    for axis in ("in", "out"):
        plain, found = (dequantized(one, A2, jq.Groups(axis, GROUP)) for one in (w, scaled))
        same = (found == plain).all(0) | (np.arange(24) == 5)
        alone = same.all() and (found[:, 5] == factor * plain[:, 5]).all()
        assert alone == (axis == "out")


def test_gptq_along_out_is_nearest_for_uncorrelated_inputs() -> None:
    w, _ = layer(18, 24)
    moment = jnp.diag(jnp.exp(normal(1, 24)))
    for rounding in (GPTQ(), GPTQ(groups="dynamic"), GPTQ(order="natural", groups="dynamic")):
        found = rounding(w, A2, jq.Groups("out", 7), evidence=moment)
        plain = jq.rounding.Nearest()(w, A2, jq.Groups("out", 7))
        np.testing.assert_array_equal(found.codes, plain.codes)
        np.testing.assert_array_equal(found.params["scale"], plain.params["scale"])


@pytest.mark.parametrize(
    ("shape", "size", "order", "groups"),
    mostly_slow(
        [
            ((12, 40), 4, "natural", "static"),
            ((11, 40), 4, "activation", "dynamic"),
            ((11, 40), 4, "natural", "dynamic"),
            ((30, 150), 128, "activation", "static"),
        ],
        lambda case: case[2:] == ("activation", "dynamic"),
    ),
)
def test_gptq_along_out_follows_the_column_loop(
    shape: tuple[int, int], size: int, order: Any, groups: Any
) -> None:
    """As AdaDim's code: A2, each column's groups fitted to the column as the loop finds it."""
    w, moment = layer(*shape)
    rounding = GPTQ(order=order, groups=groups)
    found = rounding(w, A2, jq.Groups("out", size), evidence=moment)
    codes, values, margins = gptq_oracle.gptq(
        np.asarray(w), np.asarray(moment), fit=partial(a2_fit, bits=BITS),
        round_to=partial(a2_round, bits=BITS), axis="out", group=size, order=order, groups=groups,
    )  # fmt: skip
    clear = margins.min(axis=1) > 1e-5  # a row in which a tie may fall differently in float32
    assert clear.mean() > 0.6
    np.testing.assert_array_equal(np.asarray(found.codes).astype(int)[clear], codes[clear])
    q = jq.QTensor(found.codes, dict(found.params), A2, jq.Groups("out", size),
                   jq.Layout.of(shape, in_axes=(1,)), jnp.dtype("float32"))  # fmt: skip
    np.testing.assert_allclose(jq.dequantize(q)[clear], values[clear], rtol=1e-4, atol=1e-5)


def test_dynamic_groups_per_ic_do_not_depend_on_where_columns_stand() -> None:
    """Each column owns its grids, so activation order is a permutation and costs nothing."""
    w, moment = layer(12, 40)
    order = jnp.argsort(-jnp.diagonal(moment))
    found = GPTQ(groups="dynamic")(w, A2, jq.Groups("out", 4), evidence=moment)
    moved = GPTQ(order="natural", groups="dynamic")(
        w[:, order], A2, jq.Groups("out", 4), evidence=moment[order][:, order]
    )
    np.testing.assert_array_equal(found.codes[:, order], moved.codes)
    # Updated weights are sums over columns, in another order.
    np.testing.assert_allclose(found.params["scale"][order], moved.params["scale"], rtol=1e-6)
