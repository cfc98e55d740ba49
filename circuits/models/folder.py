"""What lies in the folder of a checkpoint or an adapter, judged before any library opens it.

1. Every file that would be read lies in the folder; a link may lead elsewhere inside it, or into the ``blobs`` of the
   hub's own cache.
2. config.json is a JSON object that asks for no code of its own and no quantised weights.
3. The weights are safetensors, in one file or in the shards that an index names, each a file of this folder. From
   their headers: every tensor lies in one file alone, and holds floating-point numbers.
4. If circuits.json has the weights' checksums (`save_model` and training write them), the files still have them.
5. An adapter is a folder with adapter_config.json and no weights of a model. It names its base, a folder here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from torch import Tensor

from circuits.adapter_config import INDEX, ONE, read_settings
from circuits.errors import CircuitsError

ADAPTER = "adapter_model.safetensors"

_READ = (".json", ".safetensors", ".model", ".txt", ".jinja")
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin")
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Weights:
    """The tensors of a folder, read one at a time.

    Attributes:
        files: the file of each tensor.
        shapes: the shape of each tensor.
        dtypes: what each tensor is stored as, in safetensors' words: ``F32``, ``BF16`` …
    """

    files: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(self.files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def check_folder(folder: str | Path) -> Path:
    """A folder whose files are its own.

    Raises:
        CircuitsError: it is missing or a file, or a link in it leads out of it.
    """
    folder = Path(folder)
    if folder.is_file():
        raise CircuitsError(f"{folder} is a file: give the folder of a checkpoint on this machine")
    if not folder.is_dir():
        raise CircuitsError(f"there is no folder {folder}: give the path of a checkpoint on this machine")
    home = folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        # the hub's cache keeps files once for all versions of a model
        allowed.append(home.parent.parent / "blobs")
    for file in sorted(folder.iterdir()):
        if file.is_symlink() and file.suffix in _READ:
            target = file.resolve()
            if not any(target.is_relative_to(place) for place in allowed):
                raise CircuitsError(f"{file} is a link that leads out of its folder: put the file itself there")
    return folder


def check_config(folder: Path) -> dict[str, Any]:
    """The settings of a checkpoint, unless they need what is not done here.

    Raises:
        CircuitsError: config.json is missing or damaged, or the weights are quantised.
    """
    if not (folder / "config.json").is_file():
        raise CircuitsError(f"{folder} is no checkpoint: it has no config.json")
    settings = read_settings(folder / "config.json")
    if settings.get("quantization_config"):
        method = dict(settings["quantization_config"]).get("quant_method", "an unnamed method")
        raise CircuitsError(f"the weights in {folder} are quantised ({method}): give the checkpoint before that")
    return settings


def weights_of(folder: Path, single: str = ONE) -> Weights:
    """The tensors of a checkpoint, or with ``single`` those of one file, from the headers alone.

    Raises:
        CircuitsError: a file is missing, damaged, not safetensors or not of this folder, a tensor lies in two files or
            does not hold floating-point numbers, or a file has changed since circuits saved it.
    """
    named: dict[str, str] = {}
    if (folder / single).exists():
        files = [folder / single]
    elif single == ONE and (folder / INDEX).is_file():
        named = _index(folder)
        files = [folder / name for name in sorted(set(named.values()))]
    elif pickles := [name for name in _PICKLES if (folder / name).exists()]:
        raise CircuitsError(
            f"the weights in {folder} are a pickle ({pickles[0]}), which can run code when it is read: save them as "
            "safetensors"
        )
    else:
        raise CircuitsError(f"the weights in {folder} are missing: there is no {single}")
    weights = Weights({}, {}, {})
    for file in files:
        for name, shape, dtype in _header(file):
            if name in weights.files:
                raise CircuitsError(f"{name} lies both in {weights.files[name]} and in {file.name}: one must go")
            if dtype not in _FLOATS:
                raise CircuitsError(
                    f"{name} in {file} holds {dtype} and no floating-point numbers: give a checkpoint that is not "
                    "quantised"
                )
            weights.files[name], weights.shapes[name], weights.dtypes[name] = file, shape, dtype
    for name, place in named.items():
        if name not in weights.files or weights.files[name].name != place:
            raise CircuitsError(f"{folder / INDEX} says that {name} is in {place}, and it is not there")
    _check_unchanged(folder)
    return weights


def _index(folder: Path) -> dict[str, str]:
    named = read_settings(folder / INDEX).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
        raise CircuitsError(f"{folder / INDEX} is damaged: it has no weight_map of tensors to files")
    for name in sorted(set(named.values())):
        if Path(name).name != name:
            raise CircuitsError(f"{folder / INDEX} names {name}, which is no file of this folder")
        if not (folder / name).is_file():
            raise CircuitsError(f"the weights in {folder} are missing: {INDEX} names {name}, which is not there")
    return named


def _header(file: Path) -> Iterator[tuple[str, tuple[int, ...], str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                found = opened.get_slice(name)
                yield name, tuple(found.get_shape()), str(found.get_dtype())
    except (SafetensorError, OSError, ValueError) as error:
        raise CircuitsError(f"the weights in {file} are damaged: {error}") from None


def checksums(folder: Path) -> dict[str, str]:
    """Each weight file's xxh3, for circuits.json: a bit that flips later is found."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        hashed = xxhash.xxh3_128()
        with file.open("rb") as opened:
            while block := opened.read(1 << 24):
                hashed.update(block)
        found[file.name] = hashed.hexdigest()
    return found


def _check_unchanged(folder: Path) -> None:
    card = folder / "circuits.json"
    expected = read_settings(card).get("weights") if card.is_file() else None
    if not isinstance(expected, dict):
        return
    found = checksums(folder)
    for name, checksum in expected.items():
        if found.get(name) != checksum:
            raise CircuitsError(f"{folder / name} is not what was saved there: its checksum in {card.name} differs")


def first_line(error: BaseException) -> str:
    """The first line of what an exception says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
