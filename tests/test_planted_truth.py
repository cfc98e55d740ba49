"""A model built by hand, so that it is known which heads and neurons can carry which of two tasks.

The residual stream is divided into subspaces: what tokens of task A alone hold, of B alone, of both; the same three for
what units write; one that nobody uses; and one number for each task that is on throughout it. A unit reads and writes
subspaces of its own kind. The unembedding lifts the answers of a task by that task's number, so far that all other
tokens have a probability of exactly zero: their unembeddings, and with them the units of the other task, get a gradient
of exactly zero.
"""

import numpy
import pandas
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from circuits.masks import influenced_parameters, shared_parameters, shared_size
from circuits.models import load_model, shape_of
from circuits.tasks import Task
from circuits.tracing import PER, STATISTICS, trace_gradients
from circuits.units import Head, Neuron

KINDS = ("A", "B", "both", "neither")
#: The kind of each head and neuron, layer by layer: as many of A as of B.
HEADS = (
    ("A", "B", "both", "neither", "both", "both", "neither", "both"),
    ("both", "neither", "B", "A", "both", "neither", "both", "both"),
)
NEURONS = (
    ("both", "A", "neither", "B", "B", "A", "both", "neither", "both", "neither"),
    ("neither", "B", "A", "neither", "both", "A", "B", "both", "A", "B"),
)
D_HEAD = 4
READ = {"A": slice(0, 4), "B": slice(4, 8), "both": slice(8, 13), "neither": slice(13, 15)}
WRITE = {"A": slice(15, 18), "B": slice(18, 21), "both": slice(21, 25), "neither": slice(25, 30)}
IS_ON = {"A": 30, "B": 31}
D_MODEL = 32
WORDS = {"A": range(0, 8), "B": range(8, 16)}
ANSWERS = {"A": range(16, 21), "B": range(21, 26)}


def planted_checkpoint() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=D_MODEL,
        head_dim=D_HEAD,
        num_attention_heads=len(HEADS[0]),
        num_key_value_heads=len(HEADS[0]),
        intermediate_size=len(NEURONS[0]),
        num_hidden_layers=len(HEADS),
        vocab_size=26,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)

    def draw(weight, rows, columns):
        part = weight[rows, columns]
        part.copy_(torch.randn(part.shape, generator=generator))

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.zero_()
        for task in "AB":
            for kind in (task, "both"):
                for token in WORDS[task]:
                    draw(model.model.embed_tokens.weight, token, READ[kind])
                for token in ANSWERS[task]:
                    draw(model.lm_head.weight, token, WRITE[kind])
            model.model.embed_tokens.weight[list(WORDS[task]), IS_ON[task]] = 1.0
            model.lm_head.weight[list(ANSWERS[task]), IS_ON[task]] = 10_000.0
        for layer, heads, neurons in zip(model.model.layers, HEADS, NEURONS, strict=True):
            for head, kind in enumerate(heads):
                own = slice(head * D_HEAD, (head + 1) * D_HEAD)
                for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                    draw(projection.weight, own, READ[kind])
                draw(layer.self_attn.o_proj.weight, WRITE[kind], own)
            for neuron, kind in enumerate(neurons):
                draw(layer.mlp.gate_proj.weight, neuron, READ[kind])
                draw(layer.mlp.up_proj.weight, neuron, READ[kind])
                draw(layer.mlp.down_proj.weight, WRITE[kind], neuron)
    return model


def planted():
    return load_model(planted_checkpoint())


def task_of(name: str, examples: int = 24, length: int = 6) -> Task:
    generator = torch.Generator().manual_seed(ord(name))
    words, answers = (torch.tensor(list(tokens[name])) for tokens in (WORDS, ANSWERS))
    tokens = words[torch.randint(len(words), (examples, length), generator=generator)]
    tokens[:, -1] = answers[torch.randint(len(answers), (examples,), generator=generator)]
    answers = pandas.DataFrame({"example": range(examples), "start": length - 1, "end": length})
    return Task(name, tokens, torch.ones_like(tokens, dtype=torch.bool), answers, [""] * examples)


@pytest.fixture(scope="module")
def model():
    return planted()


@pytest.fixture(scope="module", params=[(statistic, per) for statistic in STATISTICS for per in PER])
def traces(model, request):
    statistic, per = request.param
    return [trace_gradients(model, task_of(name), statistic, per=per, batch_size=8) for name in "AB"]


def reached(trace) -> float:
    """The fraction of parameters that have a gradient at all."""
    values = torch.cat([value.flatten() for value in trace.gradients.values()])
    return int(values.count_nonzero()) / len(values)


def carried(mask, kind) -> set[str]:
    table = shared_size(mask, kind)
    return set(table["unit"][table["size"] > 0])


def planted_units(kind, *kinds: str) -> set[str]:
    table = HEADS if kind is Head else NEURONS
    return {str(kind(layer, index)) for layer, row in enumerate(table) for index, own in enumerate(row) if own in kinds}


@torch.no_grad()
def test_the_planted_model_gives_all_probability_to_the_answers_of_the_task(model):
    for name in "AB":
        probabilities = model(task_of(name).tokens)[:, -2].softmax(-1)
        assert float(probabilities[:, list(ANSWERS[name])].max()) < 1
        others = sorted(set(range(26)) - set(ANSWERS[name]))
        assert not probabilities[:, others].any()


@pytest.mark.parametrize("kind", [Head, Neuron])
def test_shared_one_sided_and_dead_units_are_recovered_exactly(model, traces, kind):
    fraction = reached(traces[0])
    assert fraction == reached(traces[1])
    own = [carried(influenced_parameters(trace, fraction), kind) for trace in traces]
    shared = carried(shared_parameters(traces, fraction), kind)
    assert own[0] == planted_units(kind, "A", "both")
    assert own[1] == planted_units(kind, "B", "both")
    assert shared == planted_units(kind, "both")
    every = {str(kind(layer, index)) for layer in range(2) for index in range(kind.count(shape_of(model)))}
    assert every - own[0] - own[1] == planted_units(kind, "neither")


def test_shared_size_counts_the_parameters_that_both_tasks_reach(traces):
    shared = shared_parameters(traces, reached(traces[0]))
    sizes = shared_size(shared, Neuron).set_index("unit")["size"]
    read, written = (part["both"].stop - part["both"].start for part in (READ, WRITE))
    # in and gate read, and out writes, the numbers that are there in both tasks: of tokens, and of units before
    assert set(sizes[sorted(planted_units(Neuron, "both"))]) == {3 * (read + written)}


def test_the_hook_point_trace_knows_the_planted_units_too(traces):
    for kind in (Head, Neuron):
        for trace, name in zip(traces, "AB", strict=True):
            table = trace.units(kind)
            assert set(table["unit"][table["gradient_x_activation"] != 0]) == planted_units(kind, name, "both")


def test_the_permuted_control_has_lift_one_within_its_interval(traces):
    fraction = reached(traces[0])
    one, two = (influenced_parameters(trace, fraction) for trace in traces)
    chance = sum(int(mask.sum()) * int(two.masks[name].sum()) / mask.numel() for name, mask in one.masks.items())
    lifts = numpy.array([(one & two.permuted(draw)).size / chance for draw in range(100)])
    interval = 3 * lifts.std(ddof=1) / len(lifts) ** 0.5
    assert abs(lifts.mean() - 1) < interval < 0.02
    assert (one & two).size / chance > lifts.max()
