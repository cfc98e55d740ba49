"""Every family: a small random model with all its peculiarities gives Hugging Face's numbers, and its rows cover it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from circuits.errors import CircuitsError
from circuits.models import load_config
from circuits.models.arithmetic import SITES, LeanModel
from circuits.models.families import families, family_of
from circuits.units import Head, KVGroup, Neuron

_SIZES = {
    **{"vocab_size": 67, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": None},
}
_LENGTH = 19
_WINDOW = 5
_SLIDING = {"use_sliding_window": True, "sliding_window": _WINDOW, "max_window_layers": 1}
_GEMMA = {"head_dim": 12, "sliding_window": _WINDOW, "query_pre_attn_scalar": 7, "attention_bias": True}
_NEOX = {**_SIZES, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}}
del _NEOX["num_key_value_heads"]
_GPT2 = {"vocab_size": 67, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 32}


def _scaled(kind: str, **settings):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 100.0, "factor": 3.0, **settings}}


_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
_LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}

CONFIGURATIONS = {
    "llama": ("Llama", {"head_dim": 12, "tie_word_embeddings": True}),
    "llama, biases, no groups": ("Llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    "llama, linear": ("Llama", _scaled("linear")),
    "llama, llama3": ("Llama", _scaled("llama3", **_LLAMA3)),
    "llama, yarn": ("Llama", _scaled("yarn", original_max_position_embeddings=8)),
    "llama, dynamic": ("Llama", {**_scaled("dynamic"), "max_position_embeddings": 12}),
    "mistral": ("Mistral", {"sliding_window": _WINDOW, "head_dim": 12}),
    "qwen2": ("Qwen2", {**_SLIDING, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {**_SLIDING, "head_dim": 12}),
    "qwen3, biases": ("Qwen3", {"head_dim": 12, "attention_bias": True, "num_key_value_heads": 1}),
    "gemma2": ("Gemma2", {**_GEMMA, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}),
    "gemma3": (
        "Gemma3Text",
        {
            **_GEMMA,
            "final_logit_softcapping": 3.0,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
                "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0},
            },
        },
    ),
    "gemma3, untied": ("Gemma3Text", {**_GEMMA, "num_hidden_layers": 6, "tie_word_embeddings": False}),
    "phi3": ("Phi3", {"sliding_window": _WINDOW}),
    "phi3, partly rotary": ("Phi3", {"rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 0.5}}),
    "phi3, longrope": ("Phi3", {"rope_parameters": _LONG, "original_max_position_embeddings": 16}),
    "olmo2": ("Olmo2", {"attention_bias": True}),
    "olmo2, tied": ("Olmo2", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "gpt_neox, parallel": ("GPTNeoX", {}),
    "gpt_neox, sequential": ("GPTNeoX", {"use_parallel_residual": False, "tie_word_embeddings": True}),
    "gpt_neox, no attention bias": ("GPTNeoX", {"attention_bias": False}),
    "stablelm, biases": ("StableLm", {"use_qkv_bias": True}),
    "stablelm, tied": (
        "StableLm",
        {
            "tie_word_embeddings": True,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
        },
    ),
    "gpt2": ("GPT2", {}),
    "gpt2, untied": ("GPT2", {"tie_word_embeddings": False, "n_inner": 44, "scale_attn_by_inverse_layer_idx": True}),
}


def random_model(name: str, **changes):
    """A model whose every parameter matters: biases are not zero, scales not one, attention far from uniform."""
    kind, settings = CONFIGURATIONS[name]
    sizes = {"GPT2": _GPT2, "GPTNeoX": _NEOX}.get(kind, _SIZES)
    config = getattr(transformers, f"{kind}Config")(**(sizes | settings | changes))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.config.architectures = [type(model).__name__]
    return enliven(model, 0.25)


@torch.no_grad()
def enliven(model, scale: float):
    """Add noise to every parameter: ``scale`` is that of the weights."""
    for key, parameter in model.named_parameters():
        is_vector = "norm" in key or "ln_" in key or parameter.dim() < 2
        parameter += (0.3 if is_vector else scale) * torch.randn(parameter.shape)
    return model


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def reference(name):
    return random_model(name)


def lean_of(model, dtype=None) -> LeanModel:
    family = family_of(model.config)
    return LeanModel(
        dict(model.named_parameters()), family.rows(model.config), family.layout(model.config), dtype=dtype
    )


@pytest.fixture(scope="module")
def lean(reference) -> LeanModel:
    return lean_of(reference)


def prompts(count: int = 3, length: int = _LENGTH):
    return torch.randint(67, (count, length), generator=torch.Generator().manual_seed(1))


def test_every_family_has_a_configuration():
    models = {type(random_model(name)).__name__ for name in CONFIGURATIONS}
    assert models == set(families())


@torch.no_grad()
def test_streams_and_logits_are_hugging_faces(reference, lean):
    tokens = prompts()
    expected = reference(tokens, output_hidden_states=True, use_cache=False)
    stream = lean.embed(tokens)
    for layer, hidden in enumerate(expected.hidden_states[:-1]):
        assert torch.allclose(stream, hidden, atol=1e-5 * float(hidden.abs().max()), rtol=0), layer
        stream = lean.layer(layer, stream)
    allowed = 1e-5 * float(expected.logits.abs().max())
    assert torch.allclose(lean.unembed(stream), expected.logits, atol=allowed, rtol=0)
    assert torch.equal(lean.run(tokens), stream)
    # the explicit way through attention, taken where a pattern is asked for
    patterns = {}
    visits = {(layer, "pattern"): keep(patterns, layer) for layer in range(lean.n_layers)}
    assert torch.allclose(lean.unembed(lean.run(tokens, visits=visits)), expected.logits, atol=allowed, rtol=0)
    for layer, attention in enumerate(reference(tokens, output_attentions=True).attentions):
        assert torch.allclose(patterns[layer], attention, atol=1e-5)


def keep(found, key):
    def look(x, source):
        found[key] = x
        return x

    return look


@torch.no_grad()
def test_every_peculiarity_changes_the_logits(name, reference):
    """What a configuration asks for is no decoration: the numbers are others without it."""
    layout = family_of(reference.config).layout(reference.config)
    plain = {"windows": [None] * layout.n_layers, "score_cap": None, "logit_cap": None}
    plain |= {"score_scales": [layout.d_head**-0.5] * layout.n_layers}
    own = lean_of(reference)
    for field, value in plain.items():
        if getattr(layout, field) == value:
            continue
        other = LeanModel(
            dict(reference.named_parameters()),
            family_of(reference.config).rows(reference.config),
            replace(layout, **{field: value}),
        )
        difference = own.unembed(own.run(prompts())) - other.unembed(other.run(prompts()))
        assert difference.abs().max() > 1e-2, field


@torch.no_grad()
def test_padding_on_the_right_changes_nothing(lean):
    tokens = prompts()
    if any(rotary is not None and rotary.by_length for rotary in lean.layout.rotary):
        pytest.skip("positions depend on the longest prompt, as they do in Hugging Face's model")
    padded = tokens.clone()
    padded[0, 7:] = 0
    alone = lean.run(tokens[:1, :7])[0]
    assert torch.allclose(lean.run(padded)[0, :7], alone, atol=1e-5 * float(alone.abs().max()), rtol=0)


@torch.no_grad()
def test_logits_at_some_positions(lean):
    tokens = prompts()
    where = torch.tensor([[0, 3], [2, 18], [1, 0]])
    expected = lean.unembed(lean.run(tokens))[where[:, 0], where[:, 1]]
    assert torch.allclose(lean.logits_at(tokens, where), expected, atol=1e-5, rtol=1e-5)


def test_rows_cover_every_entry_once(reference):
    rows = family_of(reference.config).rows(reference.config)
    assert len({row.name for row in rows}) == len(rows)
    tied = reference.config.tie_word_embeddings
    counts = {name: torch.zeros(value.shape) for name, value in reference.named_parameters()}
    for row in rows:
        if not (tied and row.kind == "unembedding"):
            row.stored(counts[row.tensor]).add_(1)
    for name, count in counts.items():
        assert count.eq(1).all(), name


def test_owners_are_counted_along_their_axis(reference, lean):
    layout = lean.layout
    tensors = dict(reference.named_parameters())
    counts = {Head: layout.n_heads, KVGroup: layout.n_groups, Neuron: layout.d_mlp}
    found = set()
    for row in family_of(reference.config).rows(reference.config):
        value = row.acting(row.stored(tensors[row.tensor]))
        if row.owner is not None:
            assert value.shape[row.axis] == counts[row.owner], row.name
            found.add(row.name.split(".", 2)[2])
        assert row.acts_as_stored == (
            value.data_ptr() != 0
            and value.untyped_storage().data_ptr() == tensors[row.tensor].untyped_storage().data_ptr()
        )
    assert found >= {"attn.W_Q", "attn.W_K", "attn.W_V", "attn.W_O", "mlp.W_in", "mlp.W_out"}


def test_tapped_gradients_are_autograds(reference, lean):
    """What taps deliver gives each example's gradient of every checkpoint tensor."""
    tokens = prompts()
    detached = LeanModel(
        {name: value.detach() for name, value in reference.named_parameters()},
        family_of(reference.config).rows(reference.config),
        lean.layout,
    )
    found = {name: torch.zeros(len(tokens), *value.shape) for name, value in reference.named_parameters()}
    with torch.enable_grad():

        def receive(use):
            def add(gradient):
                found[use.tensor] += by_example(use, gradient)

            use.written.register_hook(add)

        taps = dict.fromkeys(found, receive)
        logits = detached.unembed(detached.run(tokens, taps=taps), taps)
        losses_of(logits, tokens).sum().backward()
        for example in range(len(tokens)):
            reference.zero_grad()
            losses_of(reference(tokens[example : example + 1]).logits, tokens[example : example + 1]).sum().backward()
            for key, parameter in reference.named_parameters():
                largest = float(parameter.grad.abs().max())
                assert largest > 0, key
                assert torch.allclose(found[key][example], parameter.grad, atol=2e-5 * largest, rtol=0), key
        reference.zero_grad()
        # and where the tensors require gradients themselves, autograd finds the same through the views
        losses_of(lean.unembed(lean.run(tokens)), tokens).sum().backward()
        for key, parameter in reference.named_parameters():
            total = found[key].sum(0)
            assert torch.allclose(parameter.grad, total, atol=2e-5 * float(total.abs().max()), rtol=0), key
        reference.zero_grad()


