"""Gradient consistency along the course of training (docs/method.md, section 8).

Every few steps the gradients of both tasks' examples are compared at the weights of that moment, without disturbing the
run and across its interruptions (`circuits.tracing.along_training`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import pandas
from transformers import PreTrainedModel

from circuits.consistency.gradients import by_name, compared, wanted_parts
from circuits.consistency.pairs import GradientConsistency, groups_of, pair_kinds
from circuits.masks import ParameterMask
from circuits.models import LeanModel
from circuits.storage import write_table
from circuits.tasks import Task
from circuits.tracing import AlongTraining

_FILE = "means.parquet"


class ConsistencyCallback(AlongTraining):
    """Measures gradient consistency while a `transformers.Trainer` trains, without disturbing it.

    Args:
        task: probe examples in one format.
        other: those in another; of facts in common, as `circuits.tasks.pair_facts` gives them.
        every: steps between measurements; the first is after so many steps.
        out: a parquet file for the table, written when training ends.
        by: as in `gradient_consistency`, and so are ``loss`` and ``batch_size``.
        mask: compare inside it and outside it too, whichever model it was made for; several by name.
        loss: over ``answer`` tokens or ``all`` tokens.
        batch_size: examples in one pass.

    Raises:
        CircuitsError: as `gradient_consistency`; in training, there are no steps to measure at, or the run goes on from
            a state that was saved without this callback.

    Source:
        arXiv 2505.16178, v2; docs/method.md, section 8.

    Example:
        >>> import tempfile
        >>> from circuits.tasks import pair_facts
        >>> from circuits.facts import DatasetSettings, make_dataset, word_tokenizer
        >>> from circuits.training import Optimisation, train
        >>> folder, tokenizer = Path(tempfile.mkdtemp()), word_tokenizer()
        >>> dataset = make_dataset(folder / "facts", DatasetSettings(people=4))
        >>> probes = pair_facts(*(dataset.task(split, tokenizer) for split in ("bio", "qa_id")), 6)
        >>> measuring = ConsistencyCallback(*probes, every=2)
        >>> _ = train("mixed", dataset, folder, optimisation=Optimisation(steps=4), callbacks={"mixed": [measuring]})
        >>> measuring.table.query("kind == 'matched'")["step"].tolist()
        [2, 4]
    """

    noun: ClassVar[str] = "cosines"

    def __init__(
        self,
        task: Task,
        other: Task,
        every: int,
        *,
        out: str | Path | None = None,
        by: Sequence[str] = ("all",),
        mask: ParameterMask | Mapping[str, ParameterMask] | None = None,
        loss: str = "answer",
        batch_size: int = 64,
    ) -> None:
        super().__init__(every)
        self.out = None if out is None else Path(out)
        self._kinds = pair_kinds(task, other)
        self._tasks = task.right_padded(), other.right_padded()
        self._masks = by_name(mask)
        self._by = wanted_parts(by, self._masks)
        self._loss, self._batch_size = loss, batch_size
        self._rows: list[pandas.DataFrame] = []

    @property
    def table(self) -> pandas.DataFrame:
        """The rows of `GradientConsistency.means` so far, with ``step`` and ``by``; empty before the first step."""
        return pandas.concat(self._rows, ignore_index=True) if self._rows else pandas.DataFrame()

    def begin(self, steps: list[int]) -> None:  # noqa: ARG002
        """No rows."""
        self._rows = []

    def measure(self, model: LeanModel, step: int) -> None:
        """Add the means of this step."""
        cosines, parts = compared(
            model, *self._tasks, self._by, masks=self._masks, loss=self._loss, batch_size=self._batch_size
        )
        found = GradientConsistency(cosines, parts, self._kinds, groups_of(*self._tasks))
        for name in cosines:
            means = found.means(name)
            self._rows.append(means.assign(step=step, by=name)[["step", "by", *means]])

    def save(self, folder: Path) -> None:
        """Save the rows."""
        self._write(folder / _FILE)

    def load(self, folder: Path) -> None:
        """Load the rows."""
        self._rows = [pandas.read_parquet(folder / _FILE)]

    def end(self, model: PreTrainedModel) -> None:  # noqa: ARG002
        """Write the table."""
        if self.out is not None:
            self._write(self.out)

    def _write(self, path: Path) -> None:
        facts = {"tasks": [task.provenance for task in self._tasks], "every": self.every, "loss": self._loss}
        write_table(path, self.table, facts)
