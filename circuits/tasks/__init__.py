"""Prompts and answers, from files, from sources, or your own → tokens with named spans, foils and counterfactuals."""

from circuits.tasks.examples import Example, as_chat, tokenise
from circuits.tasks.pairs import fact_columns, facts_in_common, one_answer_each, pair_facts
from circuits.tasks.prompts import RESERVED, Prompt, read_prompts, write_prompts
from circuits.tasks.sources import SOURCES, greater_than, indirect_objects, repeated_words
from circuits.tasks.task import Task

__all__ = [
    "RESERVED",
    "SOURCES",
    "Example",
    "Prompt",
    "Task",
    "as_chat",
    "fact_columns",
    "facts_in_common",
    "greater_than",
    "indirect_objects",
    "one_answer_each",
    "pair_facts",
    "read_prompts",
    "repeated_words",
    "tokenise",
    "write_prompts",
]
