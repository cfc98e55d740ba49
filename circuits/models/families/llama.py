"""Llama 2 and 3, and what is built like them: SmolLM2, and many more."""

from typing import Any

from circuits.models.families import DECODER_KEYS
from circuits.models.layout import Layout, decoder_layout
from circuits.models.rows import Row, decoder_rows

ARCHITECTURE = "LlamaForCausalLM"
KEYS = DECODER_KEYS | {"attention_bias", "mlp_bias"}


def rows(config: Any) -> list[Row]:
    """The table of parameters."""
    bias = config.attention_bias
    return decoder_rows(config, bias=bias, output_bias=bias, mlp_bias=config.mlp_bias)


def layout(config: Any) -> Layout:
    """What layers are made of."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    return decoder_layout(config, LlamaRotaryEmbedding)
