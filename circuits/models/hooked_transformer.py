"""A `HookedTransformer` over a Hugging Face model's own tensors, for TransformerLens 3.

1. The layout becomes a HookedTransformerConfig; what the hooked model cannot represent is refused.
2. Every parameter becomes a view of a checkpoint tensor, as the family's rows say: a change of the checkpoint's tensors
   is a change of the hooked model. A copy of the model, or its move to another device, takes the tensors along.
3. Gemma stores w where 1 + w acts, and embeddings that act times √d_model. The hooked model keeps the stored tensors;
   its norms and its embedding do the arithmetic.
4. Biases that TransformerLens invents are zero and have no gradients.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from circuits.errors import CircuitsError
from circuits.models.layout import Layout, Rotary
from circuits.models.quiet import quiet
from circuits.models.rows import Row

with quiet():
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.components import Embed, RMSNorm


class RepresentationError(CircuitsError):
    """HookedTransformer lacks what the model computes."""


class OffsetNorm(RMSNorm):
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


class SharingTransformer(HookedTransformer):
    """A `HookedTransformer` whose parameters are views of the tensors at ``model.checkpoint``."""

    checkpoint: Any

    def share(self, tensors: Mapping[str, Tensor], rows: list[Row]) -> None:
        """Make every parameter that a row names a view of its tensor."""
        parameters = dict(self.named_parameters())
        for row in rows:
            parameters[self.own_name(row.name)].data = row.stored(tensors[row.tensor].detach())

    def own_name(self, name: str) -> str:
        """What TransformerLens calls a parameter: grouped keys and values begin with an underscore."""
        block, _, leaf = name.rpartition(".")
        grouped = self.cfg.n_key_value_heads is not None and ".attn." in name and leaf[-2:] in ("_K", "_V")
        return f"{block}._{leaf}" if grouped else name

    def replaced(self) -> Iterator[str]:
        """The parameters that are no longer views of their tensors."""
        parameters, tensors = dict(self.named_parameters()), self.checkpoint.tensors
        for row in self.checkpoint.rows:
            found, expected = parameters[self.own_name(row.name)], row.stored(tensors[row.tensor].detach())
            if (found.data_ptr(), found.shape, found.stride()) != (
                expected.data_ptr(),
                expected.shape,
                expected.stride(),
            ):
                yield row.name

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SharingTransformer":
        super()._apply(fn, recurse)
        if "checkpoint" in self.__dict__:
            tensors = self.checkpoint.tensors
            for name, tensor in tensors.items():
                tensors[name] = torch.nn.Parameter(fn(tensor.detach()), tensor.requires_grad)
            self.share(tensors, list(self.checkpoint.rows))
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "SharingTransformer":
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        if "checkpoint" in self.__dict__:
            # what no copy changes
            memo |= {id(one): one for one in (self.checkpoint.rows, self.checkpoint.layout)}
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        if "checkpoint" in twin.__dict__:
            twin.share(twin.checkpoint.tensors, list(twin.checkpoint.rows))
        return twin


def _rotary(layout: Layout) -> dict[str, Any]:
    """Settings for rotary positions; a second base is that of the layers with windows."""
    kinds = {id(rotary): rotary for rotary in layout.rotary}
    if len(kinds) > 2 or (len(kinds) > 1 and None in layout.rotary):
        raise RepresentationError("the checkpoint's layers differ in their positions, which HookedTransformer cannot")
    windowed = {id(layout.rotary[layer]) for layer, window in enumerate(layout.windows) if window is not None}
    ordered = sorted(kinds.values(), key=lambda rotary: id(rotary) in windowed)
    main, local = ordered[0], ordered[1] if len(ordered) > 1 else None
    assert main is not None
    of = _rope(main)
    kind, config = of.get("rope_type", "default"), main.config
    settings: dict[str, Any] = {
        "positional_embedding_type": "rotary",
        "rotary_adjacent_pairs": False,
        "rotary_base": of.get("rope_theta", 10000.0),
        "rotary_dim": round(of.get("partial_rotary_factor", 1.0) * layout.d_head),
    }
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
        raise RepresentationError(
            f"the checkpoint's rotary scaling {kind!r} is not supported by HookedTransformer: "
            f'default, linear, llama3 and yarn are; backend="bridge" knows it'
        )
    if local is not None:
        if _rope(local).get("rope_type", "default") != "default":
            raise RepresentationError(
                "the checkpoint scales the rotary angles of its windows, which HookedTransformer cannot"
            )
        settings["rotary_base_local"] = _rope(local)["rope_theta"]
    return settings


def _rope(rotary: Rotary) -> dict[str, Any]:
    settings = dict(rotary.config.rope_parameters or {})
    return settings if rotary.layer_type is None else dict(settings[rotary.layer_type])


def _settings(layout: Layout) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "d_model": layout.d_model,
        "d_head": layout.d_head,
        "n_heads": layout.n_heads,
        "n_key_value_heads": layout.n_groups if layout.n_groups != layout.n_heads else None,
        "d_mlp": layout.d_mlp,
        "n_layers": layout.n_layers,
        "n_ctx": layout.n_ctx,
        "d_vocab": layout.d_vocab,
        "eps": layout.eps,
        "act_fn": layout.activation,
        "normalization_type": layout.norm,
        "final_rms": layout.norm == "RMS",
        "gated_mlp": layout.gated,
        "parallel_attn_mlp": layout.parallel,
        "use_normalization_before_and_after": layout.pre_norms and layout.post_norms,
        "use_qk_norm": layout.head_norms == "head",
        "attn_scale": 1 / layout.score_scales[0],
        "attn_scores_soft_cap": layout.score_cap or -1.0,
        "output_logits_soft_cap": layout.logit_cap or -1.0,
    }
    if len(set(layout.score_scales)) > 1:
        # TransformerLens multiplies attn_scale with the layer's number from 1 on
        settings["scale_attn_by_inverse_layer_idx"] = True
    if any(window is not None for window in layout.windows):
        settings |= {
            "use_local_attn": True,
            "window_size": next(window for window in layout.windows if window is not None),
            "attn_types": ["global" if window is None else "local" for window in layout.windows],
        }
    return settings if layout.learned_positions else settings | _rotary(layout)


def _share_angles(model: SharingTransformer) -> None:
    """Give layers whose angles are the same one table of them, of the length that TransformerLens begins with."""
    first: dict[str, Any] = {}
    for block in model.blocks:
        attention: Any = block.attn
        if attention.attn_type not in first:
            attention._extend_rotary_embeddings(min(model.cfg.n_ctx, attention.ROTARY_INITIAL_CACHE_SIZE))
            first[attention.attn_type] = attention
        attention.rotary_sin = first[attention.attn_type].rotary_sin
        attention.rotary_cos = first[attention.attn_type].rotary_cos


def hooked_transformer(reference: PreTrainedModel, rows: list[Row], layout: Layout) -> SharingTransformer:
    """A `HookedTransformer` whose parameters are views of a Hugging Face model's, unprocessed.

    Raises:
        RepresentationError: something in its layout or among its tensors.
    """
    settings = _settings(layout)
    if not layout.learned_positions:
        # each layer would make a table of angles of its own: see below
        settings["n_ctx"] = 1
    with quiet():
        model = SharingTransformer(
            HookedTransformerConfig(
                **settings,
                dtype=reference.dtype,
                device=str(reference.device),
                original_architecture=type(reference).__name__,
                default_prepend_bos=False,
                init_weights=False,
            )
        )
    model.cfg.n_ctx = layout.n_ctx
    if not layout.learned_positions:
        _share_angles(model)
    if any(row.offset for row in rows):
        for module in list(model.modules()):
            if type(module) is RMSNorm:
                module.__class__ = OffsetNorm
    if any(row.kind == "embedding" and row.factor != 1.0 for row in rows):
        model.embed.__class__ = ScaledEmbed
    parameters, known = dict(model.named_parameters()), set()
    for row in rows:
        name = model.own_name(row.name)
        if name not in parameters:
            raise RepresentationError(
                f"the checkpoint has a tensor {row.tensor} that HookedTransformer cannot represent: load it with "
                'backend="bridge"'
            )
        known.add(name)
    model.share(dict(reference.named_parameters()), rows)
    for name in sorted(parameters.keys() - known):
        if not name.rpartition(".")[2].lstrip("_").startswith("b"):
            raise CircuitsError(f"no tensor of the checkpoint is the hooked model's {name}")
        parameters[name].data = torch.zeros_like(parameters[name])
        parameters[name].requires_grad_(False)
    model.eval()
    return model
