"""A job that dies at any moment goes on where it was, to the same bits, or says why it does not."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant.app import cli
from jquant.calibration import Evidence
from jquant.calibration.walk import Walk
from jquant.errors import CheckpointError, WorkDirError
from jquant.grids import Uniform
from jquant.io import container
from jquant.jobs import records as work_files
from jquant.rounding import GPTQ
from tests.kill_job import BATCHES, PARAMS, STAGES, fn, job, plan
from tests.test_cli import model, options, run

__all__ = ["model"]  # a fixture

# How many processes are killed, at how many moments Ctrl-C is pressed, in which stages a job dies
# at every operation, and how many bits of a record are turned: `JQUANT_KILLS=50` takes minutes.
KILLS = int(os.environ.get("JQUANT_KILLS", "1"))
STRIDE, TURNED = (5, 83) if KILLS < 50 else (1, 29)
DEADLY = (0, 4, STAGES) if KILLS < 50 else range(STAGES + 1)  # stages are written alike
CACHE = Path(__file__).parents[1] / ".cache" / "jax"


@pytest.fixture(scope="module")
def undisturbed() -> tuple[Any, jq.Report]:
    """What comes out without a work directory."""
    return job()


def assert_same_bits(one: Any, two: Any) -> None:
    chex.assert_trees_all_equal_dtypes(one, two)
    chex.assert_trees_all_equal(*(jax.tree.map(np.asarray, tree) for tree in (one, two)))


def assert_same(found: tuple[Any, jq.Report], wanted: tuple[Any, jq.Report]) -> None:
    """Equal bits, equal reports but for times and sizes."""
    assert_same_bits(found[0], wanted[0])
    rows = [
        {path: dataclasses.replace(row, seconds=0.0) for path, row in report.items()}
        for _, report in (found, wanted)
    ]
    assert rows[0] == rows[1] and found[1].stages == wanted[1].stages


def records(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("stage-*.safetensors"))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often evidence was read and a weight was rounded."""
    counts = {"gather": 0, "round": 0}

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(Walk, "gather", counting("gather", Walk.gather))
    monkeypatch.setattr("jquant.jobs.stages.quantize_weight", counting("round", jq.quantize_weight))
    return counts


# Going on.


def test_a_work_directory_changes_nothing(tmp_path: Path, undisturbed: Any) -> None:
    assert_same(job(tmp_path / "new" / "folder"), undisturbed)
    names = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert names == ["job.json", *(f"stage-{k:05d}.safetensors" for k in range(STAGES))]


@pytest.mark.parametrize("sequential", ["weight", "block", None])
def test_finished_stages_are_not_done_again(
    sequential: Any, tmp_path: Path, calls: dict[str, int]
) -> None:
    wanted = job(tmp_path, sequential=sequential)
    files = records(tmp_path)
    weights = [len(stage) for stage in wanted[1].stages]
    for kept in range(len(files) + 1):
        for name in files[kept:]:
            (tmp_path / name).unlink()
        calls.update(gather=0, round=0)
        assert_same(job(tmp_path, sequential=sequential), wanted)
        left = len(files) - kept
        assert calls == {"gather": left, "round": sum(weights[kept:])}


def test_any_stage_can_be_missing(tmp_path: Path, calls: dict[str, int]) -> None:
    wanted = job(tmp_path)
    for name in records(tmp_path):
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        calls.update(gather=0, round=0)
        assert_same(job(tmp_path), wanted)
        assert calls == {"gather": 1, "round": 1}
        leaves = jq.load(tmp_path / name)
        (tmp_path / name).write_bytes(before)
        assert_same_bits(leaves, jq.load(tmp_path / name))


def test_lazy_parameters(tmp_path: Path, undisturbed: Any) -> None:
    jq.save(tmp_path / "params", PARAMS)
    for _ in range(2):
        params = jq.load(tmp_path / "params", lazy=True)
        qparams, report = job(tmp_path / "work", params=params)
        assert all(isinstance(leaf, jq.Lazy) for leaf in jax.tree.leaves(qparams))
        assert_same((jq.realize(qparams), report), undisturbed)
        (tmp_path / "work" / records(tmp_path / "work")[-1]).unlink()


