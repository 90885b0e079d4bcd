"""Where classes of other JAX libraries keep the leaves of a decoder: the table of names, for trees.

`assembly.py` says what a leaf is called in files; a row here says where the same leaf lies among
the parameters of a class of tunix or MaxText, and in which order its axes stand there:

    v vocabulary   d width   f hidden   e experts   n heads   m heads of keys   h their channels
    q is "nh", and k "mh", in one axis

Each class computes one kind of decoder. What its own configuration says is `says`; of everything
else it computes what `fixed` has, or what a `DecoderConfig` has by default, and no network that
differs is offered to it. Scales of norms are what Hugging Face's files hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jquant.errors import FormatError
from jquant.models.config import DecoderConfig
from jquant.models.hf_config import unlike
from jquant.models.rope import LLAMA_ROPE, hf_rope


class Row(NamedTuple):
    """Where a leaf lies: `{}` is the layer's number; `slot` its place along a new first axis."""

    path: str
    axes: str
    slot: int | None = None


Rows = Mapping[str, Row]


def _nothing(config: DecoderConfig) -> dict[str, Any]:
    return {}


class Class(NamedTuple):
    """A class of another library.

    Attributes:
        name: where it is imported from.
        rows: our leaf, without "layers/", → where it lies.
        says: what its configuration calls a field of `DecoderConfig`.
        fixed: the fields that it computes in one way, which is not the usual one.
        more: what else its configuration has to say.
        scaled: whether queries are divided by the root of a head's size in the file.
        qarrays: whether it multiplies by `QArray`s of qwix.
    """

    name: str
    rows: Callable[[DecoderConfig], Rows]
    says: Mapping[str, str]
    fixed: Callable[[DecoderConfig], Mapping[str, Any]] = _nothing
    more: Callable[[DecoderConfig], Mapping[str, Any]] = _nothing
    scaled: bool = False
    qarrays: bool = False


class Library(NamedTuple):
    """A library, and its classes by the `model_type` of what they compute.

    Attributes:
        name, version: as it was tried.
        classes: `model_type` → class.
    """

    name: str
    version: str
    classes: Mapping[str, Class]

    def of(self, model_type: str, config: DecoderConfig) -> Class:
        """The class that computes a decoder.

        Raises:
            FormatError: there is none, or it computes something else.
        """
        if model_type not in self.classes:
            raise FormatError(
                f"{self.name} has no class for {model_type!r}; there are some for "
                f"{', '.join(self.classes)}"
            )
        own = self.classes[model_type]
        same = {field: getattr(config, field) for field in (*own.says.values(), "context")}
        if difference := unlike(config, DecoderConfig(**{**same, **own.fixed(config)})):
            raise FormatError(
                f"{own.name} of {self.name} {self.version} would compute another network: "
                f"{difference} (this network's, and its own)"
            )
        return own


# tunix

_MLP = {
    "mlp/gate/kernel": Row("layers/{}/mlp/gate_proj/kernel", "df"),
    "mlp/up/kernel": Row("layers/{}/mlp/up_proj/kernel", "df"),
    "mlp/down/kernel": Row("layers/{}/mlp/down_proj/kernel", "fd"),
}
_TUNIX = {
    "embed/embedding": Row("embedder/input_embedding", "vd"),
    "norm/scale": Row("final_norm/w", "d"),
    "head/kernel": Row("lm_head/w", "dv"),
    "attention_norm/scale": Row("layers/{}/input_layernorm/w", "d"),
    "mlp_norm/scale": Row("layers/{}/post_attention_layernorm/w", "d"),
    "attention/q/kernel": Row("layers/{}/attn/q_proj/w", "dnh"),
    "attention/k/kernel": Row("layers/{}/attn/k_proj/w", "dmh"),
    "attention/v/kernel": Row("layers/{}/attn/v_proj/w", "dmh"),
    "attention/q/bias": Row("layers/{}/attn/q_bias", "q"),
    "attention/k/bias": Row("layers/{}/attn/k_bias", "k"),
    "attention/v/bias": Row("layers/{}/attn/v_bias", "k"),
    "attention/out/kernel": Row("layers/{}/attn/o_proj/w", "nhd"),
    "attention/q_norm/scale": Row("layers/{}/attn/q_norm/w", "h"),
    "attention/k_norm/scale": Row("layers/{}/attn/k_norm/w", "h"),
    **_MLP,
}
_TUNIX_EXPERTS = _TUNIX | {
    "mlp/router/kernel": Row("layers/{}/mlp/router/kernel", "de"),
    "mlp/gate/kernel": Row("layers/{}/mlp/gate_proj", "edf"),
    "mlp/up/kernel": Row("layers/{}/mlp/up_proj", "edf"),
    "mlp/down/kernel": Row("layers/{}/mlp/down_proj", "efd"),
}
_TUNIX_GEMMA = {
    "embed/embedding": Row("embedder/input_embedding", "vd"),
    "norm/scale": Row("final_norm/scale", "d"),
    "attention_norm/scale": Row("layers/{}/pre_attention_norm/scale", "d"),
    "attention_post_norm/scale": Row("layers/{}/post_attention_norm/scale", "d"),
    "mlp_norm/scale": Row("layers/{}/pre_ffw_norm/scale", "d"),
    "mlp_post_norm/scale": Row("layers/{}/post_ffw_norm/scale", "d"),
    "attention/out/kernel": Row("layers/{}/attn/attn_vec_einsum/w", "nhd"),
    "attention/q_norm/scale": Row("layers/{}/attn/_query_norm/scale", "h"),
    "attention/k_norm/scale": Row("layers/{}/attn/_key_norm/scale", "h"),
    **_MLP,
}


