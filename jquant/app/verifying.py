"""`jquant verify`: what an export holds, and whether the engine it is for computes the same."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
from cyclopts import Parameter
from rich.table import Table

from jquant.app.console import Narrator, megabytes
from jquant.app.examples import Examples, held_out
from jquant.app.options import Quiet, Reading
from jquant.app.sources import Model, opened
from jquant.app.texts import limit_of, need_known, need_language_model, windows_of
from jquant.errors import ExportError
from jquant.exporters.checking import Checked, check
from jquant.exporters.clients import CLIENTS, Apart, apart, ask, need_client
from jquant.inference import apply
from jquant.weights.arguments import inputs_of

WINDOWS, LENGTH = 2, 128  # heuristic: a wrong layout shows in the first tokens


def verify_model(
    source: Path,
    *,
    client: Literal["transformers", "llama-cpp", "gptqmodel", "mlx"] | None = None,
    against: str | None = None,
    python: Path | None = None,
    examples: Examples = Examples(),
    reading: Reading = Reading(),
    every: Annotated[bool, Parameter(negative="")] = False,
    quiet: Quiet = False,
) -> None:
    """Look at an export: whether its files are as written, what they hold, what an engine computes.

    Every tensor is read and decoded. With --client the engine itself runs the export, on the CPU
    and in a process of its own, and its logits are compared with those of jquant.

        jquant verify model-ct
        jquant verify model-ct --client transformers --samples 4 --length 256
        jquant verify model-q4_k.gguf --client llama-cpp --python other-env/bin/python
        jquant verify model-ct --client transformers --against model-w4

    The exit status is 1 where a file is damaged, or was edited after it was written.

    Parameters
    ----------
    source
        A folder that `jquant export` wrote, or a GGUF file.
    client
        The engine: transformers for compressed-tensors and arrays, llama-cpp for GGUF, gptqmodel
        for GPTQ and AWQ, mlx for MLX. It runs on held-out text, 2 windows of 128 tokens unless
        --samples and --length say otherwise; on random tokens where there is no tokenizer, and none
        is named.
    against
        A quantized model whose results are expected, such as the one that was exported. Default:
        what the export itself holds, read by jquant.
    python
        The interpreter of the environment that has the engine. Default: jquant's own.
    every
        A line for every tensor, not for every kind and shape.
    """
    narrator = Narrator(quiet)
    if client is None and (against is not None or python is not None):
        option = "--python" if against is None else "--against"
        raise ValueError(f"{option} is for --client; name one: {', '.join(CLIENTS)}")
    if client is not None:
        need_client(client, _there(source))
    with narrator.stage("reading", 100) as update:
        checked = check(source, lambda done, total: update(100 * done // total))
    narrator.show(f"{source}: {_state(checked)}")
    narrator.show(_table(checked, every))
    if client is not None:
        _beside(source, client, against, python, (examples, reading), narrator)
    if checked.edited:
        raise ExportError(
            f"{source}: edited after it was written: {', '.join(checked.edited)}; export it anew "
            "unless that was meant"
        )


def _there(source: Path) -> Path:
    if not source.exists():
        raise ValueError(f"{source}: there is no such folder or file")
    return source


def _state(checked: Checked) -> str:
    if not checked.has_checksums:
        kind = "a GGUF file" if checked.path.is_file() else "no export of jquant"
        return f"every tensor can be read; {kind}, so there are no checksums"
    if checked.edited:
        return f"every tensor can be read; {len(checked.edited)} files are not as written"
    return "every file is as it was written, and every tensor can be read"


def _table(checked: Checked, every: bool) -> Table:
    """What is held, a line for each kind and shape, or for every tensor."""
    if every:
        table = Table("tensor", "held as", "shape", "bytes")
        for tensor in checked.tensors:
            table.add_row(tensor.name, tensor.held, _shape(tensor.shape), megabytes(tensor.nbytes))
    else:
        table = Table("held as", "shape", "tensors", "bytes")
        counts: Counter[tuple[str, tuple[int, ...]]] = Counter()
        sizes: Counter[tuple[str, tuple[int, ...]]] = Counter()
        for tensor in checked.tensors:
            counts[tensor.held, tensor.shape] += 1
            sizes[tensor.held, tensor.shape] += tensor.nbytes
        for (held, shape), count in counts.items():
            table.add_row(held, _shape(shape), str(count), megabytes(sizes[held, shape]))
    last = ["all", "", str(len(checked.tensors)), megabytes(checked.nbytes)]
    table.add_section()
    table.add_row(*last)
    return table


def _shape(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


def _beside(
    source: Path, client: str, against: str | None, python: Path | None,
    options: tuple[Examples, Reading], narrator: Narrator,
) -> None:  # fmt: skip
    """Shows what an engine computes beside what jquant does."""
    examples, reading = options
    expected = against or str(source)
    narrator.say(f"loading {expected}")
    model = opened(expected, quantized="keep", **reading.choices())
    need_language_model(model.fn, model.source)
    if model.tokenizer is None and against is not None:
        model = replace(model, tokenizer=opened(str(source), lazy=True).tokenizer)
    tokens, what = _tokens(model, examples)
    with tempfile.TemporaryDirectory() as scratch:
        with narrator.stage(f"running {client}", len(tokens)) as update:
            answer = ask(client, source, tokens, scratch, python=python, progress=update)
        with narrator.stage("running jquant", len(tokens)) as update:
            result = apart(_logits(model, tokens, update), answer.logits())
    narrator.show(f"{client} on {tokens.size} {what}, beside jquant.apply of {expected}")
    narrator.show(_rows(result, answer.way, dict(answer.versions)))


def _tokens(model: Model, examples: Examples) -> tuple[np.ndarray, str]:
    """Windows of tokens `[N, T]`, and what they are."""
    context = limit_of(model.fn, "context") or LENGTH
    length = examples.length or min(LENGTH, context)
    if model.tokenizer is None and examples.text is None and examples.batches is None:
        vocab, shape = limit_of(model.fn, "vocab"), (examples.samples or WINDOWS, length)
        random = np.random.default_rng(0).integers(0, vocab or 256, shape)
        return random.astype(np.int32), "random tokens"
    if examples.batches is None and examples.samples is None:  # as many as there are, up to some
        batches = [windows_of(model.fn, model.tokenizer, length, examples.text)[1][:WINDOWS]]
    else:
        batches = held_out(model, replace(examples, length=length))
    tokens = _joined([inputs_of(batch)[0] for batch in batches])
    need_known(model.fn, tokens)
    return tokens, "held-out tokens" if examples.batches is None else "tokens"


def _joined(batches: list[Any]) -> np.ndarray:
    """Batches of windows as one. ValueError: they are no tokens, or of several lengths."""
    arrays = [np.asarray(batch) for batch in batches]
    shapes = {array.shape[1:] for array in arrays}
    if len(shapes) != 1 or any(a.ndim != 2 or a.dtype.kind not in "iu" for a in arrays):
        raise ValueError("--client takes tokens: integers [windows, length], all of one length")
    return np.concatenate(arrays).astype(np.int32)


def _logits(
    model: Model, tokens: np.ndarray, update: Callable[[int], None]
) -> Iterator[np.ndarray]:
    run: Any = jax.jit(apply(model.fn))
    for k, window in enumerate(tokens):
        yield np.asarray(run(model.params, window[None])[0], np.float32)
        update(k + 1)


def _rows(result: Apart, way: str, versions: dict[str, str]) -> Table:
    table = Table(show_header=False)
    table.add_row("KL, nats per token", f"{max(result.kl, 0.0):.2e}")
    table.add_row("largest difference of logits, relative", f"{result.relative:.2e}")
    table.add_row("same likeliest token", f"{result.same_token:.2%}")
    table.add_row("loaded", way)
    table.add_row("versions", ", ".join(f"{name} {v}" for name, v in versions.items()))
    return table
