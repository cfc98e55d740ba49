import inspect
import subprocess
import sys
from typing import get_args

import pytest
import typer

from circuits.analysis import STEPS
from circuits.cli import analyse
from circuits.cli.app import app
from circuits.cli.data import data
from circuits.cli.settings import options_of
from circuits.cli.train import train
from circuits.facts import DatasetSettings
from circuits.training import Optimisation


@pytest.mark.parametrize(
    ("command", "settings", "others"),
    [(data, DatasetSettings(), {"out"}), (train, Optimisation(), {"data", "out", "recipe", "start", "seed"})],
)
def test_options_are_the_fields_of_the_settings(command, settings, others):
    options = {name: one for name, one in inspect.signature(command).parameters.items() if name not in others}
    assert len(options) >= 6
    for name, option in options.items():
        assert option.default == getattr(settings, name)
        assert get_args(option.annotation)[0] is type(getattr(settings, name))


def test_help_is_the_whole_sentence_of_the_docstring():
    options = {one.name: one.help for one in typer.main.get_command(app).commands["train"].params}
    assert options["dtype"] == (
        "float32, or bfloat16 for mixed precision; on a CPU without bfloat16 arithmetic the latter is several times "
        "slower."
    )
    assert options["steps"].startswith("Optimizer steps")


def test_a_field_that_is_not_there_is_an_error():
    with pytest.raises(KeyError, match="banana"):
        options_of("training.recipes.Optimisation", "banana")(train)


def test_the_help_of_analyse_names_every_step():
    assert analyse.STEPS.split(", ") == [one.name for one in STEPS]


@pytest.mark.parametrize("command", ["data", "train", "study"])
def test_help_imports_no_torch(command):
    said = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "circuits", command, "--help"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "circuits.cli.app" in said.stderr
    assert "torch" not in said.stderr
