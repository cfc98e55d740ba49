"""Adapters against PEFT's own forward pass."""

import json
import shutil

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from circuits.errors import CircuitsError
from circuits.masks import ParameterMask, graft, revert, unit_mask
from circuits.models import fingerprint, load_model, load_tokenizer, parameters_of, save_model
from circuits.training import new_model
from circuits.units import Head
from tests.fixtures import lively

TARGETS = {
    "llama": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
    "pythia": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
}


@pytest.fixture(scope="module")
def made(family, tokenizer, tmp_path_factory):
    """A checkpoint and a plain adapter of it, to take copies of."""
    folder = tmp_path_factory.mktemp("made")
    lively(family).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    adapt(folder / "base", folder / "adapter", lora(family))
    return folder


@pytest.fixture
def base(made, tmp_path):
    return shutil.copytree(made / "base", tmp_path / "base")


@pytest.fixture
def adapter(made, base, tmp_path):
    """The plain adapter, of the base beside it."""
    shutil.copytree(made / "adapter", tmp_path / "adapter")
    rebase(tmp_path / "adapter", str(base))
    return tmp_path / "adapter"


def rebase(adapter, name):
    """Name another base."""
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": name}))


def adapt(base, folder, config):
    """An adapter of a folder whose every number is far from nothing, and PEFT's own model with it."""
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return model.eval()


def lora(family, **settings):
    return peft.LoraConfig(**({"r": 4, "target_modules": TARGETS[family], "task_type": "CAUSAL_LM"} | settings))


def kinds(family):
    linear = TARGETS[family]
    embedding, head = {"llama": ("embed_tokens", "lm_head"), "pythia": ("embed_in", "lm_head")}[family]
    return {
        "lora": lora(family),
        "rank-stabilised, all layers but one": lora(family, use_rslora=True, layers_to_transform=[0, 1, 2]),
        "dora": lora(family, use_dora=True),
        "lora with bias": lora(family, lora_bias=family == "pythia"),
        "initialised orthogonally": lora(family, init_lora_weights="orthogonal"),
        "ia3": peft.IA3Config(target_modules=linear, feedforward_modules=linear[-1:], task_type="CAUSAL_LM"),
        "loha": peft.LoHaConfig(r=4, target_modules=linear),
        "lokr": peft.LoKrConfig(r=4, target_modules=linear),
        "oft": peft.OFTConfig(r=0, oft_block_size=8, target_modules=linear[:1], task_type="CAUSAL_LM"),
        "whole module": lora(family, modules_to_save=["norm" if family == "llama" else "final_layer_norm"]),
        "trained tokens": lora(family, trainable_token_indices=[3, 5, 8]),
        "norms": peft.LNTuningConfig(
            target_modules=["input_layernorm", "post_attention_layernorm"], task_type="CAUSAL_LM"
        ),
        "embedding of an untied model" if family == "pythia" else "embedding": lora(
            family, modules_to_save=[embedding, head]
        ),
    }


