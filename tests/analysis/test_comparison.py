import pandas
import pytest
from typer.testing import CliRunner

from circuits.analysis import Analysis, AnalysisSettings, Comparison, compare, paired_differences
from circuits.analysis.comparison_page import shown_differences
from circuits.cli.app import app
from circuits.errors import CircuitsError
from circuits.interventions import Intervention, run_interventions
from circuits.metrics import evaluate
from circuits.models import save_model
from circuits.statistics import paired
from circuits.tasks import Task
from circuits.units import Head
from tests.fixtures import few_points, loaded, without_pages

pytestmark = pytest.mark.usefixtures("all_unchecked", "pageless")

SETTINGS = AnalysisSettings(
    draws=2,
    drawn=0,
    fractions=(0.01,),
    rankings=("shared_size",),
    halvings=1,
    examples_by_step={"rank": 3},
)
#: Steps that no comparison reads, and those whose comparison has a file of its own.
NOT_COMPARED = ["neurons", "attend", "localise", "integrate", "consistency", "signature"]


@pytest.fixture(scope="module")
def models():
    return loaded("llama"), loaded("llama", seed=1), loaded("llama", seed=2)


@pytest.fixture(scope="module")
def chosen(tasks):
    return [tasks[name].select(range(8)) for name in ("bio", "qa_id")]


@pytest.fixture(scope="module")
def found(models, chosen, tmp_path_factory):
    one, other, pre = models
    out, skip = tmp_path_factory.mktemp("c") / "out", NOT_COMPARED
    with few_points(), without_pages():
        return compare(one, other, chosen, out=out, pre=pre, settings=SETTINGS, skip=skip)


def test_accuracies_are_compared_answer_by_answer(models, chosen, found):
    one, other, _ = models
    table = found.tables["accuracy"].set_index("task")
    for task in chosen:
        a, b = (evaluate(model, task) for model in (one, other))
        by_hand = paired(b["log_prob"].to_numpy(), a["log_prob"].to_numpy(), a["group"].to_numpy(), kind="real")
        row = table.loc[task.name]
        assert row["log_prob_a"] == pytest.approx(a["log_prob"].mean())
        names = ("log_prob_difference", "log_prob_difference_low", "log_prob_difference_high", "log_prob_p")
        expected = [by_hand.difference, by_hand.low, by_hand.high, by_hand.p_value]
        assert [row[name] for name in names] == pytest.approx(expected, nan_ok=True)


def test_heads_are_compared_by_what_they_do_to_the_same_answers(models, chosen, found):
    table = found.tables["sweep"].set_index(["unit", "task"])
    plan = [Intervention((Head(2, 1),))]
    effects = [run_interventions(model, chosen[1], plan, per_answer=True) for model in models[:2]]
    one, other = (table["log_prob_effect"].to_numpy() for table in effects)
    by_hand = paired(other, one, effects[0]["group"].to_numpy(), kind="real")
    row = table.loc[("L2H1", "qa_id")]
    assert row["log_prob_effect_difference"] == pytest.approx(by_hand.difference, abs=1e-6)
    assert row["log_prob_effect_p"] == pytest.approx(by_hand.p_value)
    assert (row["layer"], row["index"]) == (2, 1)
    sizes = table["log_prob_effect_difference"].abs().tolist()
    assert sizes == sorted(sizes, reverse=True)


def test_what_is_told_in_one_example_is_compared_answer_by_answer(models, chosen, tmp_path):
    told = Task(
        "told",
        *(getattr(chosen[0], name)[:2] for name in ("tokens", "attention_mask")),
        pandas.DataFrame(
            {"example": [0, 0, 1, 1], "group": [0, 0, 1, 1], "attribute": ["city", "major"] * 2, "value": "x"}
        ).assign(start=[2, 4, 2, 4], end=[3, 5, 3, 5]),
        chosen[0].texts[:2],
        provenance=chosen[0].provenance,
    )
    both = [chosen[0], told]
    found = compare(*models[:2], both, out=tmp_path, only=["ablate"], settings=AnalysisSettings(draws=2, fraction=0.05))
    rows = found.tables["ablation"].set_index(["scope", "task"])
    assert rows["answers"]["global", "told"] == 4
    drops = []
    for side in (found.a, found.b):
        answers = side.tables["ablation_answers"].query("scope == 'global' and task == 'told'")
        of = answers.groupby("condition")["log_prob"].mean()
        drops.append(of["none"] - of["shared"])
    assert rows["log_prob_drop_difference"]["global", "told"] == pytest.approx(drops[1] - drops[0], abs=1e-5)


