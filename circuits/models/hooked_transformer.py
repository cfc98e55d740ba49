"""A `HookedTransformer` over a Hugging Face model's own tensors, for TransformerLens 3.

1. A function for each family turns the Hugging Face config into settings of the HookedTransformerConfig, and refuses
   what the hooked model cannot represent.
2. A table of rows says which tensor of the checkpoint each parameter is. Every parameter becomes a view: a change of
   the checkpoint's tensors is a change of the hooked model, and a gradient is the gradient of the checkpoint's tensor.
3. Gemma stores w where 1 + w acts, and embeddings that act times √d_model. The hooked model keeps the stored tensors;
   its norms and its embedding do the arithmetic.
4. Biases that TransformerLens invents are zero and have no gradients.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from circuits.errors import CircuitsError
from circuits.models.architectures import ParameterSource
from circuits.models.quiet import quiet

with quiet():
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.components import Embed, RMSNorm


@dataclass(frozen=True)
class Row(ParameterSource):
    """A parameter's source, or that of a block of a fused tensor's rows.

    Attributes:
        rows: which of the tensor's first axis; all if not given.
    """

    rows: tuple[int, int] | None = None

    def to_hooked(self, tensor: Tensor) -> Tensor:
        """The parameter, as a view of the checkpoint's tensor."""
        return super().to_hooked(tensor if self.rows is None else tensor[slice(*self.rows)])


@dataclass(frozen=True)
class Family:
    """How one architecture becomes a `HookedTransformer`.

    Attributes:
        settings: config → settings of the HookedTransformerConfig.
        rows: config → the table of parameters; a row whose tensor the checkpoint lacks is left out.
        one_more: its norms multiply by 1 + w.
    """

    settings: Callable[[Any], dict[str, Any]]
    rows: Callable[[Any], list[Row]]
    one_more: bool = False


