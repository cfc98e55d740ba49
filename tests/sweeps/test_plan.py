import pickle
import re
from dataclasses import asdict, replace

import pandas
import pytest
import torch

from circuits.errors import CircuitsError
from circuits.masks import ParameterMask, units_of
from circuits.sweeps import SweepPlan
from circuits.units import Head, KVGroup, ModelShape, Neuron

SHAPE = ModelShape(3, 4, 2, 5)
#: Parameters of its last layer.
SHAPES = {
    "blocks.2.attn.W_Q": (4, 6, 3),
    "blocks.2.attn.W_K": (2, 6, 3),
    "blocks.2.mlp.W_in": (6, 5),
}


def names(plan: SweepPlan, prompt: int = 4) -> list[str]:
    return [str(one) for one in plan.interventions(SHAPE, prompt)]


def test_a_plan_in_yaml_in_toml_and_in_python_is_the_same(tmp_path):
    (tmp_path / "plan.yaml").write_text(
        "model: some/model\ntasks: [qa_id, bio]\nunits: [L0H1, L2H3]\nmodes: zero\npositions: 3\nseed: 7\n"
    )
    (tmp_path / "plan.toml").write_text(
        'model = "some/model"\ntasks = ["qa_id", "bio"]\nunits = ["L0H1", "L2H3"]\nmodes = "zero"\npositions = 3\n'
        "seed = 7\n"
    )
    plan = SweepPlan("some/model", tasks=["qa_id", "bio"], units=["L0H1", "L2H3"], modes=["zero"], positions=3, seed=7)
    assert SweepPlan.read(tmp_path / "plan.yaml") == SweepPlan.read(tmp_path / "plan.toml") == plan
    assert plan != SweepPlan("some/model", tasks=["qa_id", "bio"], units=["L0H1", "L2H3"], positions=3)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model: m\nmode: zero\n", "plan.yaml: there is no setting 'mode': 'modes' may be meant"),
        ("model: m\nbanana: 1\n", "plan.yaml: there is no setting 'banana': choose from model, dataset, tasks, "),
        ("tasks: bio\n", "plan.yaml names no model"),
        ("", "plan.yaml is no plan: write settings such as 'model: FOLDER'"),
        ("model: [a\n", "plan.yaml is not a YAML file: expected ',' or ']'"),
        ("model: 3\n", "plan.yaml: model is 3: it must be the path of a folder"),
        ("model: m\ntasks: [bio, bio]\n", "tasks has bio twice: name it once"),
        ("model: m\ntasks: [bio, 3]\n", "tasks is ['bio', 3]: it must be a name or a list of names"),
        ("model: m\ntasks: []\n", "tasks is []: it must be a name or a list of names"),
        ("model: m\nmodes: 3\n", "modes is 3: it must be a name or a list of names"),
        ("model: m\nmodes: max\n", "modes has no choice 'max': choose from zero, mean"),
        ("model: m\nmetrics: speed\n", "metrics has no choice 'speed': choose from exact_match"),
        ("model: m\nexamples: 0\n", "examples is 0: it must be a whole number of 1 or more"),
        ("model: m\nexamples: true\n", "examples is True: it must be a whole number of 1 or more"),
        ("model: m\nseed: 0.5\n", "seed is 0.5: it must be a whole number of 0 or more"),
        ("model: m\nverify: 0\n", "verify is 0: it must be a share above 0, up to 1"),
        ("model: m\nverify: all\n", "verify is 'all': it must be a share above 0, up to 1"),
        ("model: m\nper_answer: 3\n", "per_answer is 3: it must be true or false"),
        ("model: m\ndtype: float8\n", "dtype has no choice 'float8': choose from float32"),
        ("model: m\ntogether: triples\n", "together has no choice 'triples': choose from single, pairs, cumulative"),
        ("model: m\nscreen: banana\n", "screen has no choice 'banana': choose from attribution"),
        ("model: m\nunits: tails\n", "there are no units 'tails': choose from heads, groups, neurons, resid_pre"),
        ("model: m\nunits: 3\n", "plan.yaml: units is 3: it must be a name or a list of names"),
        ("model: m\nunits: {mask: 3}\n", "plan.yaml: units: mask is 3: it must be the path of a file"),
        ("model: m\nunits: {kind: heads}\n", "plan.yaml: units: mask is missing"),
        ("model: m\nunits: {mask: f, kind: tails}\n", "units: kind has no choice 'tails': choose from heads, groups, "),
        ("model: m\nunits: {mask: f, 3: 4}\n", "units: there is no setting '3': choose from mask, kind, top"),
        ("model: m\nunits: {mask: f, top: 0}\n", "units: top is 0: it must be a whole number of 1 or more"),
        ("model: m\nunits: {mask: f, tops: 3}\n", "units: there is no setting 'tops': 'top' may be meant"),
        ("model: m\nunits: {mask: f, kind: neurons}\nsite: q\n", "L0N0 has no site 'q'"),
        ("model: m\n3: 4\n", "plan.yaml: there is no setting '3': choose from model"),
        ("model: m\nunits: [L0H0, banana]\n", "'banana' is not a unit"),
        ("model: m\nunits: [L0H0, L0H0]\n", "units has L0H0 twice"),
        ("model: m\nsite: banana\n", "L0H0 has no site 'banana': choose from z, q, k, v, pattern"),
        ("model: m\npositions: -1\n", "there is no position -1"),
        ("model: m\nmodes: revert\n", "revert needs pre: the folder of the checkpoint before fine-tuning"),
        (
            "model: m\nsource: people\n",
            "source is given, but it is for patch or logit_diff or source_exact_match alone",
        ),
        ("model: m\nmodes: patch\nsource: bio\n", "source has no choice 'bio': choose from counterfactuals, people"),
        ("model: m\nreference: bio\n", "reference is given, but it is for mean or mean_by_position or resample alone"),
        ("model: m\nseed:\n", "seed is None: it must be a whole number"),
        ("model: m\nscreen: attribution\nmodes: revert\npre: p\n", "a screen cannot estimate what revert does"),
        ("model: m\nscreen: attribution\ntogether: cumulative\n", "but together is cumulative"),
    ],
)
def test_what_is_wrong_with_a_plan_is_told_in_a_sentence(tmp_path, text, sentence):
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(CircuitsError) as error:
        SweepPlan.read(tmp_path / "plan.yaml")
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_no_plans_are_refused(tmp_path):
    with pytest.raises(CircuitsError, match="there is no file"):
        SweepPlan.read(tmp_path / "plan.toml")
    with pytest.raises(CircuitsError, match="end the name of a YAML or TOML file in .yaml, .yml or .toml"):
        SweepPlan.read(tmp_path / "plan.json")
    (tmp_path / "plan.toml").write_text("model = \n")
    with pytest.raises(CircuitsError, match="plan.toml is not a TOML file: Invalid value"):
        SweepPlan.read(tmp_path / "plan.toml")


