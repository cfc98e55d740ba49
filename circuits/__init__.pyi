from .analysis import Analysis, Comparison, analyse, compare
from .errors import CircuitsError
from .figures import attention_figure, heads_figure, save_figure
from .interventions import Intervention, ablate_heads, run_interventions
from .masks import ParameterMask, ablate_mask, graft_by_score, shared_parameters, shared_size, units_of
from .metrics import evaluate
from .models import load_model, save_model
from .rankings import attention_scores, read_head
from .sweeps import SweepPlan, run_sweep, sweep_heads
from .tasks import Task
from .tracing import GradientTrace, trace_gradients
from .units import Head, KVGroup, Neuron

__all__ = [
    "Analysis",
    "CircuitsError",
    "Comparison",
    "GradientTrace",
    "Head",
    "Intervention",
    "KVGroup",
    "Neuron",
    "ParameterMask",
    "SweepPlan",
    "Task",
    "ablate_heads",
    "ablate_mask",
    "analyse",
    "attention_figure",
    "attention_scores",
    "compare",
    "evaluate",
    "graft_by_score",
    "heads_figure",
    "load_model",
    "read_head",
    "run_interventions",
    "run_sweep",
    "save_figure",
    "save_model",
    "shared_parameters",
    "shared_size",
    "sweep_heads",
    "trace_gradients",
    "units_of",
]
