"""The recipes: mixed training, two-stage training, two-stage with a gentle second stage, and either format alone.

A recipe is a list of stages; each stage starts from the checkpoint of the one before it, with a fresh optimizer. Mixed
and two-stage see the same number of BIO rows and the same number of QA rows, at the same peak learning rate.
"""

from dataclasses import dataclass

from circuits.errors import CircuitsError

RECIPES: tuple[str, ...] = ("mixed", "two-stage", "two-stage-gentle", "bio-only", "qa-only")


@dataclass(frozen=True)
class Optimisation:
    """How every stage is optimised: AdamW, linear warm-up, cosine decay.

    Attributes:
        steps: optimizer steps of the mixed stage, and of each of the two stages.
        rows: rows in one step of the mixed stage.
        qa_share: share of those rows that are questions; the rest are biographies.
        learning_rate: peak learning rate.
        gentle_learning_rate: peak learning rate of the gentle second stage.
        final_rate: learning rate at the end, as a share of the peak.
        warmup_steps: steps of linear warm-up.
        weight_decay: AdamW's.
        betas: AdamW's.
        clip: largest gradient norm.
        bio_loss: ``all`` tokens or ``answer`` tokens of biographies carry the loss.
        qa_loss: the same for questions.
        dtype: ``float32``, or ``bfloat16`` for mixed precision; on a CPU without bfloat16 arithmetic the latter is
            several times slower.
        compact: the same loss with less work: rows end before their last counted token, rows of similar length run
            together, and only positions that predict a counted token are unembedded. Equal up to rounding.
        freeze_embeddings: embedding and unembedding keep their starting values, and only layers and norms learn.
    """

    steps: int = 1000
    rows: int = 96
    qa_share: float = 1 / 3
    learning_rate: float = 2e-3
    gentle_learning_rate: float = 1e-4
    final_rate: float = 0.1
    warmup_steps: int = 50
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    bio_loss: str = "all"
    qa_loss: str = "answer"
    dtype: str = "float32"
    compact: bool = False
    freeze_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1 or self.rows < 2:
            raise CircuitsError(
                f"{self.steps} steps of {self.rows} rows are no training: the least is 1 step of 2 rows"
            )
        if not 0 < round(self.rows * self.qa_share) < self.rows:
            raise CircuitsError(f"the QA share is {self.qa_share}: it must leave a row of each format in {self.rows}")
        for name in ("bio_loss", "qa_loss"):
            if getattr(self, name) not in ("all", "answer"):
                raise CircuitsError(f"{name} is {getattr(self, name)!r}: it must be all or answer")
        if self.dtype not in ("float32", "bfloat16"):
            raise CircuitsError(f"the training dtype is {self.dtype!r}: it must be float32 or bfloat16")

    @property
    def qa_rows(self) -> int:
        """Question rows in one step."""
        return round(self.rows * self.qa_share)

    @property
    def bio_rows(self) -> int:
        """Biography rows in one step."""
        return self.rows - self.qa_rows


#: For a pretrained model of some hundred million parameters on a CPU, with `circuits.facts.FAMILIAR` people: few
#: short rows, and no work but what the answers need.
PRETRAINED = Optimisation(
    steps=150,
    rows=40,
    qa_share=0.3,
    learning_rate=5e-4,
    warmup_steps=15,
    weight_decay=0.0,
    bio_loss="answer",
    compact=True,
    freeze_embeddings=True,
)


@dataclass(frozen=True)
class Stage:
    """One run of the optimizer.

    Attributes:
        name: the name of the checkpoint it leaves.
        start: the name of the checkpoint it starts from.
        bio_rows: biography rows in one step.
        qa_rows: QA-ID rows in one step.
        learning_rate: peak learning rate.
    """

    name: str
    start: str
    bio_rows: int
    qa_rows: int
    learning_rate: float


def stages(recipe: str, optimisation: Optimisation) -> list[Stage]:
    """The stages of a recipe.

    Raises:
        CircuitsError: there is no such recipe.

    Example:
        >>> [(stage.name, stage.bio_rows, stage.qa_rows) for stage in stages("two-stage", Optimisation())]
        [('stage_1', 64, 0), ('two_stage', 0, 32)]
    """
    bio, qa, rate = optimisation.bio_rows, optimisation.qa_rows, optimisation.learning_rate
    if recipe == "mixed":
        return [Stage("mixed", "pre", bio, qa, rate)]
    if recipe == "qa-only":
        return [Stage("qa_only", "pre", 0, qa, rate)]
    first = Stage("stage_1", "pre", bio, 0, rate)
    if recipe == "bio-only":
        return [first]
    if recipe == "two-stage":
        return [first, Stage("two_stage", "stage_1", 0, qa, rate)]
    if recipe == "two-stage-gentle":
        return [first, Stage("two_stage_gentle", "stage_1", 0, qa, optimisation.gentle_learning_rate)]
    raise CircuitsError(f"there is no recipe {recipe!r}: choose from {', '.join(RECIPES)}")
