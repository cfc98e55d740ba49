"""Small models to train from scratch: ``tiny-llama``, ``tiny-pythia``, and the latter with untied embeddings."""

from typing import TYPE_CHECKING

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from circuits.errors import CircuitsError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

CONFIGURATIONS: tuple[str, ...] = ("tiny-llama", "tiny-pythia", "tiny-pythia-untied")


def _config(name: str, tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedConfig":
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": name != "tiny-pythia-untied",
    }
    if name == "tiny-llama":
        return LlamaConfig(**sizes, num_key_value_heads=2, intermediate_size=352)
    if name in ("tiny-pythia", "tiny-pythia-untied"):
        rotary = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
        return GPTNeoXConfig(**sizes, intermediate_size=512, rope_parameters=rotary)
    raise CircuitsError(f"there is no configuration {name!r}: choose from {', '.join(CONFIGURATIONS)}")


def new_model(name: str, tokenizer: "PreTrainedTokenizerBase", seed: int = 0) -> PreTrainedModel:
    """A small Hugging Face model with random weights, 4 layers of 4 heads, d_model 128.

    ``tiny-llama`` has RMSNorm, a gated MLP and two query heads to each key/value head; ``tiny-pythia`` is a GPT-NeoX
    with parallel attention and MLP, a quarter of each head rotary, and biases. Both tie their embeddings. The large
    Pythias do not, and ``tiny-pythia-untied`` does not either; but so small, and told its facts once, it learns no
    answers to questions that it was not trained on (docs/study.md).

    Args:
        name: one of `CONFIGURATIONS`.
        tokenizer: gives the vocabulary.
        seed: of the weights.

    Raises:
        CircuitsError: there is no such configuration.

    Example:
        >>> from circuits.facts import word_tokenizer
        >>> round(new_model("tiny-pythia", word_tokenizer()).num_parameters() / 1e6, 1)
        0.9
    """
    config = _config(name, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config) if name == "tiny-llama" else GPTNeoXForCausalLM(config)
    return model.eval()
