"""The heads of an analysis that are worth a look, drawn on an example of each task."""

from collections.abc import Mapping
from pathlib import Path

import pandas

from circuits.analysis.case import Case
from circuits.analysis.figures import effect_of
from circuits.figures import attention_figure, save_figure
from circuits.rankings import prompt_length, read_head
from circuits.units import Head

#: Longer prompts are drawn too small to read.
_LONGEST = 48


def chosen_heads(tables: Mapping[str, pandas.DataFrame], count: int) -> dict[str, str]:
    """``count`` heads that stand out, each with why: by patching, ablation, Shared Size and attention in turn."""
    found: dict[str, str] = {}
    orders = []
    for name, why in (("patches", "patched"), ("sweep", "ablated")):
        if name in tables:
            table = tables[name]
            metric = effect_of(table)
            rows = table.assign(size=table[metric].abs()).sort_values("size", ascending=False, kind="stable")
            reasons = [f"changes {row.task} by {getattr(row, metric):+.2f} when {why}" for row in rows.itertuples()]
            orders.append(list(zip(rows["unit"], reasons, strict=True)))
    if "shared_heads" in tables:
        rows = tables["shared_heads"].query("scope == 'global'").sort_values("size", ascending=False, kind="stable")
        orders.append([(row.unit, f"has {row.size:,} shared parameters") for row in rows.itertuples()])
    if "attention" in tables:
        rows = tables["attention"].sort_values("excess", ascending=False, kind="stable")
        reasons = [f"attends: {row.behaviour.replace('_', ' ')}, {row.attention:.2f}" for row in rows.itertuples()]
        orders.append(list(zip(rows["unit"], reasons, strict=True)))
    for place in range(count):
        for order in orders:
            if place < len(order) and len(found) < count:
                found.setdefault(*order[place])
    return found


def draw_heads(case: Case, tables: Mapping[str, pandas.DataFrame]) -> list[Path]:
    """Draw the attention of the heads that stand out, on the first short prompt of each task that has spans."""
    if case.model.tokenizer is None:
        return []
    prompts = []
    for name, task in case.of("attend").items():
        short = [example for example in range(len(task)) if prompt_length(task, example) <= _LONGEST]
        if task.spans and short:
            prompts.append((name, task, short[0]))
    files = []
    for head, why in chosen_heads(tables, case.settings.drawn if prompts else 0).items():
        file = case.folder / "figures" / f"attention_{head}.html"
        if not file.is_file():
            readings = [
                read_head(case.model, Head.parse(head), task, example=example, title=name)
                for name, task, example in prompts
            ]
            save_figure(attention_figure(readings, subtitle=why), file, "beside")
        files.append(file)
    return files
