import re

import pytest
import torch

from circuits.errors import CircuitsError
from circuits.masks import ParameterMask, shared_size, units_of
from circuits.units import Head, KVGroup, Neuron


@pytest.fixture(scope="module")
def mask() -> ParameterMask:
    """Random entries of two layers with 6 heads in 2 groups and 40 neurons, most of which hold nothing."""
    shapes = {"attn.W_Q": (6, 8, 4), "attn.W_O": (6, 4, 8), "attn.W_K": (2, 8, 4), "mlp.W_in": (8, 40)}
    generator = torch.Generator().manual_seed(0)
    return ParameterMask(
        {
            f"blocks.{layer}.{name}": torch.rand(shape, generator=generator) < (0.03 if "mlp" in name else 0.1)
            for layer in range(2)
            for name, shape in shapes.items()
        },
        model="a",
    )


@pytest.mark.parametrize("kind", [Head, KVGroup, Neuron])
def test_units_of_a_mask_are_those_that_hold_most_of_it(mask, kind):
    sizes = {row.unit: row.size for row in shared_size(mask, kind).itertuples()}
    by_hand = sorted((unit for unit in sizes if sizes[unit] > 0), key=lambda unit: -sizes[unit])
    found = units_of(mask, kind)
    assert [str(unit) for unit in found] == by_hand
    assert all(type(unit) is kind for unit in found)
    assert units_of(mask, kind, top=2) == found[:2]
    assert units_of(mask, kind, top=1000) == found
    assert units_of(mask) == units_of(mask, Head)


def test_units_without_a_parameter_in_the_mask_are_left_out(mask):
    assert 0 < len(units_of(mask, Neuron)) == int((shared_size(mask, Neuron)["size"] > 0).sum()) < 80


def test_equal_units_come_in_the_models_order():
    """Heads of groups of three: 2 + 1/3 and 1 + 4/3 are equal, whatever their last bits are."""
    queries, keys = torch.zeros(6, 8, 1, dtype=torch.bool), torch.zeros(2, 8, 1, dtype=torch.bool)
    keys[0, :4] = keys[1, 0] = True  # 4/3 for each of the first three heads, 1/3 for each of the others
    queries[0, 0] = queries[3, :2] = True
    mask = ParameterMask({"blocks.0.attn.W_Q": queries, "blocks.0.attn.W_K": keys}, model="a")
    sizes = shared_size(mask, Head)["size"]
    assert sizes[3] > sizes[0] == pytest.approx(sizes[3])
    assert [str(head) for head in units_of(mask)] == ["L0H0", "L0H3", "L0H1", "L0H2", "L0H4", "L0H5"]


def test_no_units_are_refused(mask):
    with pytest.raises(CircuitsError, match=re.escape("no head holds a parameter of the mask: take a larger mask")):
        units_of(mask - mask)
    with pytest.raises(CircuitsError, match="the mask covers no parameters of neurons"):
        units_of(ParameterMask({"blocks.0.attn.W_Q": torch.ones(2, 3, 4) > 0}, model="a"), Neuron)
    with pytest.raises(CircuitsError, match="top is 0: it must be 1 or more"):
        units_of(mask, top=0)
