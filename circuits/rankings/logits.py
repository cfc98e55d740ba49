"""What the stream says of the next token, layer by layer, and what each part of the model adds to the answer's logit.

1. Logit lens (nostalgebraist 2020): the stream after each layer, at each token, through the final norm and the
   unembedding, as if the layers after it were not there.
2. Direct logit attribution (Elhage et al. 2021, "A mathematical framework for transformer circuits"): the stream that
   is unembedded is the sum of what the embedding, every head, every neuron and every bias wrote. The final norm divides
   each of them by the length of the whole stream, so that their parts of a logit add up to it, before a cap on it.
3. An attention's bias and an MLP's are what is left of their outputs without their heads and neurons; the final bias is
   that of the norm and of the unembedding.
"""

import re
from typing import Any

import pandas
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.errors import CircuitsError
from circuits.models import LeanModel, Model, capture, check_task, lean_model, shape_of, user_hooks
from circuits.rankings.attention import prompt_length
from circuits.rankings.reading import head_output, token_texts
from circuits.statistics import intervals
from circuits.tasks import Task
from circuits.units import Head, Neuron

#: unit, kind, layer, index.
_Row = tuple[str, str, int | None, int | None]


def logit_lens(model: Model, task: Task, *, example: int = 0) -> pandas.DataFrame:
    """What the stream says of the next token after every layer, at every token before the answer.

    Args:
        model: loaded with `circuits.load_model` from a folder with a tokenizer.
        task: tokenised examples.
        example: which of them.

    Returns:
        One row for each layer and token: ``layer``, how many layers the stream has passed, from 0 (the embedding) to
        all of them; ``position``; ``token``; ``top``, the likeliest next token, and its ``probability``; ``answer``,
        the answer's first token, with its ``answer_probability`` and its ``answer_rank`` among all tokens, from 1.

    Raises:
        CircuitsError: the model has no tokenizer, the task no such example, or a function is hooked into the model
            behind its layers.

    Source:
        nostalgebraist, "interpreting GPT: the logit lens" (2020).

    Example:
        >>> from circuits import load_model
        >>> from circuits.facts import word_tokenizer
        >>> from circuits.training import new_model
        >>> model = load_model(new_model("tiny-llama", word_tokenizer()), tokenizer=word_tokenizer())
        >>> task = Task.from_prompts(["Which city"], [" was"], model.tokenizer)
        >>> table = logit_lens(model, task)
        >>> int(table["layer"].max()), set(table["answer"])
        (4, {'was'})
    """
    if model.tokenizer is None:
        raise CircuitsError("the names of tokens need a tokenizer: load the model from a folder that has one")
    check_task(model, task)
    _refuse(model, r"blocks\.\d+\..+", "the logit lens reads the stream past it")
    length = prompt_length(task, example)
    tokens, layers = task.select([example]).tokens[:, : length + 1], shape_of(model).n_layers
    sites = [(0, "resid_pre"), *((layer, "resid_post") for layer in range(layers))]
    kept = capture(model, tokens[:, :length], sites)
    texts, answer = token_texts(model, tokens[0, :length]), int(tokens[0, length])
    tables = []
    for layer, site in enumerate(sites):
        with torch.no_grad():
            told = lean_model(model).unembed(kept[site][0]).float().softmax(-1)
        best = told.max(-1)
        own = told[:, answer]
        tables.append(
            pandas.DataFrame(
                {
                    "layer": layer,
                    "position": range(length),
                    "token": texts,
                    "top": token_texts(model, best.indices.cpu()),
                    "probability": best.values.cpu().numpy(),
                    "answer": token_texts(model, torch.tensor([answer]))[0],
                    "answer_probability": own.cpu().numpy(),
                    "answer_rank": (told > own[:, None]).sum(-1).cpu().numpy() + 1,
                }
            )
        )
    return pandas.concat(tables, ignore_index=True)


