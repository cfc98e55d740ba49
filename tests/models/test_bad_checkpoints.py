"""Checkpoints that must not load: each is refused in one sentence, runs none of its code and asks no network."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import huggingface_hub
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from circuits.cli import main
from circuits.errors import CircuitsError
from circuits.facts import word_tokenizer
from circuits.models import fingerprint, load_model, save_model
from tests.fixtures import lively
from tests.processes import ended, forked, needs_fork

Q, NORM = "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """One folder whose weights lie in shards, one saved by us, and an adapter of the first."""
    place = tmp_path_factory.mktemp("good")
    model = lively("llama")
    model.save_pretrained(place / "model")
    model.save_pretrained(place / "shards", max_shard_size="200KB")
    tokenizer = word_tokenizer()
    for name in ("model", "shards"):
        tokenizer.save_pretrained(place / name)
    save_model(load_model(place / "model"), place / "ours")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(place / "adapter")
    return place


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a request to the network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)


def settings(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def weights(folder: Path, **changes: object) -> None:
    tensors = {name: value.clone() for name, value in load_file(folder / "model.safetensors").items()}
    for name, change in changes.items():
        tensors[name] = change(tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def flip(file: Path, byte: int, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[byte] ^= 1 << bit
    file.write_bytes(data)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def index(folder: Path, change: object) -> None:
    file = folder / "model.safetensors.index.json"
    content = json.loads(file.read_text())
    change(content["weight_map"])
    file.write_text(json.dumps(content))


def outward(folder: Path, name: str) -> None:
    target = folder.parent / f"elsewhere-{name}"
    shutil.move(folder / name, target)
    (folder / name).symlink_to(target)


def first(value: float):
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[7] = value
        return tensor

    return change


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def own_code(folder: Path) -> None:
    for name in ("configuration_own", "modeling_own", "tokenization_own"):
        (folder / f"{name}.py").write_text(f"open({str(folder.parent / 'ran')!r}, 'w').close()\n")
    auto = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    settings(folder, architectures=["OwnForCausalLM"], model_type="own", auto_map=auto)


def tokenizer_code(folder: Path) -> None:
    own_code(folder)
    settings(folder, architectures=["LlamaForCausalLM"], model_type="llama")
    file = folder / "tokenizer_config.json"
    auto = {"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}, "tokenizer_class": "Own"}
    (folder / "tokenizer.json").unlink()
    file.write_text(json.dumps(json.loads(file.read_text()) | auto))


def more_words(folder: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["<new>", "<newer>"])
    tokenizer.save_pretrained(folder)


def foreign_words(folder: Path) -> None:
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    words = content["model"]["vocab"]
    words.update({word: place + 1000 for word, place in words.items() if place > 100})
    file.write_text(json.dumps(content))


def gpt2(folder: Path) -> None:
    shutil.rmtree(folder)
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=10)).save_pretrained(folder)
    settings(folder, architectures=["ElephantForCausalLM"])


def adapter_settings(folder: Path, **changes: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "../model"} | changes))


def adapter_weights(folder: Path, change: object) -> None:
    adapter_settings(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(change(tensors), folder / "adapter_model.safetensors")


def adapter_pickle(folder: Path) -> None:
    adapter_settings(folder)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def adapter_of_another_base(folder: Path) -> None:
    adapter_settings(folder, base_model_name_or_path="../small")
    shutil.copytree(folder.parent / "model", folder.parent / "small")
    small = lively("llama").config.to_dict() | {"hidden_size": 32, "head_dim": 8, "vocab_size": 461}
    AutoModelForCausalLM.from_config(type(lively("llama").config)(**small)).save_pretrained(folder.parent / "small")


def prompt_tuning(folder: Path) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    peft.get_peft_model(lively("llama"), config).save_pretrained(folder)
    adapter_settings(folder)


def both(folder: Path) -> None:
    shutil.copy(folder.parent / "adapter" / "adapter_config.json", folder)


# name: which good folder, how it is spoilt, what the sentence says
BAD = {
    "truncated weights": ("model", lambda f: os.truncate(f / "model.safetensors", 100_000), "are damaged"),
    "weights of 0 bytes": ("model", lambda f: os.truncate(f / "model.safetensors", 0), "are damaged"),
    "bit flipped in the header's length": ("model", lambda f: flip(f / "model.safetensors", 6, 3), "are damaged"),
    "bit flipped in the header": ("model", lambda f: flip(f / "model.safetensors", 8, 2), "are damaged"),
    "bit flipped in a number we saved": (
        "ours",
        lambda f: flip(f / "model.safetensors", -9, 0),
        "is not what was saved there",
    ),
    "wrong shape": ("model", lambda f: weights(f, **{Q: lambda t: t[:32].clone()}), f"{Q} has another shape"),
    "not a number": ("model", lambda f: weights(f, **{Q: first(float("nan"))}), f"{Q} in .* 1 of 4,096 numbers"),
    "infinite": ("model", lambda f: weights(f, **{NORM: first(-float("inf"))}), f"{NORM} in .* not finite"),
    "integers": ("model", lambda f: weights(f, **{Q: lambda t: t.to(torch.int8)}), "holds I8 and no floating-point"),
    "eight-bit floats": ("model", lambda f: weights(f, **{Q: lambda t: t.to(torch.float8_e4m3fn)}), "holds F8_E4M3"),
    "quantised": (
        "model",
        lambda f: settings(f, quantization_config={"quant_method": "gptq", "bits": 4}),
        r"are quantised \(gptq\)",
    ),
    "missing weights": ("model", lambda f: (f / "model.safetensors").unlink(), "are missing"),
    "missing shard": ("shards", lambda f: shards(f)[0].unlink(), "names model-00001-of.* which is not there"),
    "index names another file": (
        "shards",
        lambda f: index(f, lambda names: names.update({Q: "other.safetensors"})),
        "names other.safetensors, which is not there",
    ),
    "index names a file above the folder": (
        "shards",
        lambda f: index(f, lambda names: names.update({Q: "../model/model.safetensors"})),
        r"names \.\./model/model\.safetensors, which is no file of this folder",
    ),
    "index names a whole path": (
        "shards",
        lambda f: index(f, lambda names: names.update({Q: "/etc/passwd"})),
        "names /etc/passwd, which is no file of this folder",
    ),
    "index puts a tensor into the wrong shard": (
        "shards",
        lambda f: index(f, lambda names: names.update({Q: next(n for n in names.values() if n != names[Q])})),
        "and it is not there",
    ),
    "index without a map": (
        "shards",
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": []}'),
        "has no weight_map",
    ),
    "a tensor in two shards": (
        "shards",
        lambda f: save_file({**load_file(shards(f)[0]), **load_file(shards(f)[1])}, shards(f)[1]),
        "lies both in",
    ),
    "a link to weights elsewhere": ("model", lambda f: outward(f, "model.safetensors"), "is a link that leads out"),
    "a link to a config elsewhere": ("model", lambda f: outward(f, "config.json"), "is a link that leads out"),
    "a link to a tokenizer elsewhere": ("model", lambda f: outward(f, "tokenizer.json"), "is a link that leads out"),
    "damaged tokenizer": ("model", lambda f: os.truncate(f / "tokenizer.json", 3000), "the tokenizer in"),
    "half a tokenizer": ("model", lambda f: (f / "tokenizer.json").unlink(), "the tokenizer in"),
    "foreign tokenizer": ("model", foreign_words, "tokens beyond the 461 that the model embeds"),
    "extended vocabulary": ("model", more_words, "has 2 tokens beyond the 461 that the model embeds, such as '<new>'"),
    "a pickle": ("model", pickled, r"are a pickle \(pytorch_model\.bin\)"),
    "code of its own": ("model", own_code, r"OwnForCausalLM is not supported.* \(auto_map\) is never run"),
    "code of its own for the tokenizer": ("model", tokenizer_code, "the tokenizer in"),
    "config of 0 bytes": ("model", lambda f: os.truncate(f / "config.json", 0), "is not a JSON file"),
    "config that is not JSON": ("model", lambda f: (f / "config.json").write_text("hidden: 1"), "is not a JSON file"),
    "config that is a list": ("model", lambda f: (f / "config.json").write_text("[1]"), "is no object of settings"),
    "config of endless depth": (
        "model",
        lambda f: (f / "config.json").write_text('{"a":' * 100_000),
        "config.json",
    ),
    "config of another model": ("model", lambda f: settings(f, num_hidden_layers=6), "is missing from the weights"),
    "config of a wider model": ("model", lambda f: settings(f, intermediate_size=600), "has another shape"),
    "config with words for numbers": ("model", lambda f: settings(f, hidden_size="wide"), "cannot be read"),
    "config with a scaling that nobody has": (
        "model",
        lambda f: settings(f, rope_parameters={"rope_type": "spiral", "rope_theta": 1e4, "factor": 2.0}),
        "cannot be read|spiral",
    ),
    "config with biases that nothing represents": ("model", lambda f: settings(f, mlp_bias=True), "is missing|biases"),
    "unsupported architecture": ("model", gpt2, "ElephantForCausalLM is not supported"),
    "missing config": ("model", lambda f: (f / "config.json").unlink(), "has no config.json"),
    "missing folder": ("model", lambda f: shutil.rmtree(f), "there is no folder"),
    "a file for a folder": ("model", lambda f: (shutil.rmtree(f), f.write_text("x")), "is a file: give the folder"),
    "a model and an adapter": ("model", both, "holds a model and an adapter"),
    "adapter without a base": (
        "adapter",
        lambda f: adapter_settings(f, base_model_name_or_path="HuggingFaceTB/SmolLM2-135M"),
        "and there is no folder",
    ),
    "adapter of a base that is gone": (
        "adapter",
        lambda f: adapter_settings(f, base_model_name_or_path="../gone"),
        "names its base as ../gone",
    ),
    "adapter of another base": ("adapter", adapter_of_another_base, "is of another base"),
    "adapter of modules that the base has not": (
        "adapter",
        lambda f: adapter_settings(f, target_modules=["query"]),
        "is of another base",
    ),
    "adapter without some weights": (
        "adapter",
        lambda f: adapter_weights(f, lambda tensors: dict(list(tensors.items())[1:])),
        "its weights have no base_model",
    ),
    "adapter with weights of another": (
        "adapter",
        lambda f: adapter_weights(f, lambda tensors: tensors | {"x.lora_A.weight": torch.ones(2)}),
        "nothing in the base takes its x.lora_A.weight",
    ),
    "adapter that is not finite": (
        "adapter",
        lambda f: adapter_weights(f, lambda tensors: {name: value / 0 for name, value in tensors.items()}),
        "not finite",
    ),
    "adapter that is cut off": (
        "adapter",
        lambda f: (adapter_settings(f), os.truncate(f / "adapter_model.safetensors", 500)),
        "are damaged",
    ),
    "adapter as a pickle": ("adapter", adapter_pickle, r"are a pickle \(adapter_model\.bin\)"),
    "adapter that cannot be merged": ("adapter", prompt_tuning, "changes no weights and cannot be merged"),
    "adapter of an unknown method": (
        "adapter",
        lambda f: adapter_settings(f, peft_type="MAGIC"),
        "method MAGIC",
    ),
    "adapter with an unknown setting": ("adapter", lambda f: adapter_settings(f, use_magic=True), "setting use_magic"),
    "adapter that changes its base at the start": (
        "adapter",
        lambda f: adapter_settings(f, init_lora_weights="pissa"),
        "begins with pissa, which changes the base's weights",
    ),
    "adapter that imports a module": (
        "adapter",
        lambda f: adapter_settings(f, megatron_config={"a": 1}, megatron_core="modeling_own"),
        "sets megatron_config",
    ),
}


def spoilt(good: Path, place: Path, name: str) -> tuple[Path, str]:
    which, spoil, sentence = BAD[name]
    for folder in {"model", "adapter", which}:
        shutil.copytree(good / folder, place / folder)
    spoil(place / which)
    return place / which, sentence


def files(place: Path) -> dict[Path, int]:
    return {file: file.lstat().st_mtime_ns for file in place.rglob("*")}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_checkpoint_is_refused_in_one_sentence(name, good, tmp_path):
    folder, sentence = spoilt(good, tmp_path, name)
    before = files(tmp_path)
    with pytest.raises(CircuitsError, match=sentence) as refused:
        load_model(folder)
    assert "\n" not in str(refused.value)
    assert files(tmp_path) == before


@pytest.mark.parametrize("name", ["truncated weights", "not a number", "code of its own", "adapter of another base"])
def test_the_command_line_refuses_it_with_exit_code_2_and_writes_nothing(name, good, dataset, tmp_path):
    folder, _ = spoilt(good, tmp_path, name)
    before = files(tmp_path)
    out, err = io.StringIO(), io.StringIO()
    words = ["circuits", "evaluate", folder, "--data", dataset.folder, "--out", tmp_path / "scores.parquet"]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", list(map(str, words)))
        with pytest.raises(SystemExit) as end:
            main()
    assert end.value.code == 2
    assert err.getvalue().startswith("circuits: ")
    assert err.getvalue().count("\n") == 1
    assert out.getvalue() == ""
    assert files(tmp_path) == before


def test_a_checkpoint_without_a_tokenizer_loads_and_says_so_when_one_is_needed(good, dataset, tmp_path, monkeypatch):
    shutil.copytree(good / "model", tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    assert load_model(tmp_path / "model").tokenizer is None
    err = io.StringIO()
    monkeypatch.setattr(sys, "argv", ["circuits", "evaluate", str(tmp_path / "model"), "--data", str(dataset.folder)])
    with redirect_stderr(err), pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "has no tokenizer" in err.getvalue()


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read everything")
def test_a_file_that_must_not_be_read_is_refused(good, tmp_path):
    shutil.copytree(good / "model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").chmod(0)
    with pytest.raises(CircuitsError, match="are damaged"):
        load_model(tmp_path / "model")


def test_what_is_unusual_but_sound_loads(good, tmp_path):
    expected = fingerprint(load_model(good / "model"))
    assert fingerprint(load_model(good / "shards")) == expected
    # the cache of the hub: links into its own blobs
    version, blobs = tmp_path / "models--a--b" / "snapshots" / "1234", tmp_path / "models--a--b" / "blobs"
    version.mkdir(parents=True)
    blobs.mkdir()
    for file in (good / "model").iterdir():
        shutil.copy(file, blobs / file.name)
        (version / file.name).symlink_to(f"../../blobs/{file.name}")
    assert fingerprint(load_model(version)) == expected
    (tmp_path / "link").symlink_to(good / "model")
    assert fingerprint(load_model(tmp_path / "link")) == expected
    # code beside a model that transformers has itself is not needed, and not run
    shutil.copytree(good / "model", tmp_path / "model")
    own_code(tmp_path / "model")
    settings(tmp_path / "model", architectures=["LlamaForCausalLM"], model_type="llama")
    assert load_model(tmp_path / "model").checkpoint.parity.differences["hookable model"] < 1e-4
    assert not (tmp_path / "ran").exists()
    # what HookedTransformer lacks, the bridge has
    shutil.copytree(good / "model", tmp_path / "scaled")
    settings(tmp_path / "scaled", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    assert hasattr(load_model(tmp_path / "scaled"), "original_model")


def test_a_flipped_bit_is_found_only_where_a_checksum_was_kept(good, tmp_path):
    # nothing in a safetensors file tells one number from another
    shutil.copytree(good / "model", tmp_path / "model")
    flip(tmp_path / "model" / "model.safetensors", -9, 0)
    assert fingerprint(load_model(tmp_path / "model")) != fingerprint(load_model(good / "model"))


ASK = """
import socket, sys
from huggingface_hub import is_offline_mode
assert not is_offline_mode()
asked = []
def refuse(*arguments, **_):
    asked.append(arguments)
    raise OSError("no network")
