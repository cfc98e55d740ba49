import math
import re
import struct
from dataclasses import replace
from pathlib import Path

import pandas
import plotly.graph_objects as go
import pytest
import torch
from choreographer.errors import ChromeNotFoundError

from circuits.errors import CircuitsError
from circuits.figures import (
    Rectangle,
    Section,
    ablation_figure,
    accuracy_figure,
    attention_figure,
    effects_figure,
    found_rectangles,
    graft_figure,
    heads_figure,
    save_figure,
    sharing_figure,
    write_report,
)
from circuits.figures.saving import save_images
from circuits.rankings import BEHAVIOURS, HeadReading, read_head
from circuits.units import Head


def reading(linking: float = 0.9, head: Head = Head(2, 1)) -> HeadReading:  # noqa: B008
    return HeadReading(
        head,
        "QA",
        "Which <b>?",
        ["<s>", "Ada", "Oakley", "was", "in", "born"],
        {"subject": [1, 2], "relation": [3, 5]},
        torch.full((6, 6), 1 / 6).tril(),
        [("Paris", 3.0), ("Oslo", 1.0)],
        ("Paris", 3.0, 1),
        {"subject_linking": (linking, 0.3), "relation_focusing": (0.1, 0.2)},
        BEHAVIOURS,
    )


def test_rectangles_are_found_from_spans_and_scores():
    found = found_rectangles([reading(), reading()])
    assert Rectangle(0, (2, 5), (1, 2), "subject_linking", True) in found
    assert Rectangle(1, (5, 5), (3, 3), "relation_focusing", False) in found
    assert Rectangle(1, (5, 5), (5, 5), "relation_focusing", False) in found
    assert len(found) == 6
    # each pattern is judged by its own score
    mixed = found_rectangles([reading(), reading(linking=0.1)])
    assert [rectangle.panel for rectangle in mixed if rectangle.shown] == [0]


def test_the_figure_shows_what_it_is_given():
    figure = attention_figure([reading(), reading()], subtitle="a model")
    page = figure.to_html(include_plotlyjs=False)
    assert figure.data[0].z[3][2] == pytest.approx(1 / 6)
    assert math.isnan(figure.data[0].z[2][3])
    assert len(framed(figure)) == 6
    assert list(figure.layout.xaxis.tickvals) == list(range(6))
    assert "L2H1" in page
    assert "Paris" in page
    assert "Which <b>?" not in page
    orange = next(bars for bars in figure.data if bars.type == "bar").marker.color
    assert orange[1] != orange[0]


def framed(figure):
    """The rectangles on the maps, without those of the legend."""
    return [shape for shape in figure.layout.shapes if shape.type == "rect" and shape.xref.startswith("x")]


def test_labels_of_one_character_stand_upright_and_what_is_no_word_in_quotation_marks():
    asked = reading()
    asked.tokens[-1], asked.tokens[-2] = "?", "..."
    figure = attention_figure([asked])
    assert list(figure.layout.xaxis.ticktext)[-1] == ""
    assert "“...”" in figure.layout.xaxis.ticktext[-2]
    (upright,) = (note for note in figure.layout.annotations if ">“?”<" in note.text)
    assert (upright.x, upright.xref, upright.textangle) == (5, "x", None)
    assert ">“?”<" in figure.layout.yaxis.ticktext[-1]
    asked = replace(asked, answer=("Rome", -0.5, 1204))
    assert any("has −0.50, rank 1,204" in note.text for note in attention_figure([asked]).layout.annotations)


def test_a_text_that_is_wider_than_its_panel_is_cut():
    asked = replace(reading(), text="Ada Lovelace was born in London. " * 9)
    (above,) = (note.text for note in attention_figure([asked]).layout.annotations if "Lovelace" in note.text)
    assert above.endswith(" …")
    assert 6 * len(above.split("  ")[1]) <= 210


def test_a_rectangle_by_hand_replaces_the_found_ones():
    figure = attention_figure([reading()], [Rectangle(0, (4, 4), (0, 1), "copying")])
    (shape,) = framed(figure)
    assert (shape.x0, shape.x1, shape.y0, shape.y1) == (-0.5, 1.5, 3.5, 4.5)
    for rectangle, message in (
        (Rectangle(1, (0, 0), (0, 0), "copying"), "there is no such panel"),
        (Rectangle(0, (0, 6), (0, 0), "copying"), "lies outside the 6 tokens"),
    ):
        with pytest.raises(CircuitsError, match=message):
            attention_figure([reading()], [rectangle])


def test_one_figure_shows_one_head():
    with pytest.raises(CircuitsError, match="not L2H1 and L0H0"):
        attention_figure([reading(), reading(head=Head(0, 0))])
    with pytest.raises(CircuitsError, match="at least one reading"):
        attention_figure([])