def _gemma_rows(config: DecoderConfig) -> Rows:
    """k and v are one array, and so is q where it has as many heads."""
    path = "layers/{}/attn/"
    if config.heads == config.kv_heads:
        axes = {"q": "ndh", "k": "mdh", "v": "mdh"}
        names = {name: Row(path + "qkv_einsum/w", axes[name], k) for k, name in enumerate(axes)}
    else:
        names = {name: Row(path + "kv_einsum/w", "mdh", k) for k, name in enumerate("kv")}
        names["q"] = Row(path + "q_einsum/w", "ndh")
    return _TUNIX_GEMMA | {f"attention/{name}/kernel": row for name, row in names.items()}


def _gemma_fixed(config: DecoderConfig) -> dict[str, Any]:
    window, divisors = max(config.windows, default=0), config.rope_divisors
    scales = (config.head_dim**-0.5, (config.width // config.heads) ** -0.5)
    own = config.attention_scale
    near = min(scales, key=lambda scale: abs(scale - (own or scales[0])))
    return {
        "norms": "both", "activation": "gelu_tanh", "qk_norm": "head", "norm_eps": 1e-6,
        "tied": True, "embed_scale": config.width**0.5, "attention_scale": near,
        "windows": tuple(window * ((k + 1) % 6 != 0) for k in range(config.layers)),
        "rope_divisors": divisors if len(set(divisors or ())) == 1 else None,
    }  # fmt: skip


def _gemma_more(config: DecoderConfig) -> dict[str, Any]:
    by_width = config.attention_scale != config.head_dim**-0.5
    ways = ("BY_ONE_OVER_SQRT_HEAD_DIM", "BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS")
    return {
        "sliding_window_size": max(config.windows),
        "global_scale_factor": (config.rope_divisors or (1.0,))[0],
        "query_pre_attn_norm": ways[by_width],
    }


_TUNIX_SIZES = {
    "num_layers": "layers", "embed_dim": "width", "hidden_dim": "hidden", "num_heads": "heads",
    "num_kv_heads": "kv_heads", "head_dim": "head_dim",
}  # fmt: skip
_TUNIX_USUAL = {
    **_TUNIX_SIZES, "vocab_size": "vocab", "rope_theta": "rope_theta", "norm_eps": "norm_eps",
    "use_tied_embedding": "tied",
}  # fmt: skip
_TUNIX_QWEN3 = {key: field for key, field in _TUNIX_USUAL.items() if key != "rope_theta"}
_TIED = {"use_tied_embedding": "weight_tying"}
_TUNIX_LLAMA = {_TIED.get(key, key): field for key, field in _TUNIX_QWEN3.items()}
_BASE = {"rope_theta": 1e6}  # by which Llama 3 and Qwen 3 turn, whatever they are told


def _base(config: DecoderConfig) -> dict[str, Any]:
    return {"rope_theta": 1_000_000}


_ROUTED = {"num_experts": "experts", "num_experts_per_tok": "experts_used"}
_HEADS_NORMED = {"qk_norm": "head"}

TUNIX = Library(
    "tunix",
    "0.1.7",
    {
        "llama": Class(
            "tunix.models.llama3.model.Llama3", lambda config: _TUNIX, _TUNIX_LLAMA,
            lambda config: _BASE, _base, qarrays=True,
        ),
        "qwen2": Class(
            "tunix.models.qwen2.model.Qwen2", lambda config: _TUNIX, _TUNIX_USUAL,
            lambda config: {"qkv_bias": True},
        ),
        "qwen3": Class(
            "tunix.models.qwen3.model.Qwen3", lambda config: _TUNIX, _TUNIX_QWEN3,
            lambda config: _BASE | _HEADS_NORMED, _base,
        ),
        "qwen3_moe": Class(
            "tunix.models.qwen3.model.Qwen3", lambda config: _TUNIX_EXPERTS,
            _TUNIX_QWEN3 | _ROUTED, lambda config: _BASE | _HEADS_NORMED, _base,
        ),
        "gemma3_text": Class(
            "tunix.models.gemma3.model.Gemma3", _gemma_rows,
            _TUNIX_SIZES | {
                "num_embed": "vocab", "global_base_frequency": "rope_theta",
                "local_base_frequency": "window_theta",
            },
            _gemma_fixed, _gemma_more, qarrays=True,
        ),
    },
)  # fmt: skip

# MaxText

_TOP, _BLOCK = "params/params/", "params/params/decoder/layers_{}/"
_MAXTEXT = {
    "embed/embedding": Row(_TOP + "token_embedder/embedding", "vd"),
    "norm/scale": Row(_TOP + "decoder/decoder_norm/scale", "d"),
    "head/kernel": Row(_TOP + "decoder/logits_dense/kernel", "dv"),
    "attention_norm/scale": Row(_BLOCK + "pre_self_attention_layer_norm/scale", "d"),
    "mlp_norm/scale": Row(_BLOCK + "post_self_attention_layer_norm/scale", "d"),
    "attention/q/kernel": Row(_BLOCK + "self_attention/query/kernel", "dnh"),
    "attention/k/kernel": Row(_BLOCK + "self_attention/key/kernel", "dmh"),
    "attention/v/kernel": Row(_BLOCK + "self_attention/value/kernel", "dmh"),
    "attention/q/bias": Row(_BLOCK + "self_attention/query/bias", "nh"),
    "attention/k/bias": Row(_BLOCK + "self_attention/key/bias", "mh"),
    "attention/v/bias": Row(_BLOCK + "self_attention/value/bias", "mh"),
    "attention/out/kernel": Row(_BLOCK + "self_attention/out/kernel", "nhd"),
    "attention/q_norm/scale": Row(_BLOCK + "self_attention/query_norm/scale", "h"),
    "attention/k_norm/scale": Row(_BLOCK + "self_attention/key_norm/scale", "h"),
    "mlp/gate/kernel": Row(_BLOCK + "mlp/wi_0/kernel", "df"),
    "mlp/up/kernel": Row(_BLOCK + "mlp/wi_1/kernel", "df"),
    "mlp/down/kernel": Row(_BLOCK + "mlp/wo/kernel", "fd"),
}
_MAXTEXT_EXPERTS = _MAXTEXT | {
    "mlp/router/kernel": Row(_BLOCK + "moe_block/gate/kernel", "de"),
    "mlp/gate/kernel": Row(_BLOCK + "moe_block/wi_0", "edf"),
    "mlp/up/kernel": Row(_BLOCK + "moe_block/wi_1", "edf"),
    "mlp/down/kernel": Row(_BLOCK + "moe_block/wo", "efd"),
}
_MAXTEXT_SIZES = {
    "base_num_decoder_layers": "layers", "vocab_size": "vocab", "base_emb_dim": "width",
    "base_mlp_dim": "hidden", "base_num_query_heads": "heads", "base_num_kv_heads": "kv_heads",
    "head_dim": "head_dim", "rope_max_timescale": "rope_theta",
    "normalization_layer_epsilon": "norm_eps", "logits_via_embedding": "tied",
}  # fmt: skip
_SAME = {"mlp_activations": ["silu", "linear"], "normalize_embedding_logits": False}
_LLAMA31 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def _stretched(config: DecoderConfig) -> dict[str, Any]:
    """The frequencies of Llama 3.1, the only ones that it stretches."""
    if config.rope_divisors is None:
        return {}
    claims = {"rope_parameters": {**_LLAMA31, "rope_theta": config.rope_theta}}
    return hf_rope(claims, LLAMA_ROPE, config.head_dim, config.context)


def _llama_more(config: DecoderConfig) -> dict[str, Any]:
    kind = "default" if config.rope_divisors is None else "llama3.1"
    return {"decoder_block": "llama2", "rope_type": kind, **_SAME}


def _qwen_more(block: str, **more: Any) -> Callable[[DecoderConfig], dict[str, Any]]:
    return lambda config: {"decoder_block": block, **_SAME, **more}


_LLAMA = Class(
    "MaxText's llama2", lambda config: _MAXTEXT, _MAXTEXT_SIZES, _stretched, _llama_more,
    scaled=True,
)  # fmt: skip
MAXTEXT = Library(
    "MaxText",
    "0.2.5",
    {
        "llama": _LLAMA,
        "mistral": _LLAMA,
        "qwen2": Class(
            "MaxText's qwen2", lambda config: _MAXTEXT, _MAXTEXT_SIZES,
            lambda config: {"qkv_bias": True}, _qwen_more("qwen2", attention_bias=True),
        ),
        "qwen3": Class(
            "MaxText's qwen3", lambda config: _MAXTEXT, _MAXTEXT_SIZES,
            lambda config: _HEADS_NORMED, _qwen_more("qwen3", use_qk_norm=True),
        ),
        "qwen3_moe": Class(
            "MaxText's qwen3_moe", lambda config: _MAXTEXT_EXPERTS,
            {**_MAXTEXT_SIZES, **_ROUTED, "base_moe_mlp_dim": "hidden"},
            lambda config: _HEADS_NORMED,
            _qwen_more("qwen3_moe", use_qk_norm=True, norm_topk_prob=True),
        ),
    },
)  # fmt: skip
LIBRARIES = {"tunix": TUNIX, "maxtext": MAXTEXT}
