"""The user's model: TransformerLens' hookable model over a Hugging Face model's own tensors, by either of its backends.

1. ``hooked_transformer`` is TransformerLens 3's `HookedTransformer`; ``bridge`` is its successor `TransformerBridge`,
   which 3.9 has too and 4 has alone. Both hold the reference's tensors, unprocessed: who changes one changes all.
2. The hook points we name are those where both backends hold the same values and where an edit means the same.
3. A hook point that fires and ignores what a function returns would be a silent fault: one forward and one backward
   pass on a few tokens show that a change at each of them reaches the logits.
"""

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from circuits.errors import CircuitsError
from circuits.models.arithmetic import SITES, Site
from circuits.models.families import family_of
from circuits.models.quiet import quiet
from circuits.models.uninterrupted import uninterrupted

#: Site → its hook point inside a block: the lean forward's, and the MLP's two that only the hookable models have.
#: ``resid_mid`` is not among them: at the bridge's an edit reaches the MLP alone.
_PREFIXES = dict.fromkeys(("q", "k", "v", "pattern", "z"), "attn.")
_PREFIXES |= dict.fromkeys(("pre", "pre_linear", "post"), "mlp.")
_SITES = {
    site: f"{_PREFIXES.get(site, '')}hook_{site}" for site in (*SITES, "pre", "pre_linear") if site != "resid_mid"
}

#: Libraries that register functions with torch for purposes of their own.
_LIBRARIES = ("torch", "transformers", "transformer_lens", "accelerate")


def backends() -> tuple[str, ...]:
    """The backends that the installed TransformerLens has, the default first.

    Example:
        >>> "bridge" in backends()
        True
    """
    try:
        with quiet():
            from transformer_lens import HookedTransformer  # noqa: F401
    except ImportError:
        return ("bridge",)
    return ("hooked_transformer", "bridge")


def hookable(
    reference: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, *, backend: str | None = None
) -> Any:
    """TransformerLens' hookable model over the tensors of a Hugging Face model, which stays as it is.

    Args:
        reference: the Hugging Face model.
        tokenizer: what the model tokenizes with; it is not changed.
        backend: ``hooked_transformer`` or ``bridge``; if not given, the first of `backends` that can represent the
            model.

    Returns:
        The model in evaluation mode. Its parameters share the memory of the reference's.

    Raises:
        CircuitsError: the installed TransformerLens lacks the backend, or cannot represent the model.

    Example:
        >>> import torch
        >>> from circuits.facts import word_tokenizer
        >>> from circuits.training import new_model
        >>> reference = new_model("tiny-llama", word_tokenizer())
        >>> model, tokens = hookable(reference), torch.tensor([[5, 6, 7]])
        >>> torch.allclose(model(tokens), reference(tokens).logits, atol=1e-5)
        True
    """
    available = backends()
    if backend not in (None, *available):
        raise CircuitsError(
            f"the installed TransformerLens has no backend {backend!r}: choose from {', '.join(available)}"
        )
    prepends = tokenizer is not None and len(tokenizer("").input_ids) > 0
    model: Any
    chosen = backend or available[0]
    if chosen == "hooked_transformer":
        from circuits.models.hooked_transformer import RepresentationError, hooked_transformer

        family = family_of(_named(reference))
        try:
            model = hooked_transformer(reference, family.rows(reference.config), family.layout(reference.config))
        except RepresentationError:
            if backend is not None:
                raise
            chosen = "bridge"
    if chosen == "bridge":
        from circuits.models.bridge import bridge

        model = bridge(reference)
    if tokenizer is not None:
        with quiet():
            model.tokenizer = tokenizer
    # the tokenizer alone decides whether there is a first token of its own
    model.cfg.tokenizer_prepends_bos = model.cfg.default_prepend_bos = prepends
    return model


def _named(reference: PreTrainedModel) -> Any:
    config = copy.copy(reference.config)
    config.architectures = [type(reference).__name__]
    return config


