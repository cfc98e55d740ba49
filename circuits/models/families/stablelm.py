"""StableLM: Llama with LayerNorm, part of each head rotary, and perhaps biases on queries, keys and values.

Checkpoints where attention and MLP read one norm, or where each head has a norm with a scale of its own, are refused.
"""

from typing import Any

from circuits.models.families import DECODER_KEYS
from circuits.models.layout import Layout, decoder_layout
from circuits.models.rows import Row, decoder_rows

ARCHITECTURE = "StableLmForCausalLM"
# without use_parallel_residual and qk_layernorm; attention does not read head_dim
KEYS = DECODER_KEYS - {"head_dim", "rms_norm_eps"} | {"layer_norm_eps", "use_qkv_bias"}


def rows(config: Any) -> list[Row]:
    """The table of parameters."""
    return decoder_rows(config, bias=config.use_qkv_bias, norm_bias=True)


def layout(config: Any) -> Layout:
    """What layers are made of."""
    from transformers.models.stablelm.modeling_stablelm import StableLmRotaryEmbedding

    return decoder_layout(config, StableLmRotaryEmbedding, norm="LN", eps=config.layer_norm_eps)
