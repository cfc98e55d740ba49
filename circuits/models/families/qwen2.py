"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values, and perhaps a window in some layers."""

from typing import Any

from circuits.models.families import DECODER_KEYS
from circuits.models.layout import Layout, decoder_layout, windows_by_type
from circuits.models.rows import Row, decoder_rows

ARCHITECTURE = "Qwen2ForCausalLM"
KEYS = DECODER_KEYS | {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}


def rows(config: Any) -> list[Row]:
    """The table of parameters."""
    return decoder_rows(config, bias=True)


def layout(config: Any) -> Layout:
    """What layers are made of."""
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    return decoder_layout(config, Qwen2RotaryEmbedding, windows=windows_by_type(config))