class OneMoreNorm(RMSNorm):
    """RMSNorm that multiplies by 1 + w, as Gemma's do."""

    def forward(self, x: Float[Tensor, "... length"]) -> Float[Tensor, "... length"]:
        """The normalised input, scaled; the hook points are RMSNorm's."""
        x = x.float() if self.cfg.dtype not in (torch.float32, torch.float64) else x
        scale = self.hook_scale((x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())
        # Gemma multiplies before it rounds
        scaled: Tensor = self.hook_normalized(x / scale) * (1 + self.w.to(x.dtype))
        return scaled.to(self.cfg.dtype)


class ScaledEmbed(Embed):
    """An embedding whose rows act times √d_model, as Gemma's do."""

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """The tokens' rows, scaled."""
        rows: Tensor = super().forward(tokens)
        return rows * torch.tensor(self.cfg.d_model**0.5, dtype=rows.dtype, device=rows.device)


def _rotary(config: Any, of: Mapping[str, Any]) -> dict[str, Any]:
    kind = of.get("rope_type", "default")
    settings: dict[str, Any] = {"rotary_base": of.get("rope_theta", 10000.0)}
    if kind == "linear":
        settings["rotary_scaling_factor"] = of["factor"]
    elif kind == "llama3":
        settings |= {
            "use_NTK_by_parts_rope": True,
            "NTK_original_ctx_len": of["original_max_position_embeddings"],
            "NTK_by_parts_low_freq_factor": of["low_freq_factor"],
            "NTK_by_parts_high_freq_factor": of["high_freq_factor"],
            "NTK_by_parts_factor": of["factor"],
        }
    elif kind == "yarn":
        settings |= {
            "use_yarn_rope": True,
            "yarn_factor": of["factor"],
            "yarn_attention_factor": ROPE_INIT_FUNCTIONS["yarn"](config, device="cpu")[1],
            "yarn_beta_fast": of.get("beta_fast") or 32.0,
            "yarn_beta_slow": of.get("beta_slow") or 1.0,
            "yarn_truncate": of.get("truncate", True),
            "yarn_original_max_position_embeddings": of["original_max_position_embeddings"],
        }
    elif kind != "default":
        raise CircuitsError(
            f"the checkpoint's rotary scaling {kind!r} is not supported by HookedTransformer: "
            f"default, linear, llama3 and yarn are"
        )
    return {
        "positional_embedding_type": "rotary",
        "rotary_adjacent_pairs": False,
        **settings,
    }


def _windows(config: Any) -> dict[str, Any]:
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    if not window or "sliding_attention" not in kinds:
        return {}
    types = ["local" if kind == "sliding_attention" else "global" for kind in kinds]
    return {"use_local_attn": True, "window_size": window, "attn_types": types}


def _shape(config: Any) -> dict[str, Any]:
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    return {
        "d_model": config.hidden_size,
        "d_head": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "n_heads": heads,
        "n_key_value_heads": groups if groups != heads else None,
        "d_mlp": config.intermediate_size,
        "n_layers": config.num_hidden_layers,
        "n_ctx": config.max_position_embeddings,
        "d_vocab": config.vocab_size,
    }


def _llama_settings(config: Any) -> dict[str, Any]:
    if getattr(config, "mlp_bias", False):
        raise CircuitsError("the checkpoint has biases in its gated MLP, which HookedTransformer cannot represent")
    shape = _shape(config)
    rotary = dict(config.rope_parameters or {})
    return {
        **shape,
        "eps": config.rms_norm_eps,
        "act_fn": config.hidden_act,
        "normalization_type": "RMS",
        "final_rms": True,
        "gated_mlp": True,
        "rotary_dim": round(rotary.get("partial_rotary_factor", 1.0) * shape["d_head"]),
        **_rotary(config, rotary),
        **_windows(config),
    }


def _qwen3_settings(config: Any) -> dict[str, Any]:
    return {**_llama_settings(config), "use_qk_norm": True}


def _gemma_settings(config: Any) -> dict[str, Any]:
    if getattr(config, "use_bidirectional_attention", None):
        raise CircuitsError("the checkpoint's attention looks ahead, which HookedTransformer cannot represent")
    shape = _shape(config)
    rotary = dict(config.rope_parameters or {})
    nested = "full_attention" in rotary
    settings = {
        **shape,
        "eps": config.rms_norm_eps,
        "act_fn": config.hidden_activation,
        "normalization_type": "RMS",
        "use_normalization_before_and_after": True,
        "final_rms": True,
        "gated_mlp": True,
        "attn_scale": config.query_pre_attn_scalar**0.5,
        "attn_scores_soft_cap": config.attn_logit_softcapping or -1.0,
        "output_logits_soft_cap": config.final_logit_softcapping or -1.0,
        "rotary_dim": shape["d_head"],
        **_rotary(config, rotary["full_attention"] if nested else rotary),
        **_windows(config),
    }
    if nested:
        local = rotary["sliding_attention"]
        if local.get("rope_type", "default") != "default":
            raise CircuitsError(
                "the checkpoint scales the rotary angles of its windows, which HookedTransformer cannot"
            )
        settings["rotary_base_local"] = local["rope_theta"]
    return settings


def _gemma3_settings(config: Any) -> dict[str, Any]:
    return {**_gemma_settings(config), "use_qk_norm": True}


def _neox_settings(config: Any) -> dict[str, Any]:
    shape = _shape(config)
    rotary = dict(config.rope_parameters or {})
    return {
        **shape,
        "eps": config.layer_norm_eps,
        "act_fn": config.hidden_act,
        "normalization_type": "LN",
        "parallel_attn_mlp": config.use_parallel_residual,
        "rotary_dim": round(rotary.get("partial_rotary_factor", 1.0) * shape["d_head"]),
        **_rotary(config, rotary),
    }


def _gpt2_settings(config: Any) -> dict[str, Any]:
    return {
        "d_model": config.n_embd,
        "d_head": config.n_embd // config.n_head,
        "n_heads": config.n_head,
        "d_mlp": config.n_inner or 4 * config.n_embd,
        "n_layers": config.n_layer,
        "n_ctx": config.n_positions,
        "d_vocab": config.vocab_size,
        "eps": config.layer_norm_epsilon,
        "act_fn": config.activation_function,
        "normalization_type": "LN",
        "use_attn_scale": config.scale_attn_weights,
        "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
    }


_PRE_NORMS = {"ln1": "input_layernorm", "ln2": "post_attention_layernorm"}
_GEMMA_NORMS = {
    "ln1": "input_layernorm",
    "ln1_post": "post_attention_layernorm",
    "ln2": "pre_feedforward_layernorm",
    "ln2_post": "post_feedforward_layernorm",
}
_POST_NORMS = {"ln1": "post_attention_layernorm", "ln2": "post_feedforward_layernorm"}


def _llama_rows(config: Any, norms: Mapping[str, str] = _PRE_NORMS) -> list[Row]:
    shape = _shape(config)
    n_heads, d_head, d_mlp = shape["n_heads"], shape["d_head"], shape["d_mlp"]
    n_groups, under = shape["n_key_value_heads"] or n_heads, "_" if shape["n_key_value_heads"] else ""
    queries, keys = n_heads * d_head, n_groups * d_head
    parts = [("", "Q", "q_proj", n_heads), (under, "K", "k_proj", n_groups), (under, "V", "v_proj", n_groups)]
    fused = [(0, queries), (queries, queries + keys), (queries + keys, queries + 2 * keys)]
    rows = [Row("embed.W_E", "model.embed_tokens.weight", "v m -> v m")]
    for layer in range(config.num_hidden_layers):
        hooked, checkpoint = f"blocks.{layer}.", f"model.layers.{layer}."
        attention, mlp = f"{checkpoint}self_attn.", f"{checkpoint}mlp."
        for (prefix, letter, module, count), block in zip(parts, fused, strict=True):
            sizes = (("head", count),)
            weight, bias = f"{hooked}attn.{prefix}W_{letter}", f"{hooked}attn.{prefix}b_{letter}"
            rows += [
                Row(weight, f"{attention}{module}.weight", "(head d) m -> head m d", sizes),
                Row(bias, f"{attention}{module}.bias", "(head d) -> head d", sizes),
                Row(weight, f"{attention}qkv_proj.weight", "(head d) m -> head m d", sizes, rows=block),
            ]
        rows += [
            Row(f"{hooked}attn.W_O", f"{attention}o_proj.weight", "m (head d) -> head d m", (("head", n_heads),)),
            Row(f"{hooked}attn.b_O", f"{attention}o_proj.bias", "m -> m"),
            Row(f"{hooked}attn.q_norm.w", f"{attention}q_norm.weight", "d -> d"),
            Row(f"{hooked}attn.k_norm.w", f"{attention}k_norm.weight", "d -> d"),
            Row(f"{hooked}mlp.W_in", f"{mlp}up_proj.weight", "n m -> m n"),
            Row(f"{hooked}mlp.W_gate", f"{mlp}gate_proj.weight", "n m -> m n"),
            Row(f"{hooked}mlp.W_gate", f"{mlp}gate_up_proj.weight", "n m -> m n", rows=(0, d_mlp)),
            Row(f"{hooked}mlp.W_in", f"{mlp}gate_up_proj.weight", "n m -> m n", rows=(d_mlp, 2 * d_mlp)),
            Row(f"{hooked}mlp.W_out", f"{mlp}down_proj.weight", "m n -> n m"),
        ]
        rows += [Row(f"{hooked}{norm}.w", f"{checkpoint}{module}.weight", "m -> m") for norm, module in norms.items()]
    rows.append(Row("ln_final.w", "model.norm.weight", "m -> m"))
    rows.append(Row("unembed.W_U", "lm_head.weight", "v m -> m v"))
    return rows


def _neox_rows(config: Any) -> list[Row]:
    heads = (("head", config.num_attention_heads),)
    rows = [Row("embed.W_E", "gpt_neox.embed_in.weight", "v m -> v m")]
    for layer in range(config.num_hidden_layers):
        hooked, checkpoint = f"blocks.{layer}.", f"gpt_neox.layers.{layer}."
        fused, output = f"{checkpoint}attention.query_key_value", f"{checkpoint}attention.dense"
        for part, name in enumerate("QKV"):
            weight, bias = "(head part d) m -> part head m d", "(head part d) -> part head d"
            sizes = (*heads, ("part", 3))
            rows.append(Row(f"{hooked}attn.W_{name}", f"{fused}.weight", weight, sizes, part))
            rows.append(Row(f"{hooked}attn.b_{name}", f"{fused}.bias", bias, sizes, part))
        rows.append(Row(f"{hooked}attn.W_O", f"{output}.weight", "m (head d) -> head d m", heads))
        rows.append(Row(f"{hooked}attn.b_O", f"{output}.bias", "m -> m"))
        for name, source in (("in", "dense_h_to_4h"), ("out", "dense_4h_to_h")):
            rows.append(Row(f"{hooked}mlp.W_{name}", f"{checkpoint}mlp.{source}.weight", "o i -> i o"))
            rows.append(Row(f"{hooked}mlp.b_{name}", f"{checkpoint}mlp.{source}.bias", "o -> o"))
        for name, source in _PRE_NORMS.items():
            rows += _layer_norm(f"{hooked}{name}", f"{checkpoint}{source}")
    rows += _layer_norm("ln_final", "gpt_neox.final_layer_norm")
    rows.append(Row("unembed.W_U", "lm_head.weight", "v m -> m v"))
    return rows


def _gpt2_rows(config: Any) -> list[Row]:
    heads = (("head", config.n_head),)
    rows = [
        Row("embed.W_E", "transformer.wte.weight", "v m -> v m"),
        Row("pos_embed.W_pos", "transformer.wpe.weight", "p m -> p m"),
    ]
    for layer in range(config.n_layer):
        hooked, checkpoint = f"blocks.{layer}.", f"transformer.h.{layer}."
        fused, output = f"{checkpoint}attn.c_attn", f"{checkpoint}attn.c_proj"
        for part, name in enumerate("QKV"):
            weight, bias = "m (part head d) -> part head m d", "(part head d) -> part head d"
            sizes = (*heads, ("part", 3))
            rows.append(Row(f"{hooked}attn.W_{name}", f"{fused}.weight", weight, sizes, part))
            rows.append(Row(f"{hooked}attn.b_{name}", f"{fused}.bias", bias, sizes, part))
        rows.append(Row(f"{hooked}attn.W_O", f"{output}.weight", "(head d) m -> head d m", heads))
        rows.append(Row(f"{hooked}attn.b_O", f"{output}.bias", "m -> m"))
        for name, source in (("in", "c_fc"), ("out", "c_proj")):
            rows.append(Row(f"{hooked}mlp.W_{name}", f"{checkpoint}mlp.{source}.weight", "i o -> i o"))
            rows.append(Row(f"{hooked}mlp.b_{name}", f"{checkpoint}mlp.{source}.bias", "o -> o"))
        for name, source in (("ln1", "ln_1"), ("ln2", "ln_2")):
            rows += _layer_norm(f"{hooked}{name}", f"{checkpoint}{source}")
    rows += _layer_norm("ln_final", "transformer.ln_f")
    rows.append(Row("unembed.W_U", "lm_head.weight", "v m -> m v"))
    return rows


def _layer_norm(hooked: str, checkpoint: str) -> list[Row]:
    return [
        Row(f"{hooked}.{short}", f"{checkpoint}.{name}", "m -> m") for short, name in (("w", "weight"), ("b", "bias"))
    ]


def _gemma_rows(config: Any) -> list[Row]:
    return _llama_rows(config, _GEMMA_NORMS)


def _olmo2_rows(config: Any) -> list[Row]:
    return _llama_rows(config, _POST_NORMS)


FAMILIES: dict[str, Family] = {
    "GPT2LMHeadModel": Family(_gpt2_settings, _gpt2_rows),
    "GPTNeoXForCausalLM": Family(_neox_settings, _neox_rows),
    "Gemma2ForCausalLM": Family(_gemma_settings, _gemma_rows, one_more=True),
    "Gemma3ForCausalLM": Family(_gemma3_settings, _gemma_rows, one_more=True),
    "LlamaForCausalLM": Family(_llama_settings, _llama_rows),
    "MistralForCausalLM": Family(_llama_settings, _llama_rows),
    "Olmo2ForCausalLM": Family(_llama_settings, _olmo2_rows),
    "Phi3ForCausalLM": Family(_llama_settings, _llama_rows),
    "Qwen2ForCausalLM": Family(_llama_settings, _llama_rows),
    "Qwen3ForCausalLM": Family(_qwen3_settings, _llama_rows),
}


def hooked_transformer(reference: PreTrainedModel) -> HookedTransformer:
    """A `HookedTransformer` whose parameters are views of a Hugging Face model's, unprocessed.

    Raises:
        CircuitsError: its architecture, or something in its config or among its tensors, cannot be represented.
    """
    name = type(reference).__name__
    if name not in FAMILIES:
        raise CircuitsError(f"the architecture {name} is not supported: {', '.join(FAMILIES)} are")
    family, config = FAMILIES[name], reference.config
    tensors = dict(reference.named_parameters(remove_duplicate=False))
    with quiet():
        model = HookedTransformer(
            HookedTransformerConfig(
                **family.settings(config),
                dtype=reference.dtype,
                device=str(reference.device),
                original_architecture=name,
                default_prepend_bos=False,
                init_weights=False,
            )
        )
    if family.one_more:
        _act_like_gemma(model)
    parameters = dict(model.named_parameters())
    invented = set(parameters)
    taken = set()
    for row in family.rows(config):
        if row.checkpoint not in tensors:
            continue
        tensor = tensors[row.checkpoint].detach()
        value = row.to_hooked(tensor)
        if value.shape != parameters[row.hooked].shape:
            raise CircuitsError(f"{row.checkpoint} has shape {tuple(tensor.shape)}, which does not fit the config")
        assert value.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr(), row
        parameters[row.hooked].data = value
        invented.discard(row.hooked)
        taken.add(row.checkpoint)
    for left in sorted(set(tensors) - taken):
        raise CircuitsError(f"the checkpoint has a tensor {left} that HookedTransformer cannot represent")
    for parameter in sorted(invented):
        if not parameter.rpartition(".")[2].lstrip("_").startswith("b"):
            raise CircuitsError(f"no tensor of the checkpoint is the hooked model's {parameter}")
        parameters[parameter].data = torch.zeros_like(parameters[parameter])
        parameters[parameter].requires_grad_(False)
    return model.eval()


def _act_like_gemma(model: HookedTransformer) -> None:
    for module in list(model.modules()):
        if type(module) is RMSNorm:
            module.__class__ = OneMoreNorm
    model.embed.__class__ = ScaledEmbed