def losses_of(logits, tokens):
    rows = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return rows.view(len(tokens), -1).mean(1)


def by_example(use, gradient):
    """One gradient for each example, from what a tap tells; written out."""
    if use.kind in ("embedding", "position"):
        total = torch.zeros(len(gradient), 67 if use.kind == "embedding" else 32, gradient.shape[-1])
        for example in range(len(gradient)):
            total[example].index_add_(0, use.read[example], gradient[example])
        return total
    if use.kind in ("weight", "unembedding"):
        first, second = (use.read, gradient) if use.inputs_first else (gradient, use.read)
        return torch.einsum("epo,epi->eoi", first, second.detach())
    rows = gradient * use.read if use.kind == "scale" else gradient
    return rows.reshape(len(rows), -1, rows.shape[-1]).sum(1)


@torch.no_grad()
def test_a_weight_changed_in_place_is_seen_at_once(name):
    model = random_model(name)
    lean, tokens = lean_of(model), prompts()
    for parameter in model.parameters():
        parameter.mul_(1.1).add_(0.01)
    expected = model(tokens).logits
    assert torch.allclose(lean.unembed(lean.run(tokens)), expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


@torch.no_grad()
def test_a_head_zeroed_at_z_is_a_head_without_output_weights(name):
    model, tokens, head = random_model(name), prompts(), 2
    lean = lean_of(model)

    def zero(z, source):
        z = z.clone()
        z[:, :, head] = 0
        return z

    found = lean.unembed(lean.run(tokens, visits={(1, "z"): zero}))
    row = next(row for row in family_of(model.config).rows(model.config) if row.name == "blocks.1.attn.W_O")
    row.stored(dict(model.named_parameters())[row.tensor])[head] = 0
    expected = model(tokens).logits
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


@torch.no_grad()
def test_sites_are_visited_in_order_and_add_up(lean):
    tokens, order, seen = prompts(), [], {}

    def visit(site):
        def look(x, source):
            order.append(site)
            seen[site] = x
            return x

        return look

    sites = [(layer, name) for layer in range(lean.n_layers) for name in SITES]
    if lean.parallel:
        sites = [site for site in sites if site[1] != "resid_mid"]
    final = lean.run(tokens, visits={site: visit(site) for site in sites})
    assert order == sites
    for layer in range(lean.n_layers):
        total = seen[layer, "resid_pre"] + seen[layer, "attn_out"] + seen[layer, "mlp_out"]
        assert torch.allclose(total, seen[layer, "resid_post"], atol=1e-5)
        heads = {"q": lean.n_heads, "k": lean.n_groups, "v": lean.n_groups, "z": lean.n_heads}
        for site, count in heads.items():
            assert seen[layer, site].shape == (*tokens.shape, count, lean.d_head)
    assert torch.equal(final, seen[lean.n_layers - 1, "resid_post"])


@torch.no_grad()
def test_pieces_compute_what_the_whole_does(lean):
    """The tree's calls: some queries only, some neurons only, one head only."""
    layer, x = lean.layers[1], torch.randn(2, 5, lean.d_model)
    q, k, v = layer.queries_keys_values(x)
    asked = layer.queries_keys_values(x, x[:, 3:])
    for found, expected in zip(asked, (q[:, 3:], k, v), strict=True):
        assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(layer.k.part(slice(0, 1))(x), k[:, :, 0], atol=1e-5)
    assert torch.allclose(layer.q.part(slice(3, 4))(x), q[:, :, 3], atol=1e-5)
    assert torch.allclose(layer.neurons(x, slice(7, 9)), layer.hidden(x)[..., 7:9], atol=1e-5)


def test_an_unknown_key_is_refused_by_name(reference):
    config = type(reference.config)(**{**reference.config.to_dict(), "clip_qkv": 8.0})
    config.architectures = [type(reference).__name__]
    with pytest.raises(CircuitsError, match="sets clip_qkv to 8.0, which circuits does not understand"):
        family_of(config)


PUBLISHED = json.loads((Path(__file__).parent / "published_configs.json").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_config_files_are_understood_as_their_makers_publish_them(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    config = load_config(tmp_path)
    layout = family_of(config).layout(config)
    assert layout.n_layers == PUBLISHED[name].get("num_hidden_layers", 12)
    assert layout.d_model == PUBLISHED[name].get("hidden_size", 768)
    window = PUBLISHED[name].get("sliding_window") if "qwen" not in name.lower() else None
    assert set(layout.windows) <= {window, None}
    assert (window in layout.windows) or window is None


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("gemma2", "use_bidirectional_attention", True),
        ("gemma3", "attn_logit_softcapping", 20.0),
        ("gpt2", "add_cross_attention", True),
        ("stablelm, biases", "use_parallel_residual", True),
        ("stablelm, biases", "qk_layernorm", True),
        ("llama", "quantization_config", {"quant_method": "gptq"}),
        ("llama", "chunk_size_feed_forward", 4),
    ],
)
def test_what_changes_the_computation_is_refused(name, key, value):
    config = random_model(name).config
    setattr(config, key, value)
    with pytest.raises(CircuitsError, match=key):
        family_of(config)


def test_another_architecture_is_refused():
    config = transformers.OPTConfig(architectures=["OPTForCausalLM"])
    with pytest.raises(CircuitsError, match="architecture OPTForCausalLM is not supported: .*docs/adding-a-family.md"):
        family_of(config)


def test_tensors_that_do_not_fit_are_refused(reference, lean):
    tensors = dict(reference.named_parameters())
    rows, layout = family_of(reference.config).rows(reference.config), lean.layout
    first = rows[0].tensor
    with pytest.raises(CircuitsError, match=f"no tensor {first}"):
        LeanModel({key: value for key, value in tensors.items() if key != first}, rows, layout)
    with pytest.raises(CircuitsError, match="a tensor adapter.weight that its family does not know"):
        LeanModel({**tensors, "adapter.weight": torch.zeros(1)}, rows, layout)
    with pytest.raises(CircuitsError, match=f"{first} does not fit its config"):
        LeanModel({**tensors, first: torch.zeros(5, 7)}, rows, layout)


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("ln_final.w", None, "ln_final has no scale: norms without weights"),
        ("ln_final.w", {"factor": 2.0}, "ln_final.w has a factor or offset: only a norm's scale can have an offset"),
        ("blocks.0.mlp.W_in", {"factor": 2.0}, "blocks.0.mlp.W_in acts as stored"),
        ("unembed.W_U", {"factor": 2.0}, "unembed.W_U acts as stored"),
    ],
)
def test_rows_that_say_what_is_not_computed_are_refused(name, changes, sentence):
    reference = random_model("llama, linear")
    rows, layout = (getattr(family_of(reference.config), part)(reference.config) for part in ("rows", "layout"))
    said = [
        row if row.name != name else replace(row, **changes) for row in rows if row.name != name or changes is not None
    ]
    kept = {row.tensor for row in said}
    tensors = {key: value for key, value in reference.named_parameters() if key in kept}
    with pytest.raises(CircuitsError, match=sentence):
        LeanModel(tensors, said, layout).run(prompts())


def test_no_such_site_and_no_such_tensor(lean):
    with pytest.raises(CircuitsError, match="no activation hook_z in layer 0"):
        lean.run(prompts(), visits={(0, "hook_z"): keep({}, 0)})
    with pytest.raises(CircuitsError, match="no tensor W_E"):
        lean.run(prompts(), taps={"W_E": print})


def test_a_prompt_longer_than_learned_positions_is_refused():
    with pytest.raises(CircuitsError, match="a prompt has 33 tokens, the model 32 positions"):
        lean_of(random_model("gpt2")).run(prompts(1, 33))
