"""The families of decoders that checkpoints hold, a row of a table each.

A family is data: what the two dialects (a `config.json` of Hugging Face, the metadata of a GGUF
file) call its sizes, what they leave unsaid, which of their switches must stand where, and which
fields of `DecoderConfig` all its networks share. The decoder knows no family; it computes what the
fields say. To add one is to add a row (and, if a block computes what none did, a field).

What GGUF says and means is llama.cpp's: its converter writes the files, its loader fills in what
they leave out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jquant.models.claims import flag, integer, number
from jquant.models.rope import LLAMA_ROPE, RopeRules

Slides = Callable[[Mapping[str, Any], int], bool]


class Key(NamedTuple):
    """Where a number stands.

    Attributes:
        hf, gguf: its key in either dialect (GGUF's without the architecture); None where unsaid.
        read: checks it, a function of `claims`.
        optional: whether null, or 0 in GGUF, leaves the field of the decoder at its default.
        made: the field from the number.
    """

    hf: str | None
    gguf: str | None
    read: Callable[..., Any] = number
    optional: bool = True
    made: Callable[[Any], Any] = lambda value: value


class Dialect(NamedTuple):
    """A family in one of the dialects.

    Attributes:
        name: `model_type`, or `general.architecture`.
        defaults: what counts where a key is absent, by key.
        allowed: the values that leave a network as the decoder computes it, by key.
        aliases: other names of keys, and which key each of them is.
        computed: fields that the dialect does not say, from those that it does.
        slides: whether a layer's attention has a window, from the keys and the layer's number;
            None: none has, and a window that would cut is refused.
        permuted: whether the rows of q and k are in llama.cpp's order, pairs side by side.
        norm_offset: what to add to the stored scales of norms.
    """

    name: str
    defaults: Mapping[str, Any] = {}
    allowed: Mapping[str, tuple[Any, ...]] = {}
    computed: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {}
    slides: Slides | None = None
    permuted: bool = False
    norm_offset: float = 0.0
    aliases: Mapping[str, str] = {}


class Family(NamedTuple):
    """A row: `fields` are what its networks share, `keys` what differs and how it is called.

    `biased` says whether a `config.json` may ask for biases by `attention_bias`.
    """

    hf: Dialect
    gguf: Dialect | None
    fields: Mapping[str, Any] = {}
    keys: Mapping[str, Key] = {}
    rope: RopeRules = LLAMA_ROPE
    biased: bool = False


SIZES = {
    "width": Key("hidden_size", "embedding_length", integer, False),
    "hidden": Key("intermediate_size", "feed_forward_length", integer, False),
    "layers": Key("num_hidden_layers", "block_count", integer, False),
    "heads": Key("num_attention_heads", "attention.head_count", integer, False),
    "kv_heads": Key("num_key_value_heads", "attention.head_count_kv", integer),
    "context": Key("max_position_embeddings", "context_length", integer),
    "norm_eps": Key("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
}


def _all(config: Mapping[str, Any], layer: int) -> bool:
    return True


def _late(config: Mapping[str, Any], layer: int) -> bool:
    return layer >= integer(config, "max_window_layers", least=0)


_SILU = {"hidden_act": ("silu",), "mlp_bias": (False,)}
_PLAIN = _SILU | {"attention_bias": (False,)}
_QWEN = {"use_sliding_window": False, "max_window_layers": 28, "sliding_window": 4096}

_GEMMA = {
    "hidden_activation": ("gelu_pytorch_tanh",),
    "use_bidirectional_attention": (False, None),
}
_GEMMA_USUAL = {
    "head_dim": 256, "tie_word_embeddings": True, "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}  # fmt: skip
_GEMMA_KEYS = {
    "attention_scale": Key("query_pre_attn_scalar", None, number, False, lambda s: s**-0.5),
    "attention_cap": Key("attn_logit_softcapping", "attn_logit_softcapping"),
    "logits_cap": Key("final_logit_softcapping", "final_logit_softcapping"),
}


def _every(count: int) -> Slides:
    """All layers but every `count`-th, unless the checkpoint has another number."""

    def slides(config: Mapping[str, Any], layer: int) -> bool:
        return (layer + 1) % integer(config, "sliding_window_pattern", count) != 0

    return slides


def _root(fields: Mapping[str, Any]) -> float:
    return fields["width"] ** 0.5


def _gemma_scale(deepest: int) -> Callable[[Mapping[str, Any]], float]:
    """llama.cpp takes the scale of a head, but in the 27B models, which it knows by their depth."""

    def scale(fields: Mapping[str, Any]) -> float:
        largest = fields["layers"] == deepest
        return (fields["width"] // fields["heads"] if largest else fields["head_dim"]) ** -0.5

    return scale


FAMILIES = (
    Family(Dialect("llama", allowed=_SILU), Dialect("llama", permuted=True), biased=True),
    Family(Dialect("mistral", {"sliding_window": 4096}, _PLAIN, slides=_all), None),
    Family(
        Dialect("qwen2", _QWEN, _SILU, slides=_late),
        Dialect("qwen2"),
        fields={"qkv_bias": True},
    ),
    Family(
        Dialect("qwen3", _QWEN | {"head_dim": 128}, _SILU, slides=_late),
        Dialect("qwen3"),
        fields={"qk_norm": "head"},
        biased=True,
    ),
    Family(
        Dialect(
            "gemma2",
            _GEMMA_USUAL | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
            _GEMMA, {"embed_scale": _root}, _every(2), norm_offset=1.0,
        ),
        Dialect(
            "gemma2",
            {
                "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
                "attention.sliding_window": 4096,
            },
            computed={"embed_scale": _root, "attention_scale": _gemma_scale(46)},
            slides=_every(2),
        ),
        fields={"norms": "both", "activation": "gelu_tanh"},
        keys=_GEMMA_KEYS,
        biased=True,
    ),
    Family(
        Dialect("gemma3_text", _GEMMA_USUAL, _GEMMA, {"embed_scale": _root}, _every(6),
                norm_offset=1.0),
        Dialect(
            "gemma3",
            computed={"embed_scale": _root, "attention_scale": _gemma_scale(62)},
            slides=_every(6),
        ),
        fields={"norms": "both", "activation": "gelu_tanh", "qk_norm": "head"},
        keys=_GEMMA_KEYS,
        rope=RopeRules({"default": "default", "linear": "linear"}, 1e6, window_theta=1e4),
        biased=True,
    ),
    Family(
        Dialect("phi3", {"rms_norm_eps": 1e-5}, _PLAIN, slides=_all),
        Dialect("phi3", slides=_all),
        fields={"fused": True},
        rope=RopeRules(
            {"default": "default", **dict.fromkeys(("longrope", "su", "yarn"), "longrope")},
            partial=True,
        ),
    ),
    Family(
        Dialect("olmo2", {"rms_norm_eps": 1e-5}, _SILU),
        Dialect("olmo2"),
        fields={"norms": "post", "qk_norm": "all"},
        biased=True,
    ),
    Family(
        Dialect("granite", {"attention_multiplier": 1.0}, _SILU),
        # llama.cpp does not turn queries and keys of this architecture where it is False
        Dialect("granite", allowed={"rope.scaling.finetuned": (True,)}, permuted=True),
        keys={
            "attention_scale": Key("attention_multiplier", "attention.scale"),
            "embed_scale": Key("embedding_multiplier", "embedding_scale"),
            "residual_scale": Key("residual_multiplier", "residual_scale"),
            "logits_divisor": Key("logits_scaling", "logit_scale"),
        },
        biased=True,
    ),
    Family(
        Dialect(
            "qwen3_moe",
            {"use_sliding_window": False, "sliding_window": 4096, "moe_intermediate_size": 768,
             "num_experts_per_tok": 8, "norm_topk_prob": False},
            _SILU | {"mlp_only_layers": ([], None), "decoder_sparse_step": (1,)},
            slides=_all,
            aliases={"num_local_experts": "num_experts"},
        ),
        # llama.cpp lets the weights of a token's experts sum to 1, whatever the network did
        Dialect("qwen3moe", allowed={
            "expert_gating_func": (0, 1), "expert_weights_scale": (0, 1),
            "expert_weights_norm": (True,), "expert_shared_count": (0,), "expert_group_count": (0,),
        }),
        fields={"qk_norm": "head"},
        keys={
            "hidden": Key("moe_intermediate_size", "expert_feed_forward_length", integer, False),
            "experts": Key("num_experts", "expert_count", integer, False),
            "experts_used": Key("num_experts_per_tok", "expert_used_count", integer, False),
            "renormalized": Key("norm_topk_prob", None, flag, False),
        },
        biased=True,
    ),
)  # fmt: skip
HF = {family.hf.name: family for family in FAMILIES}
GGUF = {family.gguf.name: family for family in FAMILIES if family.gguf is not None}