def test_batches_that_can_be_read_only_once(tmp_path: Path, undisturbed: Any) -> None:
    assert_same(job(tmp_path / "one", batches=iter(BATCHES)), undisturbed)
    one_pass = job(sequential=None)
    for batches in (iter(BATCHES), BATCHES):
        assert_same(job(tmp_path / "two", batches=batches, sequential=None), one_pass)


def test_batches_with_random_keys(tmp_path: Path) -> None:
    def noisy(params: Any, x: jax.Array, key: jax.Array) -> jax.Array:
        return fn(params, x * jax.random.bernoulli(key, 0.9, x.shape).astype(x.dtype))

    batches = [(x, jax.random.key(k)) for k, x in enumerate(BATCHES)]
    others = {"fn": noisy, "batches": batches}
    assert_same(job(tmp_path, **others), job(**others))
    batches[1] = batches[1][0], jax.random.key(9)
    with pytest.raises(WorkDirError, match="the data changed"):
        job(tmp_path, **others)


# Death at every operation on files: what lies in the folder then is what a killed process leaves.


@dataclasses.dataclass
class Camera:
    """Takes what a folder holds, before and after everything that changes it."""

    folder: Path
    seen: list[dict[str, bytes] | None] = dataclasses.field(default_factory=list)

    def take(self) -> None:
        found = None
        if self.folder.exists():
            found = {path.name: path.read_bytes() for path in self.folder.iterdir()}
        if not self.seen or self.seen[-1] != found:
            self.seen.append(found)

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.take()
            result = function(*args, **kwargs)
            self.take()
            return result

        return call

    def opened(self, *args: Any, **kwargs: Any) -> Any:
        """`open`, of files whose writes are torn in two."""
        file = open(*args, **kwargs)  # noqa: SIM115
        self.take()
        write = file.write

        class Torn:
            def __enter__(_) -> Any:  # noqa: N805
                return _

            def __exit__(_, *what: Any) -> None:  # noqa: N805
                file.close()

            def __getattr__(_, name: str) -> Any:  # noqa: N805
                return getattr(file, name)

            def write(_, data: Any) -> None:  # noqa: N805
                view = memoryview(data).cast("B")
                for part in (view[: len(view) // 2], view[len(view) // 2 :]):
                    write(part)
                    file.flush()
                    self.take()

        return Torn()


def moments(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, bytes] | None]:
    """All that the folder holds in the course of a job, one after the other."""
    camera = Camera(folder)
    with monkeypatch.context() as patch:
        patch.setattr(container, "open", camera.opened, raising=False)
        patch.setattr(os, "replace", camera.around(os.replace))
        patch.setattr(os, "fsync", camera.around(os.fsync))
        patch.setattr(pathlib.Path, "mkdir", camera.around(pathlib.Path.mkdir))
        patch.setattr(pathlib.Path, "unlink", camera.around(pathlib.Path.unlink))
        job(folder)
    return camera.seen


def restore(folder: Path, files: dict[str, bytes] | None) -> None:
    if files is not None:
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)