def hook_name(model: nn.Module, site: Site) -> str:
    """The name of the hook point of an activation.

    Args:
        model: made with `hookable`.
        site: layer and name.

    Raises:
        CircuitsError: the model has none that means the same with both backends.

    Example:
        >>> from circuits.facts import word_tokenizer
        >>> from circuits.training import new_model
        >>> hook_name(hookable(new_model("tiny-llama", word_tokenizer())), (3, "z"))
        'blocks.3.attn.hook_z'
    """
    layer, name = site
    hooked: Any = model
    if name not in _SITES or not 0 <= layer < int(hooked.cfg.n_layers):
        raise CircuitsError(f"the model has no hook point for {name} in layer {layer}")
    return f"blocks.{layer}.{_SITES[name]}"


@uninterrupted
def hooked(model: nn.Module, functions: Mapping[str, Callable[[torch.Tensor, Any], Any]]) -> Iterator[None]:
    """Inside the block, a function acts at each named hook point of every forward pass.

    Args:
        model: made with `hookable`.
        functions: hook point → function of the activation and the hook; what it returns takes the activation's place.
    """
    either: Any = model
    with either.hooks(fwd_hooks=list(functions.items())):
        yield


def hook_points(model: nn.Module, layer: int) -> dict[str, str]:
    """The names of one layer's hook points, by site: those that mean the same in both backends.

    Args:
        model: made with `hookable`.
        layer: of the model.

    Returns:
        ``q``, ``k``, ``v``, ``pattern``, ``z``, ``attn_out``, ``pre``, ``post``, ``mlp_out``, ``resid_pre`` and
        ``resid_post``; ``pre_linear`` too if the MLP is gated.

    Raises:
        CircuitsError: the model lacks one of them.

    Example:
        >>> from circuits.facts import word_tokenizer
        >>> from circuits.training import new_model
        >>> hook_points(hookable(new_model("tiny-llama", word_tokenizer())), 3)["z"]
        'blocks.3.attn.hook_z'
    """
    hooked: Any = model
    return _points_of(layer, hooked.hook_dict)


def _points_of(layer: int, has: Mapping[str, Any]) -> dict[str, str]:
    names = {site: f"blocks.{layer}.{name}" for site, name in _SITES.items()}
    if names["pre_linear"] not in has:
        del names["pre_linear"]
    for name in names.values():
        if name not in has:
            raise CircuitsError(f"the hookable model has no hook point {name}: functions cannot act there")
    return names


def probe(model: nn.Module, tokens: Int[Tensor, "batch pos"]) -> tuple[list[Tensor], Tensor]:
    """Check that a change at each hook point we name reaches the logits, by one forward and one backward pass.

    A function at every hook point puts a copy in the activation's place. The gradients of a random combination of the
    logits at that copy are zero if nothing happens when it changes.

    Args:
        model: made with `hookable`.
        tokens: what it reads.

    Returns:
        What this run computed, which is what the model computes without any function: the stream before each layer,
        and the logits.

    Raises:
        CircuitsError: at one of them nothing happens.
    """
    hooked: Any = model
    # the bridge works its names out whenever it is asked for them
    points: dict[str, Any] = hooked.hook_dict
    layers = [_points_of(layer, points) for layer in range(int(hooked.cfg.n_layers))]
    names = [name for of in layers for name in of.values()]
    copies: dict[str, Tensor] = {}

    def replace(activation: Tensor, hook: Any, name: str) -> Tensor:  # noqa: ARG001
        copies[name] = activation.clone() if activation.requires_grad else activation.clone().requires_grad_()
        return copies[name]

    added = []
    try:
        for name in names:
            points[name].add_hook(partial(replace, name=name))
            added.append(points[name])
        with torch.enable_grad(), quiet():
            logits = hooked(tokens)
            toward = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)
            gradients = torch.autograd.grad((logits * toward).float().sum(), list(copies.values()), allow_unused=True)
    finally:
        for point in added:
            point.fwd_hooks.pop().hook.remove()
        if hasattr(model, "original_model"):
            with torch.no_grad():
                hooked(tokens[:1, :1])  # the bridge keeps what it computed last, and a graph in it could not be copied
    found = dict(zip(copies, gradients, strict=True))
    for name in names:
        gradient = found.get(name)
        if gradient is None or not gradient.any():
            raise CircuitsError(
                f"a change at the hook point {name} does not reach the logits with the installed TransformerLens: "
                f"what is done there would be ignored"
            )
    return [copies[of["resid_pre"]].detach() for of in layers], logits.detach()


