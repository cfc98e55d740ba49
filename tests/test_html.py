"""What results show of themselves in a notebook."""

from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import pandas
import pytest
import torch

from circuits.html import html_facts, html_table, html_tokens
from circuits.masks import Graft, ParameterMask
from circuits.rankings import read_head
from circuits.sweeps import SweepPlan
from circuits.tasks import Task
from circuits.tracing import GradientTrace, trace_gradients

NASTY = '<script>a & "b"</script>'


class Read(HTMLParser):
    """The cells and spans of a page whose tags all close in their order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.spans: list[tuple[str, dict]] = []
        self.attributes: dict = {}
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert tag in {"div", "table", "thead", "tbody", "tr", "td", "th", "span", "small", "b", "code", "pre"}, tag
        self.open.append(tag)
        self.attributes = dict(attrs)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["span"]:
            self.spans.append((data, self.attributes))
        elif self.open[-1:] in (["td"], ["th"]):
            self.rows[-1][-1] += data


def test_tables_facts_and_tokens_are_escaped():
    assert Read(html_table([(NASTY, 1234, 0.5)], ["a<b", "n", "x"])).rows == [
        ["a<b", "n", "x"],
        [NASTY, "1,234", "0.5"],
    ]
    assert Read(html_table([])).rows == []
    assert NASTY in unescape(html_facts({"name": NASTY, "git_commit": "abc", "deep": {}}))
    assert "abc" not in html_facts({"name": NASTY, "git_commit": "abc"})
    Read(html_facts({"name": NASTY}))
    assert html_facts({}) == ""
    spans = Read(html_tokens([(" a\n", ["x<y", "z"]), ("<b>", ["z"]), ("c", [])], ["x<y", "z"])).spans
    assert [text for text, _ in spans] == ["·a↵", "<b>", "c"]
    assert [attributes.get("title") for _, attributes in spans] == ["x<y, z", "z", None]
    assert ["underline" in attributes["style"] for _, attributes in spans] == [True, False, False]
    assert len({attributes["style"].split("background:")[1].split(";")[0] for _, attributes in spans}) == 3


def test_a_task_shows_its_first_examples_by_span(tasks, tokenizer, tmp_path):
    task = replace(tasks["qa_id"], name=NASTY)
    read = Read(task._repr_html_())
    assert read.rows[1][:3] == [NASTY, str(len(task)), str(len(task.answers))]
    shown = iter(read.spans)
    for example in range(3):
        for place in task.attention_mask[example].nonzero().flatten().tolist():
            text, attributes = next(shown)
            assert text == tokenizer.decode([int(task.tokens[example, place])])
            inside = [name for name in (*task.spans, "answer") if task.span(name)[example, place]]
            assert attributes.get("title") == (", ".join(inside) or None)
    assert [text for text, _ in shown] == [*task.spans, "answer"]
    task.save(tmp_path / "task.safetensors")
    assert Task.load(tmp_path / "task.safetensors")._repr_html_() == task._repr_html_()
    # a task of an earlier version has the ids alone
    first = next(iter(Read(replace(task, token_texts={})._repr_html_()).spans))[0]
    assert first == str(int(task.tokens[0, 0]))
    empty = replace(
        task, tokens=task.tokens[:0], attention_mask=task.attention_mask[:0], answers=task.answers[:0], texts=[],
        spans={name: at[:0] for name, at in task.spans.items()},
    )  # fmt: skip
    assert Read(empty._repr_html_()).rows[1][1] == "0"


def test_a_trace_shows_its_sum_by_layer(model, tasks):
    trace = trace_gradients(model, tasks["qa_id"].select(range(2)))
    read = Read(replace(trace, task=NASTY)._repr_html_())
    assert read.rows[1] == [NASTY, trace.provenance["statistic"], "2"]
    for layer, value, _ in read.rows[3:]:
        parts = [g for name, g in trace.gradients.items() if name.startswith(f"blocks.{layer}.")]
        assert float(value) == pytest.approx(sum(float(part.sum()) for part in parts), rel=1e-2)
    assert Read(GradientTrace("a", {}, {}, 0)._repr_html_()).rows[1] == ["a", "–", "0"]


def test_a_mask_and_a_graft_show_sizes_and_where_they_come_from():
    entries = torch.arange(10) < 3
    mask = ParameterMask({"blocks.1.attn.W_Q": entries}, model=NASTY, provenance={"task": NASTY, "fraction": 0.25})
    html = mask._repr_html_()
    Read(html)
    assert "fraction 0.25" in html
    assert unescape(html).count(NASTY) == 2
    Read(ParameterMask({}, model="a")._repr_html_())
    both = replace(mask, provenance={"shared": [{"task": "bio", "fraction": 0.05}, {"task": "qa", "fraction": 0.05}]})
    assert "shared bio, qa; fraction 0.05" in both._repr_html_()
    curve = pandas.DataFrame(
        {"score": [NASTY, "change"], "size": [3, 9], "exact_match": [0.75, 0.8], "chosen": [True, False]}
    )
    assert Read(Graft(mask, curve)._repr_html_()).rows[1] == ["3", "10", "30.000%", "0.7500", NASTY]
    assert len(Read(Graft(mask, curve[:0])._repr_html_()).rows) == 1


def test_a_reading_shows_scores_and_tokens(model, tasks):
    reading = read_head(model, "L1H2", tasks["qa_id"], example=0, top=2)
    reading = replace(reading, title=NASTY, top_tokens=[(NASTY, 1.0), *reading.top_tokens[1:]])
    read = Read(reading._repr_html_())
    assert read.rows[0] == [f"L1H2 on {NASTY}", "attention", "uniform"]
    assert [row[0] for row in read.rows[1:-3]] == list(reading.scores)
    assert read.rows[-2] == [NASTY, "1"]
    Read(replace(reading, scores={}, top_tokens=[])._repr_html_())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tasks": ["qa_id", "a<b>&c.jsonl"], "units": ["L0H0", "L2H1"], "examples": 5, "check_start": False},
        {"units": {"mask": "mask.safetensors", "kind": "heads", "top": 20}, "modes": ["zero", "mean"]},
    ],
)
def test_a_plan_shows_what_makes_it_again(settings, tmp_path):
    plan = SweepPlan("runs/model", **settings)
    html = plan._repr_html_()
    Read(html)
    (tmp_path / "plan.yaml").write_text(unescape(html.removeprefix("<pre>").removesuffix("</pre>")))
    assert SweepPlan.read(tmp_path / "plan.yaml") == plan
    assert "seed" not in html
