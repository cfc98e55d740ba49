"""GPT-NeoX and Pythia: LayerNorm, a plain MLP, attention beside it or before it, part of each head rotary.

Queries, keys and values are one tensor, head by head.
"""

from typing import Any

from circuits.models.layout import Layout, decoder_layout
from circuits.models.rows import Row, attention_rows, embedding_rows, linear_rows, mlp_rows, norm_rows

ARCHITECTURE = "GPTNeoXForCausalLM"
KEYS = frozenset(
    """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings hidden_act
    layer_norm_eps use_parallel_residual attention_bias rope_parameters tie_word_embeddings
    """.split()
)


def rows(config: Any) -> list[Row]:
    """The table of parameters."""
    heads, tied = config.num_attention_heads, config.tie_word_embeddings
    embedding, unembedding = embedding_rows("gpt_neox.embed_in.weight", "lm_head.weight", tied=tied)
    table = [embedding]
    for layer in range(config.num_hidden_layers):
        block, module = f"blocks.{layer}.", f"gpt_neox.layers.{layer}."
        fused, sizes = f"{module}attention.query_key_value", (("head", heads), ("part", 3))
        weight, bias = "(head part d) m -> part head m d", "(head part d) -> part head d"
        for part, letter in enumerate("QKV"):
            table += linear_rows(
                f"{block}attn.W_{letter}",
                fused,
                weight,
                bias if config.attention_bias else None,
                sizes=sizes,
                part=part,
            )
        output = {"O": f"{module}attention.dense"}
        table += attention_rows(layer, output, heads=heads, groups=heads, output_bias=config.attention_bias)
        table += mlp_rows(layer, {"in": f"{module}mlp.dense_h_to_4h", "out": f"{module}mlp.dense_4h_to_h"}, bias=True)
        table += norm_rows(f"{block}ln1", f"{module}input_layernorm", bias=True)
        table += norm_rows(f"{block}ln2", f"{module}post_attention_layernorm", bias=True)
    return [*table, *norm_rows("ln_final", "gpt_neox.final_layer_norm", bias=True), unembedding]


def layout(config: Any) -> Layout:
    """What layers are made of."""
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding

    return decoder_layout(
        config,
        GPTNeoXRotaryEmbedding,
        norm="LN",
        eps=config.layer_norm_eps,
        gated=False,
        parallel=config.use_parallel_residual,
    )