def test_masks_are_compared_by_what_they_have_in_common(found):
    row = found.tables["masks"].set_index("scope").loc["global"]
    a, b = (side.masks["global"] for side in (found.a, found.b))
    assert row["both"] == sum(int((a.masks[name] & b.masks[name]).sum()) for name in a.masks)
    chance = sum(int(a.masks[name].sum()) * int(b.masks[name].sum()) / a.masks[name].numel() for name in a.masks)
    assert row["lift"] == pytest.approx(row["both"] / chance)


def test_what_random_masks_cost_each_model_stands_beside(found):
    table = found.tables["ablation"].set_index(["scope", "task"])
    for side, one in (("a", found.a), ("b", found.b)):
        rows = one.tables["ablation"]
        means = rows.groupby(["scope", "task", "condition"])["exact_match"].mean().unstack()
        assert table[f"exact_match_random_drop_{side}"].to_dict() == pytest.approx(
            (means["none"] - means["random"]).to_dict()
        )
        alike = means.get("shared_thinned", means["shared"]).fillna(means["shared"])
        assert table[f"exact_match_thinned_drop_{side}"].to_dict() == pytest.approx((means["none"] - alike).to_dict())
    assert "exact match, without random ones" in found.report.read_text()


def test_the_same_model_twice_differs_in_nothing(models, chosen, tmp_path):
    found = compare(
        models[0],
        loaded("llama"),
        chosen,
        out=tmp_path / "same",
        settings=SETTINGS,
        only=["evaluate", "share", "sweep"],
    )
    assert (found.tables["accuracy"]["log_prob_difference"] == 0).all()
    assert (found.tables["sweep"]["log_prob_effect_difference"] == 0).all()
    assert (found.tables["masks"]["jaccard"] == 1).all()
    assert not (found.tables["sweep"]["log_prob_effect_q"] < 0.05).any()


def test_a_comparison_shows_itself(found):
    page = found.report.read_text()
    for title in (
        "What both say",
        "What the tasks share",
        "What happens without it",
        "Which heads differ when ablated",
    ):
        assert f"<h2>{title}</h2>" in page
    assert "<table" in found._repr_html_()
    assert repr(found).startswith("Comparison('a', 'b', ")
    assert {"sweep", "patches", "heads"} <= set(found.figures)
    assert set(found.summary) >= {"accuracy", "masks", "sweep"}


def test_other_questions_cannot_be_compared():
    a = pandas.DataFrame({"task": "qa", "example": range(4), "group": range(4), "start": 3, "log_prob": -1.0})
    with pytest.raises(CircuitsError, match="the two models were asked other questions"):
        paired_differences(a, a.head(3), ["task"])


def test_what_cannot_be_compared_is_refused(models, chosen, tmp_path):
    with pytest.raises(CircuitsError, match="both models are called x"):
        compare(*models[:2], chosen, out=tmp_path / "x", names=("x", "x"))
    with pytest.raises(CircuitsError, match="holds no comparison"):
        Comparison(tmp_path)


