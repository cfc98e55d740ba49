"""Gemma 2: norms before and after, capped scores and logits, a window in every other layer.

Norms multiply with 1 + w, and the embedding with √d_model.
"""

from typing import Any

from circuits.models.families import DECODER_KEYS
from circuits.models.layout import Layout, decoder_layout, windows_by_type
from circuits.models.rows import Row, decoder_rows

ARCHITECTURE = "Gemma2ForCausalLM"
# published files also have hidden_act, which the Hugging Face model does not read
KEYS = DECODER_KEYS | {
    *("hidden_activation", "attention_bias", "query_pre_attn_scalar", "sliding_window", "layer_types"),
    *("final_logit_softcapping", "attn_logit_softcapping"),
}

#: The norms of a layer of Gemma 2 and 3.
NORMS = {
    "ln1": "input_layernorm",
    "ln1_post": "post_attention_layernorm",
    "ln2": "pre_feedforward_layernorm",
    "ln2_post": "post_feedforward_layernorm",
}


def rows(config: Any) -> list[Row]:
    """The table of parameters."""
    bias, factor = config.attention_bias, config.hidden_size**0.5
    return decoder_rows(config, bias=bias, output_bias=bias, norms=NORMS, offset=1.0, factor=factor)


def layout(config: Any) -> Layout:
    """What layers are made of."""
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RotaryEmbedding

    return decoder_layout(
        config,
        Gemma2RotaryEmbedding,
        activation=config.hidden_activation,
        windows=windows_by_type(config),
        score_scales=[config.query_pre_attn_scalar**-0.5] * config.num_hidden_layers,
        post_norms=True,
        score_cap=config.attn_logit_softcapping,
        logit_cap=config.final_logit_softcapping,
    )
