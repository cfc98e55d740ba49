"""Facts that two tasks both tell: what makes their examples belong together.

A fact is what an answer tells: its group (a person, say), and its attribute where both tasks have attributes. The first
answer that tells it, in each task, makes the pair.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas
import torch

from circuits.errors import CircuitsError
from circuits.tasks.task import Task


def facts_in_common(task: Task, other: Task, count: int | None = None, *, seed: int = 0) -> pandas.DataFrame:
    """The facts that both tell, in the order of the first.

    Args:
        task: in which facts are told one way.
        other: in which they are told another way.
        count: as many of them, drawn at random; all if there are fewer, or no number is given.
        seed: of the draw.

    Returns:
        One row for each fact: ``group``, ``attribute`` where both tasks have it, and where the first answer that tells
        it is, in ``task`` (0) and ``other`` (1): ``example_0``, ``answer_0``, ``example_1``, ``answer_1``.

    Raises:
        CircuitsError: a task names no groups.
    """
    for one in (task, other):
        if not one.provenance.get("grouped"):
            raise CircuitsError(f"the task {one.name} names no groups: give each prompt one, such as its person")
    keys = fact_columns(task, other)
    # in Python: of the some thousand answers that tasks have, a merge of tables would take several times as long
    told = [_first_answers(one, keys) for one in (task, other)]
    facts = [key for key in told[0] if key in told[1]]
    order = torch.randperm(len(facts), generator=torch.Generator().manual_seed(seed))
    chosen = [facts[place] for place in order[:count].sort().values.tolist()]
    table = pandas.DataFrame(chosen, columns=keys).astype(dict(task.answers.dtypes[keys]))
    for side, (one, first) in enumerate(zip((task, other), told, strict=True)):
        answers = [first[fact] for fact in chosen]
        table[f"example_{side}"] = one.answers["example"].to_numpy()[answers]
        table[f"answer_{side}"] = answers
    return table


def _first_answers(task: Task, keys: Sequence[str]) -> dict[tuple[Any, ...], int]:
    """Fact → the row of the first answer that tells it."""
    columns = [task.answers[name].tolist() for name in keys]
    found: dict[tuple[Any, ...], int] = {}
    for answer, fact in enumerate(zip(*columns, strict=True)):
        found.setdefault(fact, answer)
    return found


def fact_columns(*tasks: Task) -> list[str]:
    """The columns of answers that say which fact is told: ``attribute`` too where all tasks have it."""
    return ["group", *(["attribute"] if all("attribute" in one.answers for one in tasks) else [])]


def one_answer_each(task: Task, answers: Sequence[int] | None = None) -> Task:
    """Each answer, or each of these, as an example of its own, behind everything before it.

    Where examples have several answers, their foils and counterfactuals, which are of one, are left out.
    """
    task = task.right_padded()
    if len(task.answers) > len(task):
        task = replace(task, foils=None, counterfactuals=None)
    kept = task.answers if answers is None else task.answers.iloc[list(answers)]
    chosen = task.select(kept["example"].tolist())
    return replace(chosen, answers=kept.assign(example=range(len(chosen))).reset_index(drop=True))


def pair_facts(task: Task, other: Task, count: int | None = None, *, seed: int = 0) -> tuple[Task, Task]:
    """Both tasks with the facts that both tell, one answer in each example, in the same order.

    Args:
        task: as in `facts_in_common`, and so are ``other``, ``count`` and ``seed``.
        other: in which the facts are told another way.
        count: as many facts.
        seed: of the draw.

    Returns:
        The two tasks: example n of one tells what example n of the other tells.

    Raises:
        CircuitsError: a task names no groups, or the two have no fact in common.

    Example:
        >>> import tempfile
        >>> from circuits.facts import DatasetSettings, make_dataset, word_tokenizer
        >>> dataset = make_dataset(tempfile.mkdtemp(), DatasetSettings(people=4))
        >>> bio, qa = (dataset.task(split, word_tokenizer()) for split in ("bio", "qa_id"))
        >>> one, two = pair_facts(bio, qa, 5)
        >>> len(one), one.answers["value"].equals(two.answers["value"])
        (5, True)
    """
    facts = facts_in_common(task, other, count, seed=seed)
    if facts.empty:
        raise CircuitsError(f"{task.name} and {other.name} have no fact in common: give tasks with the same groups")
    return one_answer_each(task, facts["answer_0"].tolist()), one_answer_each(other, facts["answer_1"].tolist())
