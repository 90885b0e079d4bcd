"""Packets: the mean is the tree, the bytes are what the formula says, damage is refused."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import GRIDS

import jquant as jq
from jquant import exchange
from jquant.axes.groups import to_groups
from jquant.errors import FormatError, PacketError, TreeError, WeightError
from jquant.exchange.enclosing import Enclosing, check_encloses
from jquant.exchange.packet import floating_leaves
from jquant.grids import MX, NF4, Uniform
from jquant.rounding import Nearest, Stochastic
from tests.marks import mostly_slow

slow = pytest.mark.slow
KEY = jax.random.key(0)
S3 = {bits: Uniform(bits, symmetric=True, convention="S3") for bits in (2, 3, 4, 8)}
TWO = Uniform(2, symmetric=True, convention="S3", scale_dtype="float16")
HALF = Uniform(4, symmetric=True, convention="S3", scale_dtype="float16")


def tree():
    one, two, three = jax.random.split(jax.random.key(1), 3)
    return {
        "layers": [{"w": jax.random.normal(one, (5, 60)), "b": jax.random.normal(two, (7,))}],
        "scale": jnp.float32(0.3),
        "half": jax.random.normal(three, (3, 4)).astype(jnp.bfloat16),
        "step": jnp.int32(-5),
        "mask": jnp.array([True, False]),
        "none": jnp.zeros((0, 3)),
    }


def expectation(weight, row):
    """The mean of a stochastic rounding, from the two codes it chooses between; float64."""
    groups = np.asarray(to_groups(row, weight.groups), np.float64)
    lo, hi = weight.grid.bracket(to_groups(row, weight.groups), weight.params)
    pair = np.stack([np.asarray(weight.grid.decode(c, weight.params)) for c in (lo, hi)])
    below, above = pair.min(0).astype(np.float64), pair.max(0).astype(np.float64)
    share = np.where(above > below, (groups - below) / np.where(above > below, above - below, 1), 0)
    return below + np.clip(share, 0, 1) * (above - below), groups


ENCLOSING = ("S1-4", "S2-8", "S3-5-bf16", "S4-3", "S5-2", "A4-4-hqq", "affine-8", "mx-E2M1",
             "mx-E2M1-ceil-mse", "power-4", "nf4", "codebook-5")  # fmt: skip


@pytest.mark.parametrize("name", mostly_slow(ENCLOSING, ["S1-4", "S4-3", "nf4"]))
def test_the_mean_of_the_two_codes_is_the_number(name):
    """The law itself, without luck: no number lies outside the two codes it may become."""
    grid = GRIDS[name]
    w = jax.random.normal(KEY, (160,)) * jnp.linspace(0.1, 3.0, 160) + 0.2
    weight = jq.compress(w, grid, KEY, group=32).tree
    mean, groups = expectation(weight, w[None])
    np.testing.assert_allclose(mean, groups, atol=3e-6 * np.abs(groups).max())


def test_the_mean_over_keys_is_the_tree():
    count, update = 3000, tree()
    grid = S3[2]

    @jax.jit
    def total(keys):
        one = lambda key: jq.decompress(jq.compress(update, grid, key), dtype=jnp.float32)  # noqa: E731
        return jax.tree.map(lambda x: x.mean(0) if x.dtype == jnp.float32 else x[0],
                            jax.vmap(one)(keys))  # fmt: skip

    mean = total(jax.random.split(KEY, count))
    for path, leaf in floating_leaves(update).items():
        step = float(jnp.abs(leaf.astype(jnp.float32)).max())
        part = {p: x for p, x in floating_leaves(mean).items()}[path]
        error = np.abs(np.asarray(part) - np.asarray(leaf, np.float32)).max()
        assert error < 5.5 * step / 2 / math.sqrt(count), path
    assert int(mean["step"]) == -5


@pytest.mark.parametrize("block", [16, None])
def test_the_mean_of_a_rotated_packet_is_the_tree(block):
    w = jnp.zeros(96).at[3].set(5.0).at[17].set(-1.0)
    rotation = jq.Hadamard(block, seed=3)
    one = lambda key: jq.decompress(jq.compress(w, S3[3], key, rotation=rotation))  # noqa: E731
    seen = jax.jit(jax.vmap(one))(jax.random.split(KEY, 2000))
    sigma = np.asarray(seen.std(0)) / math.sqrt(2000)
    assert (np.abs(np.asarray(seen.mean(0) - w)) < 5.5 * sigma + 1e-5).all()


def test_a_rotation_takes_the_largest_order_that_divides_a_leaf():
    packet = jq.compress(
        {"even": jnp.ones(96), "odd": jnp.ones(7)}, S3[4], KEY, rotation=jq.Hadamard(32)
    )
    (part,) = packet.tree["even"].transforms
    assert part.block == 32 and packet.tree["odd"].transforms == ()


def test_a_rotation_helps_where_few_entries_stand_out():
    w = jnp.zeros(1024).at[::128].set(8.0) + 0.1 * jax.random.normal(KEY, (1024,))
    plain, turned = (
        jnp.linalg.norm(jq.decompress(jq.compress(w, S3[3], KEY, rotation=r)) - w)
        for r in (None, jq.Hadamard(128))
    )
    assert turned < 0.6 * plain


def test_equal_keys_give_equal_packets_and_a_leaf_more_changes_no_other():
    update = tree()
    one, two = (jq.compress(update, S3[4], KEY) for _ in range(2))
    jitted = jax.jit(lambda t, k: jq.compress(t, S3[4], k))(update, KEY)
    fewer = jq.compress({"layers": update["layers"]}, S3[4], KEY)
    other = jq.compress(update, S3[4], jax.random.key(9))
    same = one.tree["layers"][0]["w"].codes
    for packet in (two, jitted, fewer):
        np.testing.assert_array_equal(packet.tree["layers"][0]["w"].codes, same)
    assert (np.asarray(other.tree["layers"][0]["w"].codes) != np.asarray(same)).any()
    assert (np.asarray(one.fingerprint) != np.asarray(other.fingerprint)).any()
    equal = jq.compress({"a": update["layers"], "b": update["layers"]}, S3[4], KEY).tree
    assert (np.asarray(equal["a"][0]["w"].codes) != np.asarray(equal["b"][0]["w"].codes)).any()


def test_every_leaf_comes_back_in_its_shape_and_dtype():
    update = tree()
    back = jq.decompress(jq.compress(update, S3[8], KEY))
    assert jax.tree.structure(back) == jax.tree.structure(update)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(update), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        if not jnp.issubdtype(a.dtype, jnp.floating):
            np.testing.assert_array_equal(a, b)
        elif a.size:
            error = jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)).max()
            assert error <= jnp.abs(b.astype(jnp.float32)).max() / 100


def test_a_group_of_zeros_stays_zero():
    for grid in (S3[2], S3[4], NF4()):
        np.testing.assert_array_equal(jq.decompress(jq.compress(jnp.zeros(9), grid, KEY)), 0)


# Bytes


@pytest.mark.parametrize(
    ("grid", "scale"),
    mostly_slow(
        [(S3[2], 4), (S3[3], 4), (S3[8], 4), (HALF, 2), (NF4(), 4), (MX(), 1)],
        [(S3[3], 4), (HALF, 2)],
    ),
)
def test_the_bytes_are_what_the_formula_says(grid, scale):
    update = tree()
    packet = jq.compress(update, grid, KEY, group=32)
    expected = 28 + 4 + 2  # and an int32, two bools
    for leaf in floating_leaves(update).values():
        expected += math.ceil(leaf.size * grid.bits / 8) + math.ceil(leaf.size / 32) * scale
    described = jax.eval_shape(lambda: jq.compress(update, grid, KEY, group=32))
    data = exchange.to_bytes(packet)
    assert len(data) == exchange.wire_bytes(packet) == exchange.wire_bytes(described) == expected
    back = exchange.from_bytes(data, described)
    assert jax.tree.structure(back) == jax.tree.structure(packet)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(packet), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a, np.float64), np.asarray(b, np.float64))


def test_four_bits_are_an_eighth_of_the_bytes():
    update = {"w": jnp.ones((256, 256))}
    packet = jax.eval_shape(lambda: jq.compress(update, HALF, KEY, group=1024))
    assert exchange.wire_bytes(packet) < 256 * 256 * 4 / 8 * 1.005


def test_every_damaged_byte_is_told():
    packet = jq.compress({"w": jnp.ones(20), "n": jnp.int32(1)}, S3[4], KEY)
    data = exchange.to_bytes(packet)
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 1 << (at % 8)
        with pytest.raises(PacketError, match="damaged|no packet"):
            exchange.from_bytes(damaged, packet)
    for cut in range(len(data)):
        with pytest.raises(PacketError):
            exchange.from_bytes(data[:cut], packet)
    with pytest.raises(PacketError):
        exchange.from_bytes(data + b"\0", packet)


def signed(data):
    """Bytes with a checksum that fits, as somebody who means harm would send them."""
    import hashlib

    return bytes(data[:-8]) + hashlib.sha256(data[:-8]).digest()[:8]


def test_what_no_packet_holds_is_refused_though_its_checksum_fits():
    packet = jq.compress({"b": jnp.array([True, False]), "w": jnp.ones(20)}, S3[4], KEY)
    data = bytearray(exchange.to_bytes(packet))
    for at, byte, says in ((20, 7, "a bool"), (22, 0xFF, "off the grid"), (35, 0xFF, "a scale is")):
        forged = bytearray(data)
        forged[at] = byte
        if says == "a scale is":
            forged[32:36] = np.float32(np.nan).tobytes()
        with pytest.raises(PacketError, match=says):
            exchange.from_bytes(signed(forged), packet)
    with pytest.raises(PacketError, match="another form"):
        exchange.from_bytes(signed(data + b"\0"), packet)


@pytest.mark.parametrize(
    ("other", "options"),
    [
        ({"w": jnp.ones(21)}, {}),
        ({"v": jnp.ones(20)}, {}),
        ({"w": jnp.ones((4, 5))}, {}),
        ({"w": jnp.ones(20, jnp.bfloat16)}, {}),
        ({"w": jnp.ones(20)}, {"group": 16}),
        ({"w": jnp.ones(20)}, {"rotation": jq.Hadamard(4)}),
        ({"w": jnp.ones(20)}, {"grid": NF4()}),
    ],
)
def test_packets_of_another_form_are_refused(other, options):
    packet = jq.compress({"w": jnp.ones(20)}, S3[4], KEY)
    grid = options.pop("grid", S3[4])
    like = jq.compress(other, grid, jax.random.key(1), **options)
    with pytest.raises(PacketError, match="another form"):
        exchange.from_bytes(exchange.to_bytes(packet), like)
    with pytest.raises(PacketError, match="packet 1 is of another form"):
        exchange.average([packet, like])


def test_a_packet_goes_through_a_file_that_describes_itself(tmp_path):
    packet = jq.compress(tree(), S3[4], KEY, rotation=jq.Hadamard(4))
    jq.save(tmp_path / "p.safetensors", packet)
    back = jq.load(tmp_path / "p.safetensors", like=packet)
    assert exchange.to_bytes(back) == exchange.to_bytes(packet)


# Feedback


def test_with_feedback_everything_arrives():
    updates = [tree() for _ in range(6)]
    residual, arrived = None, 0.0
    for update in updates:
        packet, residual = exchange.with_feedback(update, residual, S3[2], None)
        arrived += np.asarray(jq.decompress(packet)["layers"][0]["w"], np.float64)
        assert residual["step"] is None and residual["layers"][0]["w"].dtype == jnp.float32
    sent = 6 * np.asarray(updates[0]["layers"][0]["w"], np.float64)
    np.testing.assert_allclose(arrived + np.asarray(residual["layers"][0]["w"]), sent, atol=1e-4)


def test_feedback_of_few_levels_contracts_by_nearest_and_not_by_chance():
    """What the default of `with_feedback` rests on."""
    w = jax.random.normal(KEY, (4096,))
    size = {}
    for rounding in (Nearest(), Stochastic()):
        key = KEY if rounding.needs else None
        _, left = exchange.with_feedback(w, None, S3[2], key, rounding=rounding)
        size[type(rounding)] = float(jnp.linalg.norm(left) / jnp.linalg.norm(w))
    assert size[Nearest] < 0.9 and size[Stochastic] > 1.0


def test_feedback_runs_inside_a_compiled_loop():
    w = {"w": jnp.array([1.0, 0.3, -0.2])}

    def step(residual, key):
        packet, residual = exchange.with_feedback(w, residual, S3[4], key, rounding=Stochastic())
        return residual, jq.decompress(packet)["w"]

    start = {"w": jnp.zeros(3)}
    left, seen = jax.lax.scan(step, start, jax.random.split(KEY, 50))
    np.testing.assert_allclose(seen.sum(0) + left["w"], 50 * w["w"], atol=1e-3)


@pytest.mark.parametrize(
    "residual",
    [{"v": jnp.zeros(3)}, {"w": jnp.zeros(4)}, {"w": None}, {"w": jnp.zeros(3, jnp.int32)}, 0.0],
)
def test_a_residual_of_another_tree_is_refused(residual):
    with pytest.raises(TreeError, match="with_feedback returned"):
        exchange.with_feedback({"w": jnp.ones(3)}, residual, S3[4], None)


# Averages


def test_a_mean_is_weighed_and_in_the_dtype_of_the_leaf():
    packets = [
        jq.compress({"w": jnp.full(4, x, jnp.bfloat16), "n": jnp.int32(2)}, S3[4], key)
        for x, key in zip((1.0, 4.0), jax.random.split(KEY), strict=True)
    ]
    mean = exchange.average(packets, weights=[3, 1])
    assert mean["w"].dtype == jnp.bfloat16 and mean["w"].tolist() == [1.75] * 4
    assert int(mean["n"]) == 2


def test_one_key_for_two_clients_is_told():
    one, two = (jq.compress({"w": jnp.full(4, x)}, S3[4], KEY) for x in (1.0, 2.0))
    third = jq.compress({"w": jnp.ones(4)}, S3[4], jax.random.key(5))
    with pytest.raises(PacketError, match="packets 0 and 2 were rounded with one key"):
        exchange.average([one, third, two])
    plain = [jq.compress({"w": jnp.ones(4)}, S3[4], None, rounding=Nearest()) for _ in range(2)]
    assert exchange.average(plain)["w"].tolist() == [1.0] * 4  # no key, nothing shared


def test_integers_that_disagree_have_no_mean():
    packets = [jq.compress({"n": jnp.int32(n)}, S3[4], jax.random.key(n)) for n in (0, 1)]
    with pytest.raises(PacketError, match="differ at 'n'"):
        exchange.average(packets)


@pytest.mark.parametrize(
    "weights", [[1.0], [1.0, -1.0], [0.0, 0.0], [1.0, float("nan")], 5, ["a", "b"]]
)
def test_weights_of_a_mean_that_do_not_fit(weights):
    packets = [jq.compress({"w": jnp.ones(4)}, S3[4], jax.random.key(n)) for n in (0, 1)]
    with pytest.raises(ValueError, match="weights must be 2"):
        exchange.average(packets, weights)
    with pytest.raises(ValueError, match="one packet or more"):
        exchange.average([])
    for wrong, says in (
        (packets[0], "a list of packets, got one"),
        ([packets[0], {"w": jnp.ones(4)}], r"packet 1 must be Packet\(\), got {'w'"),
        ([exchange.to_bytes(packets[0])], r"packet 0 must be Packet\(\), got b'jqx1"),
    ):
        with pytest.raises(ValueError, match=says):
            exchange.average(wrong)
    with pytest.raises(ValueError, match="wire_bytes: packet must be Packet"):
        exchange.wire_bytes(packets[0].tree)


# What is refused


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_what_is_not_finite_is_named(bad):
    update = {"a": jnp.ones(3), "b": [jnp.ones(3).at[1].set(bad)]}
    with pytest.raises(WeightError, match="at 'b/0', holds NaN"):
        jq.compress(update, S3[4], KEY)
    packet = jax.jit(lambda t: jq.compress(t, S3[4], KEY))({"b": jnp.full(3, jnp.nan)})
    assert jnp.isnan(jq.decompress(packet)["b"]).all()
    with pytest.raises(WeightError, match="at 'b', held NaN"):
        exchange.to_bytes(packet)


def test_numbers_that_a_scale_does_not_reach_are_refused():
    with pytest.raises(WeightError, match="at 'w', holds numbers that no scale of"):
        jq.compress({"w": jnp.full(4, 1e9)}, HALF, KEY)


@pytest.mark.parametrize(
    "name", mostly_slow(["A1-4", "A2-4", "A3-3", "UE4M3", "nv", "kmeans-4"], ["A1-4"])
)
def test_grids_that_clip_are_refused(name):
    with pytest.raises(FormatError, match="clips numbers"):
        jq.compress(jnp.ones(32), GRIDS[name], KEY)
    if name == "A1-4":
        jq.compress(jnp.ones(32), GRIDS[name], None, rounding=Nearest())


def test_stretched_scales_are_no_larger_than_they_need_be():
    w = jnp.linspace(-1.0, 1.0, 32)[None]
    for grid, most in (
        (S3[4], 1.0),
        (Uniform(4, True), 15 / 14),
        (HALF, 1.003),
        (TWO, 1.003),
        (MX(), 2.0),
    ):
        check_encloses(grid)
        plain, stretched = grid.fit(w)["scale"], Enclosing(grid).fit(w)["scale"]
        ratio = float(stretched.astype(jnp.float32)[0] / plain.astype(jnp.float32)[0])
        assert 1.0 <= ratio <= most + 1e-4, grid


@pytest.mark.parametrize(
    ("leaf", "says"),
    [
        ("text", "no array but str"),
        (jax.random.key(3), "a random key"),
        (jax.ShapeDtypeStruct((2,), jnp.float32), "only described"),
    ],
)
def test_leaves_that_are_no_updates(leaf, says):
    with pytest.raises(TreeError, match=f"'w',? is .*{says}"):
        jq.compress({"w": leaf}, S3[4], KEY)
    quantized = jq.compress({"w": jnp.ones(3)}, S3[4], KEY).tree
    with pytest.raises(TreeError, match="quantized already"):
        jq.compress(quantized, S3[4], KEY)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"group": 0}, "group must be an int from 1"),
        ({"rounding": "nearest"}, r"rounding must be Stochastic\(\) or Nearest"),
        ({"rotation": 16}, "rotation must be Hadamard"),
        ({"grid": 4}, "to a grid such as"),
        ({"key": None}, "pass key="),
    ],
)
def test_bad_arguments(options, says):
    arguments = {"grid": S3[4], "key": KEY, **options}
    with pytest.raises(ValueError, match=says):
        jq.compress(jnp.ones(3), **arguments)
    packet = jq.compress(jnp.ones(3), S3[4], KEY)
    with pytest.raises(ValueError, match="must be Packet"):
        jq.decompress(packet.tree)
    with pytest.raises(ValueError, match="must be floating"):
        jq.decompress(packet, dtype=jnp.int32)
    with pytest.raises(ValueError, match="data must be bytes"):
        exchange.from_bytes("text", packet)


@slow
def test_float64_is_rounded_by_chance_too():
    with jax.enable_x64(True):
        w = jnp.full(1 << 14, 1 + 2.0**-26, jnp.float64).at[0].set(-127.0)
        grid = Uniform(8, symmetric=True, convention="S3")
        packet = jq.compress(w, grid, KEY, group=1 << 14)
        assert jq.decompress(packet).dtype == jnp.float64
        with pytest.raises(WeightError, match="beyond float32"):
            jq.compress(jnp.full(3, 1e300, jnp.float64), grid, KEY)
        numbers = np.arange(3) + 2**40  # NumPy's, which JAX would cut in its 32-bit mode
    packet = jq.compress({"n": numbers, "w": jnp.ones(3)}, grid, KEY)
    back = exchange.from_bytes(exchange.to_bytes(packet), packet)
    np.testing.assert_array_equal(jq.decompress(back)["n"], numbers)
