"""Phi-3: Llama with queries, keys and values in one tensor, gate and up in another, and perhaps a window."""

from dataclasses import replace
from typing import Any

from circuits.models.families import DECODER_KEYS
from circuits.models.layout import Layout, decoder_layout, head_width
from circuits.models.rows import Row, decoder_rows

ARCHITECTURE = "Phi3ForCausalLM"
KEYS = DECODER_KEYS | {"sliding_window", "original_max_position_embeddings"}


def rows(config: Any) -> list[Row]:
    """The table of parameters."""
    queries = config.num_attention_heads * head_width(config)
    keys, neurons = config.num_key_value_heads * head_width(config), config.intermediate_size
    fused = {
        "q_proj": ("qkv_proj", (0, queries)),
        "k_proj": ("qkv_proj", (queries, queries + keys)),
        "v_proj": ("qkv_proj", (queries + keys, queries + 2 * keys)),
        "gate_proj": ("gate_up_proj", (0, neurons)),
        "up_proj": ("gate_up_proj", (neurons, 2 * neurons)),
    }
    table = []
    for row in decoder_rows(config):
        module = row.tensor.split(".")[-2]
        name, taken = fused.get(module, (module, None))
        table.append(replace(row, tensor=row.tensor.replace(f".{module}.", f".{name}."), rows=taken))
    return table


def layout(config: Any) -> Layout:
    """What layers are made of."""
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    windows = [config.sliding_window] * config.num_hidden_layers
    return decoder_layout(config, Phi3RotaryEmbedding, windows=windows)