@pytest.mark.parametrize("kind", [*kinds("llama"), "embedding of an untied model"])
def test_merged_logits_are_pefts_own(kind, family, base, tmp_path, tasks):
    if kind not in kinds(family):
        pytest.skip("of the other family")
    reference = adapt(base, tmp_path / "adapter", kinds(family)[kind])
    tokens = tasks["qa_id"].tokens[:6]
    plain, model = AutoModelForCausalLM.from_pretrained(base), load_model(base, adapter=tmp_path / "adapter")
    with torch.no_grad():
        expected = reference(tokens).logits
        assert float((plain(tokens).logits - expected).abs().max()) > 1e-2
        assert float((model(tokens) - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    assert model.checkpoint.source == str(base)
    assert model.checkpoint.adapter == str(tmp_path / "adapter")


def test_a_folder_that_is_an_adapter_names_its_base(base, adapter):
    expected = fingerprint(load_model(base, adapter=adapter))
    for name in (str(base), "../base"):
        rebase(adapter, name)
        model = load_model(adapter)
        assert fingerprint(model) == expected != fingerprint(load_model(base))
        assert model.checkpoint.source == str(base)
    for name in ("HuggingFaceTB/SmolLM2-135M", "../nowhere", None):
        rebase(adapter, name)
        with pytest.raises(CircuitsError, match="base"):
            load_model(adapter)
        assert fingerprint(load_model(base, adapter=adapter)) == expected
    with pytest.raises(CircuitsError, match="is an adapter itself"):
        load_model(adapter, adapter=adapter)


def test_the_tokenizer_is_the_adapters_own_or_the_bases(base, tokenizer, adapter):
    assert load_model(adapter).tokenizer.get_vocab() == tokenizer.get_vocab()
    assert load_tokenizer(adapter).bos_token == "<s>"
    own = load_tokenizer(base)
    own.bos_token = "Paris"
    own.save_pretrained(adapter)
    assert load_model(adapter).tokenizer.bos_token == "Paris"
    assert load_model(base, adapter=adapter).tokenizer.bos_token == "Paris"


def test_a_graft_of_everything_that_an_adapter_changed_is_the_merged_model(base, tasks, adapter):
    pre, tuned = load_model(base), load_model(base, adapter=adapter)
    names = [name for name in parameters_of(pre) if "attn" in name or "mlp" in name]
    everything = ParameterMask(
        {name: torch.ones_like(parameters_of(pre)[name], dtype=torch.bool) for name in names}, fingerprint(tuned)
    )
    tokens = tasks["qa_id"].tokens[:4]
    assert not torch.equal(pre(tokens), tuned(tokens))
    with graft(pre, everything, tuned):
        for name, value in parameters_of(tuned).items():
            assert torch.equal(parameters_of(pre)[name], value), name
        assert torch.equal(pre(tokens), tuned(tokens))


def test_a_merged_model_is_saved_as_a_checkpoint_and_says_where_it_is_from(base, tmp_path, adapter):
    model = load_model(adapter)
    save_model(model, tmp_path / "merged")
    assert fingerprint(load_model(tmp_path / "merged")) == fingerprint(model)
    card = json.loads((tmp_path / "merged" / "circuits.json").read_text())
    assert (card["source"], card["adapter"]) == (str(base), str(adapter))


def test_an_adapter_is_merged_into_a_model_in_memory(base, adapter):
    before = AutoModelForCausalLM.from_pretrained(base)
    model = load_model(before, adapter=adapter)
    assert fingerprint(model) == fingerprint(load_model(adapter))
    again = dict(AutoModelForCausalLM.from_pretrained(base).named_parameters())
    assert all(torch.equal(value, again[name]) for name, value in before.named_parameters())


def test_another_base_than_the_adapter_names_is_refused_where_it_can_be_told(family, base, tmp_path, adapter):
    other, moved = tmp_path / "other", tmp_path / "moved"
    lively(family, seed=1).save_pretrained(other)
    shutil.copytree(base, moved)
    assert fingerprint(load_model(moved, adapter=adapter)) == fingerprint(load_model(adapter))
    with pytest.raises(CircuitsError, match="is of the base .*base, and .*other has other weights"):
        load_model(other, adapter=adapter)


def test_an_adapter_of_the_other_family_is_refused(family, base, tokenizer, adapter):
    shutil.rmtree(base)
    other = new_model("tiny-pythia" if family == "llama" else "tiny-llama", tokenizer)
    with pytest.raises(CircuitsError, match="is of another base"):
        load_model(other, adapter=adapter)


def test_without_peft_one_sentence_says_what_to_install(base, monkeypatch, adapter):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(CircuitsError, match=r"needs the package peft: install fact-circuits\[adapters\]"):
        load_model(base, adapter=adapter)


def test_an_adapter_starts_from_its_base(base, family, adapter):
    """Whatever the base itself started from."""
    other = load_model(lively(family, 1))
    (base / "circuits.json").write_text(json.dumps({"start_fingerprint": fingerprint(other)}))
    tuned, pre = load_model(adapter), load_model(base)
    mask = unit_mask(tuned, [Head(0, 0)])
    with revert(tuned, mask, pre):
        pass
    found = rf"adapter was trained from model {fingerprint(pre)}, and memory is {fingerprint(other)}: give the model"
    with pytest.raises(CircuitsError, match=found):
        revert(tuned, mask, other)
    with pytest.raises(CircuitsError, match="base with the adapter .*adapter is"):
        revert(tuned, mask, tuned)
    # an adapter's own word counts more
    (adapter / "circuits.json").write_text(json.dumps({"start_fingerprint": fingerprint(other)}))
    tuned = load_model(adapter)
    revert(tuned, mask, other)
    with pytest.raises(CircuitsError, match=f"was trained from model {fingerprint(other)}"):
        revert(tuned, mask, pre)


@pytest.mark.parametrize("family", ["llama"])
def test_a_model_in_memory_did_not_come_from_a_folder_called_memory(family, tmp_path, monkeypatch):
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "circuits.json").write_text(json.dumps({"start_fingerprint": "0123456789abcdef"}))
    monkeypatch.chdir(tmp_path)
    tuned, pre = (load_model(lively(family, seed)) for seed in (0, 1))
    revert(tuned, unit_mask(tuned, [Head(0, 0)]), pre)


@pytest.mark.parametrize("family", ["llama"], scope="module")
def test_a_base_is_named_as_from_the_working_directory_too(base, tmp_path, monkeypatch, adapter):
    shutil.copytree(adapter, tmp_path / "runs" / "adapter")
    rebase(tmp_path / "runs" / "adapter", "base")
    with pytest.raises(CircuitsError, match=r"as base, and there is no folder .*/runs/adapter/base or .*/base"):
        load_model(tmp_path / "runs" / "adapter")
    monkeypatch.chdir(tmp_path)
    expected = fingerprint(load_model(base, adapter=tmp_path / "runs" / "adapter"))
    model = load_model("runs/adapter")
    assert fingerprint(model) == expected
    assert model.checkpoint.source == str(base)
    # what lies beside the adapter comes first
    shutil.copytree(base, tmp_path / "runs" / "adapter" / "base")
    assert load_model("runs/adapter").checkpoint.source == str(tmp_path / "runs" / "adapter" / "base")
