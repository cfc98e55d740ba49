"""The paper's study end to end (arXiv 2505.16178): nothing but calls to the other rooms, in resumable steps.

1. data: make people up, and tell their facts once, or in several ways.
2. train: mixed, two-stage, and two-stage with a small second rate, from the same starting weights: those of a new
   small model, or of a pretrained checkpoint.
3. evaluate: exact match of every model on every split.
4. analyse: `circuits.analysis.analyse`, two models at a time, each with the model before training. Of θ_mixed and the
   θ_two-stage with the small second rate: gradients of BIO and QA-ID, what they share, reverting it, the fewest
   fine-tuned parameters that keep QA-ID, every head ablated, and patched from the BIO run; rankings of heads and
   neurons, and whether their top ones are enough, and needed; how alike both formats are inside, and what answers rest
   on. Of two-stage with the full second rate the last two. Of the parameters that both formats updated along training,
   in place of those whose gradients both have now, what is measured of these.
5. compare, updated: both models side by side, and both sets of parameters.
6. patch_people: every head from another person's run.
7. attend: every head's attention in both formats.
8. report: ``summary.json`` and ``report.html``, with the paper's claims.

A study that is started again goes on after the last step that it finished, also within `compare`. Several seeds are
several studies, and a summary of theirs.
"""

from circuits.study.claims import findings
from circuits.study.running import report_study, run_study
from circuits.study.seeds import report_studies, run_studies
from circuits.study.settings import (
    AUGMENTED_STUDY,
    CONDITIONS,
    FAMILIES,
    PRETRAINED_STUDY,
    StudySettings,
    usual_settings,
)
from circuits.verdicts import Finding

__all__ = [
    "AUGMENTED_STUDY",
    "CONDITIONS",
    "FAMILIES",
    "PRETRAINED_STUDY",
    "Finding",
    "StudySettings",
    "findings",
    "report_studies",
    "report_study",
    "run_studies",
    "run_study",
    "usual_settings",
]