@pytest.mark.parametrize(
    ("arguments", "settings", "sentence"),
    [
        ((), {}, "model is missing"),
        ((3,), {}, "model is 3: it must be the path of a folder"),
        (("m",), {"mode": "zero"}, "there is no setting 'mode': 'modes' may be meant"),
        (("m",), {"model": "n"}, "model: Got multiple values for argument"),
        (("m",), {"modes": "max"}, "modes has no choice 'max': choose from zero, mean"),
        (("m",), {"threads": "2"}, "threads is '2': it must be a whole number of 1 or more"),
    ],
)
def test_plans_made_in_python_are_told_the_same(arguments, settings, sentence):
    with pytest.raises(CircuitsError, match=f"^{re.escape(sentence)}"):
        SweepPlan(*arguments, **settings)


def test_a_plan_stays_as_it_is_and_travels():
    plan = SweepPlan("m", tasks="bio", units={"mask": "shared.safetensors", "top": 3}, verify=1)
    with pytest.raises(AttributeError):
        plan.seed = 1
    assert pickle.loads(pickle.dumps(plan)) == plan == SweepPlan(**asdict(plan))
    assert hash(plan) == hash(SweepPlan(**asdict(plan)))
    assert replace(plan, seed=1) != plan
    with pytest.raises(CircuitsError, match="seed is -1: it must be a whole number of 0 or more"):
        replace(plan, seed=-1)


def test_tasks_may_be_named_that_only_a_prepared_sweep_can_look_up():
    tasks = ("qa_ood", "ioi", "my/prompts.jsonl")
    assert SweepPlan("m", tasks=list(tasks), modes="mean", reference="ioi").tasks == tasks


def test_units_of_every_kind():
    counts = {"heads": 12, "groups": 6, "neurons": 15, "attn_out": 3, "resid_post": 3}
    for kind, count in counts.items():
        assert len(set(names(SweepPlan("m", units=kind)))) == count
    assert names(SweepPlan("m", units="mlp_out")) == ["zero L0.mlp_out", "zero L1.mlp_out", "zero L2.mlp_out"]
    assert names(SweepPlan("m", units="L2G1")) == ["zero L2G1"]
    with pytest.raises(CircuitsError, match="there is no head L3H0: the model has layers 0 to 2"):
        names(SweepPlan("m", units=["L3H0"]))