@pytest.mark.slow
def test_death_at_every_operation_on_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Any, calls: dict[str, int]
) -> None:
    states = moments(tmp_path / "first", monkeypatch)
    assert states[0] is None and states[-1] is not None and len(states[-1]) == 1 + STAGES
    assert any(".tmp" in name for state in states if state for name in state)
    assert len(states) > 10 * STAGES
    tried: list[Any] = []  # what many operations leave as it is need not be tried again
    for at, state in enumerate(states):
        done = sum(name.startswith("stage-") for name in state or ())
        if state in tried or done not in DEADLY:
            continue
        tried.append(state)
        folder = tmp_path / str(at)
        restore(folder, state)
        assert len(records(folder)) == done
        calls.update(gather=0, round=0)
        assert_same(job(folder), undisturbed)
        assert calls == {"gather": STAGES - done, "round": STAGES - done}
        assert not list(folder.glob(".*")), "what a killed process left behind is cleared away"
    # And when a resumed job, which finds a folder to check, dies too.
    folder = tmp_path / "second"
    restore(folder, states[len(states) // 2])
    for at, state in enumerate(moments(folder, monkeypatch)):
        restore(tmp_path / f"again-{at}", state)
        if at % 8 == 0:
            assert_same(job(tmp_path / f"again-{at}"), undisturbed)


@pytest.mark.slow
def test_ctrl_c_at_every_moment_says_how_to_go_on(tmp_path: Path, undisturbed: Any) -> None:
    total = 0

    def count(_: jq.Progress) -> None:
        nonlocal total
        total += 1

    assert_same(job(progress=count), undisturbed)
    assert total == STAGES * (2 * len(BATCHES) + 1)
    for at in range(0, total, STRIDE):
        folder, told = tmp_path / str(at), []

        def stop(move: jq.Progress, at: int = at, told: list[jq.Progress] = told) -> None:
            told.append(move)
            if len(told) == at + 1:
                signal.raise_signal(signal.SIGINT)

        with pytest.raises(KeyboardInterrupt) as error, default_interrupt():
            job(folder, progress=stop)
        (note,) = error.value.__notes__
        assert f"stage {told[-1].stage + 1} of {STAGES}" in note
        assert f"the same call with work_dir={str(folder)!r} goes on" in note
        assert len(records(folder)) == told[-1].stage + (told[-1].doing == "advancing")
        assert_same(job(folder), undisturbed)
    with pytest.raises(KeyboardInterrupt) as error, default_interrupt():
        job(progress=lambda move: signal.raise_signal(signal.SIGINT))
    assert not getattr(error.value, "__notes__", ())  # nothing is kept, so nothing goes on


@contextlib.contextmanager
def default_interrupt() -> Iterator[None]:
    old = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may have been ignored
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, old)


def test_an_error_in_the_callback_leaves_a_resumable_state(
    tmp_path: Path, undisturbed: Any
) -> None:
    def fail(move: jq.Progress) -> None:
        if move.stage == 3:
            raise RuntimeError("the terminal is gone")

    with pytest.raises(RuntimeError, match="terminal"):
        job(tmp_path, progress=fail)
    assert len(records(tmp_path)) == 3
    assert_same(job(tmp_path), undisturbed)


# Death of a real process.


def killed(folder: Path, share: float) -> bool:
    """Begin the job in a process and kill it when this share of its time has passed; if it was."""
    command = [sys.executable, "-m", "tests.kill_job", str(folder)]
    settings = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(CACHE),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONHASHSEED": str(random.randrange(1000)),
    }
    root = Path(__file__).parents[1]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    with subprocess.Popen(
        command, cwd=root, env={**os.environ, "PYTHONPATH": path, **settings},
        stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        word, seconds = process.stdout.readline().split()
        assert word == "ready"
        time.sleep(share * float(seconds))
        process.kill()
        rest = process.stdout.read()
    assert process.returncode in (-signal.SIGKILL, 0)
    return "done" not in rest


@pytest.mark.slow
def test_killed_processes_go_on_to_the_same_bits(tmp_path: Path, undisturbed: Any) -> None:
    random.seed(KILLS)
    found: list[int | None] = []
    for at in range(4 * KILLS):
        folder = tmp_path / str(at)
        if killed(folder, random.random()):  # else it was faster than before
            found.append(len(records(folder)) if folder.exists() else None)
        assert_same(job(folder), undisturbed)
        assert not list(folder.glob(".*"))
        if len(found) == KILLS:
            break
    print(f"stages that were kept of {STAGES} at each kill: {found}")
    assert len(found) == KILLS


# Another job is refused, with the reason.


def stacked(params: Any, x: jax.Array, first: int, second: int) -> jax.Array:
    return jnp.tanh(x @ params["w"][first]) @ params["w"][second]


def test_what_changed_is_named(tmp_path: Path) -> None:
    def constant(params: Any, x: jax.Array) -> jax.Array:
        return fn(params, x * 1.0625)

    table = jnp.linspace(0.5, 1.5, 6, dtype=jnp.float32)

    def closed(params: Any, x: jax.Array) -> jax.Array:
        return fn(params, x * table)

    def structure(params: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(fn(params, x))[..., ::-1] + jnp.sin(x[..., :5] @ jnp.eye(5, dtype=x.dtype))

    def backwards(params: Any, x: jax.Array) -> jax.Array:
        def block(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
            return x + jnp.tanh(x @ p["up"] + 0.5) @ p["down"] + p["bias"], None

        x, _ = jax.lax.scan(block, x @ params["enter"], params["blocks"], reverse=True)
        return jnp.tanh(x) @ params["head"]

    job(tmp_path, fn=closed)
    base = {"fn": closed}
    assert_same(job(tmp_path, **base), job(**base))
    head = PARAMS["head"]
    dtype = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), PARAMS)
    more = [*BATCHES, BATCHES[0]]
    changed: list[tuple[dict[str, Any], list[str]]] = [
        ({"fn": constant}, ["the function"]),
        ({"fn": fn}, ["the function"]),
        ({"fn": structure}, ["the function"]),
        ({"fn": backwards}, ["the function"]),
        ({"plan": plan(bits=2)}, ["the plan"]),
        ({"params": {**PARAMS, "head": head.at[3, 2].add(1e-6)}}, ["the parameters"]),
        ({"params": jax.tree.map(np.asarray, PARAMS), "key": jax.random.key(4)}, ["the key"]),
        ({"key": jax.random.key(4)}, ["the key"]),
        ({"batches": [BATCHES[0].at[0, 0].add(1e-6), *BATCHES[1:]]}, ["the data"]),
        ({"batches": [BATCHES[1], BATCHES[0], BATCHES[2]]}, ["the data"]),
        ({"batches": more}, ["the data"]),
        ({"sequential": "block"}, ["sequential (was weight, is block)"]),
        ({"plan": plan(bits=2), "key": jax.random.key(4)}, ["the plan", "the key"]),
        ({"params": dtype, "batches": [x.astype(jnp.float16) for x in BATCHES],
          "fn": fn, "plan": None}, ["the function", "the parameters", "the data"]),
    ]  # fmt: skip
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for others, names in changed:
        if others.get("plan", plan) is None:
            weights = jq.find_weights(fn, dtype, BATCHES[0].astype(jnp.float16))
            others["plan"] = jq.plan(weights, dict(plan()))
        with pytest.raises(WorkDirError) as error:
            job(tmp_path, **{**base, **others})
        said = f"{tmp_path} belongs to another job: {', '.join(names)} changed since it was begun"
        assert str(error.value).startswith(said)
        assert "pass a new work_dir" in str(error.value)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    job(tmp_path, **base)


def test_which_layer_is_used_when_is_part_of_the_function(tmp_path: Path) -> None:
    params = {"w": jnp.stack([BATCHES[0][:6], BATCHES[1][:6]])}

    def in_order(params: Any, x: jax.Array) -> jax.Array:
        return stacked(params, x, 0, 1)

    def in_reverse(params: Any, x: jax.Array) -> jax.Array:
        return stacked(params, x, 1, 0)

    weights = jq.find_weights(in_order, params, BATCHES[0])
    others = {"params": params, "plan": jq.plan(weights, {"w": jq.Scheme(Uniform(3))})}
    job(tmp_path, fn=in_order, **others)
    with pytest.raises(WorkDirError, match="the function changed"):
        job(tmp_path, fn=in_reverse, **others)


@pytest.mark.parametrize("name", ["JAX", "jaxlib", "jquant", "device"])
def test_versions_and_the_device_are_named(name: str, tmp_path: Path) -> None:
    job(tmp_path)
    said = json.loads((tmp_path / "job.json").read_text())
    now, said["fingerprint"][name] = said["fingerprint"][name], "0.0.1"
    (tmp_path / "job.json").write_text(json.dumps(said))
    with pytest.raises(WorkDirError) as error:
        job(tmp_path)
    assert f"another job: {name} (was 0.0.1, is {now}) changed" in str(error.value)


def test_evidence_that_was_given_is_part_of_the_job(tmp_path: Path) -> None:
    params = {"w": BATCHES[0][:6]}
    weights = jq.find_weights(lambda p, x: x @ p["w"], params, BATCHES[0])
    mirrored = jq.find_weights(lambda p, x: x @ p["w"].T, params, BATCHES[0])
    scheme = {"w": jq.Scheme(Uniform(3), None, GPTQ())}
    moment = BATCHES[0].T @ BATCHES[0]
    count = jnp.asarray(16.0)
    given = {"plan": jq.plan(weights, scheme), "evidence": {"w": Evidence(moment, count)}}
    wanted = jq.quantize(None, params, **given)  # type: ignore[arg-type]
    for _ in range(2):
        found = jq.quantize(None, params, **given, work_dir=tmp_path)  # type: ignore[arg-type]
        assert_same(found, wanted)
    for others, what in [
        ({"evidence": {"w": Evidence(2 * moment, count)}}, "the data"),
        ({"plan": jq.plan(mirrored, scheme)}, "the plan"),  # which axis is which is part of it
    ]:
        with pytest.raises(WorkDirError, match=f"{what} changed"):
            jq.quantize(None, params, work_dir=tmp_path, **{**given, **others})  # type: ignore[arg-type]


def test_parameters_in_files_are_told_apart(tmp_path: Path) -> None:
    layers = np.memmap(tmp_path / "layers", np.float32, "w+", shape=(2, 8, 5))
    layers[0], layers[1] = np.asarray(PARAMS["head"]), 1.0

    def with_head(head: Any, folder: str = "work") -> tuple[Any, jq.Report]:
        return job(tmp_path / folder, params={**PARAMS, "head": head})

    wanted = job()
    assert_same(with_head(layers[0]), wanted)
    again = np.memmap(tmp_path / "layers", np.float32, "r", shape=(2, 8, 5))
    assert_same(with_head(again[0]), wanted)
    cut = np.memmap(tmp_path / "layers", np.float32, "r", shape=(2, 5, 8))
    for other in (layers[1], again[1], again[0][::-1], cut[0].T, np.asarray(layers[0])):
        with pytest.raises(WorkDirError, match="the parameters changed"):
            with_head(other)
    # What is computed from a memory map is called one too, and is in no file.
    assert_same(with_head(layers[0].astype(np.float32, copy=True), "copied"), wanted)
    os.utime(tmp_path / "layers", ns=(0, 0))
    with pytest.raises(WorkDirError, match="the parameters changed"):
        with_head(again[0])


def test_lazy_parameters_of_another_file(tmp_path: Path) -> None:
    for name in ("one", "two"):
        jq.save(tmp_path / name, PARAMS)
    job(tmp_path / "work", params=jq.load(tmp_path / "one", lazy=True))
    with pytest.raises(WorkDirError, match="the parameters changed"):
        job(tmp_path / "work", params=jq.load(tmp_path / "two", lazy=True))


# Damage.


def test_any_damage_to_the_job_file_is_told(tmp_path: Path) -> None:
    job(tmp_path)
    file = tmp_path / "job.json"
    good = file.read_bytes()
    fingerprint = json.loads(good)["fingerprint"]
    work_files.open_work_dir(tmp_path, fingerprint)
    raws = [good[:at] for at in range(len(good) - 2)]
    for at in range(len(good)):
        raw = bytearray(good)
        raw[at] ^= 1 << at % 8
        raws.append(bytes(raw))
    for raw in [*raws, b"\xff\xfe", b"[]", b"3", b'{"version": 1}', b"[" * 100_000, b"\0" * 99]:
        file.write_bytes(raw)
        with contextlib.suppress(json.JSONDecodeError, UnicodeDecodeError, RecursionError):
            if json.loads(raw) == json.loads(good):
                continue  # white space
        with pytest.raises(WorkDirError, match="pass a new work_dir") as error:
            work_files.open_work_dir(tmp_path, fingerprint)
        assert str(tmp_path) in str(error.value)


def test_a_damaged_record_is_told_and_can_be_done_again(tmp_path: Path, undisturbed: Any) -> None:
    job(tmp_path)
    file = tmp_path / "stage-00002.safetensors"
    good = file.read_bytes()
    flips = []
    for at in range(0, len(good), TURNED):  # in the header and in the arrays
        raw = bytearray(good)
        raw[at] ^= 1 << at % 8
        flips.append(bytes(raw))
    other = (tmp_path / "stage-00003.safetensors").read_bytes()
    for raw in [*flips, good[:-1], good[:9], b"", good + b"\0", other]:
        file.write_bytes(raw)
        with pytest.raises(CheckpointError) as error:
            job(tmp_path)
        said = str(error.value)
        assert said.startswith(f"{file}: ") and said.count(str(file)) == 1
        assert "delete that file, and the same job" in said
    file.unlink()
    assert_same(job(tmp_path), undisturbed)


def test_damage_shows_when_a_lazy_result_is_read(tmp_path: Path) -> None:
    jq.save(tmp_path / "params", PARAMS)
    params = jq.load(tmp_path / "params", lazy=True)
    qparams, _ = job(tmp_path / "work", params=params)
    last = tmp_path / "work" / records(tmp_path / "work")[-1]
    last.write_bytes(last.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match="delete that file"):
        jq.realize(qparams)


# Folders that cannot be worked in.


def refused(folder: Path) -> str:
    def never(_: jq.Progress) -> None:
        raise AssertionError("work was started")

    with pytest.raises(WorkDirError) as error:
        job(folder, progress=never)
    assert str(folder) in str(error.value)
    return str(error.value)


def test_a_folder_of_other_things(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("all my work")
    said = refused(tmp_path)
    assert "no job.json, so it is not a work directory" in said and "a new folder" in said
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "pass a folder that can be written to" in refused(tmp_path / "file")
    assert "pass a folder that can be written to" in refused(tmp_path / "file" / "below")


def failing(code: int, when: Callable[[Path], bool]) -> Callable[..., Any]:
    def opened(path: Any, *args: Any, **kwargs: Any) -> Any:
        if when(Path(path)):
            raise OSError(code, os.strerror(code), str(path))
        return open(path, *args, **kwargs)

    return opened


def test_a_folder_that_is_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job(tmp_path / "full")
    (tmp_path / "empty").mkdir()
    refuse = failing(errno.EROFS, lambda path: tmp_path in path.parents)
    monkeypatch.setattr(container, "open", refuse, raising=False)
    for folder in (tmp_path / "full", tmp_path / "empty"):
        assert "Read-only file system" in refused(folder)


@pytest.mark.parametrize("at", [0, 3, STAGES - 1])
def test_a_full_disk_keeps_what_is_done(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Any,
    calls: dict[str, int],
) -> None:  # fmt: skip
    """Space ends in the middle of a record."""

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *what: Any) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, data: Any) -> None:
            self.file.write(memoryview(data).cast("B")[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def opened(path: Any, *args: Any, **kwargs: Any) -> Any:
        file = open(path, *args, **kwargs)  # noqa: SIM115
        return Full(file) if f"stage-{at:05d}" in Path(path).name else file

    with monkeypatch.context() as patch:
        patch.setattr(container, "open", opened, raising=False)
        with pytest.raises(WorkDirError) as error:
            job(tmp_path)
    said = str(error.value)
    assert said.startswith(f"{tmp_path}: the record of stage {at + 1} cannot be written (No space")
    assert "all stages before it are kept" in said and "with this work_dir" in said
    assert len(list(tmp_path.iterdir())) == 1 + at
    calls.update(gather=0, round=0)
    assert_same(job(tmp_path), undisturbed)
    assert calls == {"gather": STAGES - at, "round": STAGES - at}


# The command line.


@pytest.mark.slow
def test_the_command_line_says_how_to_go_on_and_goes_on(
    model: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    work_dir = tmp_path / "work"
    arguments = ["quantize", model, "--group", 16, "-q", *options(model)]
    stopping = ["--work-dir", work_dir, *arguments[1:], "-o", tmp_path / "resumed"]
    quantize = cli.quantize

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        def stop(move: jq.Progress) -> None:
            if move.stage == 3:
                signal.raise_signal(signal.SIGINT)

        return quantize(*args, **{**kwargs, "progress": stop})

    with monkeypatch.context() as patch, default_interrupt():
        patch.setattr(cli, "quantize", interrupted)
        assert run("quantize", *stopping) == 130
    out, err = capsys.readouterr()
    assert not out and "Traceback" not in err
    assert "jquant: stopped\nstopped in stage 4 of 8" in err and str(work_dir) in err
    assert len(records(work_dir)) == 3 and not (tmp_path / "resumed").exists()
    assert run("quantize", *stopping) == 0
    assert run(*arguments, "-o", tmp_path / "at-once") == 0
    one, two = (jq.load(tmp_path / n / "jquant.safetensors") for n in ("resumed", "at-once"))
    assert_same_bits(one, two)
    # Another command with the same folder is refused in one line.
    other = ["-r", "int3-gptq", "--force"]
    assert run("quantize", *stopping, *other) == 1
    assert f"{work_dir} belongs to another job: the plan changed" in capsys.readouterr().err
