"""Compiled programs kept on disk, so that a second command need not compile what the first one did.

The cache is JAX's own: keys hold the program, the versions of JAX and of its compiler, and the
device. Only the command line turns it on; a library leaves such choices to whoever imports it.
"""

from __future__ import annotations

import os

import jax

from jquant.models.smollm2 import cache_folder

LIMIT = 2**30  # bytes; those not used for longest go first
LEAST = 0.2  # seconds of compiling, below which reading a file back gains nothing (heuristic)


def keep_programs() -> None:
    """Have JAX keep compiled programs in `programs` of jquant's cache folder, at most 1 GiB.

    Not where `JQUANT_PROGRAMS=off`, and not where the user has told JAX what to keep.
    """
    off = os.environ.get("JQUANT_PROGRAMS", "").lower() in ("off", "0", "no")
    if off or jax.config.values["jax_compilation_cache_dir"]:
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "programs"))
    jax.config.update("jax_compilation_cache_max_size", LIMIT)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST)
