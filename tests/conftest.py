"""How every test runs: on the CPU, with JAX as strict as it can be, and compiling fast and once.

Three quarters of the suite's time were XLA's. Programs are compiled without optimizations, which
takes a third of the time and changes no law; tests of what the compiler makes of a program (fusion,
memory, the order of sums) and those that run for minutes are marked `optimized`: they are
skipped, unless `OPTIMIZED=1` asks for the whole run to be compiled as users compile.
"""

import contextlib
import gc
import importlib.metadata
import itertools
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before JAX is imported anywhere. Nothing may reach for a model hub behind a test's back.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if os.environ.get("OPTIMIZED", "0") == "0":
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    # XLA ends the process at a flag that it does not know, and newer ones have no other emitters.
    emitters = "--xla_cpu_use_fusion_emitters=false "
    os.environ["XLA_FLAGS"] = (
        (emitters if importlib.metadata.version("jaxlib").startswith("0.10.") else "")
        + "--xla_cpu_parallel_codegen_split_count=1 "
        + os.environ.get("XLA_FLAGS", "")
    )

import hypothesis
import jax
import pytest

from jquant.io.files import FileState
from tests.marks import EVERY_CASE

OPTIMIZED = os.environ.get("OPTIMIZED", "0") != "0"

# Programs are kept between runs, and shared by workers: all of them, since seven in ten compile in
# less than 0.1 s, JAX's least for keeping one.
CACHE = Path(__file__).parents[1] / ".cache" / "jax"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# Where in the code an operation was written need not be told in each program, of which there are
# tens of thousands.
jax.config.update("jax_traceback_in_locations_limit", 0)

# A library that mixes dtypes by accident loses precision by accident. (Ranks may be promoted: a
# bias added to a batch is what the functions under test do, Flax's own layers first.)
jax.config.update("jax_numpy_dtype_promotion", "strict")

# The same examples on every machine: a failure seen once can be seen again.
hypothesis.settings.register_profile(
    "jquant",
    derandomize=True,
    deadline=None,
    max_examples=30 if EVERY_CASE else 15,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("jquant")


GONE = pytest.StashKey[list[str]]()


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what `-m` says
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow = set((Path(__file__).with_name("slow.txt")).read_text("utf-8").splitlines())
    for item in items:
        if item.nodeid in slow:  # by their time; others are marked in their files
            item.add_marker(pytest.mark.slow)
    collected = {item.nodeid for item in items}
    asked = "".join(config.args)  # where one test of a file is named, the others are not there
    files = {item.split("::")[0] for item in collected}
    parts = {file for file in files if f"{file}::" in asked}
    gone = [node for node in slow - collected if node.split("::")[0] in files - parts]
    config.stash[GONE] = sorted(gone)
    if not OPTIMIZED:
        skip = pytest.mark.skip(reason="of what the compiler makes: OPTIMIZED=1 ./run tests")
        for item in items:
            if item.get_closest_marker("optimized"):
                item.add_marker(skip)


@pytest.fixture
def slow_and_gone(request: pytest.FixtureRequest) -> list[str]:
    """The ids of `slow.txt` that their files do not hold."""
    return request.config.stash[GONE]


def pytest_collection_finish() -> None:
    """What is imported by now stays: the collector of garbage need not look at it again."""
    gc.collect()
    gc.freeze()


MAPPINGS, TESTS = 20_000, itertools.count(1)


def mappings() -> int:
    """Of memory, of this process; where the system does not tell, as many as are too many."""
    try:
        return len(Path("/proc/self/maps").read_bytes().splitlines())
    except OSError:
        return MAPPINGS


@pytest.fixture(scope="module", autouse=True)
def forgotten_programs() -> Iterator[None]:
    """Compiled programs are forgotten between files when there are many, or the process would be.

    A program takes a dozen mappings of memory, a process may have 65530 of them on Linux, and where
    XLA gets no more it crashes. What is used again comes from the cache on disk. A file takes no
    more than the half of what is left.
    """
    yield
    if mappings() >= MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def forgotten_in_long_files() -> Iterator[None]:
    """So too within a file, where one process runs many tests and none of the others."""
    yield
    if next(TESTS) % 20 == 0 and mappings() >= 2 * MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def compiles():
    """A context manager that yields the list of programs compiled inside it."""

    @contextlib.contextmanager
    def record():
        log: list[str] = []

        class Handler(logging.Handler):
            def emit(self, entry: logging.LogRecord) -> None:
                if entry.getMessage().startswith("Compiling "):
                    log.append(entry.getMessage())

        logger, handler = logging.getLogger("jax"), Handler()
        logger.addHandler(handler)
        try:
            with jax.log_compiles():
                yield log
        finally:
            logger.removeHandler(handler)

    return record


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of every read from a file that was opened lazily."""
    log: list[int] = []
    original = FileState.open

    class Spy:
        def __init__(self, file: Any):
            self.seek, self.readinto_ = file.seek, file.readinto

        def readinto(self, buffer: Any) -> int:
            log.append(self.readinto_(buffer))
            return log[-1]

    @contextlib.contextmanager
    def opened(self: FileState) -> Iterator[Any]:
        with original(self) as file:
            yield Spy(file)

    monkeypatch.setattr(FileState, "open", opened)
    return log
