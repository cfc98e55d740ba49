"""From the tensors of a checkpoint to the weights that a model's arithmetic is done with.

1. Weights are views of the checkpoint's tensors, as the family's rows say; nothing is copied, so that a tensor changed
   in place is seen at once. Their shapes are those that the layout says.
2. Projections have their outputs first, however they are stored.
3. Projections that are parts of one tensor are known by their rows. Where each one's outputs stand in the whole is read
   off by taking the numbers of its outputs through the same rows.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from circuits.errors import CircuitsError
from circuits.models.layer import Fused, LeanLayer, Linear, Norm
from circuits.models.layout import Layout
from circuits.models.rows import Row


class Weights:
    """The weights of a model.

    Args:
        tensors: the checkpoint's, by name.
        rows: parameter → the row that says where it is.
        layout: what layers are made of.

    Raises:
        CircuitsError: a tensor is of another shape than the layout says.
    """

    def __init__(self, tensors: Mapping[str, Tensor], rows: Mapping[str, Row], layout: Layout) -> None:
        self._tensors, self._rows, self._layout = tensors, rows, layout
        self._check_shapes()

    def _check_shapes(self) -> None:
        layout = self._layout
        d, heads, groups = layout.d_model, (layout.n_heads, layout.d_head), (layout.n_groups, layout.d_head)
        shapes = {
            **{
                "embed.W_E": (layout.d_vocab, d),
                "unembed.W_U": (d, layout.d_vocab),
                "pos_embed.W_pos": (layout.n_ctx, d),
            },
            **{"attn.W_Q": (heads[0], d, heads[1]), "attn.W_O": (*heads, d), "attn.b_Q": heads},
            **{f"attn.W_{letter}": (groups[0], d, groups[1]) for letter in "KV"},
            **{f"attn.b_{letter}": groups for letter in "KV"},
            **{f"mlp.W_{name}": (d, layout.d_mlp) for name in ("in", "gate")},
            "mlp.W_out": (layout.d_mlp, d),
        }
        for row in self._rows.values():
            expected = shapes.get(row.name if row.layer is None else row.name.split(".", 2)[2])
            found = tuple(row.stored(self._tensors[row.tensor]).shape)
            if expected is not None and found != expected:
                raise CircuitsError(
                    f"{row.tensor} does not fit its config: {row.name} has the shape {found}, not {expected}"
                )

    def stored(self, name: str) -> Tensor:
        """A parameter as it is stored."""
        row = self._rows[name]
        return row.stored(self._tensors[row.tensor])

    def linear(self, name: str, bias: str) -> Linear:
        """A projection, its outputs first."""
        rows = tuple(self._rows[each] for each in (name, bias) if each in self._rows)
        for row in rows:
            if not row.acts_as_stored:
                raise CircuitsError(
                    f"{row.name} acts as stored: only a norm's scale can have an offset, only the embedding a factor"
                )
        weight = _outputs_first(name, self.stored(name))
        return Linear(weight, self.stored(bias) if len(rows) > 1 else None, rows)

    def norm(self, name: str) -> Norm:
        """A norm, given the name that its scale and bias begin with."""
        rows = tuple(self._rows[each] for each in (f"{name}.w", f"{name}.b") if each in self._rows)
        if not rows or rows[0].name != f"{name}.w":
            raise CircuitsError(f"{name} has no scale: norms without weights are not among what a family can say")
        for row in rows:
            if row.factor != 1.0 or (row.offset and row is not rows[0]):
                raise CircuitsError(
                    f"{row.name} has a factor or offset: only a norm's scale can have an offset, only the embedding a "
                    "factor"
                )
        weight, bias = self.stored(rows[0].name), self.stored(rows[1].name) if len(rows) > 1 else None
        return Norm(weight, bias, self._layout.eps, self._layout.norm == "LN", rows)

    def _fused(self, names: Sequence[str]) -> Fused | None:
        """Projections whose weights are parts of one tensor; None if they are not."""
        rows = [self._rows[name] for name in names]
        if len({row.tensor for row in rows}) > 1:
            return None
        tensor = self._tensors[rows[0].tensor]
        outputs = tensor.shape[1 if rows[0].inputs_first else 0]
        numbers = torch.arange(outputs)
        numbers = numbers.expand(tensor.shape) if rows[0].inputs_first else numbers[:, None].expand(tensor.shape)
        pieces = []
        for row in rows:
            where = _outputs_first(row.name, row.stored(numbers))[..., 0]
            heads, width = where.shape if where.dim() > 1 else (1, len(where))
            first = where.flatten()
            stride = int(first[width] - first[0]) if heads > 1 else width
            pieces.append((int(first[0]), stride, heads, width))
        found = [rows[0], *(self._rows[bias] for bias in [names[0].replace(".W_", ".b_")] if bias in self._rows)]
        bias = self._tensors[found[1].tensor] if len(found) > 1 else None
        return Fused(Linear(tensor.T if rows[0].inputs_first else tensor, bias, tuple(found)), tuple(pieces))

    def layer(self, layer: int) -> LeanLayer:
        """All of one layer."""
        layout, at = self._layout, f"blocks.{layer}."
        # where norms stand only behind, they have the names of those that stand before
        behind = ("ln1_post", "ln2_post") if layout.pre_norms else ("ln1", "ln2")
        stored = {letter: self.linear(f"{at}attn.W_{letter}", f"{at}attn.b_{letter}") for letter in "QKVO"}
        gate, up, down = ((f"{at}mlp.W_{name}", f"{at}mlp.b_{name}") for name in ("gate", "in", "out"))
        return LeanLayer(
            norm1=self.norm(f"{at}ln1") if layout.pre_norms else None,
            norm2=self.norm(f"{at}ln2") if layout.pre_norms else None,
            post_norm1=self.norm(at + behind[0]) if layout.post_norms else None,
            post_norm2=self.norm(at + behind[1]) if layout.post_norms else None,
            query_norm=self.norm(f"{at}attn.q_norm") if layout.head_norms else None,
            key_norm=self.norm(f"{at}attn.k_norm") if layout.head_norms else None,
            q=stored["Q"],
            k=stored["K"],
            v=stored["V"],
            qkv=self._fused([f"{at}attn.W_{letter}" for letter in "QKV"]),
            o=stored["O"],
            gate=self.linear(*gate) if layout.gated else None,
            up=self.linear(*up),
            gate_up=self._fused([gate[0], up[0]]) if layout.gated else None,
            down=self.linear(*down),
            activation=_activation(layout.activation),
            heads_apart=layout.head_norms == "head",
            d_head=layout.d_head,
            window=layout.windows[layer],
            score_scale=layout.score_scales[layer],
            score_cap=layout.score_cap,
        )


def _outputs_first(name: str, stored: Tensor) -> Tensor:
    """A weight in TransformerLens' layout as ``[out, in]`` or ``[head, d_head, in]``: a view."""
    leaf = name.rpartition(".")[2]
    if leaf in ("W_Q", "W_K", "W_V"):
        return stored.transpose(1, 2)
    if leaf == "W_O":
        return stored.permute(2, 0, 1).flatten(1)
    return stored.T


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    from transformers.activations import ACT2FN

    # the same function, written in one kernel
    found: Any = ACT2FN["gelu_pytorch_tanh" if name == "gelu_new" else name]
    return found if isinstance(found, torch.nn.Module) else found()
