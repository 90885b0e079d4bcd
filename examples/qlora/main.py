"""QLoRA: adapters trained beside the 4-bit codes of a language model, from three starts.

python -m examples.qlora.main           # SmolLM2-135M: minutes; writes results.json
python -m examples.qlora.main --small   # a network of 1 M weights: seconds, nothing written

The starts: float32 weights, codes of nearest rounding, and codes of GPTQ with QEP's correction. A
run that was stopped goes on from its last measurement: `--work` keeps what is done.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jquant as jq
from examples.qlora.memory import bytes_of
from jquant.weights.qtensor import is_qtensor

HERE = Path(__file__).parent
STARTS = ("float32", "nearest", "QEP")
Tree = Any


@dataclass(frozen=True)
class Size:
    """How large the experiment is."""

    length: int = 64  # tokens of a window
    calibrate: int = 64  # windows that calibrate
    train: int = 160  # windows that train, of text that calibration does not see
    measure: int = 8  # windows that measure, of text that neither sees
    batch: int = 2
    steps: int = 32
    every: int = 8  # steps between two measurements
    rank: int = 8
    rate: float = 1e-3


SMALL = Size(length=64, calibrate=8, train=24, measure=8, batch=4, steps=12, every=3)


class Subject(NamedTuple):
    """A model and its text."""

    name: str
    fn: Callable[..., Any]
    params: Tree
    linears: str  # paths of the weights that get codes and adapters
    calibration: np.ndarray
    training: np.ndarray
    held_out: np.ndarray


def subject(small: bool, size: Size) -> Subject:
    """The model, and three texts that do not overlap."""
    if small:
        from tests import trained

        fn, params, calibration, rest = trained.load()
        windows = [w[:, : size.length] for w in (calibration, rest)]
        name, linears = "byte network", trained.LINEARS
    else:
        from jquant.models import load, smollm2

        fn, params, tokenizer = load(smollm2.fetch(progress=print), scan_layers=True)
        windows = list(smollm2.text_windows(tokenizer, size.length))
        name, linears = "SmolLM2-135M-Instruct", "layers/.*"
    calibration, rest = windows
    held_out, training = rest[-size.measure :], rest[: -size.measure][: size.train]
    return Subject(name, fn, params, linears, calibration[: size.calibrate], training, held_out)


def start(which: str, task: Subject, size: Size, work: Path) -> Tree:
    """The tree that training begins from; codes are kept in the folder."""
    if which == "float32":
        return task.params
    file = work / f"{which}.jq"
    if file.exists():
        return jq.load(file)
    scheme = {"nearest": jq.presets.int4_nearest(64), "QEP": jq.presets.int4_qep(64)}[which]
    weights = jq.find_weights(task.fn, task.params, task.calibration[:1])
    plan = jq.plan(weights, {task.linears: scheme, ".*": jq.keep})
    batches = None if which == "nearest" else list(task.calibration[:, None])
    qparams, _ = jq.quantize(task.fn, task.params, plan, batches)
    jq.save(file, qparams)
    return qparams


def cross_entropy(fn: Callable[..., Any], params: Tree, tokens: Any) -> jax.Array:
    """Mean nats per token."""
    logits = fn(params, tokens)[:, :-1].astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


class Program(NamedTuple):
    """A compiled step of training, and what it takes."""

    step: Callable[..., Any]
    loss: Callable[..., Any]
    memory: dict[str, float]


def compiled(
    task: Subject, frozen: Any, trainable: Tree, optimizer: Any, example: np.ndarray
) -> Program:
    """The step `(trainable, state, frozen, tokens)`, and the loss."""

    def loss(trainable: Tree, frozen: Any, tokens: Any) -> jax.Array:
        return cross_entropy(jq.apply(task.fn), jq.merge(frozen, trainable), tokens)

    def step(trainable: Tree, state: Any, frozen: Any, tokens: Any) -> Any:
        value, gradient = jax.value_and_grad(loss)(trainable, frozen, tokens)
        updates, state = optimizer.update(gradient, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    state = optimizer.init(trainable)
    program = jax.jit(step, donate_argnums=(0, 1)).lower(trainable, state, frozen, example)
    program = program.compile()
    memory = bytes_of(loss, program, (trainable, state, frozen, example))
    return Program(program, jax.jit(loss), memory)


def batches(task: Subject, size: Size) -> Iterator[np.ndarray]:
    """The same batches for every start."""
    rng = np.random.default_rng(0)
    for _ in range(size.steps):
        yield task.training[rng.choice(len(task.training), size.batch, replace=False)]


@dataclass
class Progress:
    """How far a start has come; kept in a folder at every measurement."""

    trainable: Tree
    state: Any
    curve: dict[str, float]
    losses: list[float]
    seconds: list[float]

    @staticmethod
    def read(folder: Path, trainable: Tree, state: Any) -> Progress:
        """What is kept, or the beginning: a copy, as steps give away what they are given."""
        if not (folder / "told.json").exists():
            return Progress(*jax.tree.map(jnp.copy, (trainable, state)), {}, [], [])
        told = json.loads((folder / "told.json").read_text("utf-8"))
        here = jq.load(folder / told["arrays"], like=(trainable, state))
        return Progress(*here, told["curve"], told["losses"], told["seconds"])

    def write(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        arrays = f"{len(self.losses)}.safetensors"
        jq.save(folder / arrays, (self.trainable, self.state))
        told = {"arrays": arrays, "curve": self.curve, "losses": self.losses}
        text = json.dumps(told | {"seconds": self.seconds})
        (folder / "told.new").write_text(text, "utf-8")
        (folder / "told.new").replace(folder / "told.json")


def train(which: str, task: Subject, size: Size, work: Path) -> dict[str, Any]:
    """The curve of a start, and what its steps take."""
    began = time.perf_counter()
    tree = start(which, task, size, work)
    quantized = time.perf_counter() - began
    weights = jq.find_weights(task.fn, task.params, task.calibration[:1])
    plan = jq.plan(weights, {task.linears: jq.presets.int4_nearest(64), ".*": jq.keep})
    rules = {"|".join(map(escaped, plan)): jq.LoRA(size.rank)}
    frozen, trainable = jq.adapt(tree, rules, key=jax.random.key(0), weights=weights)
    optimizer = optax.adam(size.rate)
    program = compiled(task, frozen, trainable, optimizer, task.training[: size.batch])

    def measured(trainable: Tree) -> float:
        parts = np.split(task.held_out, range(size.batch, len(task.held_out), size.batch))
        each = [float(program.loss(trainable, frozen, part)) for part in parts]
        return float(np.average(each, weights=[len(part) for part in parts]))

    state = optimizer.init(trainable)
    here = Progress.read(work / f"{which}.part", trainable, state)
    if not here.curve:
        here.curve["0"] = measured(here.trainable)
    for number, tokens in enumerate(batches(task, size), 1):
        if number <= len(here.losses):
            continue
        began = time.perf_counter()
        here.trainable, here.state, value = program.step(here.trainable, here.state, frozen, tokens)
        here.losses.append(float(value))
        here.seconds.append(time.perf_counter() - began)
        if number % size.every == 0 or number == size.steps:
            here.curve[str(number)] = measured(here.trainable)
            here.write(work / f"{which}.part")
            print(
                f"{which:8s} step {number:4d}: {here.curve[str(number)]:.4f} nats held out",
                flush=True,
            )
    bits = sum(is_qtensor(leaf) for leaf in jax.tree.leaves(tree, is_leaf=is_qtensor))
    return {
        "curve": here.curve,
        "training": here.losses,
        "step_seconds": statistics.median(here.seconds[1:]),
        "quantize_seconds": quantized,
        "bytes": program.memory,
        "quantized_weights": bits,
        "adapter_parameters": sum(leaf.size for leaf in jax.tree.leaves(trainable)),
    }


def escaped(path: str) -> str:
    """A path as a regular expression of it."""
    return path.replace(".", r"\.")


def compared(runs: dict[str, Any]) -> dict[str, Any]:
    """What the runs say of each other; None where a run is missing or a loss is not reached."""
    if not all(which in runs for which in STARTS):
        return {}
    curves = {w: {int(k): v for k, v in runs[w]["curve"].items()} for w in STARTS}
    aim = curves["nearest"][max(curves["nearest"])]
    reached = [number for number, loss in sorted(curves["QEP"].items()) if loss <= aim]
    full = runs["float32"]
    return {
        "nearest_final": aim,
        "steps_of_QEP_to_nearest_final": reached[0] if reached else None,
        "steps": max(curves["nearest"]),
        "step_time_of_float32": runs["QEP"]["step_seconds"] / full["step_seconds"],
        "memory_of_float32": runs["QEP"]["bytes"]["program"] / full["bytes"]["program"],
        "memory_by_arithmetic": runs["QEP"]["bytes"]["program"]
        / runs["QEP"]["bytes"]["by arithmetic"],
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="the byte network, few steps")
    parser.add_argument("--steps", type=int, help="of training")
    parser.add_argument("--out", type=Path, help="where to write; results.json unless --small")
    parser.add_argument(
        "--only", choices=STARTS, help="one start; the others as they are in --work"
    )
    parser.add_argument("--work", type=Path, help="folder that keeps codes and finished starts")
    given = parser.parse_args(arguments)
    size = SMALL if given.small else Size()
    if given.steps:
        size = Size(**{**asdict(size), "steps": given.steps})
    task = subject(given.small, size)
    with tempfile.TemporaryDirectory() as scratch:
        work = given.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        runs: dict[str, Any] = {}
        for which in STARTS:
            record = work / f"{which}.json"
            if record.exists():
                runs[which] = json.loads(record.read_text("utf-8"))
            elif given.only in (None, which):
                runs[which] = train(which, task, size, work)
                record.write_text(json.dumps(runs[which]), "utf-8")
    result = {
        "model": task.name,
        "size": asdict(size),
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "optax": optax.__version__,
            "jquant": jq.__version__ if hasattr(jq, "__version__") else "0.1.0",
        },
        "machine": {"backend": jax.default_backend(), "processor": platform.machine()},
        "runs": runs,
        "compared": compared(runs),
    }
    out = given.out or (None if given.small else HERE / "results.json")
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    for name, value in result["compared"].items():
        print(f"{name}: {value}")
    return result


if __name__ == "__main__":
    main()
