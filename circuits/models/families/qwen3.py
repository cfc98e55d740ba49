"""Qwen3: like Qwen2, with norms on the queries and keys of each head and biases only where the config asks for them."""

from typing import Any

from circuits.models.families import DECODER_KEYS
from circuits.models.layout import Layout, decoder_layout, windows_by_type
from circuits.models.rows import PRE_NORMS, Row, decoder_rows

ARCHITECTURE = "Qwen3ForCausalLM"
KEYS = DECODER_KEYS | {"attention_bias", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}

_NORMS = {**PRE_NORMS, "attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"}


def rows(config: Any) -> list[Row]:
    """The table of parameters."""
    return decoder_rows(config, bias=config.attention_bias, output_bias=config.attention_bias, norms=_NORMS)


def layout(config: Any) -> Layout:
    """What layers are made of."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    return decoder_layout(config, Qwen3RotaryEmbedding, windows=windows_by_type(config), head_norms="head")
