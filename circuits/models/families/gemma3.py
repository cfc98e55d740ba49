"""Gemma 3, text only: Gemma 2 with norms on queries and keys, rotary positions by type of layer, no score caps."""

from typing import Any

from circuits.models.families import DECODER_KEYS
from circuits.models.families.gemma2 import NORMS
from circuits.models.layout import Layout, Rotary, decoder_layout, windows_by_type
from circuits.models.rows import Row, decoder_rows

ARCHITECTURE = "Gemma3ForCausalLM"
# the Hugging Face model reads no attn_logit_softcapping: a checkpoint that sets it is refused
KEYS = DECODER_KEYS | {
    *("hidden_activation", "attention_bias", "query_pre_attn_scalar", "sliding_window", "layer_types"),
    *("final_logit_softcapping", "_sliding_window_pattern", "sliding_window_pattern"),
}

_NORMS = {**NORMS, "attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"}


def rows(config: Any) -> list[Row]:
    """The table of parameters."""
    bias, factor = config.attention_bias, config.hidden_size**0.5
    return decoder_rows(config, bias=bias, output_bias=bias, norms=_NORMS, offset=1.0, factor=factor)


def layout(config: Any) -> Layout:
    """What layers are made of."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

    by_type = {kind: Rotary(Gemma3RotaryEmbedding, config, kind) for kind in set(config.layer_types)}
    return decoder_layout(
        config,
        Gemma3RotaryEmbedding,
        activation=config.hidden_activation,
        rotary=[by_type[kind] for kind in config.layer_types],
        windows=windows_by_type(config),
        score_scales=[config.query_pre_attn_scalar**-0.5] * config.num_hidden_layers,
        post_norms=True,
        head_norms="head",
        logit_cap=config.final_logit_softcapping,
    )
