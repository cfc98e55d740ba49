"""The paper's study end to end (arXiv 2505.16178): nothing but calls to the other rooms, in resumable steps.

1. data: make people up.
2. train: mixed, two-stage, and two-stage with a small second rate, from the same starting weights: those of a new
   small model, or of a pretrained checkpoint.
3. evaluate: exact match of every model on every split.
4. trace: gradients of BIO and QA-ID at θ_mixed and θ_two-stage.
5. share: shared parameters, Shared Size, and their controls.
6. ablate: revert the shared parameters to θ_pre, against random ones.
7. graft: the fewest fine-tuned parameters that keep QA-ID, by score.
8. rank: heads and neurons by Shared Size and its rivals; are the top ones enough, and are they needed?
9. sweep: ablate every head.
10. patch: every head from the BIO run of the same person, and from another person's run.
11. attend: score every head's attention, and draw the attention figures.
12. report: ``summary.json`` and ``report.html``.

Each step writes its results and then ``steps/NAME.json``; a study that is started again goes on after the last of
these. Several seeds are several studies, and a summary of theirs.
"""

from circuits.study.claims import findings
from circuits.study.running import report_study, run_study
from circuits.study.seeds import run_studies
from circuits.study.settings import FAMILIES, PRETRAINED_STUDY, StudySettings
from circuits.verdicts import Finding

__all__ = [
    "FAMILIES",
    "PRETRAINED_STUDY",
    "Finding",
    "StudySettings",
    "findings",
    "report_study",
    "run_studies",
    "run_study",
]
