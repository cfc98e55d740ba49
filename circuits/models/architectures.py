"""Which tensor of a Hugging Face checkpoint is which parameter of a `HookedTransformer`, in both directions.

Every parameter of the hooked model is a rearrangement of a checkpoint tensor, or of one part of a fused one. One table
for each architecture says which, as einops patterns; read backwards it turns a hooked model into a checkpoint again.
A parameter that stands in no row (the biases TransformerLens invents for Llama) is no parameter of the checkpoint.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange

from circuits.errors import CircuitsError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class ParameterSource:
    """Where one parameter of the hooked model comes from.

    Attributes:
        hooked: its name in the hooked model.
        checkpoint: the tensor's name in the checkpoint.
        pattern: einops pattern from the checkpoint's layout to the hooked one.
        sizes: einops axis sizes.
        part: which part of a fused tensor, counted along the first axis of the pattern's result.
    """

    hooked: str
    checkpoint: str
    pattern: str
    sizes: tuple[tuple[str, int], ...] = ()
    part: int | None = None

    def to_hooked(self, tensor: "Tensor") -> "Tensor":
        """The parameter, as a view of the checkpoint's tensor where einops can."""
        result: Tensor = rearrange(tensor, self.pattern, **dict(self.sizes))
        return result if self.part is None else result[self.part]

    def to_checkpoint(self, tensor: "Tensor") -> "Tensor":
        """The checkpoint's tensor; for a fused one, of parameters stacked along the first axis."""
        left, right = self.pattern.split("->")
        result: Tensor = rearrange(tensor, f"{right} -> {left}", **dict(self.sizes))
        return result


@dataclass(frozen=True)
class Architecture:
    """One architecture that can be loaded.

    Attributes:
        name: its class in Hugging Face's transformers.
        settings: config → settings of the HookedTransformerConfig; refuses what the hooked model can't represent.
        sources: config → the table of parameters.
    """

    name: str
    settings: Callable[[Any], dict[str, Any]]
    sources: Callable[[Any], list[ParameterSource]]


def _rotary(config: Any) -> dict[str, Any]:
    rotary = dict(config.rope_parameters or {})
    kind = rotary.get("rope_type", "default")
    settings: dict[str, Any] = {
        "positional_embedding_type": "rotary",
        "rotary_adjacent_pairs": False,
        "rotary_base": rotary.get("rope_theta", 10000.0),
    }
    if kind == "llama3":
        settings |= {
            "use_NTK_by_parts_rope": True,
            "NTK_original_ctx_len": rotary["original_max_position_embeddings"],
            "NTK_by_parts_low_freq_factor": rotary["low_freq_factor"],
            "NTK_by_parts_high_freq_factor": rotary["high_freq_factor"],
            "NTK_by_parts_factor": rotary["factor"],
        }
    elif kind != "default":
        raise CircuitsError(f"the checkpoint's rotary scaling {kind!r} is not supported: default and llama3 are")
    return settings


def _llama_settings(config: Any) -> dict[str, Any]:
    if config.mlp_bias:
        raise CircuitsError("the checkpoint has biases in its gated MLP, which HookedTransformer cannot represent")
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    grouped = config.num_key_value_heads != config.num_attention_heads
    return {
        "d_model": config.hidden_size,
        "d_head": d_head,
        "n_heads": config.num_attention_heads,
        "n_key_value_heads": config.num_key_value_heads if grouped else None,
        "d_mlp": config.intermediate_size,
        "n_layers": config.num_hidden_layers,
        "n_ctx": config.max_position_embeddings,
        "eps": config.rms_norm_eps,
        "d_vocab": config.vocab_size,
        "act_fn": config.hidden_act,
        "normalization_type": "RMS",
        "final_rms": True,
        "gated_mlp": True,
        "rotary_dim": d_head,
        **_rotary(config),
    }


def _llama_sources(config: Any) -> list[ParameterSource]:
    heads, groups = (("head", config.num_attention_heads),), (("head", config.num_key_value_heads),)
    under = "_" if config.num_key_value_heads != config.num_attention_heads else ""
    rows = [ParameterSource("embed.W_E", "model.embed_tokens.weight", "v m -> v m")]
    for layer in range(config.num_hidden_layers):
        hooked, checkpoint = f"blocks.{layer}.", f"model.layers.{layer}."
        attention = [("W_Q", "q_proj", heads), (f"{under}W_K", "k_proj", groups), (f"{under}W_V", "v_proj", groups)]
        for name, source, sizes in attention:
            weight = f"{checkpoint}self_attn.{source}.weight"
            rows.append(ParameterSource(f"{hooked}attn.{name}", weight, "(head d) m -> head m d", sizes))
            if config.attention_bias:
                bias = f"{checkpoint}self_attn.{source}.bias"
                name = name.replace("W", "b")
                rows.append(ParameterSource(f"{hooked}attn.{name}", bias, "(head d) -> head d", sizes))
        output = f"{checkpoint}self_attn.o_proj"
        rows.append(ParameterSource(f"{hooked}attn.W_O", f"{output}.weight", "m (head d) -> head d m", heads))
        if config.attention_bias:
            rows.append(ParameterSource(f"{hooked}attn.b_O", f"{output}.bias", "m -> m"))
        rows += [
            ParameterSource(f"{hooked}ln1.w", f"{checkpoint}input_layernorm.weight", "m -> m"),
            ParameterSource(f"{hooked}ln2.w", f"{checkpoint}post_attention_layernorm.weight", "m -> m"),
            ParameterSource(f"{hooked}mlp.W_in", f"{checkpoint}mlp.up_proj.weight", "n m -> m n"),
            ParameterSource(f"{hooked}mlp.W_gate", f"{checkpoint}mlp.gate_proj.weight", "n m -> m n"),
            ParameterSource(f"{hooked}mlp.W_out", f"{checkpoint}mlp.down_proj.weight", "m n -> n m"),
        ]
    rows.append(ParameterSource("ln_final.w", "model.norm.weight", "m -> m"))
    rows.append(ParameterSource("unembed.W_U", "lm_head.weight", "v m -> m v"))
    return rows


