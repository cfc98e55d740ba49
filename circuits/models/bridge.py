"""A `TransformerBridge` around a Hugging Face model's own parameters, for TransformerLens 4 (and 3.9).

1. The bridge puts wrappers into the module tree it is given, which renames its parameters. So it gets a tree of its
   own, whose parameters and buffers are the very objects of the reference; attention is eager, so that patterns can be
   hooked.
2. Nothing is processed, fetched or converted.
3. For a fused tensor the bridge would keep copies of its parts (GPT-NeoX), or parameters of its own that receive the
   gradients (GPT-2, Phi-3). Here each part reads the fused tensor whenever it runs.
4. A bridge's modules hold functions that know other modules of it, which a copy would go on using. So a copy is made
   anew, around a copy of the reference.
"""

import copy
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from circuits.errors import CircuitsError
from circuits.models.quiet import quiet

with quiet():
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module


class FusedPart(nn.Module):
    """One of the projections that a fused module holds, for example the queries of all heads.

    Args:
        fused: the module; it stays the owner of the tensors.
        rows: which of its outputs, in their order.
    """

    def __init__(self, fused: nn.Module, rows: Tensor | slice) -> None:
        super().__init__()
        # not a submodule: the parameters are in the tree once
        self._fused = (fused,)
        self._rows = rows

    @property
    def weight(self) -> Tensor:
        """``[out, in]``."""
        weight: Any = self._fused[0].weight
        if isinstance(self._fused[0], Conv1D):
            weight = weight.T
        part: Tensor = weight[self._rows]
        return part

    @property
    def bias(self) -> Tensor | None:
        """``[out]``, if the fused module has one."""
        bias: Any = self._fused[0].bias
        return None if bias is None else bias[self._rows]

    def forward(self, x: Tensor) -> Tensor:
        """The part's outputs."""
        return functional.linear(x, self.weight, self.bias)


class SharingBridge(TransformerBridge):
    """A `TransformerBridge` whose parameters are the tensors at ``model.checkpoint``."""

    checkpoint: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> "SharingBridge":
        from circuits.models.hookable import user_hooks  # which makes bridges

        for found in user_hooks(self):
            raise CircuitsError(f"a function is hooked into the model at {found.name}: a copy would lack it")
        (reference,) = vars(self)["_reference"]
        twin = bridge(copy.deepcopy(reference, memo))
        memo[id(self)] = twin
        if self.tokenizer is not None:
            with quiet():
                twin.tokenizer = copy.deepcopy(self.tokenizer, memo)
        for name in ("tokenizer_prepends_bos", "default_prepend_bos"):
            setattr(twin.cfg, name, getattr(self.cfg, name))
        checkpoint = vars(self).get("checkpoint")
        if checkpoint is not None:
            own = {name: copy.deepcopy(getattr(checkpoint, name), memo) for name in ("config", "tensors")}
            twin.checkpoint = replace(checkpoint, **own)
        twin.train(self.training)
        return twin


def bridge(reference: PreTrainedModel) -> SharingBridge:
    """A `TransformerBridge` over a Hugging Face model's parameters, which the model itself goes on using.

    Raises:
        CircuitsError: TransformerLens has no bridge for its architecture.
    """
    shared = {id(tensor): tensor for tensor in (*reference.parameters(), *reference.buffers())}
    tree = copy.deepcopy(reference, shared)
    name = type(reference).__name__
    with quiet():
        tree.set_attn_implementation("eager")
        try:
            model = build_bridge_from_module(
                tree,
                name,
                hf_config=copy.deepcopy(tree.config),
                model_name="memory",
                post_adapter_hook=lambda adapter: _read_fused_parts(adapter, tree.config),
            )
            model.__class__ = SharingBridge
        except ValueError as error:
            raise CircuitsError(f"TransformerLens has no bridge for the architecture {name}: {error}") from None
    config: Any = tree.config
    # GPT-2's config may leave this to the library
    if name == "GPT2LMHeadModel":
        model.cfg.d_mlp = config.n_inner or 4 * config.n_embd
    # in a tuple, where torch does not take it for a module of the model
    vars(model)["_reference"] = (reference,)
    model.eval()
    return cast(SharingBridge, model)


def _read_fused_parts(adapter: Any, config: Any) -> None:
    block = adapter.component_mapping["blocks"].submodules
    attention, mlp = block["attn"], block["mlp"]
    if "qkv" in attention.submodules:
        fused = attention.submodules["qkv"].name
        attention.split_qkv_matrix = lambda original: tuple(
            FusedPart(getattr(original, fused), rows)
            for rows in _qkv_rows(adapter.cfg, interleaved="query_key" in fused)
        )
    if hasattr(mlp, "split_gate_up_matrix"):
        n = config.intermediate_size
        mlp.split_gate_up_matrix = lambda original: (
            FusedPart(original.gate_up_proj, slice(0, n)),
            FusedPart(original.gate_up_proj, slice(n, 2 * n)),
        )


def _qkv_rows(cfg: Any, interleaved: bool) -> list[Tensor | slice]:
    heads, groups, width = int(cfg.n_heads), int(cfg.n_key_value_heads or cfg.n_heads), int(cfg.d_head)
    if interleaved:
        # GPT-NeoX stores query, key and value of each head together
        return list(torch.arange(heads * 3 * width).view(heads, 3, width).transpose(0, 1).reshape(3, -1))
    q, k = heads * width, groups * width
    return [slice(0, q), slice(q, q + k), slice(q + k, q + 2 * k)]