def test_a_real_reading_is_drawn_and_saved_as_a_page(model, tasks, tmp_path):
    figure = attention_figure([read_head(model, Head(1, 1), tasks["qa_ood"], example=0, title="QA")])
    save_figure(figure, tmp_path / "figure.html")
    page = (tmp_path / "figure.html").read_text()
    assert "plotly" in page
    assert "<script src" not in page
    assert 'src="http' not in page
    assert '"displaylogo": false' in page
    save_figure(figure, tmp_path / "pages" / "figure.html", "beside")
    assert (tmp_path / "pages" / "plotly.min.js").stat().st_size > 1_000_000
    assert (tmp_path / "pages" / "figure.html").stat().st_size < 100_000


def size_of(image: Path) -> tuple[float, float]:
    """Width and height that the file itself claims, in pixels of the layout."""
    content = image.read_bytes()
    if image.suffix == ".png":
        assert content.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", content[16:24])
        return width / 2, height / 2
    if image.suffix == ".svg":
        width, height = re.search(rb'^<svg [^>]*?width="([\d.]+)" height="([\d.]+)"', content).groups()
        return float(width), float(height)
    assert content.startswith(b"%PDF")
    (box,) = re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", content)
    # a page counts 72 points to the inch, a layout 96 pixels
    return float(box[0]) * 96 / 72, float(box[1]) * 96 / 72


def test_every_static_image_has_the_size_of_its_figure(tmp_path):
    wide = attention_figure([reading(), reading()])
    wide_size = (wide.layout.width, wide.layout.height)
    low, tall, unsaid = (go.Figure(layout=layout) for layout in ({"width": 420, "height": 240}, {"height": 900}, {}))
    images = {
        **{f"wide{ending}": (wide, wide_size) for ending in (".png", ".svg", ".pdf")},
        "low.pdf": (low, (420, 240)),
        "tall.png": (tall, (700, 900)),
        "unsaid.svg": (unsaid, (700, 500)),
    }
    try:
        save_images({tmp_path / name: figure for name, (figure, _) in images.items()})
    except CircuitsError as error:
        assert "needs Chrome or Chromium" in str(error)
        pytest.skip("no browser here")
    for name, (_, size) in images.items():
        assert size_of(tmp_path / name) == pytest.approx(size, abs=name.endswith(".pdf")), name


