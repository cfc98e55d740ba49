"""Model families as data: a module a family, found by listing this package.

Each has ``ARCHITECTURE`` (its class in transformers), ``KEYS`` (the config keys it understands), ``rows(config)`` (its
table of parameters) and ``layout(config)`` (what its layers are made of). docs/adding-a-family.md says how to add one.
"""

import pkgutil
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from circuits.errors import CircuitsError

if TYPE_CHECKING:
    from circuits.models.layout import Layout
    from circuits.models.rows import Row


class Family(Protocol):
    """What the module of a family holds."""

    ARCHITECTURE: str
    KEYS: frozenset[str]

    def rows(self, config: Any) -> "list[Row]":
        """The table of parameters."""

    def layout(self, config: Any) -> "Layout":
        """What layers are made of."""


#: Config keys that don't change what a causal language model computes in evaluation.
NO_PART_OF_THE_MODEL = frozenset(
    """
    _name_or_path architectures auto_map dtype torch_dtype transformers_version transformers.js_config model_type
    use_cache cache_implementation initializer_range pretraining_tp is_decoder is_llama_config
    output_attentions output_hidden_states return_dict keys_to_ignore_at_inference
    attention_dropout attn_pdrop embd_pdrop resid_pdrop hidden_dropout classifier_dropout
    residual_dropout embedding_dropout
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id mask_token_id cls_token_id decoder_start_token_id
    tokenizer_class model_max_length
    id2label label2id num_labels problem_type task_specific_params
    summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout
    do_sample temperature top_p top_k typical_p max_length max_new_tokens repetition_penalty length_penalty num_beams
    num_beam_groups diversity_penalty num_return_sequences unsloth_version unsloth_fixed
    """.split()
)

#: Config keys of a model that has Llama's modules.
DECODER_KEYS = frozenset(
    """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    max_position_embeddings hidden_act rms_norm_eps rope_parameters tie_word_embeddings
    """.split()
)


@cache
def families() -> dict[str, Family]:
    """Every family, by the name of its architecture.

    Example:
        >>> "LlamaForCausalLM" in families()
        True
    """
    modules: Any = [import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    return {module.ARCHITECTURE: module for module in modules}


def family_of(config: Any) -> Family:
    """The family of a Hugging Face config.

    Raises:
        CircuitsError: the architecture is not supported, or the config has a key that its family does not understand.

    Example:
        >>> from transformers import LlamaConfig
        >>> family_of(LlamaConfig(architectures=["LlamaForCausalLM"])).ARCHITECTURE
        'LlamaForCausalLM'
    """
    family = named_family(config.architectures, config.model_type)
    _check_keys(config, family)
    return family


def named_family(architectures: Sequence[str] | None, model_type: str | None = None) -> Family:
    """The family of an architecture, given the names that a config has for it.

    Raises:
        CircuitsError: it is not supported.
    """
    names, known = list(architectures or []), families()
    family = next((known[name] for name in names if name in known), None)
    if family is None:
        raise CircuitsError(
            f"the architecture {', '.join(names) or model_type} is not supported: "
            f"{', '.join(sorted(known))} are; docs/adding-a-family.md says how to add one"
        )
    return family


def _check_keys(config: Any, family: Family) -> None:
    usual = type(config)().to_dict()
    for key, value in config.to_dict().items():
        # keys with an underscore are notes of libraries to themselves
        if key in family.KEYS or key in NO_PART_OF_THE_MODEL or key.startswith("_"):
            continue
        # what the config's class does not know, and is switched off, is not there
        if value != usual[key] if key in usual else value is not None and value is not False:
            raise CircuitsError(
                f"config.json sets {key} to {value!r}, which circuits does not understand for {family.ARCHITECTURE}: "
                "what the model computes may depend on it. If it does not, delete it from config.json"
            )
