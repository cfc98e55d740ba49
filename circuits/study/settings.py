"""What a study is made from."""

from dataclasses import dataclass, field, fields, replace
from typing import Any

from circuits.analysis import AnalysisSettings
from circuits.errors import CircuitsError
from circuits.facts import FAMILIAR, DatasetSettings
from circuits.interventions import ABLATIONS
from circuits.masks import FRACTIONS
from circuits.models import family_of, load_config
from circuits.rankings import RANKINGS
from circuits.training import PRETRAINED, Optimisation

FAMILIES: tuple[str, ...] = ("llama", "pythia")
#: How people's facts are told: once each, in one wording and order; or in several, where storing them is easy to ask
#: for whatever the training, and a second stage fails by forgetting.
CONDITIONS: dict[str, dict[str, Any]] = {
    "single": {"biographies": 1, "wordings": 1, "order": "fixed", "row": "biography"},
    "augmented": {"biographies": 3, "wordings": 5, "order": "permuted", "row": "sentence"},
}
_FAMILY_OF = {"LlamaForCausalLM": "llama", "GPTNeoXForCausalLM": "pythia"}
#: Facts that both formats are compared on. Half of them are looked at again with each set of parameters reverted, or
#: alone; of every fifth one gradients are integrated.
_FACTS = 200


#: For facts told once. A shorter first stage leaves more of them where questions find them; a larger second rate finds
#: more of them too, and forgets more (docs/study.md).
TOLD_ONCE = Optimisation(rows=72, gentle_learning_rate=5e-5, compact=True)


