"""Options that are fields of a settings dataclass: with its types and defaults, and help from its docstring.

The dataclass's source is read and not imported: importing its package brings torch, which ``--help`` would wait for.
"""

import ast
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

import circuits

Command = TypeVar("Command", bound=Callable[..., None])


def options_of(settings: str, *names: str) -> Callable[[Command], Command]:
    """Give a command an option for each of these fields, which it takes as ``**settings``.

    Args:
        settings: the dataclass by its place in the package, such as ``training.recipes.Optimisation``.
        names: fields with a default of a plain type, in the order of ``--help``.

    Raises:
        KeyError: The dataclass has no such field with a default, or its docstring does not say what it is.

    Example:
        >>> @options_of("training.recipes.Optimisation", "steps", "learning_rate")
        ... def train(out: str, **settings: Any) -> None: ...
        >>> [(option.name, option.default) for option in inspect.signature(train).parameters.values()][1:]
        [('steps', 1000), ('learning_rate', 0.002)]
    """
    *place, name = settings.split(".")
    source = Path(circuits.__file__).parent.joinpath(*place).with_suffix(".py").read_text(encoding="utf-8")
    [found] = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == name)
    fields = {
        ast.unparse(node.target): (node.annotation, node.value)
        for node in found.body
        if isinstance(node, ast.AnnAssign) and node.value
    }
    says = dict(re.findall(r"^    (\w+): (.+(?:\n        .+)*)", ast.get_docstring(found) or "", re.MULTILINE))

    def option(name: str) -> inspect.Parameter:
        # the field's own expressions, such as int | None, and 1 / 3
        type_, default = (eval(ast.unparse(part), {}) for part in fields[name])
        words = " ".join(says[name].split())
        # a symbol, such as k, stays as it is
        words = (words if words[1] == ":" else words[0].upper() + words[1:]).replace("``", "")
        kind: Any = Annotated[type_, typer.Option(help=words, show_default=default is not None)]
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)

    def with_options(command: Command) -> Command:
        signature = inspect.signature(command)
        own = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
        command.__signature__ = signature.replace(parameters=[*own, *map(option, names)])  # type: ignore[attr-defined]
        return command

    return with_options
