import copy
import importlib
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from circuits.consistency import gradient_consistency, representation_consistency
from circuits.errors import CircuitsError
from circuits.facts import DatasetSettings, make_dataset, word_tokenizer
from circuits.interventions import Intervention, run_interventions
from circuits.metrics import evaluate
from circuits.models import (
    LeanModel,
    capture,
    check_task,
    describe,
    fingerprint,
    lean_model,
    load_model,
    load_tokenizer,
    parameters_of,
    save_model,
)
from circuits.models.hookable import backends, hookable
from circuits.rankings import (
    attention_scores,
    average_head,
    behaviour_scores,
    direct_logits,
    head_patterns,
    logit_lens,
    read_head,
)
from circuits.tracing import trace_checkpoints, trace_gradients
from circuits.training import new_model
from circuits.units import Head
from tests.fixtures import lively
from tests.models.test_families import random_model

#: What TransformerLens 3 alone has.
ONLY_3 = pytest.mark.skipif(backends()[0] == "bridge", reason="TransformerLens 4 has no HookedTransformer")


@pytest.fixture
def folder(huggingface, tokenizer, tmp_path):
    # a name that looks like a hub model must not matter
    path = tmp_path / "llama-7b-pythia-gpt2"
    huggingface.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_logits_equal_the_hugging_face_model_from_a_folder_and_from_memory(folder, huggingface, tasks):
    tokens = tasks["qa_id"].select(range(8)).tokens
    expected = huggingface(tokens).logits
    for model in (load_model(folder), load_model(huggingface)):
        assert torch.allclose(model(tokens), expected, atol=1e-4, rtol=0)
    assert load_model(folder).tokenizer("Paris").input_ids == load_model(folder).to_tokens("Paris")[0].tolist()


@ONLY_3
def test_parameters_are_what_transformer_lens_converts(model, huggingface, family):
    conversions = importlib.import_module("transformer_lens.pretrained.weight_conversions")
    convert = {"llama": conversions.convert_llama_weights, "pythia": conversions.convert_neox_weights}[family]
    expected = convert(huggingface, model.cfg)
    parameters = parameters_of(model)
    for name, value in parameters.items():
        assert torch.equal(value, expected[model.own_name(name)]), name
    invented = set(dict(model.named_parameters())) - {model.own_name(name) for name in parameters}
    assert all(not expected[name].any() for name in invented & set(expected))
    assert all(not dict(model.named_parameters())[name].requires_grad for name in invented)
    if family == "llama":
        assert "blocks.0.attn.b_Q" in invented
        assert "blocks.0.mlp.b_in" in invented
    else:
        assert invented == {"unembed.b_U"}


def test_every_checkpoint_parameter_is_accounted_for_once(model, huggingface):
    tied = huggingface.config.tie_word_embeddings
    hooked = sum(value.numel() for name, value in parameters_of(model).items() if not (tied and name == "unembed.W_U"))
    assert hooked == huggingface.num_parameters()


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "tie_word_embeddings": False},
        {"attention_bias": True},
        {"head_dim": 48},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ],
    ids=["no groups", "one group, untied", "attention biases", "wide heads", "llama3 rotary"],
)
def test_shapes_of_llama(changes):
    sizes = {"vocab_size": 90, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**(sizes | {"num_key_value_heads": 2, "intermediate_size": 80} | changes))
    torch.manual_seed(0)
    reference = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter += 0.1 * torch.randn_like(parameter) if "norm" not in name else 0
    model = load_model(reference)
    tokens = torch.randint(90, (3, 20))
    assert torch.allclose(model(tokens), reference(tokens).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_loads(huggingface, dtype, tasks):
    model = load_model(huggingface, dtype)
    assert {parameter.dtype for parameter in parameters_of(model).values()} == {getattr(torch, dtype)}
    assert model(tasks["bio"].tokens[:2]).dtype == getattr(torch, dtype)


def test_a_model_in_memory_is_copied(huggingface, family):
    before = {name: value.clone() for name, value in huggingface.named_parameters()}
    model = load_model(huggingface)
    with torch.no_grad():
        for parameter in parameters_of(model).values():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in huggingface.named_parameters())