@dataclass(frozen=True)
class StudySettings:
    """What a study is made from.

    Attributes:
        family: ``llama`` or ``pythia``; that of the pretrained model, or ``llama``, if not given.
        seed: of people, weights, rows and random masks.
        data: the people.
        optimisation: how they are learned.
        fraction: k of the influenced sets.
        trace_examples: examples of each task that are traced.
        sweep_examples: examples of each task that are scored under each ablation.
        keep: share of the accuracy on QA-ID that a graft must keep.
        rank_examples: examples of each task that are scored at each point of a ranking's curves.
        draws: random masks, permutations and rankings.
        model: folder of a pretrained checkpoint to start from; a new small model of the family if not given.
        evaluate_every: steps of training between points of its curves and between saved states.
        evaluate_examples: examples of each split that whole models are scored on; all if not given.
        fractions: the k of the sharing curve.
        rank_halvings: curves over more than 32 units are measured at every tenth of them, and below the first at so
            many halvings of all of them; at every doubling from 1 if not given.
        sweep_modes: how every head is ablated alone.
        rates: peak learning rates of more second stages, beside the gentle one and the full one; their models are only
            evaluated.
    """

    family: str | None = None
    seed: int = 0
    data: DatasetSettings = field(default_factory=lambda: DatasetSettings(**CONDITIONS["single"]))
    optimisation: Optimisation = field(default_factory=lambda: TOLD_ONCE)
    fraction: float = 0.01
    trace_examples: int = 600
    sweep_examples: int = 200
    keep: float = 0.95
    rank_examples: int = 50
    draws: int = 5
    model: str | None = None
    evaluate_every: int = 100
    evaluate_examples: int | None = None
    fractions: tuple[float, ...] = FRACTIONS
    rank_halvings: int | None = None
    sweep_modes: tuple[str, ...] = ABLATIONS
    rates: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        found = "llama"
        if self.model is not None:
            architecture = family_of(load_config(self.model)).ARCHITECTURE
            found = _FAMILY_OF.get(architecture, architecture)
        if self.family is None:
            object.__setattr__(self, "family", found)
        if self.model is None and self.family not in FAMILIES:
            raise CircuitsError(f"there is no family {self.family!r}: choose from {', '.join(FAMILIES)}")
        if self.model is not None and self.family != found:
            raise CircuitsError(f"the model {self.model} is a {found}, not a {self.family}: leave out the family")
        if self.data.seed != self.seed:
            raise CircuitsError(
                f"the study's seed is {self.seed}, but its people's is {self.data.seed}: make them equal"
            )
        if self.evaluate_every < 1:
            raise CircuitsError("a study needs steps between evaluations: give 1 or more")
        if self.data.people < 8:
            raise CircuitsError(f"a study of {self.data.people} people has nobody to compare with: take 8 or more")
        _ = self.analysis  # which refuses what it cannot be made with

    @property
    def analysis(self) -> AnalysisSettings:
        """How the mixed model and the two-stage one are analysed."""
        scored, facts = ("bio", "qa_id", "qa_ood"), min(self.trace_examples, _FACTS)
        return AnalysisSettings(
            fraction=self.fraction,
            fractions=self.fractions,
            draws=self.draws,
            keep=self.keep,
            examples=self.sweep_examples,
            # a new model can do nothing with the embeddings it had before training
            rest="fine_tuned" if self.model is None else "pre",
            seed=self.seed,
            modes=self.sweep_modes,
            rankings=tuple(RANKINGS),
            ties=self.draws,
            halvings=self.rank_halvings,
            tenths=True,
            tasks_by_step={
                "trace": ("bio", "qa_id"),
                "ablate": scored,
                "graft": ("qa_id",),
                "sweep": scored,
                "patch": ("qa_ood",),
                "rank": ("qa_id", "qa_ood"),
                "consistency": ("bio", "qa_ood"),
                "localise": ("bio", "qa_ood"),
                "signature": ("bio", "qa_ood"),
                "integrate": ("bio", "qa_ood"),
            },
            examples_by_step={
                "evaluate": self.evaluate_examples,
                "trace": self.trace_examples,
                "ablate": self.trace_examples,
                "rank": self.rank_examples,
                "consistency": facts,
                "localise": max(1, facts // 2),
                "signature": facts,
                "integrate": max(1, facts // 5),
            },
        )


#: Facts told in several ways.
AUGMENTED_STUDY = StudySettings(data=DatasetSettings(**CONDITIONS["augmented"]), optimisation=Optimisation())

#: For a pretrained model of some hundred million parameters. Give it its ``model``.
PRETRAINED_STUDY = StudySettings(
    data=replace(FAMILIAR, people=80, **CONDITIONS["single"]),
    # rows are whole biographies: fewer of them take as long as more sentences
    optimisation=replace(PRETRAINED, steps=100, rows=24, qa_share=0.5),
    trace_examples=40,
    sweep_examples=8,
    rank_examples=8,
    evaluate_every=50,
    evaluate_examples=160,
    fractions=(0.0001, 0.001, 0.01, 0.1),
    rank_halvings=4,
    sweep_modes=("zero",),
    rates=(1e-5, 2e-4),
)


def usual_settings(condition: str | None = None, *, pretrained: bool = False) -> StudySettings:
    """The settings of a study where nothing else is asked for, without its model.

    Args:
        condition: one of `CONDITIONS`; ``single`` if not given.
        pretrained: whether the model is a pretrained one.
    """
    if condition != "augmented":
        return PRETRAINED_STUDY if pretrained else StudySettings()
    return replace(PRETRAINED_STUDY, data=FAMILIAR, optimisation=PRETRAINED) if pretrained else AUGMENTED_STUDY


def settings_of(plan: dict[str, Any]) -> StudySettings:
    """The settings that a plan was written from."""

    def with_tuples(values: dict[str, Any]) -> dict[str, Any]:
        return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}

    # a plan may name settings that a later version has done away with, and the model's fingerprint
    names = {one.name for one in fields(StudySettings)}
    known = {name: value for name, value in with_tuples(plan).items() if name in names}
    data, optimisation = DatasetSettings(**with_tuples(plan["data"])), Optimisation(**with_tuples(plan["optimisation"]))
    return StudySettings(**known | {"data": data, "optimisation": optimisation})
