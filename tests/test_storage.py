import json
import math

import numpy

from circuits.storage import write_json


def test_a_json_file_holds_nothing_that_is_no_json(tmp_path):
    value = {"gini": math.nan, "rows": [1.5, (math.inf, numpy.float64("nan"))], "name": "NaN", "size": 3}
    write_json(tmp_path / "sharing.json", value)

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    read = json.loads((tmp_path / "sharing.json").read_text(), parse_constant=refuse)
    assert read == {"gini": None, "rows": [1.5, [None, None]], "name": "NaN", "size": 3}