def test_saving_gives_back_the_same_checkpoint(folder, tmp_path):
    model = load_model(folder)
    save_model(model, tmp_path / "again", {"why": "test"})
    one, two = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, tmp_path / "again"))
    two = dict(two.named_parameters())
    assert all(torch.equal(value, two[name]) for name, value in one.named_parameters())
    assert fingerprint(load_model(tmp_path / "again")) == fingerprint(model)
    facts = json.loads((tmp_path / "again" / "circuits.json").read_text())
    assert facts["why"] == "test"
    assert facts["model"] == fingerprint(model)
    assert {"library_version", "git_commit", "dtype", "device", "source"} <= set(facts)


def test_a_changed_model_saves_its_changes(folder, tmp_path):
    model = load_model(folder)
    before = fingerprint(model)
    with torch.no_grad():
        parameters_of(model)["blocks.1.attn.W_Q"][2] *= 2
    assert fingerprint(model) != before
    save_model(model, tmp_path / "again")
    found, expected = (parameters_of(one)["blocks.1.attn.W_Q"] for one in (load_model(tmp_path / "again"), model))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", backends())
def test_a_parameter_that_was_replaced_is_refused_wherever_it_would_be_ignored(tmp_path, backend):
    model = load_model(lively("llama"), backend=backend)
    lean_model(model)
    if backend == "hooked_transformer":
        name, module, parameter = "unembed.W_U", model.unembed, "W_U"
    else:
        name, module, parameter = "model.layers.1.mlp.down_proj.weight", model.blocks[1].mlp.out, "weight"
    setattr(module, parameter, torch.nn.Parameter(getattr(module, parameter).detach() * 2))
    for use in (lambda: save_model(model, tmp_path / "out"), lambda: lean_model(model)):
        with pytest.raises(CircuitsError, match=f"the parameter {name} of the hooked model was replaced"):
            use()
    assert not (tmp_path / "out").exists()


def test_one_of_two_tied_parameters_that_was_replaced_is_refused():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    reference = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=30, tie_word_embeddings=True)).eval()
    model = load_model(reference, backend="bridge")
    lean_model(copy.deepcopy(model))
    model.unembed.weight = torch.nn.Parameter(model.unembed.weight.detach() * 2)
    with pytest.raises(CircuitsError, match=r"the parameter lm_head\.weight of the hooked model was replaced"):
        lean_model(model)