def test_the_command_compares_two_checkpoints(models, tmp_path):
    for name, model in zip(("one", "two"), models, strict=False):
        save_model(model, tmp_path / name)
    lines = [f'{{"prompt": "Where was Ada born? {word}", "answer": " Paris"}}' for word in ("Yes", "No", "In")]
    for name in ("x", "y"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines[: 2 if name == "x" else 3]))
    words = ["compare", tmp_path / "one", tmp_path / "two", "--task", tmp_path / "x.jsonl", "--out", tmp_path / "out"]
    result = CliRunner().invoke(app, [*map(str, words), "--only", "evaluate"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "a: one, b: two" in result.output
    assert Comparison(tmp_path / "out").names == ("one", "two")


def test_the_page_names_models_and_rankings_as_a_person_does(found):
    page = found.report.read_text()
    assert '<th class="words">ranking</th>' in page
    assert "Shared Size, per tensor" in page
    for raw in ("auc_a<", "n50_b<", "size_a<", "score_a<", ">global<"):
        assert raw not in page
    row = found.tables["areas"].query("kind == 'head' and condition == 'sufficient' and metric == 'shared_size'")
    cells = "".join(f'<td class="words short">{name}</td>\n      ' for name in ("sufficient", "Shared Size"))
    assert f"{cells}<td>{row['auc_a'].mean():.2f}</td>" in page


def test_an_interval_that_holds_everything_possible_is_not_shown():
    table = pandas.DataFrame({"task": ["a", "b"], "answers": 2, "exact_match_effect_a": 0.0})
    table = table.assign(exact_match_effect_b=0.85, exact_match_effect_difference=0.85, exact_match_effect_q=1.0)
    table["exact_match_effect_difference_low"] = [-10.0, 0.5]
    table["exact_match_effect_difference_high"] = [11.7, 1.2]
    shown = shown_differences(table, ["task"], ("one", "two"), ending="_effect")["difference"].tolist()
    assert shown == ["+85.0% (too few to tell)", "+85.0% (+50.0% to +120.0%)"]


def test_measures_and_their_controls_are_rows():
    table = pandas.DataFrame({"task": ["a", "b"], "answers": 2})
    for name, value in {"exact_match": 0.5, "log_prob": -1.0}.items():
        for ending in ("a", "b", "difference", "difference_low", "difference_high", "q"):
            table[f"{name}_{ending}"] = value
    table["log_prob_difference"] = [float("nan"), -1.0]  # a task without this metric
    table["random_a"], table["random_b"] = 0.25, [0.75, float("nan")]
    controls = {"exact_match": {"random ones": "random"}}
    shown = shown_differences(table, ["task"], ("one", "two"), controls=controls)
    assert list(shown) == ["task", "measure", "answers", "one", "two", "difference", "q"]
    assert shown[["task", "measure", "one", "two"]].to_numpy().tolist() == [
        ["a", "exact match", "50.0%", "50.0%"],
        ["a", "exact match, random ones", "25.0%", "75.0%"],
        ["b", "exact match", "50.0%", "50.0%"],
        ["b", "exact match, random ones", "25.0%", "–"],
        ["b", "log-probability (nats)", "-1.00", "-1.00"],
    ]
    assert "measure" not in shown_differences(table, ["task"], ("one", "two"), metrics=["log_prob"])


@pytest.mark.parametrize("command", ["analyse", "compare"])
def test_a_task_is_held_out_of_the_shared_set_from_the_shell(command, models, dataset, tmp_path):
    sides = ["a"] if command == "analyse" else ["a", "b"]
    tasks = [part for name in ("bio", "qa_id", "qa_ood") for part in ("--task", name)]
    for side, model in zip(sides, models, strict=False):
        save_model(model, tmp_path / side)
    base = [command, *(str(tmp_path / side) for side in sides), *tasks, "--data", str(dataset.folder)]
    base += ["--out", str(tmp_path / "out"), "--examples", "4", "--draws", "2", "--only", "trace"]
    base += ["--only", "ablate" if command == "analyse" else "evaluate"]
    result = CliRunner().invoke(app, [*base, "--held-out", "qa_ood"])
    assert result.exit_code == 0, result.output
    for out in [tmp_path / "out" / side for side in sides] if command == "compare" else [tmp_path / "out"]:
        found = Analysis(out)
        assert list(found.traces) == ["bio", "qa_id"]
        scored = found.tables["ablation" if command == "analyse" else "accuracy"]
        assert set(scored["task"]) == {"bio", "qa_id", "qa_ood"}
    result = CliRunner().invoke(app, [*base, "--held-out", "qa"])
    assert isinstance(result.exception, CircuitsError)
    assert str(result.exception) == "there is no task 'qa' to hold out: choose from bio, qa_id, qa_ood"
    everything = [part for name in ("bio", "qa_id", "qa_ood") for part in ("--held-out", name)]
    result = CliRunner().invoke(app, [*base, *everything])
    assert str(result.exception) == "every task is held out: at least one has to be traced"
