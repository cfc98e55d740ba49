"""The attention figure: its numbers are the model's, its rectangles lie on their spans, its difference is one."""

from dataclasses import replace

import numpy
import pytest
import torch

from circuits.errors import CircuitsError
from circuits.figures import Rectangle, attention_figure
from circuits.rankings import average_head, read_head
from circuits.tasks import Task
from tests.figures.test_figures import framed, reading


def maps(figure, coloraxis="coloraxis"):
    """Of whole prompts: a strip has one row."""
    return [
        trace.z
        for trace in figure.data
        if trace.type == "heatmap" and trace.coloraxis == coloraxis and len(trace.z) > 1
    ]


def asked(length: int, spans=None):
    """A reading of a prompt of so many tokens."""
    pattern = torch.rand(length, length, generator=torch.Generator().manual_seed(0)).tril()
    tokens = [f"word{place}" for place in range(length)]
    spans = {"subject": [1, 2]} if spans is None else spans
    return replace(reading(), tokens=tokens, pattern=pattern / pattern.sum(-1, keepdim=True), spans=spans)


def test_two_checkpoints_are_drawn_beside_each_other_with_their_difference():
    one, other = asked(6), replace(asked(6), pattern=torch.full((6, 6), 0.5).tril())
    figure = attention_figure([one, one], against=[other, other], models=("before", "after"))
    first, second, *_ = maps(figure)
    for map_, shown in ((first, one), (second, other)):
        assert numpy.allclose(map_[numpy.tril_indices(6)], shown.pattern.numpy()[numpy.tril_indices(6)])
    differences = maps(figure, "coloraxis2")
    assert len(differences) == 2
    assert numpy.allclose(differences[0], first - second, equal_nan=True)
    scale = figure.layout.coloraxis2
    assert scale.cmin == -scale.cmax == pytest.approx(-numpy.nanmax(numpy.abs(first - second)))
    assert any("before − after" in note.text for note in figure.layout.annotations)
    # each of the two is judged by its own score
    worse = replace(other, scores={**other.scores, "subject_linking": (0.1, 0.3)})
    dashes = [shape.line.dash for shape in framed(attention_figure([one], against=[worse])) if shape.y0 == 1.5]
    assert dashes == ["solid", "dash", "solid"]
    with pytest.raises(CircuitsError, match="these are others, or other tokens"):
        attention_figure([one], against=[asked(7)])


def test_rectangles_cover_the_tokens_of_their_spans_also_where_a_part_is_shown():
    whole = asked(60, {"subject": [20, 21], "relation": [40]})
    for options, shown in (({}, range(60)), ({"window": (15, 59)}, range(15, 60)), ({"span": "relation"}, None)):
        figure = attention_figure([whole], **options)
        shown = list(shown) if shown else [*range(34, 47), *range(54, 60)]
        (map_,) = maps(figure)
        expected = whole.pattern[shown][:, shown].numpy()
        assert numpy.allclose(map_[numpy.tril_indices(len(shown))], expected[numpy.tril_indices(len(shown))])
        covered = set()
        for shape in framed(figure):
            if shape.xref == figure.data[-2].xaxis:
                covered |= {shown[place] for place in range(len(shown)) if shape.x0 < place < shape.x1}
        assert covered == {20, 21, 40} & set(shown)
    with pytest.raises(CircuitsError, match="no span 'IO': it has subject, relation"):
        attention_figure([whole], span="IO")
    with pytest.raises(CircuitsError, match="no window 15 to 60: QA has the tokens 0 to 59"):
        attention_figure([whole], window=(15, 60))


def test_a_part_has_a_strip_that_says_where_it_is():
    figure = attention_figure([asked(60)], window=(15, 30))
    strip = next(trace for trace in figure.data if trace.type == "heatmap" and len(trace.z) == 1)
    assert numpy.allclose(strip.z[0], asked(60).pattern[-1].numpy())
    (mark,) = (shape for shape in framed(figure) if shape.xref == strip.xaxis)
    assert (mark.x0, mark.x1) == (14.5, 30.5)
    assert not [trace for trace in attention_figure([asked(60)]).data if trace.type == "heatmap" and len(trace.z) == 1]


