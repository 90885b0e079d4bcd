"""Models of `transformers` by their own PyTorch code: the same numbers, every weight, one line."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import jquant as jq
from jquant import models
from jquant.errors import CheckpointError, TreeError, UnsupportedPrimitiveError
from jquant.trees.lazy import is_lazy

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("torchax")

from tests.marks import mostly_slow  # noqa: E402
from tests.zoo import inputs_of, linear_names, torch_output, zoo, zoo_model  # noqa: E402

TIED = "lm_head.weight"  # where it is the embedding, it is one leaf under another name
FAST = ("Qwen3ForCausalLM", "BertModel", "MixtralForCausalLM")
ALL = mostly_slow(zoo(), FAST)
# Unlike each other in what they are made of: windows, one fused projection, convolutions as
# products, a recurrence, experts, an encoder beside a decoder, pictures.
WHOLE = mostly_slow(
    [*FAST, "Gemma2ForCausalLM", "GPT2LMHeadModel", "MambaForCausalLM", "GptOssForCausalLM",
     "T5ForConditionalGeneration", "ViTForImageClassification"],
    FAST,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Folders that `transformers` wrote, one for each architecture."""
    written: dict[str, Path] = {}

    def folder(architecture: str) -> Path:
        if architecture not in written:
            written[architecture] = tmp_path_factory.mktemp(architecture)
            zoo_model(architecture).save_pretrained(written[architecture])
        return written[architecture]

    yield folder


def plan_for(fn: Any, params: Any, inputs: Any) -> jq.Plan:
    """4 bits by GPTQ for what has inputs; embeddings are kept."""
    weights = jq.find_weights(fn, params, *inputs)
    contracted = [p for p, w in weights.items() if all(u.kind != "lookup" for u in w.uses)]
    scheme = jq.presets.int4_gptq(group=8)
    return jq.plan(weights, {p.replace(".", r"\."): scheme for p in contracted})


@pytest.mark.parametrize("architecture", ALL)
def test_the_same_numbers_from_the_same_folder(
    architecture: str, folder_of: Callable[[str], Path]
) -> None:
    model, inputs = zoo_model(architecture), inputs_of(architecture)
    fn, params, tokenizer = models.load(folder_of(architecture), backend="torch", lazy=True)
    assert tokenizer is None and all(map(is_lazy, params.values()))
    result = jax.jit(fn)(jq.realize(params), *inputs)
    expected = torch_output(model, fn, inputs)
    np.testing.assert_allclose(result, expected, atol=1e-5 * max(1, abs(expected).max()))
    assert linear_names(model) - {TIED} <= set(plan_for(fn, params, inputs))


