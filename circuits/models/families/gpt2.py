"""GPT-2: LayerNorm, a plain MLP, learned positions, tied embeddings.

Weights are stored as ``[in, out]``; queries, keys and values are one tensor.
"""

from typing import Any

from circuits.models.layout import Layout
from circuits.models.rows import Row, embedding_rows, linear_rows, mlp_rows, norm_rows

ARCHITECTURE = "GPT2LMHeadModel"
KEYS = frozenset(
    """
    vocab_size n_positions n_embd n_layer n_head n_inner n_ctx activation_function layer_norm_epsilon scale_attn_weights
    scale_attn_by_inverse_layer_idx reorder_and_upcast_attn tie_word_embeddings
    """.split()
)


def rows(config: Any) -> list[Row]:
    """The table of parameters."""
    heads, tied = config.n_head, config.tie_word_embeddings
    embedding, unembedding = embedding_rows("transformer.wte.weight", "lm_head.weight", tied=tied)
    table = [embedding, Row("pos_embed.W_pos", "transformer.wpe.weight", "p m -> p m", "position")]
    for layer in range(config.n_layer):
        block, module = f"blocks.{layer}.", f"transformer.h.{layer}."
        weight, bias = "m (part head d) -> part head m d", "(part head d) -> part head d"
        for part, letter in enumerate("QKV"):
            table += linear_rows(
                f"{block}attn.W_{letter}",
                f"{module}attn.c_attn",
                weight,
                bias,
                sizes=(("head", heads), ("part", 3)),
                part=part,
                inputs_first=True,
            )
        table += linear_rows(
            f"{block}attn.W_O",
            f"{module}attn.c_proj",
            "(head d) m -> head d m",
            "m -> m",
            sizes=(("head", heads),),
            inputs_first=True,
        )
        modules = {"in": f"{module}mlp.c_fc", "out": f"{module}mlp.c_proj"}
        table += mlp_rows(layer, modules, bias=True, inputs_first=True)
        table += norm_rows(f"{block}ln1", f"{module}ln_1", bias=True)
        table += norm_rows(f"{block}ln2", f"{module}ln_2", bias=True)
    return [*table, *norm_rows("ln_final", "transformer.ln_f", bias=True), unembedding]


def layout(config: Any) -> Layout:
    """What layers are made of."""
    d_head = config.n_embd // config.n_head
    scale = d_head**-0.5 if config.scale_attn_weights else 1.0
    deeper = config.scale_attn_by_inverse_layer_idx
    return Layout(
        n_layers=config.n_layer,
        d_model=config.n_embd,
        n_heads=config.n_head,
        n_groups=config.n_head,
        d_head=d_head,
        d_mlp=config.n_inner or 4 * config.n_embd,
        d_vocab=config.vocab_size,
        n_ctx=config.n_positions,
        norm="LN",
        eps=config.layer_norm_epsilon,
        activation=config.activation_function,
        rotary=[None] * config.n_layer,
        windows=[None] * config.n_layer,
        score_scales=[scale / (layer + 1) if deeper else scale for layer in range(config.n_layer)],
        gated=False,
        learned_positions=True,
        tied=config.tie_word_embeddings,
    )
