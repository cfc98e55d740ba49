"""OLMo 2: norms only on what attention and MLP write, and over all queries and all keys of a layer."""

from typing import Any

from circuits.models.families import DECODER_KEYS
from circuits.models.layout import Layout, decoder_layout
from circuits.models.rows import Row, decoder_rows

ARCHITECTURE = "Olmo2ForCausalLM"
KEYS = DECODER_KEYS | {"attention_bias"}

# TransformerLens calls them ln1 and ln2, wherever they stand
_NORMS = {
    "ln1": "post_attention_layernorm",
    "ln2": "post_feedforward_layernorm",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
}


def rows(config: Any) -> list[Row]:
    """The table of parameters."""
    return decoder_rows(config, bias=config.attention_bias, output_bias=config.attention_bias, norms=_NORMS)


def layout(config: Any) -> Layout:
    """What layers are made of."""
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RotaryEmbedding

    return decoder_layout(config, Olmo2RotaryEmbedding, pre_norms=False, post_norms=True, head_norms="all")