@pytest.mark.filterwarnings("ignore:.*rank deficient")
@pytest.mark.parametrize("architecture", WHOLE)
def test_every_weight_is_found_and_quantized(
    architecture: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    model, inputs = zoo_model(architecture), inputs_of(architecture, rows=6)
    fn, params, _ = models.load(folder_of(architecture), backend="torch", lazy=True)
    plan = plan_for(fn, params, inputs)
    assert linear_names(model) - {TIED} <= set(plan)
    qparams, report = jq.quantize(fn, params, plan, [inputs, inputs_of(architecture, 6, 1)])
    layers = 2 if "T5" not in architecture and "Whisper" not in architecture else 4
    assert len(report.stages) >= 2 * layers
    qparams = jq.realize(qparams)
    result = jax.jit(jq.apply(fn))(qparams, *inputs)
    exact = jax.jit(fn)(jq.dequantize(qparams), *inputs)
    np.testing.assert_allclose(result, exact, atol=1e-5 * float(abs(exact).max()))
    models.save_quantized(tmp_path, fn, qparams)
    again, kept, _ = models.load(tmp_path)
    assert again == fn and hash(again) == hash(fn)
    np.testing.assert_array_equal(jax.jit(jq.apply(again))(kept, *inputs), result)


def test_tied_weights_are_one_leaf(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    fn, params, _ = models.load(folder_of("GPT2LMHeadModel"), backend="torch")
    assert "transformer.wte.weight" in params and TIED not in params
    tensors = safetensors.numpy.load_file(folder_of("GPT2LMHeadModel") / "model.safetensors")
    renamed = {(TIED if "wte" in name else name): value for name, value in tensors.items()}
    _, again, _ = models.load(rewritten(folder_of("GPT2LMHeadModel"), tmp_path, renamed))
    assert again.keys() == params.keys()
    tokens = inputs_of("GPT2LMHeadModel")[0]
    np.testing.assert_array_equal(fn(again, tokens), fn(params, tokens))


def rewritten(folder: Path, target: Path, tensors: Any, **config: Any) -> Path:
    """A copy of a folder with other tensors, and with some keys of its configuration replaced."""
    claims = json.loads((folder / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(claims))
    safetensors.numpy.save_file(dict(tensors), target / "model.safetensors")
    return target


@pytest.fixture
def opt(folder_of: Callable[[str], Path]) -> tuple[Path, dict[str, np.ndarray]]:
    folder = folder_of("OPTForCausalLM")
    return folder, safetensors.numpy.load_file(folder / "model.safetensors")


NAME = "model.decoder.layers.1.fc1.weight"
DAMAGES: dict[str, tuple[Callable[[dict[str, np.ndarray]], Any], str]] = {
    "missing": (lambda t: t.pop(NAME), rf"tensor '{NAME}' is missing; near: 'model.decoder"),
    "extra": (lambda t: t.update(more=t[NAME]), "1 tensors that OPTForCausalLM has no place for"),
    "shape": (
        lambda t: t.update({NAME: t[NAME][:7]}),
        rf"'{NAME}' has shape \(7, 32\); the config",
    ),
    "dtype": (lambda t: t.update({NAME: t[NAME].astype(np.int8)}), f"'{NAME}' has dtype I8"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_tensors_that_do_not_fit_are_named(
    damage: str, opt: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    folder, tensors = opt
    change, message = DAMAGES[damage]
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        models.load(rewritten(folder, tmp_path, tensors), lazy=True)


def test_nan_is_refused_when_it_is_read(
    opt: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    folder, tensors = opt
    tensors[NAME][3, 4] = np.nan
    _, params, _ = models.load(rewritten(folder, tmp_path, tensors), lazy=True)
    with pytest.raises(CheckpointError, match="fc1.weight' holds NaN"):
        params[NAME][...]


def test_a_class_may_be_named_and_takes_what_is_its(
    opt: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    folder, tensors = opt
    tensors["more"] = np.ones(3, np.float32)
    path = rewritten(folder, tmp_path, tensors)
    fn, params, _ = models.load(path, architecture="OPTModel")
    assert fn.output == "last_hidden_state" and "more" not in params
    assert fn(params, inputs_of("OPTForCausalLM")[0]).shape == (2, 12, 32)
    saved = tmp_path / "saved"
    models.save_quantized(saved, fn, params)
    assert models.load(saved, architecture="OPTModel")[0] == fn
    with pytest.raises(CheckpointError, match="was saved as OPTModel, and cannot run as 'OPT"):
        models.load(saved, architecture="OPTForCausalLM")
    with pytest.raises(ValueError, match="backend='jax' is the reference decoder, .*leave out one"):
        models.load(path, backend="jax", architecture="OPTModel")


def test_a_class_may_be_named_on_the_command_line(
    opt: tuple[Path, dict[str, np.ndarray]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from jquant.app import cli

    folder, tensors = opt
    path = rewritten(folder, tmp_path, tensors, architectures=None)
    np.save(tmp_path / "tokens.npy", inputs_of("OPTForCausalLM", rows=4)[0])

    def run(command: str, *more: object) -> tuple[int, str, str]:
        status = cli.run([command, str(path), *map(str, more), "-q"])
        return (status, *capsys.readouterr())

    given = ("--batches", tmp_path / "tokens.npy")
    named = (*given, "-o", tmp_path / "w4", "-r", "int4-nearest", "--group", 8, "--architecture")
    for command in (named[:-1], (*named, "OPTForCausalLm"), (*named, "OPTModel", "--backend=jax")):
        status, _, err = run("quantize", *command)
        assert status == 1 and not (tmp_path / "w4").exists()
        assert "--architecture" in err or "near: 'OPTForCausalLM'" in err or "leave out one" in err
    assert run("quantize", *named, "OPTModel")[0] == 0
    assert models.load(tmp_path / "w4")[0].config.architecture == "OPTModel"
    status, out, _ = run("evaluate", *given, "--architecture", "OPTForCausalLM")
    assert status == 0 and "perplexity" in out
    path = tmp_path / "w4"
    status, _, err = run("evaluate", *given, "--architecture", "OPTForCausalLM")
    assert status == 1 and "was saved as OPTModel" in err


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(architectures=["OPTForEverything"]), "'OPTForEverything': transformers .* no such"),
        (dict(architectures=["AutoModel"]), "'AutoModel': transformers .* has no such model"),
        (dict(architectures=None), "architectures: config.json names none; pass architecture="),
        (dict(num_hidden_layers=10**9), "num_hidden_layers = 1000000000, and there are"),
        (dict(num_attention_heads=5), "transformers refuses its configuration"),
        (dict(quantization_config={"bits": 4}), "quantized checkpoints are not read"),
        (dict(model_type="nothing"), "refuses its configuration|model_type"),
    ],
)
def test_what_transformers_does_not_know(
    config: dict[str, Any], message: str, opt: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    folder, tensors = opt
    with pytest.raises(CheckpointError, match=message):
        models.load(rewritten(folder, tmp_path, tensors, **config), backend="torch")


def test_the_reference_decoder_comes_first(folder_of: Callable[[str], Path]) -> None:
    folder, tokens = folder_of("LlamaForCausalLM"), inputs_of("LlamaForCausalLM")[0]
    reference, params, _ = models.load(folder)
    own, own_params, _ = models.load(folder, backend="torch")
    assert isinstance(reference, models.Decoder) and isinstance(own, models.TorchFunction)
    np.testing.assert_allclose(reference(params, tokens), own(own_params, tokens), atol=2e-5)
    with pytest.raises(CheckpointError, match="model_type = 'opt' is not supported"):
        models.load(folder_of("OPTForCausalLM"), backend="jax")
    with pytest.raises(ValueError, match="backend = 'tf'; supported"):
        models.load(folder, backend="tf")  # type: ignore[arg-type]


def test_other_inputs_and_outputs_by_name(folder_of: Callable[[str], Path]) -> None:
    tokens = inputs_of("BertModel")[0]
    mask = np.arange(tokens.shape[1]) < np.array([[12], [5]])
    fn, params, _ = models.load(folder_of("BertModel"))
    padded = dataclasses.replace(fn, inputs=("input_ids", "attention_mask"))
    whole = padded(params, tokens, mask.astype(np.int32))
    alone = fn(params, tokens[1:, :5])
    np.testing.assert_allclose(whole[1:, :5], alone, atol=1e-5)
    pooled = dataclasses.replace(fn, output="pooler_output")(params, tokens)
    assert pooled.shape == (2, 32)
    with pytest.raises(TypeError, match=r"expected 2 inputs \('input_ids', 'attention_mask'\)"):
        padded(params, tokens)
    with pytest.raises(
        ValueError, match="output = 'logits': BertModel gives last_hidden_state, po"
    ):
        dataclasses.replace(fn, output="logits")(params, tokens)
    del params["encoder.layer.0.output.dense.bias"]
    with pytest.raises(
        TreeError, match="'encoder.layer.0.output.dense.bias' is missing in the par"
    ):
        fn(params, tokens)


def test_text_is_generated_without_a_cache(folder_of: Callable[[str], Path]) -> None:
    fn, params, _ = models.load(folder_of("Qwen3ForCausalLM"), backend="torch")
    prompt = inputs_of("Qwen3ForCausalLM")[0][:, :5]
    text = prompt
    for _ in range(3):
        logits = fn(params, text)
        text = np.concatenate([text, np.argmax(logits[:, -1:], -1)], axis=1)
    np.testing.assert_array_equal(models.generate(fn, params, prompt, 3), text[:, 5:])


def test_bfloat16_is_the_compute_dtype(folder_of: Callable[[str], Path]) -> None:
    tokens = inputs_of("Qwen3ForCausalLM")[0]
    fn, params, _ = models.load(folder_of("Qwen3ForCausalLM"), backend="torch")
    half, same, _ = models.load(folder_of("Qwen3ForCausalLM"), backend="torch", dtype="bfloat16")
    assert same["model.norm.weight"].dtype == jnp.float32
    exact, rough = fn(params, tokens), half(same, tokens)
    assert rough.dtype == jnp.bfloat16
    assert 0 < abs(exact - rough.astype(jnp.float32)).max() < 0.1 * abs(exact).max()


def test_an_operator_that_torchax_lacks_is_named(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchax.tensor import Environment, OperatorNotFound

    def lacking(self: Any, operator: Any) -> Any:
        raise OperatorNotFound(f"Operator with name {operator} has no lowering")

    fn, params, _ = models.load(folder_of("BertModel"))
    monkeypatch.setattr(Environment, "_get_op_or_decomp", lacking)
    with pytest.raises(UnsupportedPrimitiveError, match="BertModel: .*no lowering.*newer torchax"):
        fn(params, inputs_of("BertModel")[0])


def test_a_shard_that_is_not_there(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    zoo_model("OPTForCausalLM").save_pretrained(tmp_path, max_shard_size="40kB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    fn, params, _ = models.load(tmp_path)
    _, whole, _ = models.load(folder_of("OPTForCausalLM"))
    assert all(np.array_equal(params[name], whole[name]) for name in whole)
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=f"{shards[1].name} is missing"):
        models.load(tmp_path)


def test_code_that_looks_at_values_is_refused(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fn, params, _ = models.load(folder_of("BertModel"))
    forward = transformers.BertModel.forward

    def looking(self: Any, input_ids: Any, **rest: Any) -> Any:
        return forward(self, input_ids if (input_ids > 3).all() else -input_ids, **rest)

    monkeypatch.setattr(transformers.BertModel, "forward", looking)
    with pytest.raises(UnsupportedPrimitiveError, match="depends on the values of its inputs"):
        jq.find_weights(fn, params, *inputs_of("BertModel"))


def test_a_saved_lie_is_refused(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    fn, params, _ = models.load(folder_of("Qwen3ForCausalLM"), backend="torch")
    del params["model.norm.weight"]
    models.save_quantized(tmp_path, fn, params)
    with pytest.raises(CheckpointError, match="do not fit the decoder at 'model.norm.weight'"):
        models.load(tmp_path)
    lie = dataclasses.replace(fn, config=models.TorchConfig("os.system", fn.config.values))
    models.save_quantized(tmp_path, lie, params)
    with pytest.raises(CheckpointError, match="malformed torch: architectures = 'os.system'"):
        models.load(tmp_path)


@pytest.mark.slow
def test_every_command(
    folder_of: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel

    from jquant.app import cli

    folder, out = folder_of("Qwen3ForCausalLM"), tmp_path / "w4"
    words = Tokenizer(WordLevel({f"w{k}": k for k in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{k * k % 61}" for k in range(2000)))

    def run(*arguments: object) -> str:
        assert cli.run([str(argument) for argument in arguments]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    options = ("--text", text, "--length", 32, "--samples", 4)
    more = ("--group", 8, "--backend", "torch", "-q")
    assert "14 weights" in run("quantize", folder, "-o", out, *more, *options)
    assert "Qwen3ForCausalLM" in run("inspect", out)
    assert "KL, nats per token" in run("evaluate", out, "--against", folder, *options, "-q")
    assert run("generate", out, "-p", "w3 w4", "--tokens", 2, "--no-chat").startswith("w")
    status = cli.run(["evaluate", str(folder_of("BertModel")), "-q", "--tokenizer", str(out)])
    assert status == 1
    assert "are no logits of tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    "architecture", ["T5ForConditionalGeneration", "ViTForImageClassification"]
)
def test_inputs_of_every_kind_on_the_command_line(
    architecture: str, folder_of: Callable[[str], Path], tmp_path: Path, capsys: Any
) -> None:
    from jquant.app import cli

    folder, out = folder_of(architecture), tmp_path / "w8"
    file = tmp_path / "inputs.npz"
    np.savez(file, *inputs_of(architecture))

    def run(*arguments: object) -> str:
        assert cli.run([str(argument) for argument in arguments]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    rule = (
        ".*block.0.*wi.weight" if "T5" in architecture else ".*0.*fc1.weight"
    ) + "=int8-nearest:8"
    run("quantize", folder, "-o", out, "-q", "--rule", rule, "--rule", ".*=keep", "--batches", file)
    shown = run("evaluate", out, "--against", folder, "-q", "--batches", file)
    assert "squared error of outputs, relative" in shown
    assert cli.run(["evaluate", str(out), "-q", "--batches", str(file)]) == 1
    assert "no logits of tokens that follow its first input" in capsys.readouterr().err


TOKENS = np.arange(24, dtype=np.int64).reshape(2, 12) % 60
FEATURES = np.zeros((2, 16, 64), np.float32)
UNFIT: dict[str, tuple[str, dict[str, Any], str]] = {
    "too few": ("T5", {"arr_0": TOKENS}, "1 inputs in place of 2; .* takes input_ids .whole numb"),
    "kind": ("T5", {"a": TOKENS * 1.0, "b": TOKENS}, "input_ids are no whole numbers; .* float64 "),
    "floats": ("Whisper", {"a": FEATURES.astype(int), "b": TOKENS}, "input_features are no floats"),
    "shape": ("ViT", {"x": np.zeros((2, 3, 8, 8), np.float32)}, "ViTForImageC.* refuses them: .*8"),
    "rank": ("T5", {"a": TOKENS[..., None], "b": TOKENS}, "T5ForCond.* refuses them: .*size"),
    "token": (
        "T5",
        {"a": TOKENS, "b": TOKENS + 45},
        "decoder_input_ids holds token 68; .* 0 to 63",
    ),
    "negative": ("T5", {"a": TOKENS - 1, "b": TOKENS}, "input_ids holds token -1"),
    "name": ("T5", {"input_ids": TOKENS, "decoder": TOKENS}, "'decoder' is no input of T5ForCond"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_inputs_that_do_not_fit_are_refused_with_what_is_taken(
    case: str, folder_of: Callable[[str], Path], tmp_path: Path, capsys: Any
) -> None:
    from jquant.app import cli

    start, arrays, message = UNFIT[case]
    folder = folder_of(next(name for name in zoo() if name.startswith(start)))
    np.savez(tmp_path / "inputs.npz", **arrays)
    out = tmp_path / "out"
    line = ["quantize", folder, "-o", out, "-q", "--batches", tmp_path / "inputs.npz"]
    assert cli.run(list(map(str, line))) == 1
    assert re.search(message, capsys.readouterr().err) and not out.exists()


def test_text_is_no_input_of_a_network_of_pictures(
    folder_of: Callable[[str], Path], tmp_path: Path, capsys: Any
) -> None:
    from jquant.app import cli

    folder = folder_of("ViTForImageClassification")
    assert cli.run(["quantize", str(folder), "-o", str(tmp_path / "out"), "-q"]) == 1
    taken = r"takes pixel_values \(floats \[examples, channels, height, width\]\), and text is none"
    assert re.search(taken, capsys.readouterr().err)
    assert cli.run(["generate", str(folder), "-p", "hello"]) == 1
    assert "needs a language model that predicts each next token" in capsys.readouterr().err


def test_arrays_of_a_file_count_by_their_names(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    from jquant.app.examples import read_batches
    from jquant.app.named_inputs import taking
    from jquant.app.sources import Model

    fn, params, _ = models.load(folder_of("BertModel"), lazy=True)
    mask = (np.arange(12) < np.array([[12], [5]])).astype(np.int32)
    file = str(tmp_path / "inputs.npz")
    np.savez(file, attention_mask=mask, input_ids=TOKENS)
    model = taking(Model("bert", fn, params), file)
    assert model.fn.inputs == ("input_ids", "attention_mask")
    ((tokens, second),) = read_batches(file, model.fn.inputs)
    np.testing.assert_array_equal(tokens, TOKENS)
    np.testing.assert_array_equal(second, mask)
    np.savez(file, mask=mask, tokens=TOKENS)  # names of the user's own: by order
    assert taking(Model("bert", fn, params), file).fn == fn
    np.testing.assert_array_equal(read_batches(file, fn.inputs)[0][0], mask)


def test_tokens_that_a_mask_hides_do_not_count(folder_of: Callable[[str], Path]) -> None:
    from jquant.app.named_inputs import real_tokens
    from jquant.app.sources import Model

    fn, params, _ = models.load(folder_of("BertModel"), lazy=True)
    mask = (np.arange(12) < np.array([[12], [5]])).astype(np.int32)
    model = Model("bert", dataclasses.replace(fn, inputs=("input_ids", "attention_mask")), params)
    weights = real_tokens(model, [(TOKENS, mask)])
    assert weights is not None and weights.unmatched == "count" and callable(weights.of)
    np.testing.assert_array_equal(weights.of(TOKENS, mask), mask == 1)
    assert real_tokens(model, [(TOKENS, np.ones_like(mask))]) is None
    assert real_tokens(model, [(TOKENS, np.zeros((2, 1, 12, 12)))]) is None  # not of tokens
    assert real_tokens(Model("bert", fn, params), [TOKENS]) is None
    both = ("input_ids", "attention_mask", "decoder_input_ids")
    paired = Model("t5", dataclasses.replace(fn, inputs=both), params)
    assert real_tokens(paired, [(TOKENS, mask, TOKENS)]) is None


@pytest.mark.slow
def test_the_command_line_leaves_padding_out(
    folder_of: Callable[[str], Path], tmp_path: Path, capsys: Any
) -> None:
    from jquant.app import cli

    mask = np.tile(np.arange(12) < np.array([[12], [5]]), (8, 1))
    folder, out, file = str(folder_of("Qwen3ForCausalLM")), tmp_path / "out", tmp_path / "x.npz"
    line = ["-q", "--architecture", "Qwen3ForCausalLM", "--batches", str(file)]
    shown = []
    for padding in (0, 7):
        tokens = np.where(mask, np.tile(TOKENS, (8, 1)), padding)
        np.savez(file, input_ids=tokens, attention_mask=mask.astype(np.int32))
        if not shown:
            command = ["quantize", folder, "-o", str(out), "--recipe", "int8-gptq", *line]
            assert cli.run(command) == 0
            rows = json.loads((out / "report.json").read_text())["weights"]
            assert rows["model.layers.0.self_attn.q_proj.weight"]["tokens"] == mask.sum()
            capsys.readouterr()
        assert cli.run(["evaluate", str(out), "--against", folder, *line]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] and "KL" in shown[0]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["MixtralForCausalLM"])
def test_experts_gathered_for_each_token_have_the_evidence_of_sorted_ones(
    architecture: str, folder_of: Callable[[str], Path]
) -> None:
    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.of = zoo_model(architecture)
            self.of.set_experts_implementation("batched_mm")

        def forward(self, tokens: Any) -> Any:
            return self.of(tokens, use_cache=False).logits

    inputs = inputs_of(architecture, rows=6)
    fn, params, _ = models.load(folder_of(architecture), backend="torch")
    gathering, named = models.from_torch(Logits())
    assert "ragged_dot" not in str(jax.make_jaxpr(gathering)(named, *inputs))
    np.testing.assert_allclose(gathering(named, *inputs), fn(params, *inputs), atol=1e-5)
    experts = [name for name in params if "experts" in name]
    expected = jq.capture(fn, params, [inputs], paths=experts)
    evidence = jq.capture(gathering, named, [inputs], paths=[f"of.{name}" for name in experts])
    assert len(experts) == 4
    for name in experts:
        own, sorted_ones = evidence[f"of.{name}"], expected[name]
        np.testing.assert_array_equal(own.count, sorted_ones.count)
        np.testing.assert_allclose(own.second_moment, sorted_ones.second_moment, atol=1e-3)
