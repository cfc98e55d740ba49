"""What is checked before a model is handed out: every path that numbers take gives the checkpoint's logits.

1. The Hugging Face model that was read is the reference. Two paths compute with its tensors: the lean model (all our
   numbers) and the hookable model (what a user explores with).
2. All read the same random tokens: twelve, or a few more than the shortest sliding window if that is no longer than the
   model's own context and a thousand; the result names the window that is not left. The logits of the last twelve
   positions must agree with the reference: in float32 to 1e-4, or to 1e-5 of the largest logit where that is more
   (2e-5 for the hookable one).
3. The hookable model's run on twelve tokens is also the one that shows that a change at each hook point reaches the
   logits (`circuits.models.hookable.probe`); on more tokens it runs once more, without gradients.
4. Where logits do not agree, the residual streams are compared, and the path and the first layer that departs are
   named.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from circuits.errors import CircuitsError
from circuits.models.checkpoint import Parity, checkpoint_of, lean_model
from circuits.models.hookable import hook_name, probe
from circuits.models.layout import Layout
from circuits.models.quiet import quiet

#: How far logits may lie apart, as a share of the largest one. In half precision the libraries round attention scores
#: at different places: 6 % apart in bfloat16 after the 30 layers of SmolLM2-135M; wrong weights are 100 % apart.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-1, torch.float16: 2e-2}

#: HookedTransformer adds up in another order than Hugging Face: with Gemma 3 270M, whose stream is large, its logits
#: are 1.04e-5 of the largest apart on one processor, and less on others.
_OTHER_ORDER = {("hookable model", torch.float32): 2.0}

#: The shortest probe, which is also how many positions have their logits compared (those of all positions of a long
#: probe would take more memory than many a model), how far a probe goes beyond a window, and the longest.
_SHORT, _BEYOND, _LONG = 12, 4, 1024

#: The stream before each layer, and the logits.
_Run = tuple[list[Tensor], Tensor]


@torch.no_grad()
def check_parity(model: nn.Module, reference: PreTrainedModel) -> Parity:
    """How far every path is from the logits of the reference.

    Raises:
        CircuitsError: a path is too far, or a change at a hook point has no effect.
    """
    layout = checkpoint_of(model).layout
    length = _length(layout)
    tokens = torch.randint(layout.d_vocab, (1, length), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(reference.device)
    expected_streams, expected = _huggingface(reference, tokens)
    tolerance = _TOLERANCE[reference.dtype] * float(expected.abs().max())
    differences = {}
    for name, path in _PATHS.items():
        streams, logits = path(model, tokens)
        difference = differences[name] = float((logits - expected).abs().max())
        allowed = max(1e-4, tolerance * _OTHER_ORDER.get((name, reference.dtype), 1))
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
    unread = [window for window in layout.windows if window is not None and window >= length]
    return Parity(length, max(1e-4, tolerance), differences, min(unread, default=None))


def _length(layout: Layout) -> int:
    windows = [window for window in layout.windows if window is not None]
    beyond = min(windows, default=0) + _BEYOND
    longest = min(_LONG, layout.n_ctx)
    return min(longest, max(_SHORT, beyond if beyond <= longest else 0))


def _huggingface(model: PreTrainedModel, tokens: Int[Tensor, "batch pos"]) -> _Run:
    with quiet():
        found = model(tokens, output_hidden_states=True, use_cache=False, logits_to_keep=_SHORT)
    # the last of its streams has been through the final norm
    return list(found.hidden_states[:-1]), found.logits


def _hookable(model: nn.Module, tokens: Int[Tensor, "batch pos"]) -> _Run:
    run = probe(model, tokens[:, -_SHORT:])
    if tokens.shape[1] <= _SHORT:
        return run
    either: Any = model
    names = [hook_name(model, (layer, "resid_pre")) for layer in range(checkpoint_of(model).layout.n_layers)]
    streams: list[Tensor] = []

    def keep(stream: Tensor, hook: Any) -> None:  # noqa: ARG001
        streams.append(stream)

    def last(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (arguments[0][:, -_SHORT:], *arguments[1:])

    handle = either.unembed.register_forward_pre_hook(last)
    try:
        with quiet(), either.hooks(fwd_hooks=[(name, keep) for name in names]):
            logits = either(tokens)
    finally:
        handle.remove()
    return streams, logits


def _lean(model: nn.Module, tokens: Int[Tensor, "batch pos"]) -> _Run:
    lean, streams = lean_model(model), []

    def keep(stream: Tensor, _: Tensor | None) -> Tensor:
        streams.append(stream)
        return stream

    stream = lean.run(tokens, visits={(layer, "resid_pre"): keep for layer in range(lean.n_layers)})
    return streams, lean.unembed(stream[:, -_SHORT:])


_PATHS: dict[str, Callable[[nn.Module, Tensor], _Run]] = {"lean model": _lean, "hookable model": _hookable}