@dataclass(frozen=True)
class UserHook:
    """A function that a user hooked into a model.

    Attributes:
        name: of the hook point, or of the module if torch's own hooks were used, or `EVERY_MODULE`.
        direction: ``forward`` or ``backward``.
        permanent: it survives ``reset_hooks``.
        function: what is called.
    """

    name: str
    direction: str
    permanent: bool
    function: Callable[..., Any]


def user_hooks(model: nn.Module) -> list[UserHook]:
    """The functions hooked into a model: at hook points, and by torch's own means on any module or on all.

    Functions that torch, transformers, TransformerLens and accelerate register for themselves are left out.

    Args:
        model: made with `hookable`, or a Hugging Face model.

    Example:
        >>> from circuits.facts import word_tokenizer
        >>> from circuits.training import new_model
        >>> model = hookable(new_model("tiny-llama", word_tokenizer()))
        >>> with model.hooks(fwd_hooks=[("blocks.1.attn.hook_z", lambda z, hook: 0 * z)]):
        ...     [(found.name, found.direction) for found in user_hooks(model)]
        [('blocks.1.attn.hook_z', 'forward')]
        >>> user_hooks(model)
        []
    """
    hooked: Any = model
    points: dict[str, Any] = getattr(hooked, "hook_dict", {})
    layers = int(hooked.cfg.n_layers) if points else 0
    # the bridge has several names for a hook point, of which the last is the one we use
    ours = [f"blocks.{layer}.{name}" for layer in range(layers) for name in _SITES.values()]
    names = {id(points[name]): name for name in (*points, *ours) if name in points}
    found, managed = [], set()
    for point in {id(point): point for point in points.values()}.values():
        for direction, handles in (("forward", point.fwd_hooks), ("backward", point.bwd_hooks)):
            for handle in handles:
                managed.add((id(point), handle.hook.id))
                function = getattr(handle, "user_hook", None) or handle.hook
                found.append(UserHook(names[id(point)], direction, handle.is_permanent, function))
    for name, module in _modules(model):
        for direction, attribute in _TORCH_HOOKS:
            for key, function in getattr(module, attribute).items():
                if (id(module), key) not in managed and not _of_a_library(function):
                    found.append(UserHook(names.get(id(module), name), direction, True, function))
    for direction, attribute in _TORCH_HOOKS:
        for function in getattr(nn.modules.module, f"_global{attribute}").values():
            if not _of_a_library(function):
                found.append(UserHook(EVERY_MODULE, direction, True, function))
    return found


#: Where functions act that torch runs at each module of each model.
EVERY_MODULE = "every module, by torch's global hooks"

_TORCH_HOOKS = (
    ("forward", "_forward_pre_hooks"),
    ("forward", "_forward_hooks"),
    ("backward", "_backward_pre_hooks"),
    ("backward", "_backward_hooks"),
)


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    seen = set()
    # the bridge keeps the tree it wraps out of torch's sight
    for tree in (model, getattr(model, "original_model", None)):
        for name, module in tree.named_modules() if isinstance(tree, nn.Module) else ():
            if id(module) not in seen:
                seen.add(id(module))
                # what the bridge wraps, and what is in it, goes by the wrapper's name
                yield re.sub(r"(^|\.)_original_component", "", name), module


def _of_a_library(function: Any) -> bool:
    while isinstance(function, partial):
        function = function.func
    module = getattr(function, "__module__", None) or type(function).__module__
    return str(module).split(".")[0] in _LIBRARIES
