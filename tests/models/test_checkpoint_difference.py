"""Differences of two checkpoints against the loop over hooked parameters."""

import math

import pandas
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from circuits.errors import CircuitsError
from circuits.figures import difference_figure, write_difference
from circuits.models import difference, fingerprint, load_model, parameters_of, save_model, shape_of
from circuits.units import Head, KVGroup, Neuron, component_of, layer_of
from tests.fixtures import lively

NUMBERS = ["norm", "relative", "changed"]


@pytest.fixture
def pair(family, tokenizer, tmp_path):
    """A checkpoint, and another that differs in one head, one neuron, one group and one entry of the embedding."""
    model = load_model(lively(family), tokenizer=tokenizer)
    save_model(model, tmp_path / "base")
    values = parameters_of(model)
    with torch.no_grad():
        values["blocks.1.attn.W_Q"][2] *= 1.5
        values["blocks.3.mlp.W_out"][17] += 0.25
        values["blocks.2.attn.W_K"][1, 0, 0] += 1
        values["embed.W_E"][5, 3] += 1
    save_model(model, tmp_path / "tuned", max_shard_size="200KB")
    return tmp_path / "base", tmp_path / "tuned"


def entries_of(unit, parameters):
    """The entries that belong to a unit alone, found by hand: keys and values of several heads to no head."""
    grouped = len(parameters["blocks.0.attn.W_K"]) < len(parameters["blocks.0.attn.W_Q"])
    mine = {
        Neuron: ("mlp.W_in", "mlp.W_gate", "mlp.W_out", "mlp.b_in"),
        KVGroup: ("attn.W_K", "attn.W_V"),
        Head: ("attn.W_Q", "attn.W_O", "attn.b_Q")
        + (() if grouped else ("attn.W_K", "attn.W_V", "attn.b_K", "attn.b_V")),
    }[type(unit)]
    for name, value in parameters.items():
        inside = name.split(".", 2)[-1]
        if layer_of(name) == unit.layer and inside in mine:
            yield name, value[:, unit.index] if inside in ("mlp.W_in", "mlp.W_gate") else value[unit.index]


def expected(old, new):
    old, new = (torch.cat([value.reshape(-1) for value in values]).double() for values in (old, new))
    return (new - old).norm().item(), ((new - old).norm() / old.norm()).item(), (new != old).double().mean().item()


def test_a_difference_is_what_a_loop_over_parameters_finds(pair, family):
    base, tuned = pair
    table = difference(base, tuned).set_index("unit")
    assert table.index.is_unique
    one, two = load_model(base), load_model(tuned)
    old, new = ({name: value.detach() for name, value in parameters_of(model).items()} for model in (one, two))
    shape = shape_of(one)
    units = [*shape.heads(), *(Neuron(3, index) for index in range(0, shape.d_mlp, 7))]
    if family == "llama":
        units += [KVGroup(layer, index) for layer in range(4) for index in range(2)]
    for unit in units:
        ours = [dict(entries_of(unit, values)) for values in (old, new)]
        wanted = expected(ours[0].values(), ours[1].values())
        assert table.loc[str(unit), NUMBERS].tolist() == pytest.approx(wanted, rel=1e-5, abs=1e-12)
        assert table.loc[str(unit), "parameters"] == sum(value.numel() for value in ours[0].values())
    if family == "llama":
        del old["unembed.W_U"], new["unembed.W_U"]
    for layer in (*range(4), None):
        for component in {component_of(name) for name in old if layer_of(name) == layer}:
            names = [name for name in old if (layer_of(name), component_of(name)) == (layer, component)]
            wanted = expected([old[name] for name in names], [new[name] for name in names])
            row = table.loc[component if layer is None else f"L{layer}.{component}"]
            assert row[NUMBERS].tolist() == pytest.approx(wanted, rel=1e-5, abs=1e-12)
    assert table.loc["model", NUMBERS].tolist() == pytest.approx(expected(old.values(), new.values()), rel=1e-5)
    assert table.loc["L1", "norm"] == pytest.approx(table.loc["L1H2", "norm"], rel=1e-6)
    changed = table.index[(table["norm"] > 0) & table["kind"].isin(["head", "group", "neuron"])]
    assert set(changed) == {"L1H2", "L3N17", "L2G1" if family == "llama" else "L2H1"}


def test_fingerprints_are_those_of_the_loaded_models(pair):
    assert difference(*pair).attrs == {
        side: fingerprint(load_model(folder)) for side, folder in zip(("base", "tuned"), pair, strict=True)
    }


def test_a_checkpoint_does_not_differ_from_itself_whatever_it_is_stored_as(pair, tmp_path, family):
    base, _ = pair
    model = lively(family)
    model.bfloat16().save_pretrained(tmp_path / "half")
    model.float().save_pretrained(tmp_path / "full")
    for one, two in ((base, base), (tmp_path / "half", tmp_path / "full")):
        table = difference(one, two)
        assert not table["norm"].any()
        assert not table["changed"].any()


def test_an_adapter_differs_from_its_base_where_it_was_trained(pair, family, tmp_path):
    base, _ = pair
    target = {"llama": "down_proj", "pythia": "dense_4h_to_h"}[family]
    config = peft.LoraConfig(r=2, target_modules=[target], layers_to_transform=[1], init_lora_weights=False)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "adapter")
    table = difference(base, tmp_path / "adapter")
    changed = table[table["norm"] > 0]
    assert set(changed["layer"].dropna()) == {1}
    assert set(changed["component"].dropna()) == {"mlp"}
    assert set(changed["kind"]) == {"model", "layer", "component", "neuron"}


def test_models_that_do_not_belong_together_are_refused(pair, family, tokenizer, tmp_path):
    base, _ = pair
    other = tmp_path / "other"
    lively("pythia" if family == "llama" else "llama").save_pretrained(other)
    with pytest.raises(CircuitsError, match="compare checkpoints of one model"):
        difference(base, other)
    config = lively(family).config
    for key, size, value in (
        ("vocab_size", "d_vocab", 500), ("intermediate_size", "d_mlp", 300), ("num_attention_heads", "n_heads", 8)
    ):  # fmt: skip
        small = type(config)(
            **{name: one for name, one in config.to_dict().items() if name != "head_dim"} | {key: value}
        )
        AutoModelForCausalLM.from_config(small).save_pretrained(other)
        with pytest.raises(CircuitsError, match=f"{size} is .* in the first and {value} in the second"):
            difference(base, other)
    lively(family).save_pretrained(other)
    words = load_model(base).tokenizer
    content = words.backend_tokenizer.to_str().replace('"Paris"', '"Parys"').replace('"April"', '"Aprul"')
    words.save_pretrained(other)
    (other / "tokenizer.json").write_text(content)
    with pytest.raises(CircuitsError, match="their tokenizers have other words"):
        difference(base, other)


def test_the_figure_shows_every_head_and_component(pair, family):
    table = difference(*pair)
    figure = difference_figure(table, "norm")
    heads = next(trace for trace in figure.data if "L1H2" in set(pandas.DataFrame(trace.customdata).to_numpy().ravel()))
    assert heads.z.shape == (4, 4)
    assert heads.z[1][2] == heads.z.max() == table.set_index("unit").loc["L1H2", "norm"]
    assert len(figure.data) == (3 if family == "llama" else 2)
    with pytest.raises(CircuitsError, match="there is no value 'size'"):
        difference_figure(table, "size")
    with pytest.raises(CircuitsError, match="has no column kind"):
        difference_figure(table.drop(columns="kind"))


def test_a_norm_of_nothing_has_no_relative_change(family, tmp_path):
    model = lively(family)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "layers.0" in name and "norm" in name:
                value.zero_()
    model.save_pretrained(tmp_path / "zero")
    table = difference(tmp_path / "zero", tmp_path / "zero").set_index("unit")
    assert math.isnan(table.loc["L0.norms", "relative"])
    assert table.loc["L1.norms", "relative"] == 0


def test_the_page_of_a_difference_names_what_changed_most(pair, tmp_path):
    table = difference(*pair)
    write_difference(table, tmp_path / "page.html", title="What changed", largest=3)
    page = (tmp_path / "page.html").read_text()
    for kind in ("head", "neuron"):
        units = table[table["kind"] == kind].sort_values("relative", ascending=False, kind="stable")["unit"].tolist()
        assert all(f">{unit}</td>" in page for unit in units[:3])
        assert not any(f">{unit}</td>" in page for unit in units[3:])
    assert ">L1</td>" in page
    assert ">embeddings</td>" in page
