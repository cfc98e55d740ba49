"""What is compared: pairs of examples, and the cosines between their gradients with means and intervals.

1. A pair is matched if its examples are of one group (and tell the same attribute, where both tasks name attributes
   and each example has one); the others are what it is judged against.
2. Intervals are by the jackknife over groups: each group is left out, with every pair that it is on either side of.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import pandas
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.errors import CircuitsError
from circuits.html import html_table
from circuits.statistics import intervals
from circuits.storage import read_tensors, write_tensors
from circuits.tasks import Task

#: What the two examples of a pair have in common: group and attribute, the attribute, the group, or neither.
KINDS: tuple[str, ...] = ("matched", "same_attribute", "same_group", "unrelated")
#: Parts that a notebook shows.
_SHOWN = 12


def mismatched_kind(kinds: Sequence[str]) -> str:
    """What matched pairs are set beside: the same attribute of another group, where the tasks have attributes."""
    return "same_attribute" if "same_attribute" in set(kinds) else "unrelated"


@dataclass(frozen=True)
class GradientConsistency:
    """The cosines between the loss gradients of the examples of two tasks.

    Attributes:
        cosines: what is compared (`BY`) → the cosines over each of its parts; NaN where a gradient is zero.
        parts: for each of these one row for each part: ``unit``, ``layer``, ``index`` (−1 where there is none).
        kinds: which of `KINDS` each pair is.
        groups: of each example of the first task, and of the second.
        provenance: model, tasks and settings.
    """

    cosines: dict[str, Float[Tensor, "part example other"]]
    parts: dict[str, pandas.DataFrame]
    kinds: Int[Tensor, "example other"]
    groups: tuple[list[Any], list[Any]]
    provenance: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        counts = ", ".join(f"{name} {len(found)}" for name, found in self.parts.items())
        return f"GradientConsistency({self.kinds.shape[0]} × {self.kinds.shape[1]} examples; {counts})"

    def _repr_html_(self) -> str:
        """What Jupyter shows: the mean of each kind of pairs over the first parts."""
        shown = []
        for name, parts in self.parts.items():
            table = self._means(name, parts.head(_SHOWN))
            cells = table.assign(
                mean=[f"{row.mean:+.3f} ({row.low:+.3f} to {row.high:+.3f})" for row in table.itertuples()]
            ).pivot(index="unit", columns="kind", values="mean")
            cells = cells.loc[parts["unit"].head(_SHOWN), [kind for kind in KINDS if kind in cells]].fillna("–")
            rows = [(unit, *row) for unit, row in zip(cells.index, cells.to_numpy().tolist(), strict=True)]
            more = f"<small>and {len(parts) - len(rows):,} more</small>" if len(parts) > len(rows) else ""
            shown.append(html_table(rows, [name, *(kind.replace("_", " ") for kind in cells)]) + more)
        return f"<div>{self!r}{''.join(shown)}</div>"

    def save(self, path: str | Path) -> None:
        """Save as safetensors."""
        tensors = {f"cosines/{name}": value for name, value in self.cosines.items()} | {"kinds": self.kinds}
        metadata = {
            "kind": "gradient consistency",
            "parts": {name: table.to_dict("list") for name, table in self.parts.items()},
            "groups": list(self.groups),
            "provenance": self.provenance,
        }
        write_tensors(Path(path), tensors, metadata)

    @classmethod
    def load(cls, path: str | Path) -> "GradientConsistency":
        """Load what `save` wrote.

        Raises:
            CircuitsError: the file is missing, damaged or holds something else.
        """
        tensors, metadata = read_tensors(Path(path), "gradient consistency")
        parts = {name: pandas.DataFrame(table) for name, table in metadata["parts"].items()}
        one, two = metadata["groups"]
        cosines = {name: tensors[f"cosines/{name}"] for name in parts}
        return cls(cosines, parts, tensors["kinds"], (one, two), metadata["provenance"])

    def pairs(self, by: str = "all", kinds: Sequence[str] = KINDS) -> pandas.DataFrame:
        """One row for each part and pair: ``unit``, ``layer``, ``index``, ``example``, ``other``, ``kind``, ``cosine``.

        Raises:
            CircuitsError: nothing was compared by that, or there is no such kind.
        """
        cosines, parts = self._by(by)
        for kind in kinds:
            if kind not in KINDS:
                raise CircuitsError(f"there is no kind of pairs {kind!r}: choose from {', '.join(KINDS)}")
        wanted = torch.isin(self.kinds, torch.tensor([KINDS.index(kind) for kind in kinds]))
        where = wanted.nonzero()
        count = len(where)
        repeated = parts.loc[parts.index.repeat(count)].reset_index(drop=True)
        names = numpy.array(KINDS)[self.kinds[wanted].numpy()]
        return repeated.assign(
            example=numpy.tile(where[:, 0].numpy(), len(parts)),
            other=numpy.tile(where[:, 1].numpy(), len(parts)),
            kind=numpy.tile(names, len(parts)),
            cosine=cosines[:, wanted].flatten().numpy(),
        )

    def by_example(self, by: str = "all") -> pandas.DataFrame:
        """The mean cosine of each example of the first task and its pairs of each kind, for paired comparisons.

        Returns:
            One row for each part, kind and example that has such pairs: ``unit``, ``layer``, ``index``, ``kind``,
            ``example``, ``group``, ``cosine``. Pairs whose cosine is NaN are left out.

        Raises:
            CircuitsError: nothing was compared by that.
        """
        cosines, parts = self._by(by)
        known, values, tables = ~cosines.isnan(), cosines.double().nan_to_num(), []
        for code, kind in enumerate(KINDS):
            chosen = known & (self.kinds == code)
            count = chosen.sum(2)
            means = (values * chosen).sum(2) / count
            part, example = count.nonzero().T
            names = parts.iloc[part.numpy()].reset_index(drop=True)
            groups = [self.groups[0][place] for place in example.tolist()]
            columns = {"example": example.numpy(), "group": groups, "cosine": means[part, example].numpy()}
            tables.append(names.assign(kind=kind, **columns))
        return pandas.concat(tables, ignore_index=True)

    def means(self, by: str = "all", *, level: float = 0.95) -> pandas.DataFrame:
        """One row for each part and kind of pairs.

        Returns:
            ``unit``, ``layer``, ``index``, ``kind``, ``pairs``, ``mean``, ``low``, ``high``, the quantiles ``q05``,
            ``median``, ``q95``, and ``matched_above``, ``above_low``, ``above_high``: how far the matched mean lies
            above this one. Pairs whose cosine is NaN are left out.

        Raises:
            CircuitsError: nothing was compared by that.
        """
        return self._means(by, self._by(by)[1], level)

    def _means(self, by: str, parts: pandas.DataFrame, level: float = 0.95) -> pandas.DataFrame:
        cosines, rows = self.cosines[by], []
        for number, part in enumerate(parts.to_dict("records")):
            values, known = cosines[number].double(), ~cosines[number].isnan()
            left_out: dict[str, numpy.ndarray] = {}
            means: dict[str, float] = {}
            for code, kind in enumerate(KINDS):
                chosen = (self.kinds == code) & known
                if not chosen.any():
                    continue
                found, pseudo = values[chosen], self._jackknifed(values, chosen)
                left_out[kind] = pseudo
                means[kind] = float(found.mean())
                some = found[:: max(1, len(found) // 1_000_000)]
                quantiles = torch.quantile(some, torch.tensor([0.05, 0.5, 0.95]).double()).tolist()
                above = [numpy.nan] * 3
                if kind != "matched" and "matched" in means:
                    above = [means["matched"] - means[kind], *_interval(left_out["matched"] - pseudo, level)]
                mean = [means[kind], *_interval(pseudo, level)]
                rows.append(
                    {
                        **part,
                        "kind": kind,
                        "pairs": len(found),
                        **dict(zip(("mean", "low", "high"), mean, strict=True)),
                        **dict(zip(("q05", "median", "q95"), quantiles, strict=True)),
                        **dict(zip(("matched_above", "above_low", "above_high"), above, strict=True)),
                    }
                )
        return pandas.DataFrame(rows)

    def _by(self, by: str) -> tuple[Tensor, pandas.DataFrame]:
        if by not in self.cosines:
            raise CircuitsError(f"gradients were not compared by {by!r}: choose from {', '.join(self.cosines)}")
        return self.cosines[by], self.parts[by]

    def _jackknifed(self, values: Tensor, chosen: Tensor) -> numpy.ndarray:
        """For each group what it adds to the mean, which is the mean of these."""
        names = {name: code for code, name in enumerate(dict.fromkeys([*self.groups[0], *self.groups[1]]))}
        one, two = (torch.tensor([names[name] for name in side]) for side in self.groups)
        own = one[:, None] == two
        sums = []
        for table in (values.nan_to_num() * chosen, chosen.double()):
            touched = torch.zeros(len(names)).double()
            touched.index_add_(0, one, table.sum(1)).index_add_(0, two, table.sum(0))
            touched.index_add_(0, one, -(table * own).sum(1))
            sums.append((float(table.sum()), touched))
        (total, by_group), (count, in_group) = sums
        mean, part = total / count, in_group > 0
        # nothing is left where a group is in every pair: then no spread is known
        left = (total - by_group) / (count - in_group)
        kept = torch.where(part, len(names) * mean - (len(names) - 1) * left, mean)
        pseudo: numpy.ndarray = (kept - kept.mean() + mean).numpy()
        return pseudo


def _interval(values: numpy.ndarray, level: float) -> tuple[float, float]:
    if not numpy.isfinite(values).all():
        return numpy.nan, numpy.nan
    low, high = intervals(values, kind="real", level=level)
    return float(low), float(high)


def groups_of(task: Task, other: Task) -> tuple[list[Any], list[Any]]:
    """The group of each example of both."""
    one, two = (each.answers.groupby("example")["group"].first().tolist() for each in (task, other))
    return one, two


def pair_kinds(task: Task, other: Task) -> Int[Tensor, "example other"]:
    """Which of `KINDS` each pair of examples is.

    Raises:
        CircuitsError: the tasks' authors gave no groups, or no group is in both.
    """
    for each in (task, other):
        if not each.provenance.get("grouped"):
            raise CircuitsError(
                f"the examples of {each.name} have no groups: say which belong together with groups=[…]"
            )
    named = all("attribute" in each.answers for each in (task, other))
    tables = [each.answers.groupby("example") for each in (task, other)]
    if named:
        named = all(int(table["attribute"].nunique(dropna=False).max()) == 1 for table in tables)
    groups = [table["group"].first().tolist() for table in tables]
    about = [table["attribute"].first().tolist() if named else [0] * len(table) for table in tables]
    same = [torch.tensor([[a == b for b in side[1]] for a in side[0]]) for side in (groups, about)]
    group, attribute = same
    if not named:
        attribute = group
    kinds = torch.full(group.shape, KINDS.index("unrelated"))
    kinds[attribute & ~group], kinds[group & ~attribute], kinds[group & attribute] = 1, 2, 0
    if not (kinds == 0).any():
        raise CircuitsError(
            f"{task.name} and {other.name} have no group in common that tells the same: no pair is matched"
        )
    return kinds
