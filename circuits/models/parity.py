"""What is checked before a model is handed out: every path that numbers take gives the checkpoint's logits.

1. The Hugging Face model that was read is the reference. Three paths compute with the hooked model's parameters: the
   hooked model itself (hooks, curves, grafts), the lean model (the engine) and the Hugging Face view (traces).
2. All read the same random tokens. Logits must agree with the reference: in float32 to 1e-4, or to 1e-5 of the largest
   logit where that is more.
3. Where they do not, the residual streams are compared, and the path and the first layer that departs are named.
"""

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from circuits.errors import CircuitsError
from circuits.models.lean import LeanModel
from circuits.models.loading import HookedTransformer, Parity, huggingface_view
from circuits.models.quiet import quiet

#: How far logits may lie apart, as a share of the largest one. In half precision the two libraries round attention
#: scores at different places: 6 % apart in bfloat16 after the 30 layers of SmolLM2-135M; wrong weights are 100 % apart.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-1, torch.float16: 2e-2}

#: The stream before each layer, and the logits.
_Run = tuple[list[Tensor], Tensor]


@torch.no_grad()
def check_parity(model: HookedTransformer, reference: PreTrainedModel) -> Parity:
    """How far every path is from the logits of the reference; too far raises a `CircuitsError`."""
    vocabulary = int(model.cfg.d_vocab)
    tokens = torch.randint(vocabulary, (2, 12), generator=torch.Generator().manual_seed(0)).to(reference.device)
    expected_streams, expected = _huggingface(reference, tokens)
    allowed = max(1e-4, _TOLERANCE[reference.dtype] * float(expected.abs().max()))
    differences = {}
    for name, path in _PATHS.items():
        streams, logits = path(model, tokens)
        difference = differences[name] = float((logits - expected).abs().max())
        if difference <= allowed:
            continue
        departed = next(
            (
                f"layer {layer - 1}" if layer else "the embedding"
                for layer, stream in enumerate(streams)
                if not torch.allclose(stream, expected_streams[layer], atol=allowed, rtol=1e-3)
            ),
            "the last layer, the final norm or the unembedding",
        )
        raise CircuitsError(
            f"the {name}'s logits differ from the checkpoint's by {difference:.2g} ({allowed:.2g} is allowed): "
            f"they first depart at {departed}"
        )
    return Parity(tokens.shape[1], allowed, differences)


def _huggingface(model: PreTrainedModel, tokens: Int[Tensor, "batch pos"]) -> _Run:
    with quiet():
        found = model(tokens, output_hidden_states=True, use_cache=False)
    # the last of its streams has been through the final norm
    return list(found.hidden_states[:-1]), found.logits


def _hooked(model: HookedTransformer, tokens: Int[Tensor, "batch pos"]) -> _Run:
    with quiet():
        logits, cache = model.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_resid_pre"))
    return [cache[f"blocks.{layer}.hook_resid_pre"] for layer in range(model.cfg.n_layers)], logits


def _lean(model: HookedTransformer, tokens: Int[Tensor, "batch pos"]) -> _Run:
    lean = LeanModel(model)
    streams = [stream.view(*tokens.shape, -1) for stream in lean.streams(tokens)]
    return streams[:-1], lean.unembed(streams[-1])


def _view(model: HookedTransformer, tokens: Int[Tensor, "batch pos"]) -> _Run:
    with huggingface_view(model) as view:
        return _huggingface(view, tokens)


_PATHS: dict[str, Callable[[HookedTransformer, Tensor], _Run]] = {
    "hooked model": _hooked,
    "lean model": _lean,
    "Hugging Face view": _view,
}
