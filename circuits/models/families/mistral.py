"""Mistral: Llama with a sliding window in every layer."""

from typing import Any

from circuits.models.families import DECODER_KEYS
from circuits.models.layout import Layout, decoder_layout
from circuits.models.rows import Row, decoder_rows

ARCHITECTURE = "MistralForCausalLM"
KEYS = DECODER_KEYS | {"sliding_window"}


def rows(config: Any) -> list[Row]:
    """The table of parameters."""
    return decoder_rows(config)


def layout(config: Any) -> Layout:
    """What layers are made of."""
    from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding

    windows = [config.sliding_window] * config.num_hidden_layers
    return decoder_layout(config, MistralRotaryEmbedding, windows=windows)
