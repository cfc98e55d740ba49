"""What a setting of a plan can be, and the one sentence that is said where it is something else.

1. A plan is a pydantic dataclass; the types below are those of its settings.
2. A type refuses a value by what follows the setting's name: "is 0: it must be a whole number of 1 or more".
3. `in_one_sentence` turns what pydantic finds into one `CircuitsError`, of the first setting that is wrong.
"""

import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from difflib import get_close_matches
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from circuits.errors import CircuitsError

#: No value is turned into another type, and no setting is ignored.
STRICT = ConfigDict(strict=True, extra="forbid")
Made = TypeVar("Made")


def must_be(what: str) -> WrapValidator:
    """A value that is not of the type is refused with what it can be."""

    def check(value: Any, inner: ValidatorFunctionWrapHandler) -> Any:
        try:
            return inner(value)
        except ValidationError:
            raise ValueError(f"is {value!r}: it must be {what}") from None

    return WrapValidator(check)


def one_of(choices: Collection[str]) -> AfterValidator:
    """A name, or each of several, is one of these."""

    def check(value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for name in (value,) if isinstance(value, str) else value:
            if name not in choices:
                raise ValueError(f"has no choice {name!r}: choose from {', '.join(choices)}")
        return value

    return AfterValidator(check)


def _once(names: Sequence[str]) -> tuple[str, ...]:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"has {name} twice: name it once")
    return tuple(names)


Name = Annotated[str, must_be("a name")]
#: A single name stands for a list of one.
Names = Annotated[
    Sequence[str],
    Field(min_length=1),
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
    must_be("a name or a list of names"),
    AfterValidator(_once),
]
Folder = Annotated[str | Path, AfterValidator(str), must_be("the path of a folder")]
File = Annotated[str | Path, AfterValidator(str), must_be("the path of a file")]
Count = Annotated[int, Field(ge=1), must_be("a whole number of 1 or more")]
Seed = Annotated[int, Field(ge=0), must_be("a whole number of 0 or more")]
Share = Annotated[float, Field(gt=0, le=1), must_be("a share above 0, up to 1")]
Flag = Annotated[bool, must_be("true or false")]


def in_one_sentence(settings: type[Made]) -> type[Made]:
    """Class decorator: what pydantic refuses is a `CircuitsError`."""
    made: Callable[..., None] = settings.__init__

    @wraps(made)
    def make(self: Made, *args: Any, **values: Any) -> None:
        try:
            made(self, *args, **values)
        except ValidationError as refused:
            raise CircuitsError(_sentence(refused, list(signature(settings).parameters))) from None

    settings.__init__ = make  # type: ignore[method-assign,assignment]
    # what Jupyter shows: the types, without what checks them
    plain, types = signature(settings), get_type_hints(settings)
    settings.__signature__ = plain.replace(  # type: ignore[attr-defined]
        parameters=[one.replace(annotation=types[one.name]) for one in plain.parameters.values()]
    )
    return settings


def _sentence(refused: ValidationError, known: list[str]) -> str:
    first = refused.errors()[0]
    told = first.get("ctx", {}).get("error")
    if not first["loc"]:  # two settings that do not fit together
        return str(told)
    place = first["loc"][0]
    name = known[place] if isinstance(place, int) and place < len(known) else str(place)
    if first["type"] == "unexpected_keyword_argument":
        close = get_close_matches(name, known, 1)
        return f"there is no setting {name!r}: " + (
            f"{close[0]!r} may be meant" if close else f"choose from {', '.join(known)}"
        )
    if first["type"] == "missing":
        return f"{name} is missing: it has no value of its own"
    if told is None or isinstance(told, CircuitsError):  # a whole sentence
        return f"{name}: {told or first['msg']}"
    return f"{name} {told}"


def read_settings(path: Path) -> Mapping[Any, Any]:
    """The settings in a YAML or TOML file.

    Raises:
        CircuitsError: the file is missing, or is no such file.
    """
    if path.suffix not in (".yaml", ".yml", ".toml"):
        raise CircuitsError(f"{path} is no plan: end the name of a YAML or TOML file in .yaml, .yml or .toml")
    if not path.is_file():
        raise CircuitsError(f"there is no file {path}")
    kind = "TOML" if path.suffix == ".toml" else "YAML"
    try:
        text = path.read_text(encoding="utf-8")
        settings = tomllib.loads(text) if kind == "TOML" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        where = f" in line {mark.line + 1}" if mark else ""
        raise CircuitsError(f"{path} is not a {kind} file: {problem.splitlines()[0]}{where}") from None
    if not isinstance(settings, dict):
        raise CircuitsError(f"{path} is no plan: write settings such as 'model: FOLDER', each on a line of its own")
    return settings