def test_a_copy_has_weights_of_its_own_and_a_move_takes_the_checkpoints_tensors_along(model):
    twin, tokens = copy.deepcopy(model), torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        parameters_of(twin)["blocks.1.attn.W_Q"].mul_(2)
    assert fingerprint(twin) != fingerprint(model)
    moved = copy.deepcopy(twin).to(torch.float64)
    assert all(tensor.dtype == torch.float64 for tensor in moved.checkpoint.tensors.values())
    for one in (model, twin, moved):
        lean = lean_model(one)
        assert torch.allclose(lean.unembed(lean.run(tokens)), one(tokens), atol=1e-5)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(CircuitsError, match="there is no folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(CircuitsError, match=r"is no checkpoint: it has no config\.json"):
        load_model(tmp_path)
    with pytest.raises(CircuitsError, match="the tokenizer in"):
        load_tokenizer(tmp_path)


def test_a_truncated_checkpoint_is_refused(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(CircuitsError, match="the weights in .* are damaged"):
        load_model(folder)
    weights.unlink()
    with pytest.raises(CircuitsError, match="the weights in .* are missing"):
        load_model(folder)


def test_weights_that_do_not_fit_the_config_are_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    first = sorted(name for name in tensors if "mlp" in name)[0]
    changed = {name: value for name, value in tensors.items() if name != first}
    save_file(changed, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CircuitsError, match=f"{first} is missing from the weights"):
        load_model(folder)
    save_file(tensors | {first: tensors[first][:3].contiguous()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CircuitsError, match=f"{first} has another shape"):
        load_model(folder)
    save_file(tensors | {"extra.weight": torch.zeros(2)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CircuitsError, match=r"extra\.weight is in the weights but not in the model"):
        load_model(folder)


def test_a_damaged_config_is_refused(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(CircuitsError, match=r"config\.json is not a JSON file"):
        load_model(folder)


def test_an_architecture_that_is_not_supported_is_refused(tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 8, "word_embed_proj_dim": 8}
    OPTForCausalLM(OPTConfig(**sizes, vocab_size=10)).save_pretrained(tmp_path / "opt")
    with pytest.raises(CircuitsError, match=r"OPTForCausalLM is not supported: .*LlamaForCausalLM.* how to add one"):
        load_model(tmp_path / "opt")


@torch.no_grad()
def test_a_model_with_dynamic_angles_is_loaded_whatever_it_has_read(tokenizer):
    reference = random_model("llama, dynamic")
    tokens = torch.randint(67, (1, 30), generator=torch.Generator().manual_seed(0))
    reference(tokens)
    model = load_model(reference)
    assert torch.allclose(model(tokens[:, :12]), random_model("llama, dynamic")(tokens[:, :12]).logits, atol=1e-4)


def test_an_unknown_dtype_is_refused(huggingface):
    with pytest.raises(CircuitsError, match="the dtype 'int8' is not supported"):
        load_model(huggingface, "int8")


def test_a_model_of_somebody_else_is_refused(huggingface):
    other = hookable(huggingface)
    with pytest.raises(CircuitsError, match="was not loaded by circuits"):
        fingerprint(other)


def test_a_folder_is_not_half_written_when_saving_fails(model, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(type(model.tokenizer), "save_pretrained", fail)
    with pytest.raises(OSError, match="no space left"):
        save_model(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def departing(path, monkeypatch):
    """Spoil one of the ways that numbers are computed in, and no other."""
    if path == "hookable model":
        hooked_transformer = importlib.import_module("circuits.models.hooked_transformer")
        real = hooked_transformer.SharingTransformer.share

        def share(model, *args):
            real(model, *args)
            model.blocks[2].attn.W_O.data = -model.blocks[2].attn.W_O.data

        monkeypatch.setattr(hooked_transformer.SharingTransformer, "share", share)
        monkeypatch.setattr(hooked_transformer.SharingTransformer, "replaced", lambda _: ())
    else:
        # a layer's queries and keys without their positions
        monkeypatch.setattr(LeanModel, "rotate", lambda self, x, angles: x)  # noqa: ARG005


@pytest.mark.parametrize(("path", "layer"), [pytest.param("hookable model", 2, marks=ONLY_3), ("lean model", 0)])
def test_parity_is_checked_on_every_path_that_numbers_take(huggingface, monkeypatch, path, layer):
    departing(path, monkeypatch)
    with pytest.raises(CircuitsError, match=rf"the {path}'s logits differ .* they first depart at layer {layer}"):
        load_model(huggingface)


def test_what_is_captured_is_what_the_hookable_model_computes_whether_it_is_hooked_or_not(model, bio):
    _, cache = model.run_with_cache(bio.tokens)
    names = {"resid_pre": "hook_resid_pre", "pattern": "attn.hook_pattern", "z": "attn.hook_z", "post": "mlp.hook_post"}
    sites = [(layer, name) for layer in range(4) for name in names]
    fast = capture(model, bio.tokens, sites)
    with model.hooks(fwd_hooks=[("blocks.3.hook_resid_post", lambda stream, hook: 0 * stream)]):  # noqa: ARG005
        slow = capture(model, bio.tokens, sites)
    assert fast.keys() == slow.keys() == set(sites)
    for layer, name in sites:
        for found in (fast, slow):
            assert torch.allclose(found[layer, name], cache[f"blocks.{layer}.{names[name]}"], atol=1e-4), (layer, name)


def test_a_model_in_memory_with_hooks_is_refused(family, tokenizer):
    huggingface = new_model(f"tiny-{family}", tokenizer)
    handle = huggingface.get_input_embeddings().register_full_backward_hook(lambda *_: None)
    with pytest.raises(CircuitsError, match="a function is hooked into the model at .*embed.*: it would"):
        load_model(huggingface)
    handle.remove()
    load_model(huggingface)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_round_trip_in_shards_is_exact_and_keeps_the_dtype(folder, tmp_path, dtype):
    save_model(load_model(folder, dtype), tmp_path / "first", max_shard_size="200KB")
    save_model(load_model(tmp_path / "first", dtype), tmp_path / "second")
    assert len(list((tmp_path / "first").glob("model-*.safetensors"))) > 1
    one: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "first").glob("*.safetensors"):
        one |= load_file(file)
    two = load_file(tmp_path / "second" / "model.safetensors")
    assert one.keys() == two.keys() == load_file(folder / "model.safetensors").keys()
    for name, value in two.items():
        assert value.dtype == getattr(torch, dtype)
        assert torch.equal(one[name], value)
    assert json.loads((tmp_path / "second" / "config.json").read_text())["dtype"] == dtype


def test_the_parity_that_was_measured_is_kept(folder):
    parity = load_model(folder).checkpoint.parity
    assert parity.tokens == 12
    assert parity.window is None
    assert parity.differences.keys() == {"hookable model", "lean model"}
    assert all(0 <= difference <= parity.allowed for difference in parity.differences.values())


@pytest.mark.parametrize(
    ("window", "tokens", "unread"), [(8, 12, None), (11, 15, None), (40, 44, None), (2000, 12, 2000)]
)
def test_a_window_that_the_probe_does_not_leave_is_told(tmp_path, window, tokens, unread):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = MistralConfig(
        **sizes, vocab_size=30, intermediate_size=24, sliding_window=window, max_position_embeddings=4096
    )
    MistralForCausalLM(config).save_pretrained(tmp_path / "mistral")
    parity = load_model(tmp_path / "mistral").checkpoint.parity
    assert (parity.tokens, parity.window) == (tokens, unread)
    said = describe(tmp_path / "mistral")["parity probe"]
    assert ("; too short to leave the sliding window of 2,000" in said) == (unread is not None)


#: What a model and a task meet in.
MEETINGS = {
    "evaluate": evaluate,
    "trace": trace_gradients,
    "trace_checkpoints": lambda model, task: trace_checkpoints([model], task),
    "interventions": lambda model, task: run_interventions(model, task, Intervention((Head(0, 0),))),
    "read_head": lambda model, task: read_head(model, "L0H0", task, example=0),
    "average_head": lambda model, task: average_head(model, "L0H0", task),
    "attention_scores": attention_scores,
    "behaviour_scores": behaviour_scores,
    "head_patterns": head_patterns,
    "logit_lens": logit_lens,
    "direct_logits": direct_logits,
    "gradient_consistency": lambda model, task: gradient_consistency(model, task, task),
    "representation_consistency": lambda model, task: representation_consistency(model, task, task),
}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """Questions in the tokens of another tokenizer."""
    people = make_dataset(tmp_path_factory.mktemp("people"), DatasetSettings(people=4, pools="familiar"))
    return people.task("qa_id", word_tokenizer("familiar"))


@pytest.mark.parametrize("meet", MEETINGS.values(), ids=MEETINGS)
def test_a_task_of_another_tokenizer_is_refused(untouched, foreign, meet):
    with pytest.raises(CircuitsError, match="the task qa_id was made with another tokenizer than the model's: its tok"):
        meet(untouched, foreign)


def test_a_tokenizer_of_the_same_content_is_the_same(tasks):
    more = word_tokenizer()
    more.add_special_tokens({"sep_token": "<sep>"})
    for tokenizer in (more, None):
        check_task(SimpleNamespace(tokenizer=tokenizer), tasks["qa_id"])
    made_up = replace(tasks["qa_id"], token_texts={})
    check_task(SimpleNamespace(tokenizer=word_tokenizer("familiar")), made_up)


@pytest.mark.parametrize("token", [100_000, -1])
def test_tokens_that_a_model_does_not_embed_are_refused(untouched, tasks, token):
    tokens = tasks["qa_id"].tokens.clone()
    tokens[0, 1] = token
    task = replace(tasks["qa_id"], tokens=tokens, token_texts={})
    for meet in (evaluate, trace_gradients, MEETINGS["interventions"], MEETINGS["gradient_consistency"]):
        with pytest.raises(CircuitsError, match=f"there is a token {token}, but the model embeds tokens 0 to "):
            meet(untouched, task)
    with (
        untouched.hooks(fwd_hooks=[("blocks.0.attn.hook_z", lambda z, hook: z)]),  # noqa: ARG005
        pytest.raises(CircuitsError, match=f"there is a token {token}, but"),
    ):
        evaluate(untouched, task)
