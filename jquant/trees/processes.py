"""What several processes of one program tell each other: short words, by JAX's own collectives.

A program on several processes is the same program on each of them, and each must get as far as the
others: who waits for an array that another will never send waits forever. So what can differ
between processes (files, data, what a user has passed) is compared before arrays depend on it.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jquant.errors import ProcessError


def is_spread(tree: Any) -> bool:
    """Whether an array of a tree lies on devices of other processes as well."""
    return any(
        isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        for leaf in jax.tree.leaves(tree)
    )


def whole(leaf: jax.Array) -> np.ndarray:
    """An array in NumPy's hands; of one that is spread over processes, its parts from all of them.

    Every process must call it for the same arrays.
    """
    if leaf.is_fully_addressable or leaf.is_fully_replicated:
        return np.asarray(leaf)
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


def from_all(word: str) -> list[str]:
    """What each process passes, by process: of words that differ, digests.

    The same word comes back as it is.
    """
    if jax.process_count() == 1:
        return [word]
    mine = hashlib.sha256(word.encode()).digest()
    rows = multihost_utils.process_allgather(np.frombuffer(mine, np.uint8))
    digests = [bytes(row).hex() for row in np.asarray(rows).reshape(jax.process_count(), -1)]
    return [word if row == mine.hex() else row for row in digests]


def differing(words: Sequence[str]) -> list[int]:
    """The processes that do not pass what process 0 does."""
    return [process for process, word in enumerate(words) if word != words[0]]


def fallen(error: Exception | None) -> list[int]:
    """The processes that got an error where they were; waits for all."""
    words = from_all("went on" if error is None else "fell")
    ok = "went on" if error is None else hashlib.sha256(b"went on").hexdigest()
    return [process for process, word in enumerate(words) if word != ok]


@contextlib.contextmanager
def on_all(shared: bool, what: str) -> Iterator[None]:
    """A block that each process runs; if it fails on one, it fails on all.

    Args:
        shared: whether there are others at all.
        what: the block in words, for the message.

    Raises:
        ProcessError: another process could not do it.
    """
    error: Exception | None = None
    try:
        yield
    except (OSError, ValueError) as raised:
        if not shared:
            raise
        error = raised
    others = fallen(error) if shared else []
    if error is not None:
        raise error
    if others:
        raise ProcessError(f"process {joined(others)} could not {what}; see the error there")


def one_token() -> str:
    """Eight random hexadecimal digits, the same on every process."""
    token = np.frombuffer(secrets.token_bytes(4), np.uint8)
    if jax.process_count() > 1:
        token = np.asarray(multihost_utils.broadcast_one_to_all(token))
    return bytes(token.astype(np.uint8)).hex()


def joined(numbers: Iterable[int]) -> str:
    """Processes in words: `1`, or `1 and 3`."""
    return " and ".join(map(str, numbers))