def _neox_settings(config: Any) -> dict[str, Any]:
    if not config.attention_bias:
        raise CircuitsError("GPT-NeoX checkpoints without attention biases are not supported")
    d_head = config.hidden_size // config.num_attention_heads
    return {
        "d_model": config.hidden_size,
        "d_head": d_head,
        "n_heads": config.num_attention_heads,
        "d_mlp": config.intermediate_size,
        "n_layers": config.num_hidden_layers,
        "n_ctx": config.max_position_embeddings,
        "eps": config.layer_norm_eps,
        "d_vocab": config.vocab_size,
        "act_fn": config.hidden_act,
        "normalization_type": "LN",
        "parallel_attn_mlp": config.use_parallel_residual,
        "rotary_dim": round((config.rope_parameters or {}).get("partial_rotary_factor", 1.0) * d_head),
        **_rotary(config),
    }


def _neox_sources(config: Any) -> list[ParameterSource]:
    heads = (("head", config.num_attention_heads),)
    rows = [ParameterSource("embed.W_E", "gpt_neox.embed_in.weight", "v m -> v m")]
    for layer in range(config.num_hidden_layers):
        hooked, checkpoint = f"blocks.{layer}.", f"gpt_neox.layers.{layer}."
        fused = f"{checkpoint}attention.query_key_value"
        sizes = (*heads, ("part", 3))
        for part, name in enumerate("QKV"):
            weight, bias = "(head part d) m -> part head m d", "(head part d) -> part head d"
            rows.append(ParameterSource(f"{hooked}attn.W_{name}", f"{fused}.weight", weight, sizes, part))
            rows.append(ParameterSource(f"{hooked}attn.b_{name}", f"{fused}.bias", bias, sizes, part))
        output = f"{checkpoint}attention.dense"
        rows.append(ParameterSource(f"{hooked}attn.W_O", f"{output}.weight", "m (head d) -> head d m", heads))
        rows.append(ParameterSource(f"{hooked}attn.b_O", f"{output}.bias", "m -> m"))
        for name, source in (("in", "dense_h_to_4h"), ("out", "dense_4h_to_h")):
            rows.append(ParameterSource(f"{hooked}mlp.W_{name}", f"{checkpoint}mlp.{source}.weight", "o i -> i o"))
            rows.append(ParameterSource(f"{hooked}mlp.b_{name}", f"{checkpoint}mlp.{source}.bias", "o -> o"))
        for name, source in (("ln1", "input_layernorm"), ("ln2", "post_attention_layernorm")):
            rows.append(ParameterSource(f"{hooked}{name}.w", f"{checkpoint}{source}.weight", "m -> m"))
            rows.append(ParameterSource(f"{hooked}{name}.b", f"{checkpoint}{source}.bias", "m -> m"))
    rows.append(ParameterSource("ln_final.w", "gpt_neox.final_layer_norm.weight", "m -> m"))
    rows.append(ParameterSource("ln_final.b", "gpt_neox.final_layer_norm.bias", "m -> m"))
    rows.append(ParameterSource("unembed.W_U", "lm_head.weight", "v m -> m v"))
    return rows


_ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("LlamaForCausalLM", _llama_settings, _llama_sources),
        Architecture("GPTNeoXForCausalLM", _neox_settings, _neox_sources),
    )
}


def architecture_of(config: "PreTrainedConfig") -> Architecture:
    """The architecture a Hugging Face config names.

    Raises:
        CircuitsError: it is not supported.
    """
    names = list(config.architectures or [])
    for name in names:
        if name in _ARCHITECTURES:
            return _ARCHITECTURES[name]
    raise CircuitsError(
        f"the architecture {', '.join(names) or config.model_type} is not supported: {' and '.join(_ARCHITECTURES)} are"
    )


def checkpoint_tensors(sources: list[ParameterSource], parameters: dict[str, "Tensor"]) -> dict[str, "Tensor"]:
    """Turn parameters of the hooked model back into the tensors of the checkpoint."""
    grouped: dict[str, list[ParameterSource]] = {}
    for source in sources:
        grouped.setdefault(source.checkpoint, []).append(source)
    tensors = {}
    for name, rows in grouped.items():
        if rows[0].part is None:
            tensors[name] = rows[0].to_checkpoint(parameters[rows[0].hooked])
        else:
            rows = sorted(rows, key=lambda row: row.part or 0)
            tensors[name] = rows[0].to_checkpoint(torch.stack([parameters[row.hooked] for row in rows]))
    return tensors
