"""The PyTorch module of a `transformers` architecture, without weights.

The module is built on PyTorch's meta device: it has every parameter's name, shape and place, and
holds none. What it computes from its configuration alone (rotary frequencies, positions, masks) is
computed as `transformers` computes it after loading, and stays in the module as constants.

Only code of the installed `transformers` is run, never code that a checkpoint brings along, and
attention is its plain one: a configuration cannot choose kernels.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jquant.errors import CheckpointError, extra, near
from jquant.models.claims import only

# What differs between two files of one network, or is set here whatever a file says.
_NOT_OF_THE_NETWORK = {
    "_name_or_path", "architectures", "attn_implementation", "_attn_implementation", "dtype",
    "experts_implementation", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip


@dataclass(frozen=True)
class TorchConfig:
    """A `transformers` architecture and its configuration. Static and hashable.

    Attributes:
        architecture: the name of a class of `transformers`, such as "Qwen3ForCausalLM".
        values: its configuration, as the JSON text of an object.

    Example:
        >>> config = TorchConfig.of({"model_type": "gpt2", "n_embd": 64}, "GPT2LMHeadModel")
        >>> config.values
        '{"model_type": "gpt2", "n_embd": 64}'
    """

    architecture: str
    values: str

    @classmethod
    def of(cls, config: Mapping[str, Any], architecture: str | None = None) -> TorchConfig:
        """Of what a `config.json` says; the architecture is the one it names unless given.

        Raises:
            CheckpointError: it names none, it holds no JSON, or it asks for what cannot be had.
        """
        only(config, "quantization_config", (None,), default=None)
        if architecture is None:
            names = config.get("architectures")
            if not isinstance(names, list) or not names or not isinstance(names[0], str):
                raise CheckpointError(
                    "architectures: config.json names none; pass architecture= (--architecture) "
                    "with the name of a class of transformers, such as 'BertModel'"
                )
            architecture = names[0]
        values = {k: v for k, v in config.items() if k not in _NOT_OF_THE_NETWORK}
        return cls(architecture, json.dumps(values, sort_keys=True))

    @property
    def is_causal(self) -> bool:
        """Whether it is a language model that predicts each next token."""
        from transformers.models.auto import modeling_auto

        return self.architecture in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()

    @property
    def vocab(self) -> int:
        """Tokens that the network has; 0 if it has none."""
        return int(getattr(_text(self), "vocab_size", None) or 0)

    @property
    def context(self) -> int:
        """Positions that the network was made for; 2048 where its configuration does not say."""
        text = _text(self)
        # `max_length` and its like are habits of generating, not sizes of the network
        for name in ("max_position_embeddings", "n_positions", "max_target_positions"):
            size = getattr(text, name, None)
            if isinstance(size, int) and size > 0:
                # RoBERTa's positions begin after that of padding
                offset = (text.pad_token_id or 0) + 1 if _counts_from_padding(text) else 0
                return size - offset
        return 2048


def need_torch() -> None:
    """MissingPackageError: PyTorch, torchax or `transformers` is not there; names the extra."""
    with extra("torch"):
        import torch
        import transformers  # noqa: F401

        try:
            import torchax  # noqa: F401  # pyright: ignore[reportMissingImports]
        except AttributeError as error:  # it looks up operators that this PyTorch has not
            raise ImportError(f"torchax is too old for PyTorch {torch.__version__}") from error


def torch_module(config: TorchConfig) -> Any:
    """The module in evaluation mode, its parameters on the meta device; built once per config.

    Raises:
        MissingPackageError: see `need_torch`.
        CheckpointError: `transformers` has no such architecture, or refuses its configuration.
    """
    need_torch()
    return _module(config)


def architecture_class(name: str) -> Any:
    """The class of `transformers` that has a name.

    Raises:
        CheckpointError: there is none, or it is no model.
    """
    import transformers

    model = getattr(transformers, name, None) if name.isidentifier() else None
    is_model = isinstance(model, type) and issubclass(model, transformers.PreTrainedModel)
    if not is_model or not model.__module__.startswith("transformers.models."):
        models = (own for own in dir(transformers) if "Model" in own or "For" in own)
        others = [own for own in models if not own.startswith(("Auto", "PreTrained"))]
        raise CheckpointError(
            f"architectures = {name[:80]!r}: transformers {transformers.__version__} has no such "
            f"model; near: {near(name[:80], others)} (code that lies beside a checkpoint is never "
            "run); a newer transformers may have it, or write the network in JAX and pass it to "
            "jquant.quantize"
        )
    return model


def need_layers(config: TorchConfig, tensors: int) -> None:
    """CheckpointError: more layers than tensors: they are built one by one, for ever."""
    text = _text(config)
    for name in ("num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers"):
        layers = getattr(text, name, None)
        if isinstance(layers, int) and layers > tensors:
            raise CheckpointError(f"{name} = {layers}, and there are {tensors} tensors")


@contextlib.contextmanager
def _refusing(config: TorchConfig) -> Iterator[None]:
    """Whatever `transformers` raises about a configuration, as the error of a checkpoint."""
    try:
        yield
    except (CheckpointError, ImportError):
        raise
    except Exception as error:  # of its validators, and of every model's own constructor
        raise CheckpointError(
            f"{config.architecture}: transformers refuses its configuration: {error!s:.300}"
        ) from error


@functools.lru_cache(maxsize=64)
def _settings(config: TorchConfig) -> Any:
    """The configuration as an object of `transformers`."""
    model = architecture_class(config.architecture)
    with _refusing(config):
        values = json.loads(config.values)
        kind = model.config_class
        if values.get("model_type", kind.model_type) != kind.model_type:
            import transformers

            kind = transformers.CONFIG_MAPPING[values["model_type"]]
        return kind.from_dict(values)


def _text(config: TorchConfig) -> Any:
    """The part of the configuration that is about text."""
    return _settings(config).get_text_config(decoder=True)


def _counts_from_padding(text: Any) -> bool:
    return text.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet", "data2vec-text")


@functools.lru_cache(maxsize=8)
def _module(config: TorchConfig) -> Any:
    import torch

    model, settings = architecture_class(config.architecture), _settings(config)
    with _refusing(config):
        settings.return_dict = True
        with _quiet(), torch.device("meta"):
            module = model._from_config(
                settings, dtype=torch.float32, attn_implementation="eager",
                experts_implementation=None,
            )  # fmt: skip
        for name, buffer in list(module.named_buffers()):
            owner = module.get_submodule(name.rpartition(".")[0])
            owner._buffers[name.rpartition(".")[2]] = torch.empty_like(buffer, device="cpu")
        module.initialize_weights()  # of parameters nothing: they are nowhere
    return module.eval()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """`transformers` does not tell of its defaults."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