@pytest.mark.parametrize("length", [6, 30, 100, 512])
def test_labels_never_stand_on_each_other_and_those_of_spans_are_there(length):
    figure = attention_figure([asked(length, {"subject": [3]})])
    places, size = list(figure.layout.xaxis.tickvals), figure.layout.width * numpy.ptp(figure.layout.xaxis.domain)
    assert min(numpy.diff(places)) * size / length >= 8
    assert any("word3<" in text for text in figure.layout.xaxis.ticktext)
    assert figure.layout.width <= 940


@pytest.fixture(scope="module")
def task(tokenizer):
    """Two prompts with spans and foils."""
    names = ("Ada", "Bo")
    return Task.from_prompts(
        [f"{name} Oakley was born in" for name in ("Priscilla", "Alexandra")],
        [" Paris", " Oslo"],
        tokenizer,
        foils=[" Oslo", " Paris"],
        spans=[{"who": f"{name} Oakley"} for name in ("Priscilla", "Alexandra")],
        name=names[0],
    )


def test_what_a_head_adds_directly_and_moves_equals_the_raw_model(model, task):
    found = read_head(model, "L2H3", task, example=0)
    length = len(found.tokens)
    _, cache = model.run_with_cache(task.tokens[:1, :length])
    output = cache["blocks.2.attn.hook_z"][0, -1, 3] @ model.blocks[2].attn.W_O[3]
    # linear in what is added once the final norm's scale is held
    scale, centre = cache["ln_final.hook_scale"][0, -1], output.mean() if hasattr(model.ln_final, "b") else 0
    logits = (output - centre) / scale * model.ln_final.w @ model.unembed.W_U
    tokens = {"answer": task.tokens[0, length], "foil": task.foils.tokens[0, length]}
    assert {name: value for name, (_, value) in found.direct.items()} == pytest.approx(
        {name: float(logits[token]) for name, token in tokens.items()}, abs=1e-4
    )
    group = 3 * model.cfg.n_key_value_heads // model.cfg.n_heads if model.cfg.n_key_value_heads else 3
    values = cache["blocks.2.attn.hook_v"][0, :, group]
    lengths = torch.stack([(value @ model.blocks[2].attn.W_O[3]).norm() for value in values])
    assert torch.allclose(found.weighted, found.pattern * lengths, atol=1e-5)
    (map_,) = maps(attention_figure([found], weighted=True))
    assert numpy.allclose(map_[numpy.tril_indices(length)], found.weighted.numpy()[numpy.tril_indices(length)])


def test_an_average_over_a_task_equals_one_example_after_the_other(model, task):
    average = average_head(model, "L2H3", task, batch_size=1)
    assert (average.rows, average.columns) == (["who", "last"], ["first token", "who", "other tokens"])
    expected = []
    for example in range(2):
        one = read_head(model, "L2H3", task, example=example)
        who, rest = one.spans["who"], [place for place in range(1, len(one.tokens)) if place not in one.spans["who"]]
        expected.append(
            [
                [sum(float(one.pattern[query, key]) for query in queries for key in keys) / len(queries)
                 for keys in ([0], who, rest)]
                for queries in (who, [len(one.tokens) - 1])
            ]
        )  # fmt: skip
    # of the other tokens, all stand behind the span
    assert torch.isnan(average.values[:, 0, 2]).all()
    found, wanted = average.pattern, torch.tensor(expected).mean(0)
    assert torch.allclose(found[~found.isnan()], wanted[~found.isnan()], atol=1e-5)
    figure = attention_figure([average])
    assert numpy.allclose(maps(figure)[0], found.numpy(), equal_nan=True)
    with pytest.raises(CircuitsError, match="has no tokens: it takes no window"):
        attention_figure([average], span="who")
    against = attention_figure([average], against=[replace(average, values=average.values * 0.5)])
    assert numpy.allclose(maps(against, "coloraxis2")[0], found.numpy() / 2, equal_nan=True)


def test_a_window_and_a_rectangle_by_hand_agree():
    figure = attention_figure([asked(60)], [Rectangle(0, (30, 40), (2, 25), "copying")], window=(20, 59))
    (shape,) = (shape for shape in framed(figure) if shape.line.width == 2.5)
    assert (shape.x0, shape.x1, shape.y0, shape.y1) == (-0.5, 5.5, 9.5, 20.5)


def test_one_reading_is_drawn_as_a_list_of_it_is():
    one, other = asked(6), asked(6, {})
    assert attention_figure(one, against=other) == attention_figure([one], against=[other])