@pytest.mark.parametrize("error", [ChromeNotFoundError(), RuntimeError("Kaleido requires Google Chrome\n\nto be")])
def test_without_a_browser_one_sentence_says_so_and_nothing_is_written(tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("plotly.io.write_images", fail)
    with pytest.raises(CircuitsError, match=r"figure\.png needs Chrome or Chromium, and none could be started"):
        save_figure(attention_figure([reading()]), tmp_path / "figure.png")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_ending_is_refused(tmp_path):
    with pytest.raises(CircuitsError, match=r"end the name in \.html, \.png, \.svg, \.pdf"):
        save_figure(attention_figure([reading()]), tmp_path / "figure.gif")


def test_charts_show_the_numbers_of_their_tables():
    accuracy = pandas.DataFrame({"model": ["mixed", "two_stage"], "split": ["qa_ood"] * 2, "exact_match": [0.9, 0.1]})
    assert [list(bar.y) for bar in accuracy_figure(accuracy).data] == [[0.9], [0.1]]
    heads = pandas.DataFrame(
        {"layer": [0, 0, 1, 1], "index": [0, 1, 0, 1], "model": ["mixed"] * 4, "effect": [0.0, -1.0, 2.0, 3.0]}
    )
    (heat,) = heads_figure(heads, "effect").data
    assert heat.z.tolist() == [[0.0, -1.0], [2.0, 3.0]]
    (part,) = heads_figure(heads[heads["index"] == 1], "effect").data
    assert (list(part.x), list(part.y)) == ([1], [0, 1])
    assert [list(row) for row in heat.text] == [["0.00", "−1.00"], ["2.00", "3.00"]]
    (counts,) = heads_figure(heads.assign(effect=heads["effect"] * 1000), "effect", digits=0).data
    assert counts.text[1][1] == "3,000"
    ablation = pandas.DataFrame(
        {
            "model": ["mixed"] * 4,
            "condition": ["none", "shared", "random", "random"],
            "draw": [0, 0, 0, 1],
            "task": ["bio"] * 4,
            "exact_match": [1.0, 0.2, 0.6, 0.8],
        }
    )
    bars = {bar.name: bar for bar in ablation_figure(ablation).data}
    assert list(bars["random parameters ablated"].y) == pytest.approx([0.7])
    assert list(bars["random parameters ablated"].error_y.array) == pytest.approx([0.1])


def test_an_ablation_shows_the_mask_that_was_thinned_as_its_control():
    table = pandas.DataFrame(
        [
            ("mixed", condition, draw, "bio", value)
            for condition, values in {
                "none": [1.0],
                "shared": [0.1],
                "random": [0.7, 0.9],
                "shared_thinned": [0.3, 0.5],
            }.items()
            for draw, value in enumerate(values)
        ],
        columns=["model", "condition", "draw", "task", "exact_match"],
    )
    both = pandas.concat([table[table["condition"] != "shared_thinned"].assign(model="two_stage"), table])
    bars = list(ablation_figure(both).data)
    thinned = "shared, thinned to match random"
    plain = ["whole model", "shared parameters ablated", "random parameters ablated"]
    assert [bar.name for bar in bars] == [*plain, *plain[:2], thinned, plain[2]]
    # each is named once, by the first model that has it
    assert [bar.name for bar in bars if bar.showlegend] == [*plain, thinned]
    (bar,) = (bar for bar in bars if bar.name == thinned)
    assert (list(bar.y), list(bar.error_y.array)) == (pytest.approx([0.4]), pytest.approx([0.1]))
    assert bar.error_y.visible
    scopes = pandas.concat([table.assign(scope="global"), table.assign(scope="tensor", exact_match=0.0)])
    with pytest.raises(CircuitsError, match="several rows for one model, condition, draw and task: select one scope"):
        ablation_figure(scopes)


@pytest.mark.parametrize(
    ("heads", "panels", "width"),
    [(4, 2, 720), (4, 1, 440), (1, 1, 380), (9, 2, 1080), (32, 2, 1080), (4, 4, 1080), (4, 6, 1080)],
)
def test_maps_of_heads_have_numbers_where_cells_have_room(heads, panels, width):
    table = pandas.DataFrame(
        [(0, index, panel, 0.5) for panel in range(panels) for index in range(heads)],
        columns=["layer", "index", "model", "effect"],
    )
    figure = heads_figure(table, "effect")
    assert (figure.layout.width, figure.layout.height) == (width, 640 if panels > 4 else 320)
    assert all(axis.domain[0] >= 0 and axis.domain[1] <= 1 for axis in figure.select_yaxes())
    cell = (figure.layout.xaxis.domain or (0, 1))[1] * (width - 200) / heads
    assert (figure.data[0].texttemplate is not None) == (cell >= 34)
    assert (figure.layout.xaxis.dtick == 1) == (cell >= 20)


def test_a_map_of_some_layers_is_as_tall_as_they_are_and_names_each():
    table = pandas.DataFrame(
        [(layer, index, 0.5) for layer in (21, 22, 23) for index in range(4)], columns=["layer", "index", "effect"]
    )
    figure = heads_figure(table, "effect")
    assert figure.layout.height == 320
    assert figure.layout.yaxis.dtick == 1
    assert figure.data[0].texttemplate is not None


def test_grafts_are_drawn_with_the_chosen_ones_marked():
    table = pandas.DataFrame(
        {
            "model": ["mixed"] * 3 + ["two_stage"] * 3,
            "score": "change",
            "size": [0, 10, 100] * 2,
            "fraction": [0.0, 0.1, 1.0] * 2,
            "exact_match": [0.0, 0.5, 1.0, 0.0, 0.96, 1.0],
            "chosen": [False, False, True, False, True, False],
        }
    )
    figure = graft_figure(table, 0.95)
    curve, star, other, other_star = figure.data
    assert (list(curve.x), list(curve.y)) == ([10, 100], [0.5, 1.0])
    assert (list(star.x), list(star.y), list(other_star.x)) == ([100], [1.0], [10])
    assert list(other.y) == [0.96, 1.0]
    assert {"100 (100.0%)", "10 (10.0%)"} <= {note.text for note in figure.layout.annotations}
    assert "95%" in figure.layout.title.text


def test_sharing_is_drawn_beside_its_control_and_chance():
    table = pandas.DataFrame(
        {
            "model": ["mixed"] * 2,
            "fraction": [0.01, 0.1],
            "share": [0.5, 0.8],
            "permuted_share": [0.2, 0.4],
            "permuted_share_low": [-0.1, 0.3],
            "permuted_share_high": [0.3, 0.5],
        }
    )
    band, shared, permuted, chance = sharing_figure(table).data
    assert list(band.y) == [0.3, 0.5, 0.3, 0.0]
    assert (list(shared.y), list(permuted.y), list(chance.y)) == ([0.5, 0.8], [0.2, 0.4], [0.01, 0.1])


def test_tables_that_do_not_fit_are_refused():
    for draw in (graft_figure, sharing_figure):
        with pytest.raises(CircuitsError, match="the table has no rows"):
            draw(pandas.DataFrame(columns=["model", "score", "size", "fraction", "exact_match", "chosen", "share",
                 "permuted_share", "permuted_share_low", "permuted_share_high"]))  # fmt: skip
    with pytest.raises(CircuitsError, match="the table has no split"):
        accuracy_figure(pandas.DataFrame({"model": ["mixed"], "exact_match": [1.0]}))
    twice = pandas.DataFrame({"layer": [0, 0], "index": [0, 0], "model": ["mixed"] * 2, "effect": [0.0, 1.0]})
    with pytest.raises(CircuitsError, match="several rows for one head"):
        heads_figure(twice, "effect")


def test_the_report_opens_offline_and_escapes_text(tmp_path):
    table = pandas.DataFrame({"claim": ["a < b"], "holds": ["yes"]})
    sections = [Section("One & two", ["text <i>"], table, attention_figure([reading()]))]
    write_report(tmp_path / "report.html", "A <title>", "lead", sections=sections, footer="end")
    page = (tmp_path / "report.html").read_text()
    assert "One &amp; two" in page
    assert "a &lt; b" in page
    assert "text &lt;i&gt;" in page
    assert "<script src" not in page
    assert "<link" not in page.split("<body>")[0].split("<script>")[0]
    assert page.count("<div class='figure'") == 1


def test_numbers_stand_to_the_right_with_true_minus_signs_and_whole_intervals(tmp_path):
    table = pandas.DataFrame(
        {
            "task": ["QA-OOD", "2026-11-27"],
            "difference": ["-0.30 (-0.50 to -0.10)", "-0.00"],
            "q": ["5e-05", "–"],
            "written": ["three of -1 and four more words", ""],
        }
    )
    write_report(tmp_path / "report.html", "title", "lead", sections=[Section("One", (), table)])
    page = (tmp_path / "report.html").read_text().split("<tbody>")[1]
    cells = [line.strip() for line in page.splitlines() if "<td" in line]
    assert cells == [
        '<td class="words short">QA-OOD</td>',
        "<td>−0.30 (−0.50\xa0to\xa0−0.10)</td>",
        "<td>5e-05</td>",
        '<td class="words">three of −1 and four more words</td>',
        '<td class="words short">2026-11-27</td>',
        "<td>0.00</td>",
        "<td>–</td>",
        '<td class="words short"></td>',
    ]


def test_a_long_title_of_colours_is_broken_into_lines():
    table = pandas.DataFrame({"layer": [0], "index": [0], "size": [1.0], "model": ["x"]})
    figure = heads_figure(table, "size", title="two-stage, small second rate less<br>mixed")
    assert figure.data[0].colorbar.title.text == "two-stage, small<br>second rate less<br>mixed"


def test_any_table_of_heads_is_drawn_without_a_facet():
    heads = [{"unit": f"L{layer}H{head}", "layer": layer, "index": head} for layer in range(2) for head in range(2)]
    table = pandas.DataFrame(heads).assign(size=[1.0, 2.0, 3.0, 4.0])
    assert heads_figure(table, "size").data[0].z.tolist() == [[1, 2], [3, 4]]
    modes = pandas.concat([table.assign(task="qa", mode=mode) for mode in ("zero", "mean")])
    assert [note.text for note in heads_figure(modes, "size").layout.annotations] == ["zero", "mean"]
    both = pandas.concat([modes.assign(task=task) for task in ("qa", "bio")])
    with pytest.raises(CircuitsError, match="several rows for one head and task: select one mode and task first"):
        heads_figure(both, "size")


def test_effects_stand_in_order_with_their_intervals():
    rows = [("L0H0", "bio", -1.0, -1.5, -0.2), ("L0H0", "qa", 0.5, -0.1, 0.9), ("L1H1", "bio", -3.0, -3.5, -2.5)]
    rows += [("L1H1", "qa", -2.0, -2.5, -1.0), ("L2H1", "bio", 0.1, 0.05, 0.2), ("L2H1", "qa", 0.1, -0.2, 0.4)]
    columns = ["unit", "task", "log_prob_effect", "log_prob_effect_low", "log_prob_effect_high"]
    table = pandas.DataFrame(rows, columns=columns)
    figure = effects_figure(table, top=2)
    bio, qa = figure.data
    assert bio.x == qa.x == ("L1H1", "L0H0")
    assert list(bio.y) == [-3.0, -1.0]
    assert list(qa.error_y.array) == pytest.approx([1.0, 0.4])
    assert list(qa.error_y.arrayminus) == pytest.approx([0.5, 0.6])
    assert qa.marker.symbol == ("circle", "circle-open")
    assert figure.layout.showlegend
    # one task alone needs no name
    assert not effects_figure(table[table["task"] == "bio"].drop(columns="task")).layout.showlegend
    with pytest.raises(CircuitsError, match="several rows for one unit and task"):
        effects_figure(pandas.concat([table, table]))
    with pytest.raises(CircuitsError, match="exact_match_effect"):
        effects_figure(table, "exact_match_effect")
