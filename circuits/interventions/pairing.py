"""Which examples, and which of their tokens, belong together in activation patching.

1. A run is patched from a source run: another person in the same template, or the same person's fact in the other
   format.
2. A pair is about the same attribute; it is of one group (a person, say), or both prompts have the same tokens but for
   the subject. What is known of two examples and says otherwise is refused.
3. Positions match by themselves if both runs have the same spans at the same places; otherwise by span: the tokens of
   each, from the last backwards, and the token that predicts the answer.
"""

from typing import Any

import pandas
import torch
from jaxtyping import Int
from torch import Tensor

from circuits.errors import CircuitsError
from circuits.tasks import Task, fact_columns, one_answer_each


def matching_positions(source: Task, target: Task) -> Int[Tensor, "match 3"]:
    """Which position of the source matches which of the target: rows of ``example, source position, target position``.

    Args:
        source: the run that values are taken from.
        target: the run that is changed, with as many examples.

    Raises:
        CircuitsError: the tasks have different numbers of examples, an example has several answers, or two examples
            that stand at the same place are no pair.
    """
    if len(source) != len(target):
        raise CircuitsError(f"patching pairs examples: the source has {len(source)}, the target {len(target)}")
    for task in (source, target):
        if len(task.answers) != len(task):
            raise CircuitsError(
                f"patching needs one answer in each example, but {task.name} has biographies of several"
            )
    _check_pairs(source.right_padded(), target.right_padded())
    names = list(dict.fromkeys([*target.spans, *source.spans]))
    rows = []
    for example in range(len(target)):
        last, last_other = (int(task.span("last")[example].nonzero()[0]) for task in (target, source))
        spans, others = _spans(target, names, example, last), _spans(source, names, example, last_other)
        if last == last_other and spans == others:
            rows += [(example, position, position) for position in range(last + 1)]
            continue
        matched = {last: last_other}
        for name in names:
            theirs = [position for position in others[name] if position < last_other]
            ours = [position for position in spans[name] if position < last]
            for their, our in zip(reversed(theirs), reversed(ours), strict=False):
                matched.setdefault(our, their)
        # the token that predicts the answer comes after all others
        rows += [(example, matched[ours], ours) for ours in [*list(matched)[1:], last]]
    return torch.tensor(rows)


def _spans(task: Task, names: list[str], example: int, last: int) -> dict[str, list[int]]:
    """Where the spans of a prompt are, up to its last token."""
    nowhere = torch.zeros_like(task.attention_mask)
    return {name: task.spans.get(name, nowhere)[example, : last + 1].nonzero().flatten().tolist() for name in names}


def _check_pairs(source: Task, target: Task) -> None:
    for theirs, ours in zip(source.answers.itertuples(), target.answers.itertuples(), strict=True):
        where = f"example {ours.example} of {source.name} is no pair of that of {target.name}"
        how = "pair the examples with pair_people or pair_formats"
        attributes, groups = ([getattr(one, name, None) for one in (theirs, ours)] for name in ("attribute", "group"))
        if pandas.notna(attributes).all() and attributes[0] != attributes[1]:
            raise CircuitsError(f"{where}: it tells the {attributes[0]}, not the {attributes[1]}: {how}")
        other = pandas.notna(groups).all() and groups[0] != groups[1]
        if other and _form(source, theirs)[1:] != _form(target, ours)[1:]:
            raise CircuitsError(f"{where}: it is about another person in other words: {how}")


def pair_counterfactuals(task: Task) -> Task:
    """The counterfactuals of a task, each beside the prompt that it changes.

    Raises:
        CircuitsError: the task has none.
    """
    if task.counterfactuals is None:
        raise CircuitsError(f"the task {task.name} has no counterfactuals: give each of its prompts one")
    return task.counterfactuals


def pair_formats(task: Task, source: Task) -> Task:
    """The answers of ``source`` that tell the same fact of the same person as those of ``task``, in its order.

    Where an example of the source tells several facts, each is an example of its own, behind everything before it.

    Raises:
        CircuitsError: a fact is not in the source, or the task is not of people's facts.
    """
    if "attribute" not in task.answers:
        raise CircuitsError(f"the task {task.name} tells no attributes of people, as {source.name} does: take another")
    keys = ["group", "attribute"]
    known = _first_told(source, keys)
    wanted = list(task.answers[keys].itertuples(index=False, name=None))
    for person, attribute in wanted:
        if (person, attribute) not in known:
            raise CircuitsError(f"{source.name} does not tell the {attribute} of person {person}")
    return one_answer_each(source, [known[fact] for fact in wanted])


def pair_groups(task: Task, source: Task) -> tuple[Task, Task] | None:
    """The answers of two tasks that are about the same: of the same group, and attribute where both have one.

    Args:
        task: the run that is changed.
        source: where values come from.

    Returns:
        Source and target, as long as each other, with one answer in each example; None if the tasks' authors gave no
        groups, or no group is in both.
    """
    if not all(one.provenance.get("grouped") for one in (source, task)):
        return None
    keys = fact_columns(source, task)
    known = _first_told(source, keys)
    told = list(task.answers[keys].itertuples(index=False, name=None))
    chosen = [answer for answer, fact in enumerate(told) if fact in known]
    if not chosen:
        return None
    return one_answer_each(source, [known[told[answer]] for answer in chosen]), one_answer_each(task, chosen)


def _first_told(task: Task, keys: list[str]) -> dict[tuple[Any, ...], int]:
    """Which answer of a task tells each fact first."""
    told = list(task.answers[keys].itertuples(index=False, name=None))
    return {fact: answer for answer, fact in reversed(list(enumerate(told)))}


def pair_people(task: Task, seed: int = 0, among: Task | None = None) -> Task:
    """For each example one about another person, the same attribute in the same wording: the corrupted run.

    Prompts of a pair have the same tokens but for the subject, and subjects of as many tokens; answers may differ in
    length.

    Args:
        task: the clean run.
        seed: of the choice of partners.
        among: the examples that partners are chosen from; the task's own if not given.

    Raises:
        CircuitsError: an example has no partner of the same form and length with another answer.
    """
    generator = torch.Generator().manual_seed(seed)
    among = task if among is None else among
    groups: dict[Any, list[Any]] = {}
    for answer in among.answers.itertuples():
        groups.setdefault(_form(among, answer), []).append(answer)
    chosen = []
    for answer in task.answers.itertuples():
        partners = [other for other in groups.get(_form(task, answer), []) if other.value != answer.value]
        if not partners:
            raise CircuitsError(
                f"nobody else is asked in the words of {task.texts[answer.example]!r}: take more people"
            )
        chosen.append(int(partners[int(torch.randint(len(partners), (1,), generator=generator))].example))
    return among.select(chosen)


def _form(task: Task, answer: Any) -> tuple[Any, ...]:
    """The attribute of an answer, the spans of its prompt, and the prompt's tokens that are not the subject's."""
    spans = _spans(task, list(task.spans), answer.example, answer.start - 1)
    tokens, subject = task.tokens[answer.example, : answer.start].tolist(), set(spans.get("subject", ()))
    others = tuple(token for position, token in enumerate(tokens) if position not in subject)
    return getattr(answer, "attribute", None), tuple((name, *found) for name, found in spans.items()), others