def test_units_of_a_ranking_come_from_the_top_down(tmp_path):
    table = pandas.DataFrame({"unit": ["L2H1", "L0H0", "L1H3"], "score": [3.0, 2.0, 1.0]})
    table.to_parquet(tmp_path / "ranking.parquet")
    table.to_csv(tmp_path / "ranking.csv", index=False)
    for ending in ("parquet", "csv"):
        plan = SweepPlan("m", units=tmp_path / f"ranking.{ending}", together="cumulative")
        assert names(plan) == ["zero L2H1", "zero L2H1+L0H0", "zero L2H1+L0H0+L1H3"]
    (tmp_path / "bad.parquet").write_text("no table")
    for wrong, sentence in [
        (tmp_path / "no.csv", "there is no file"),
        (tmp_path / "bad.parquet", "is damaged or is no table"),
    ]:
        with pytest.raises(CircuitsError, match=sentence):
            names(SweepPlan("m", units=wrong))
    table.rename(columns={"unit": "head"}).to_csv(tmp_path / "other.csv")
    with pytest.raises(CircuitsError, match="has no column unit"):
        names(SweepPlan("m", units=tmp_path / "other.csv"))
    pandas.concat([table, table]).to_csv(tmp_path / "twice.csv")
    with pytest.raises(CircuitsError, match="names a unit twice"):
        names(SweepPlan("m", units=tmp_path / "twice.csv"))


@pytest.mark.parametrize(("kind", "unit"), [("heads", Head), ("groups", KVGroup), ("neurons", Neuron)])
def test_units_of_a_mask_come_largest_first(tmp_path, kind, unit):
    generator = torch.Generator().manual_seed(0)
    held = {name: torch.rand(shape, generator=generator) < 0.2 for name, shape in SHAPES.items()}
    mask = ParameterMask(held, model="a")
    mask.save(tmp_path / "mask.safetensors")
    by_hand = [f"zero {one}" for one in units_of(mask, unit)]
    assert by_hand
    plan = SweepPlan("m", units={"mask": tmp_path / "mask.safetensors", "kind": kind})
    assert names(plan) == by_hand
    assert names(replace(plan, units={"mask": tmp_path / "mask.safetensors", "kind": kind, "top": 1})) == by_hand[:1]
    (tmp_path / "plan.yaml").write_text(f"model: m\nunits: {{mask: {tmp_path}/mask.safetensors, kind: {kind}}}\n")
    assert SweepPlan.read(tmp_path / "plan.yaml") == plan


def test_masks_that_name_no_units_are_refused(tmp_path):
    with pytest.raises(CircuitsError, match="no.safetensors"):
        names(SweepPlan("m", units={"mask": tmp_path / "no.safetensors"}))
    empty = ParameterMask({name: torch.zeros(shape, dtype=torch.bool) for name, shape in SHAPES.items()}, model="a")
    empty.save(tmp_path / "empty.safetensors")
    with pytest.raises(CircuitsError, match="no group holds a parameter of the mask"):
        names(SweepPlan("m", units={"mask": tmp_path / "empty.safetensors", "kind": "groups"}))


def test_the_order_is_mode_then_unit_then_position():
    plan = SweepPlan("m", units=["L0H0", "L2H1"], modes=["zero", "mean"], positions="each")
    assert names(plan, 2) == [
        "zero L0H0 at 0", "zero L0H0 at 1", "zero L2H1 at 0", "zero L2H1 at 1",
        "mean L0H0 at 0", "mean L0H0 at 1", "mean L2H1 at 0", "mean L2H1 at 1",
    ]  # fmt: skip
    assert len(names(SweepPlan("m", together="pairs"))) == 12 * 11 / 2


def test_interventions_that_memory_could_not_hold_are_refused():
    shape = ModelShape(4, 4, 4, 1000)
    with pytest.raises(CircuitsError, match=r"pairs of 4,000 units are too many interventions"):
        SweepPlan("m", units="neurons", together="pairs").interventions(shape, 10)
    with pytest.raises(CircuitsError, match="name two units or more"):
        SweepPlan("m", units="L0H0", together="pairs").interventions(shape, 10)


@pytest.mark.parametrize("size", [1, 3, 7, 64])
@pytest.mark.parametrize("screen", [None, "attribution"])
def test_jobs_hold_every_intervention_once_and_in_order(size, screen):
    plan = SweepPlan("m", tasks=["bio", "qa_id"], job_size=size, screen=screen, verify=0.3)
    counts = {"bio": 20, "qa_id": 11}
    jobs = plan.jobs(counts)
    assert jobs == plan.jobs(counts)
    assert [job.index for job in jobs] == list(range(len(jobs)))
    assert [job.stage for job in jobs] == sorted(job.stage for job in jobs)
    for task, count in counts.items():
        for stage in ("estimate", "exact"):
            held = [row for job in jobs if (job.task, job.stage) == (task, stage) for row in range(job.start, job.stop)]
            expected = count if screen is None or stage == "estimate" else round(0.3 * count)
            assert held == list(range(0 if screen is None and stage == "estimate" else expected))
        assert all(len(job) <= size for job in jobs if job.stage == "exact")


def test_each_position_ends_with_the_longest_prompt(plan_of, dataset, tokenizer):
    from circuits.sweeps.jobs import prepare

    prepared = prepare(plan_of(positions="each", units="L0H0"))
    task = dataset.task("qa_ood", tokenizer).sample(6, 0)
    longest = max(int(row.start) for row in task.answers.itertuples())
    assert [one.positions for one in prepared.interventions["qa_ood"]] == list(range(longest))
