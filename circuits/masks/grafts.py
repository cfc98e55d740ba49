"""A small graft that was found: what it holds, what a notebook shows of it, and its files."""

from dataclasses import dataclass
from pathlib import Path

import pandas

from circuits.errors import CircuitsError
from circuits.html import html_table
from circuits.masks.mask import ParameterMask
from circuits.storage import write_table


@dataclass(frozen=True, eq=False)
class Graft:
    """A small graft that was found, and the search for it.

    Attributes:
        mask: γ, over all parameters of the fine-tuned model; ``graft(pre, graft.mask, fine_tuned)`` applies it.
        curve: one row for each graft that was tried, by ``score`` and ``size``: ``fraction`` of the parameters,
            ``exact_match`` and ``log_prob`` on the task (means over answers), and ``chosen``, true in one row.
        answers: one row for each answer of the task, for paired comparisons: ``example``, ``group``, ``attribute``,
            ``exact_match`` of the graft that was chosen, and that of the fine-tuned model, ``fine_tuned``. None for
            grafts saved by earlier versions.
    """

    mask: ParameterMask
    curve: pandas.DataFrame
    answers: pandas.DataFrame | None = None

    @property
    def size(self) -> int:
        """How many parameters are grafted, ``|γ|₀``."""
        return self.mask.size

    @property
    def fraction(self) -> float:
        """The share of the model's parameters that is grafted."""
        return self.mask.size / self.mask.total

    @property
    def accuracy(self) -> float:
        """Exact match of the grafted model on the task."""
        return float(self.curve.loc[self.curve["chosen"], "exact_match"].iloc[0])

    def __repr__(self) -> str:
        return (
            f"Graft({self.size:,} of {self.mask.total:,} parameters, {self.fraction:.3%}, accuracy={self.accuracy:.4f})"
        )

    def _repr_html_(self) -> str:
        """What Jupyter shows: size, accuracy, and the score that it was chosen by."""
        share = self.mask.size / self.mask.total if self.mask.total else 0.0
        rows = [
            (self.size, self.mask.total, f"{share:.3%}", f"{float(accuracy):.4f}", score)
            for accuracy, score in self.curve.loc[
                self.curve["chosen"].astype(bool), ["exact_match", "score"]
            ].to_numpy()
        ]
        return f"<div>{html_table(rows, ['grafted', 'parameters', 'share', 'accuracy', 'score'])}</div>"

    def save(self, folder: str | Path) -> None:
        """Save as ``mask.safetensors``, ``curve.parquet`` and ``answers.parquet`` in a folder."""
        self.mask.save(Path(folder) / "mask.safetensors")
        write_table(Path(folder) / "curve.parquet", self.curve, self.mask.provenance)
        if self.answers is not None:
            write_table(Path(folder) / "answers.parquet", self.answers, self.mask.provenance)

    @classmethod
    def load(cls, folder: str | Path) -> "Graft":
        """Load what `save` wrote.

        Raises:
            CircuitsError: a file is missing or damaged.
        """
        mask, curve = ParameterMask.load(Path(folder) / "mask.safetensors"), Path(folder) / "curve.parquet"
        if not curve.is_file():
            raise CircuitsError(f"there is no file {curve}")
        answers = Path(folder) / "answers.parquet"
        return cls(mask, pandas.read_parquet(curve), pandas.read_parquet(answers) if answers.is_file() else None)
