"""Which folder holds an adapter, and which its base."""

from pathlib import Path
from typing import Any

from circuits.errors import CircuitsError
from circuits.storage import read_json

#: What the weights of a model are in: one file, or those that an index names.
ONE, INDEX = "model.safetensors", "model.safetensors.index.json"


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter, and not a model.

    Raises:
        CircuitsError: it holds both.
    """
    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file():
        return False
    if any((folder / name).exists() for name in (ONE, INDEX)):
        raise CircuitsError(f"{folder} holds a model and an adapter: give each a folder of its own")
    return True


def base_of(adapter: str | Path) -> Path:
    """The folder of the model that an adapter names as its base.

    A name that is no whole path is looked for beside the adapter, then in the working directory, as PEFT writes it.

    Raises:
        CircuitsError: the adapter names none that is a folder on this machine.
    """
    adapter = Path(adapter)
    name = read_settings(adapter / "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise CircuitsError(f"the adapter {adapter} does not name its base: load_model(base, adapter=…) does")
    if Path(name).is_absolute():
        places = [Path(name)]
    else:
        places = list(dict.fromkeys(place.resolve() for place in (adapter / name, Path(name))))
    for place in places:
        if place.is_dir():
            return place
    raise CircuitsError(
        f"the adapter {adapter} names its base as {name}, and there is no folder {' or '.join(map(str, places))}: name "
        "the base's folder with load_model(base, adapter=…), or in its adapter_config.json"
    )


def read_settings(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CircuitsError: there is none.
    """
    try:
        found = read_json(file)
    except (RecursionError, OSError) as error:
        raise CircuitsError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(found, dict):
        raise CircuitsError(f"{file} is no object of settings: a checkpoint's config is {{…}}")
    return found