socket.create_connection = socket.getaddrinfo = socket.socket.connect = refuse
from circuits.errors import CircuitsError
from circuits.models import load_model
for folder in sys.argv[1:]:
    try:
        load_model(folder)
    except CircuitsError:
        print("refused")
assert not asked, asked
"""


def ask_as_a_fork(folders) -> subprocess.CompletedProcess[str]:
    """The same in a fork of this process, which has its imports already."""

    def work() -> None:
        for name in [name for name in os.environ if "OFFLINE" in name]:
            del os.environ[name]
        huggingface_hub.constants.HF_HUB_OFFLINE = False
        sys.argv = ["-c", *map(str, folders)]
        exec(ASK, {})

    child = forked(work)
    code = ended(child)
    return subprocess.CompletedProcess("fork", code, child.said(), child.said())


def ask_as_a_program(folders) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
    return subprocess.run(
        [sys.executable, "-c", ASK, *map(str, folders)], capture_output=True, text=True, env=environment
    )


@needs_fork
@pytest.mark.parametrize("ask", [ask_as_a_fork, pytest.param(ask_as_a_program, marks=pytest.mark.slow)])
def test_a_process_that_may_ask_the_network_does_not(good, tmp_path, ask):
    shutil.copytree(good / "model", tmp_path / "model")
    shutil.copytree(good / "adapter", tmp_path / "adapter")
    shutil.copytree(good / "adapter", tmp_path / "homeless")
    shutil.copytree(good / "model", tmp_path / "half")
    adapter_settings(tmp_path / "adapter")
    adapter_settings(tmp_path / "homeless", base_model_name_or_path="HuggingFaceTB/SmolLM2-135M")
    (tmp_path / "half" / "tokenizer.json").unlink()
    folders = [tmp_path / name for name in ("model", "adapter", "homeless", "half")]
    result = ask(folders)
    assert (result.returncode, result.stdout) == (0, "refused\nrefused\n"), result.stderr
