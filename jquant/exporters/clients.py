"""Engines that an export can be run by, to see that they compute what `jquant.apply` does.

An engine runs in a process of its own, and in any environment: often not in jquant's, since engines
ask for other versions of the same packages. It is given tokens and gives logits. A row of `CLIENTS`
says which formats it opens, and by which versions of which packages that was tried;
`client_child.py` is what runs there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jquant.errors import ClientError
from jquant.formats.config import claimed

_CHILD = Path(__file__).with_name("client_child.py")
_TORCH = {"torch": "2.13.0", "transformers": "5.24.0"}


@dataclass(frozen=True)
class Client:
    """An engine.

    Attributes:
        formats: what it opens: "gguf", "mlx", "safetensors" (arrays), or a `quant_method`, each
            with the packages that this takes and the versions that were tried.
    """

    formats: Mapping[str, Mapping[str, str]]


_GPTQMODEL = {**_TORCH, "GPTQModel": "7.2.0"}
CLIENTS: Mapping[str, Client] = {
    "transformers": Client(
        {"compressed-tensors": {**_TORCH, "compressed-tensors": "0.20.1"}, "safetensors": _TORCH}
    ),
    "llama-cpp": Client({"gguf": {"llama-cpp-python": "0.3.36"}}),
    "gptqmodel": Client({"gptq": _GPTQMODEL, "awq": _GPTQMODEL}),
    "mlx": Client({"mlx": {"mlx": "0.32.4", "mlx-lm": "0.32.2"}}),
}


@dataclass(frozen=True, eq=False)
class Answer:
    """What an engine computed.

    Attributes:
        logits: gives those of each window in turn, float32 `[length, vocab]`.
        versions: of its packages.
        way: how it was told to load the model; "as it comes": not at all.
    """

    logits: Callable[[], Iterator[np.ndarray]]
    versions: Mapping[str, str]
    way: str


def need_client(name: str, path: Path) -> Mapping[str, str]:
    """The packages, and the versions tried, that an engine needs to open an export.

    Raises:
        ClientError: there is no such engine, or it does not open exports of this format.
    """
    if name not in CLIENTS:
        raise ClientError(f"client={name[:80]!r} is none of {', '.join(CLIENTS)}")
    form, formats = form_of(path), CLIENTS[name].formats
    if form not in formats:
        others = [other for other, row in CLIENTS.items() if form in row.formats]
        raise ClientError(
            f"{name} opens {', '.join(formats)}, and {path} is {form}; "
            + (f"pass client={others[0]!r}" if others else "no client here opens it")
        )
    return formats[form]


def form_of(path: Path) -> str:
    """The format of an export: "gguf", "mlx", "safetensors", or the `quant_method` it names.

    Raises:
        ClientError: it is no folder with a `config.json`, and no file.
    """
    if path.is_file():
        return "gguf"
    from jquant.models.hf_folder import read_json

    quantization = claimed(dict(read_json(path / "config.json")))
    if isinstance(quantization, Mapping):
        return str(quantization.get("quant_method"))[:80]
    return "safetensors"


def ask(
    name: str,
    path: str | os.PathLike[str],
    tokens: np.ndarray,
    folder: str | os.PathLike[str],
    *,
    python: str | os.PathLike[str] | None = None,
    progress: Callable[[int], object] = lambda done: None,
) -> Answer:
    """What an engine computes with an export, on the CPU.

    Args:
        name: of `CLIENTS`.
        path: a folder or a GGUF file.
        tokens: int32 `[windows, length]`.
        folder: where its logits are left, a file for each window.
        python: the interpreter of the environment that has the engine; default: this one.
        progress: is told how many windows are done.

    Raises:
        ClientError: there is no such engine, it does not open this format, a package is missing
            (names it, and the version that was tried), or it failed (with what it said).
        OSError: there is no such interpreter.
    """
    place, interpreter = Path(path).resolve(), str(python or sys.executable)
    packages = need_client(name, place)
    out = Path(folder).resolve()
    np.save(out / "tokens.npy", np.asarray(tokens, np.int32))
    job = {
        "client": name, "path": str(place), "packages": list(packages),
        "tokens": str(out / "tokens.npy"), "out": str(out),
    }  # fmt: skip
    last, complaint = _run(interpreter, job, progress)
    if "missing" in last:
        tried = " ".join(f"'{package}=={version}'" for package, version in packages.items())
        raise ClientError(
            f"{last['missing']} is not installed beside {interpreter}; {name} was tried with: pip "
            f"install {tried}. Name the interpreter that has it (python=, --python)"
        )
    if "versions" not in last:
        reason = last.get("error") or (complaint.strip().splitlines() or ["nothing was said"])[-1]
        raise ClientError(f"{name} did not run {place}: {reason[:400]}")

    def logits() -> Iterator[np.ndarray]:
        for k in range(len(tokens)):
            yield np.load(out / f"{k}.npy", allow_pickle=False)

    return Answer(logits, last["versions"], last["way"])


def _run(
    interpreter: str, job: Mapping[str, Any], progress: Callable[[int], object]
) -> tuple[dict[str, Any], str]:
    """The last line that the child said, and its complaints. Its program comes as standard input,
    so that no file beside it is taken for a package of the same name."""
    environment = dict(os.environ)
    if interpreter != sys.executable:  # what is for this interpreter is not for that
        environment.pop("PYTHONPATH", None)
    source = f"{_CHILD.read_text('utf-8')}\n\nmain(json.loads({json.dumps(job)!r}))\n"
    last: dict[str, Any] = {}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as complaints:
        child = subprocess.Popen(
            [interpreter, "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints,
            text=True, encoding="utf-8", errors="replace", cwd=job["out"], env=environment,
        )  # fmt: skip
        try:
            assert child.stdin is not None and child.stdout is not None
            child.stdin.write(source)
            child.stdin.close()
            for line in child.stdout:
                last = _line(line) or last
                progress(last.get("windows", 0))
            child.wait()
        except BaseException:
            child.kill()
            child.wait()
            raise
        finally:
            if child.stdout is not None:
                child.stdout.close()
        complaints.seek(0)
        return last, complaints.read()[-4000:]


def _line(line: str) -> dict[str, Any]:
    """What a line of the child says; nothing, of a line that the engine printed."""
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


@dataclass(frozen=True)
class Apart:
    """How far an engine's logits are from those expected.

    Attributes:
        kl: the KL divergence from what is expected to what the engine has, in nats per token.
        largest_difference: of two logits.
        largest_logit: of those expected, in magnitude.
        same_token: how often both have the same token likeliest, from 0 to 1.
    """

    kl: float
    largest_difference: float
    largest_logit: float
    same_token: float

    @property
    def relative(self) -> float:
        """The largest difference relative to the largest logit."""
        return self.largest_difference / max(self.largest_logit, 1e-30)


def apart(expected: Iterator[np.ndarray], logits: Iterator[np.ndarray]) -> Apart:
    """How far logits are from those expected, window by window, in float64.

    Args:
        expected: `[length, vocab]` each.
        logits: as many, of the same shapes.

    Raises:
        ClientError: the engine's shapes are others, or its logits no numbers.

    Example:
        >>> one = np.array([[0.0, 1.0], [2.0, 0.0]])
        >>> apart(iter([one]), iter([one + 0.5])).largest_difference
        0.5
    """
    kl, same, difference, largest = [], [], 0.0, 0.0
    for ours, theirs in zip(expected, logits, strict=True):
        if ours.shape != theirs.shape:
            raise ClientError(f"the client's logits are {theirs.shape}, expected {ours.shape}")
        if not np.isfinite(theirs).all():
            raise ClientError("the client's logits hold NaN or infinity")
        one, other = ours.astype(np.float64), theirs.astype(np.float64)
        p, q = log_softmax(one), log_softmax(other)
        kl.append((np.exp(p) * (p - q)).sum(-1))
        same.append(one.argmax(-1) == other.argmax(-1))
        difference = max(difference, float(np.abs(one - other).max()))
        largest = max(largest, float(np.abs(one).max()))
    means = (float(np.concatenate(rows).mean()) for rows in (kl, same))
    return Apart(next(means), difference, largest, next(means))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logits as logarithms of probabilities."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