def direct_logits(model: Model, task: Task, *, neurons: bool = False) -> pandas.DataFrame:
    """What each part of the model adds directly to the logit of the answer's first token, mean over examples.

    Args:
        model: loaded with `circuits.load_model`.
        task: tokenised examples.
        neurons: each neuron has a row, in place of one for each MLP.

    Returns:
        One row for each part: ``unit`` (a head, a neuron, ``embedding``, ``L2 MLP``, ``L2 attention bias``,
        ``L2 MLP bias``, ``final bias``), ``kind`` (``head``, ``neuron``, ``mlp``, ``embedding`` or ``bias``), ``layer``
        and ``index`` (missing where it has none), ``logit``, and for a task with foils ``logit_diff``, what it adds to
        the answer's logit less what it adds to the foil's; each with the ends of its 95 % interval over examples
        (``…_low``, ``…_high``). Each column of means adds up to the model's own mean, before a cap on logits.

    Raises:
        CircuitsError: a function is hooked into the model elsewhere than inside heads and MLPs.

    Source:
        Elhage et al. 2021, "A mathematical framework for transformer circuits".

    Example:
        >>> from circuits import load_model
        >>> from circuits.facts import word_tokenizer
        >>> from circuits.training import new_model
        >>> model = load_model(new_model("tiny-llama", word_tokenizer()), tokenizer=word_tokenizer())
        >>> task = Task.from_prompts(["Which city"], [" was"], model.tokenizer)
        >>> direct_logits(model, task)["kind"].value_counts().to_dict()
        {'head': 16, 'mlp': 4, 'embedding': 1, 'bias': 1}
    """
    _refuse(
        model,
        r"blocks\.\d+\.(attn\.hook_(q|k|v|z|pattern)|mlp\.hook_(pre|post))",
        "what parts add would no longer add up to the logit",
    )
    check_task(model, task)
    lean, layers = lean_model(model), shape_of(model).n_layers
    sites = [(layer, name) for layer in range(layers) for name in ("z", "post", "attn_out", "mlp_out")]
    sites += [(0, "resid_pre"), (layers - 1, "resid_post")]
    logits: list[Tensor] = []
    differences: list[Tensor] = []
    rows: list[_Row] = []
    for example in range(len(task)):
        length = prompt_length(task, example)
        chosen = [int(task.tokens[example, length])]
        if task.foils is not None:
            chosen.append(int(task.foils.tokens[example, prompt_length(task.foils, example)]))
        kept = capture(model, task.select([example]).tokens[:, :length], sites)
        last = {site: activation[0, -1:] for site, activation in kept.items()}
        with torch.no_grad():
            parts, rows = _parts(lean, last, neurons)
            stream, wanted = last[layers - 1, "resid_post"], torch.tensor(chosen)
            added = lean.added_logits(parts, stream, wanted)
            # of nothing the final norm leaves its bias, and the unembedding adds its own
            bias = lean.uncapped(torch.zeros_like(stream))[:, wanted.to(lean.device)]
        found = torch.cat([added, bias.float()]).double().cpu()
        logits.append(found[:, 0])
        if len(chosen) > 1:
            differences.append(found[:, 0] - found[:, 1])
    columns = ("unit", "kind", "layer", "index")
    table = pandas.DataFrame([*rows, ("final bias", "bias", None, None)], columns=columns)
    table = table.astype({"layer": "Int64", "index": "Int64"})
    answers = task.answers.drop_duplicates("example").sort_values("example")
    groups = answers["group"].tolist() if "group" in answers else answers["example"].tolist()
    for name, values in (("logit", logits), ("logit_diff", differences)):
        if values:
            each = torch.stack(values, 1).numpy()
            low, high = intervals(each, groups, kind="real")
            table = table.assign(**{name: each.mean(1), f"{name}_low": low, f"{name}_high": high})
    return table


def _parts(
    lean: LeanModel, last: dict[tuple[int, str], Tensor], neurons: bool
) -> tuple[Float[Tensor, "part d_model"], list[_Row]]:
    """What wrote the stream at one token, and its names."""
    parts: list[Tensor] = [last[0, "resid_pre"].float()]
    rows: list[_Row] = [("embedding", "embedding", None, None)]
    for place, layer in enumerate(lean.layers):
        z, post = last[place, "z"], last[place, "post"]
        heads = torch.cat([head_output(lean, Head(place, index), z).float() for index in range(z.shape[1])])
        rows += [(str(Head(place, index)), "head", place, index) for index in range(z.shape[1])]
        parts.append(heads)
        if _has_bias(layer.o, layer.post_norm1):
            parts.append(last[place, "attn_out"].float() - heads.sum(0))
            rows.append((f"L{place} attention bias", "bias", place, None))
        if not neurons:
            parts.append(last[place, "mlp_out"].float())
            rows.append((f"L{place} MLP", "mlp", place, None))
            continue
        written = layer.down.weight.T.float() * post[0].float()[:, None]
        if layer.post_norm2 is not None:
            written = layer.post_norm2.part(written, layer.down(post))
        rows += [(str(Neuron(place, index)), "neuron", place, index) for index in range(len(written))]
        parts.append(written)
        if _has_bias(layer.down, layer.post_norm2):
            parts.append(last[place, "mlp_out"].float() - written.sum(0))
            rows.append((f"L{place} MLP bias", "bias", place, None))
    return torch.cat(parts), rows


def _has_bias(*weights: Any) -> bool:
    return any(one is not None and one.bias is not None for one in weights)


def _refuse(model: Model, allowed: str, why: str) -> None:
    """Refuse functions hooked in where they would be passed over."""
    for name in (found.name for found in user_hooks(model)):
        if not re.fullmatch(allowed, name) and name not in ("hook_embed", "hook_pos_embed"):
            raise CircuitsError(f"a function is hooked into the model at {name or 'the whole model'}: {why}")
