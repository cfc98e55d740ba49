"""The hookable model of every family, by both backends, against Hugging Face's model and its own weights."""

import copy
import socket
from functools import cache

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
)

from circuits.errors import CircuitsError
from circuits.models.families import families, family_of
from circuits.models.hookable import backends, hook_points, hookable, probe, user_hooks

BOTH = ("hooked_transformer", "bridge")
TOKENS = torch.randint(61, (2, 14), generator=torch.Generator().manual_seed(1))


def small(kind, **settings):
    shape = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    return kind(**{**shape, **settings, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None})


def small_gpt2(**settings):
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return GPT2Config(vocab_size=61, n_embd=32, n_layer=3, n_head=4, n_positions=64, **settings, **tokens)


def rope(kind="default", **settings):
    return {"rope_type": kind, "rope_theta": 500000.0, **settings}


LLAMA3 = rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=16)

# windows shorter than the tokens, caps that bite, fewer key/value heads than heads
CONFIGS = {
    "gemma2": small(
        Gemma2Config,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=5,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        query_pre_attn_scalar=24,
    ),
    "gemma3": small(
        Gemma3TextConfig,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=5,
        query_pre_attn_scalar=24,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gpt2": small_gpt2(n_inner=48),
    "gpt2-default-mlp": small_gpt2(),
    "llama": small(LlamaConfig, num_key_value_heads=2, rope_parameters=LLAMA3),
    "llama-biases": small(LlamaConfig, attention_bias=True),
    "llama-linear": small(LlamaConfig, num_key_value_heads=2, rope_parameters=rope("linear", factor=4.0)),
    "llama-yarn": small(LlamaConfig, num_key_value_heads=2, rope_parameters=YARN),
    "mistral": small(MistralConfig, num_key_value_heads=2, head_dim=8, sliding_window=5),
    "neox": small(GPTNeoXConfig, rope_parameters=rope(partial_rotary_factor=0.5)),
    "neox-no-biases": small(GPTNeoXConfig, attention_bias=False, rope_parameters=rope(partial_rotary_factor=0.5)),
    "neox-sequential": small(
        GPTNeoXConfig, use_parallel_residual=False, rope_parameters=rope(partial_rotary_factor=0.5)
    ),
    "olmo2": small(Olmo2Config, num_key_value_heads=2),
    "phi3": small(Phi3Config, num_key_value_heads=2, sliding_window=5),
    "stablelm": small(StableLmConfig, num_key_value_heads=2, use_qkv_bias=True),
    "qwen2": small(Qwen2Config, num_key_value_heads=2),
    "qwen3": small(Qwen3Config, num_key_value_heads=2, head_dim=16),
}


def lively(name, seed=0):
    """A Hugging Face model whose every tensor matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).eval()
    with torch.no_grad():
        for tensor, parameter in model.named_parameters():
            scale = (
                0.1 if "norm" in tensor or "ln_" in tensor else 0.5 if "embed" in tensor or "wte" in tensor else 0.25
            )
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(params=BOTH)
def backend(request):
    if request.param not in backends():
        pytest.skip(f"this TransformerLens has no {request.param}")
    return request.param


#: Each family once; its variants differ in a layer's arithmetic alone, and have a test of that.
FAMILIES = [name for name in CONFIGS if "-" not in name]


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


@cache
def _made(name, backend):
    reference = lively(name)
    before = {tensor: parameter.detach().clone() for tensor, parameter in reference.named_parameters()}
    return reference, hookable(reference, backend=backend), before


@pytest.fixture
def made(name, backend):
    """A Hugging Face model and the hookable one of its tensors, for tests that leave both as they were."""
    reference, model, before = _made(name, backend)
    yield reference, model
    assert user_hooks(model) == []
    model.zero_grad()
    reference.zero_grad()
    for tensor, parameter in reference.named_parameters():
        assert torch.equal(parameter, before[tensor]), tensor


@pytest.fixture
def reference(made):
    return made[0]


@pytest.fixture
def model(made):
    return made[1]


def logits_of(model, tokens=TOKENS):
    with torch.no_grad():
        output = model(tokens)
    return getattr(output, "logits", output)


def hooked_logits(model, functions, tokens=TOKENS):
    with model.hooks(fwd_hooks=list(functions.items())):
        return logits_of(model, tokens)


def nothing(activation, hook):
    return torch.zeros_like(activation)


def flipped(activation, hook):
    return activation.flip(0)


def put(value):
    def function(activation, hook):
        return value

    return function


def near(one, two, share=1e-5):
    return float((one - two).abs().max()) <= share * float(two.abs().max())


def projection(reference, layer, part):
    """Of the attention or MLP of a layer of any family: the output projection, as (weight [out, in], bias)."""
    base = reference.base_model
    block = (base.h if hasattr(base, "h") else base.layers)[layer]
    module = {
        "attention": lambda: getattr(
            getattr(block, "self_attn", None) or getattr(block, "attention", None) or block.attn,
            "o_proj" if hasattr(block, "self_attn") else "dense" if hasattr(block, "attention") else "c_proj",
        ),
        "mlp": lambda: next(
            getattr(block.mlp, name) for name in ("down_proj", "dense_4h_to_h", "c_proj") if hasattr(block.mlp, name)
        ),
    }[part]()
    return (module.weight.T if hasattr(base, "h") else module.weight), module.bias


def test_every_family_is_here():
    assert {type(lively(name)).__name__ for name in CONFIGS} == set(families())


@pytest.mark.parametrize("name", CONFIGS)
def test_it_computes_what_hugging_face_computes_and_leaves_that_model_as_it_was(name, backend):
    reference = lively(name)
    names, before = [name for name, _ in reference.named_parameters()], logits_of(reference)
    implementation = reference.config._attn_implementation
    model = hookable(reference, backend=backend)
    assert near(logits_of(model), before)
    assert [name for name, _ in reference.named_parameters()] == names
    assert torch.equal(logits_of(reference), before)
    assert reference.config._attn_implementation == implementation


@torch.no_grad()
def test_a_change_of_any_tensor_in_place_is_seen_at_once(reference, model):
    generator, before = torch.Generator().manual_seed(2), logits_of(model)
    for tensor, parameter in reference.named_parameters():
        if ".0." in tensor or ".2." in tensor:
            continue
        old = parameter.clone()
        parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        changed = logits_of(reference)
        # keys' biases shift every score of a query alike where positions are not rotary
        assert not near(changed, before) or "c_attn.bias" in tensor, tensor
        assert near(logits_of(model), changed, 2e-5), tensor
        parameter.copy_(old)
    assert near(logits_of(model), logits_of(reference))


@torch.no_grad()
def test_a_change_through_the_hookable_model_is_seen_by_hugging_face(reference, model):
    attention = model.blocks[1].attn
    for weight in (attention.o.weight if hasattr(attention, "o") else attention.W_O, model.ln_final.w):
        old, before = weight.clone(), logits_of(reference)
        # not a factor, which a norm behind it would undo
        weight += 0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(4))
        assert not near(logits_of(reference), before)
        assert near(logits_of(model), logits_of(reference))
        weight.copy_(old)


def test_parameters_take_no_memory_of_their_own(reference, model):
    own = {parameter.untyped_storage().data_ptr() for parameter in reference.parameters()}
    for tensor, parameter in model.named_parameters():
        assert parameter.untyped_storage().data_ptr() in own or not parameter.any(), tensor


def test_gradients_at_parameters_are_those_of_the_checkpoints_tensors(reference, model, backend):
    logits_of_reference = reference(TOKENS).logits
    logits_of_reference.square().mean().backward()
    expected = {name: parameter.grad.clone() for name, parameter in reference.named_parameters()}
    reference.zero_grad()
    model(TOKENS).square().mean().backward()
    if backend == "bridge":
        found = {name: parameter.grad for name, parameter in reference.named_parameters()}
    else:
        config = copy.copy(reference.config)
        config.architectures = [type(reference).__name__]
        hooked, names = dict(model.named_parameters()), dict(reference.named_parameters())
        with torch.no_grad():
            found = {name: torch.zeros_like(parameter) for name, parameter in names.items()}
            for row in family_of(config).rows(config):
                row.stored(found[row.tensor]).add_(hooked[model.own_name(row.name)].grad)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for tensor, gradient in expected.items():
        assert torch.allclose(found[tensor], gradient, atol=1e-5 * largest, rtol=1e-4), tensor


@torch.no_grad()
def test_a_head_or_neuron_set_to_zero_is_a_head_or_neuron_without_output_weights(reference, model):
    width = model.cfg.d_head

    for site, part, rows in (("z", "attention", slice(2 * width, 3 * width)), ("post", "mlp", slice(7, 9))):
        weight, _ = projection(reference, 1, part)
        old = weight[:, rows].clone()

        def ablate(activation, hook, rows=rows):
            flat = activation.flatten(2).clone()
            flat[..., rows] = 0
            return flat.view(activation.shape)

        found, before = hooked_logits(model, {hook_points(model, 1)[site]: ablate}), logits_of(model)
        weight[:, rows] = 0
        assert near(found, logits_of(reference))
        assert not near(found, before, 1e-3)
        weight[:, rows] = old


@torch.no_grad()
def test_attention_or_mlp_set_to_zero_is_one_without_an_output_projection(reference, model):
    for site, part in (("attn_out", "attention"), ("mlp_out", "mlp")):
        weight, bias = projection(reference, 1, part)
        found = hooked_logits(model, {hook_points(model, 1)[site]: nothing})
        kept = [(tensor, tensor.clone()) for tensor in (weight, bias) if tensor is not None]
        for tensor, _ in kept:
            tensor.zero_()
        assert near(found, logits_of(reference))
        for tensor, old in kept:
            tensor.copy_(old)


@torch.no_grad()
def test_attention_can_be_computed_by_hand_from_its_hook_points(model):
    points, kept = hook_points(model, 1), {}

    def keep(site):
        def function(activation, hook):
            kept[site] = activation.clone()

        return function

    hooked_logits(model, {points[site]: keep(site) for site in ("q", "k", "v", "pattern", "z")})
    cfg = model.cfg
    groups = cfg.n_key_value_heads or cfg.n_heads
    assert kept["q"].shape == kept["z"].shape == (2, 14, cfg.n_heads, cfg.d_head)
    assert kept["k"].shape == kept["v"].shape == (2, 14, groups, cfg.d_head)
    assert kept["pattern"].shape == (2, cfg.n_heads, 14, 14)
    assert torch.allclose(kept["pattern"].sum(-1), torch.ones(2, cfg.n_heads, 14), atol=1e-5)
    v = kept["v"].repeat_interleave(cfg.n_heads // groups, 2)
    assert torch.allclose(torch.einsum("bhqk,bkhd->bqhd", kept["pattern"], v), kept["z"], atol=1e-5)
    # a pattern put in the pattern's place is what z is made of, and a q, k or v what the pattern and z are made of
    turned = kept["pattern"].flip(0)
    z = torch.einsum("bhqk,bkhd->bqhd", turned, v)
    by_pattern = hooked_logits(model, {points["pattern"]: put(turned)})
    assert near(by_pattern, hooked_logits(model, {points["z"]: put(z)}))
    z = torch.einsum("bhqk,bkhd->bqhd", kept["pattern"], v.flip(0))
    by_v = hooked_logits(model, {points["v"]: flipped})
    assert near(by_v, hooked_logits(model, {points["z"]: put(z)}))
    both = {points["q"]: flipped, points["k"]: flipped}
    assert near(hooked_logits(model, both), by_pattern)


@torch.no_grad()
def test_the_mlp_and_the_stream_can_be_computed_by_hand_from_their_hook_points(model):
    points, kept = hook_points(model, 1), {}

    def keep(site):
        def function(activation, hook):
            kept[site] = activation.clone()

        return function

    hooked_logits(model, {point: keep(site) for site, point in points.items()})
    assert torch.allclose(kept["resid_pre"] + kept["attn_out"] + kept["mlp_out"], kept["resid_post"], atol=1e-4)
    if "pre_linear" in points:
        share = kept["post"] / kept["pre_linear"]
        # an activation function depends on nothing but what it reads
        order = kept["pre"].flatten().argsort()
        steps = share.flatten()[order].diff().abs() / (kept["pre"].flatten()[order].diff() + 1e-4)
        assert float(steps.median()) < 1.2
        no_gate = hooked_logits(model, {points["pre_linear"]: nothing})
        assert near(no_gate, hooked_logits(model, {points["post"]: nothing}))
    nothing_in = hooked_logits(model, {points["pre"]: nothing})
    assert near(nothing_in, hooked_logits(model, {points["post"]: nothing}))
    after = hooked_logits(model, {hook_points(model, 0)["resid_post"]: flipped})
    assert near(after, logits_of(model).flip(0))
    assert near(hooked_logits(model, {points["resid_pre"]: flipped}), after)


@torch.no_grad()
def test_a_hook_point_holds_the_same_and_does_the_same_in_both_backends(name):
    if backends() != BOTH:
        pytest.skip("this TransformerLens has one backend")
    models = [_made(name, backend)[1] for backend in BOTH]
    assert hook_points(models[0], 1) == hook_points(models[1], 1)
    for point in hook_points(models[0], 1).values():
        seen = []

        def noisy(activation, hook):
            seen.append(activation.clone())
            noise = torch.randn(activation.shape, generator=torch.Generator().manual_seed(3))
            return activation + 0.1 * noise

        outputs = [hooked_logits(model, {point: noisy}) for model in models]
        assert len(seen) == 2, point
        assert near(seen[0], seen[1], 2e-5), point
        assert near(outputs[0], outputs[1], 2e-5), point


@torch.no_grad()
def test_functions_may_change_an_activation_in_place(model):
    point = hook_points(model, 1)["z"]

    def in_place(z, hook):
        z[:, :, 2] = 0

    def returning(z, hook):
        return torch.cat([z[:, :, :2], 0 * z[:, :, 2:3], z[:, :, 3:]], 2)

    returned = hooked_logits(model, {point: returning})
    assert near(hooked_logits(model, {point: in_place}), returned)


def test_run_with_hooks_and_the_cache_take_the_names(model):
    points = hook_points(model, 1)
    with torch.no_grad():
        found = model.run_with_hooks(TOKENS, fwd_hooks=[(points["z"], nothing)])
        assert torch.equal(found, hooked_logits(model, {points["z"]: nothing}))
        logits, cache = model.run_with_cache(TOKENS, names_filter=[*points.values()])
        assert near(logits, logits_of(model))
        assert all(cache[point].shape[0] == 2 for point in points.values())


def test_every_hook_point_is_probed(name, model, monkeypatch):
    probe(model, TOKENS)
    # the probe takes one after the other, in every family alike
    for site in ("q", "pattern", "z", "pre", "mlp_out") if name == "llama" else ("pattern", "mlp_out"):
        place = hook_points(model, 1)[site]
        point = model.hook_dict[place]
        with monkeypatch.context() as patch:
            # the function runs, and what it returns is dropped
            patch.setattr(point, "add_hook", _dropping(point.add_hook))
            with pytest.raises(CircuitsError, match=f"a change at the hook point {place} does not reach the logits"):
                probe(model, TOKENS)
    probe(model, TOKENS)
    assert user_hooks(model) == []
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_probe_gives_what_the_model_computes_and_needs_no_parameter_that_learns(model):
    model.requires_grad_(False)
    points = [hook_points(model, layer)["resid_pre"] for layer in range(model.cfg.n_layers)]
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS, names_filter=points)
    streams, logits = probe(model, TOKENS)
    model.requires_grad_(True)
    assert torch.equal(logits, logits_of(model))
    assert not logits.requires_grad
    assert len(streams) == len(points)
    assert all(torch.equal(stream, cache[point]) for stream, point in zip(streams, points, strict=True))


@pytest.mark.skipif("hooked_transformer" not in backends(), reason="the tables are HookedTransformer's")
@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("llama", 1),
        ("gemma3", 2),
        *(pytest.param(name, 1, marks=pytest.mark.slow) for name in ("llama-yarn", "neox")),
    ],
)
def test_layers_with_the_same_angles_have_one_table_which_grows(name, kinds):
    config = copy.deepcopy(CONFIGS[name])
    # long texts, of one head
    for heads in ("num_attention_heads", "num_key_value_heads"):
        if hasattr(config, heads):
            setattr(config, heads, 1)
    config.max_position_embeddings = 3000
    model = hookable(AutoModelForCausalLM.from_config(config), backend="hooked_transformer")
    assert model.cfg.n_ctx == 3000
    assert len({block.attn.rotary_sin.data_ptr() for block in model.blocks}) == kinds
    for length, kept in ((14, 2048), (2100, 3000)):
        logits_of(model, torch.zeros(1, length, dtype=torch.long))
        for block in model.blocks:
            attention, cfg = block.attn, model.cfg
            own = attention.calculate_sin_cos_rotary(cfg.rotary_dim, kept, attention._rotary_base(), cfg.dtype)
            assert torch.equal(attention.rotary_sin, own[0])
            assert torch.equal(attention.rotary_cos, own[1])


def _dropping(add):
    def dropping(function, *args, **kwargs):
        def ignored(activation, hook):
            function(activation, hook=hook)

        return add(ignored, *args, **kwargs)

    return dropping


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_functions_of_users_are_found(model):
    logits_of(model)
    assert user_hooks(model) == []
    z, pattern = (hook_points(model, 1)[site] for site in ("z", "pattern"))

    def look(*_, **__):
        return None

    with model.hooks(fwd_hooks=[(z, look)], bwd_hooks=[(pattern, look)]):
        found = [(hook.name, hook.direction, hook.permanent, hook.function) for hook in user_hooks(model)]
        assert sorted(found, key=str) == sorted(
            [(z, "forward", False, look), (pattern, "backward", False, look)], key=str
        )
    assert user_hooks(model) == []
    model.add_hook(z, look)
    model.add_perma_hook(pattern, look)
    assert {(hook.name, hook.permanent) for hook in user_hooks(model)} == {(z, False), (pattern, True)}
    model.reset_hooks()
    assert [hook.name for hook in user_hooks(model)] == [pattern]
    model.reset_hooks(including_permanent=True)
    assert user_hooks(model) == []
    handles = [model.blocks[1].mlp.register_forward_pre_hook(look), model.hook_dict[z].register_forward_hook(look)]
    found = {(hook.name, hook.direction, hook.function) for hook in user_hooks(model)}
    assert found == {("blocks.1.mlp", "forward", look), (z, "forward", look)}
    for handle in handles:
        handle.remove()
    assert user_hooks(model) == []


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_backward_hooks_do_not_stay(model):
    point, seen = hook_points(model, 1)["z"], []

    def see(gradient, hook):
        seen.append(gradient.shape)

    for _ in range(2):
        with model.hooks(bwd_hooks=[(point, see)]):
            model(TOKENS).sum().backward()
    model(TOKENS).sum().backward()
    assert len(seen) == 2
    assert not any(point.fwd_hooks or point.bwd_hooks for point in model.hook_dict.values())


@pytest.mark.parametrize("name", ["llama"])
def test_the_tokenizer_is_taken_as_it_is_and_nothing_is_fetched(reference, backend, tokenizer, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a request to the network")

    monkeypatch.setattr(socket, "socket", refuse)
    before = (tokenizer.backend_tokenizer.to_str(), tokenizer.padding_side, tokenizer.special_tokens_map)
    model = hookable(reference, tokenizer, backend=backend)
    assert model.tokenizer is tokenizer
    assert (tokenizer.backend_tokenizer.to_str(), tokenizer.padding_side, tokenizer.special_tokens_map) == before
    assert model.cfg.default_prepend_bos == (len(tokenizer("").input_ids) > 0)
    assert model.cfg.d_vocab == 61


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_in_the_config_are_the_checkpoints(name, backend):
    reference, model, _ = _made(name, backend)
    cfg, config = model.cfg, reference.config
    assert (cfg.n_layers, cfg.n_heads, cfg.d_model, cfg.d_vocab) == (3, 4, 32, 61)
    assert cfg.d_mlp == projection(reference, 0, "mlp")[0].shape[1]
    assert cfg.d_head == projection(reference, 0, "attention")[0].shape[1] // 4
    assert (cfg.n_key_value_heads or cfg.n_heads) == getattr(config, "num_key_value_heads", 4)
    assert cfg.dtype == torch.float32
    assert str(cfg.device) == "cpu"


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.bfloat16) for name in FAMILIES), ("llama", torch.float16), ("gemma2", torch.float16)],
)
def test_half_precision_stays_what_it_is(name, backend, dtype):
    reference = lively(name).to(dtype)
    model = hookable(reference, backend=backend)
    assert model.cfg.dtype == dtype
    found, expected = logits_of(model), logits_of(reference)
    assert found.dtype == dtype
    assert near(found.float(), expected.float(), 0.1 if dtype == torch.bfloat16 else 0.02)


def test_what_cannot_be_hooked_is_refused(backend):
    with pytest.raises(CircuitsError, match="has no backend 'nnsight': choose from .*bridge"):
        hookable(lively("llama"), backend="nnsight")
    with torch.random.fork_rng(devices=[]):
        config = BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=61)
        bloom = AutoModelForCausalLM.from_config(config).eval()
        biased = AutoModelForCausalLM.from_config(small(LlamaConfig, mlp_bias=True)).eval()
    if backend == "hooked_transformer":
        with pytest.raises(
            CircuitsError, match="the architecture BloomForCausalLM is not supported: GPT2LMHeadModel, "
        ):
            hookable(bloom, backend=backend)
        with pytest.raises(
            CircuitsError, match=r"a tensor .*mlp.gate_proj.bias that HookedTransformer .* backend=\"bridge\""
        ):
            hookable(biased, backend=backend)
        # unless one was asked for, the other backend takes its place
        assert hasattr(hookable(biased), "original_model")
        assert not hasattr(hookable(lively("llama")), "original_model")
    else:
        assert near(logits_of(hookable(biased, backend=backend)), logits_of(biased))
    with pytest.raises(CircuitsError, match=r"has no hook point blocks.7.hook_resid_pre: functions cannot act there"):
        hook_points(hookable(lively("llama"), backend=backend), 7)
