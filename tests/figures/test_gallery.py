"""The page of all heads holds the scores and patterns that it was given, and nothing ends its script early."""

import base64
import json
import re

import numpy
import pandas
import pytest
import torch

from circuits.errors import CircuitsError
from circuits.figures import write_gallery
from circuits.rankings import HeadPatterns


def scores():
    rows = [(f"L{layer}H{head}", layer, head, 0.1 * layer + 0.2 * head) for layer in range(2) for head in range(2)]
    table = pandas.DataFrame(rows, columns=["unit", "layer", "index", "score"])
    ends = {"excess_low": [float("nan")] * 4, "excess_high": [0.5] * 4}
    return table.assign(behaviour="first_token", uniform=0.1, excess=table["score"] - 0.1, examples=3, **ends)


def test_the_page_holds_what_it_was_given(tmp_path):
    patterns = torch.rand(2, 2, 3, 3, generator=torch.Generator().manual_seed(0)).tril()
    read = HeadPatterns("example 0", ["<s>", "</script>", "Ada"], {}, patterns)
    write_gallery(scores(), read, tmp_path / "page.html", title="a < b")
    page = (tmp_path / "page.html").read_text()
    assert "<title>a &lt; b</title>" in page
    assert page.count("</script>") == 4
    assert not re.search(r"(src|href)=[\"'](?!data:|#main)", page)
    assert "$$" not in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert data["tokens"] == read.tokens
    shades = numpy.frombuffer(base64.b64decode(data["patterns"]), dtype=numpy.uint8).reshape(2, 2, 3, 3)
    assert numpy.abs(shades / 255 - patterns.numpy()).max() <= 0.5 / 255 + 1e-6
    assert [(row["unit"], row["head"]) for row in data["rows"]] == [("L0H0", 0), ("L0H1", 1), ("L1H0", 2), ("L1H1", 3)]
    assert [row["score"] for row in data["rows"]] == pytest.approx([0, 0.2, 0.1, 0.3])
    assert data["rows"][0]["low"] is None


def test_scores_of_another_model_are_refused(tmp_path):
    read = HeadPatterns("example 0", ["a"], {}, torch.ones(1, 2, 1, 1))
    with pytest.raises(CircuitsError, match="L1H0 has no pattern"):
        write_gallery(scores(), read, tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []
