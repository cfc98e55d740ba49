import numpy
import pytest
import torch

from circuits.errors import CircuitsError
from circuits.models import parameters_of
from circuits.units import Component, Head, KVGroup, ModelShape, Neuron, layout_of

SHAPE = ModelShape(4, 6, 2, 32)


def test_names_are_read_and_written():
    assert Head.parse("L21H17") == Head(21, 17)
    assert str(Neuron.parse("l3n512")) == "L3N512"
    assert sorted([Head(1, 0), Head(0, 5)]) == [Head(0, 5), Head(1, 0)]


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        (Head, "banana", "'banana' is not a head: write layer and head as in L21H17"),
        (Head, "L1N2", "'L1N2' is not a head"),
        (Head, "L99H0", "there is no head L99H0: the model has layers 0 to 3"),
        (Head, "L0H6", "there is no head L0H6: each layer has heads 0 to 5"),
        (KVGroup, "L0G2", "each layer has groups 0 to 1"),
        (Neuron, "L0N32", "each layer has neurons 0 to 31"),
    ],
)
def test_names_that_are_none_are_refused(kind, name, message):
    with pytest.raises(CircuitsError, match=message):
        kind.parse(name, SHAPE)


def test_every_parameter_of_attention_and_mlp_has_an_owner_but_output_biases(model):
    for name, value in parameters_of(model).items():
        layout = layout_of(name)
        belongs = (".attn." in name or ".mlp." in name) and not name.endswith(("b_O", "b_out"))
        assert (layout.unit is not None) == belongs, name
        if layout.unit is not None:
            cfg = model.cfg
            shape = ModelShape(cfg.n_layers, cfg.n_heads, cfg.n_key_value_heads or cfg.n_heads, cfg.d_mlp)
            assert value.shape[layout.axis] == layout.unit.count(shape), name


@pytest.mark.parametrize("kind", [Head, KVGroup, Neuron])
def test_a_unit_counts_its_layer_and_its_index_from_0(kind):
    for layer, index, message in (
        (-1, 0, f"a {kind.NOUN} has no layer -1: give a whole number from 0 on"),
        (0, -1, f"a {kind.NOUN} has no index -1"),
        (1.0, 0, f"a {kind.NOUN} has no layer 1.0"),
        (0, "1", f"a {kind.NOUN} has no index '1'"),
        (True, 0, f"a {kind.NOUN} has no layer True"),
    ):
        with pytest.raises(CircuitsError, match=message):
            kind(layer, index)
    unit = kind(numpy.int64(2), torch.arange(3)[1].numpy()[()])
    assert (type(unit.layer), type(unit.index), unit) == (int, int, kind(2, 1))


def test_a_component_has_a_layer_and_a_name_that_exist():
    with pytest.raises(CircuitsError, match="there is no component 'mlp': choose from resid_pre, attn_out, "):
        Component(0, "mlp")
    with pytest.raises(CircuitsError, match="a component has no layer -1"):
        Component(-1, "mlp_out")
    assert Component(numpy.int32(1), "mlp_out") == Component(1, "mlp_out")
