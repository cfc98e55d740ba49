from circuits.tasks.examples import Example, as_chat, tokenise
from circuits.tasks.prompts import RESERVED, Prompt, read_prompts, write_prompts
from circuits.tasks.task import Task

__all__ = [
    "RESERVED",
    "Example",
    "Prompt",
    "Task",
    "as_chat",
    "read_prompts",
    "tokenise",
    "write_prompts",
]
