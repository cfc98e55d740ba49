"""Saved results: where they came from, and how they reach the disk whole or not at all."""

import hashlib
import json
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuits.errors import CircuitsError

if TYPE_CHECKING:
    import pandas
    from torch import Tensor

DISTRIBUTION = "fact-circuits"


@cache
def library_version() -> str:
    """The version of this library."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "unknown"


@cache
def git_commit() -> str:
    """The commit of the checkout this library runs from, ``-dirty`` if it was changed; ``unknown`` outside one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return "unknown"
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def provenance(**facts: Any) -> dict[str, Any]:
    """Where a result came from: library version, git commit, and the given facts.

    Args:
        facts: model and dataset fingerprints, settings, seed, dtype, device; must be JSON.

    Example:
        >>> sorted(provenance(seed=0))
        ['git_commit', 'library_version', 'seed']
    """
    return {"library_version": library_version(), "git_commit": git_commit(), **facts}


def digest(*parts: bytes | memoryview | str) -> str:
    """Sixteen hexadecimal characters that name a content.

    Example:
        >>> digest("people", "seed 0") == digest("people", "seed 0") != digest("people", "seed 1")
        True
    """
    hashed = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        hashed.update(memoryview(data).nbytes.to_bytes(8, "little"))
        hashed.update(data)
    return hashed.hexdigest()


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place if the block succeeds and vanishes if it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        # on the disk before it has its name: a power failure leaves no empty file either
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Like `atomic_file`, for a folder; an older folder of that name is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        old = temporary.with_name(f"{temporary.name}.old")
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names.

    Example:
        >>> flatten({"seed": 0, "data": {"people": 50}})
        {'seed': 0, 'data.people': 50}
    """
    flat: dict[str, Any] = {}
    for name, part in value.items():
        flat |= flatten(part, f"{prefix}{name}.") if isinstance(part, Mapping) else {f"{prefix}{name}": part}
    return flat


def check_ending(path: Path, endings: Sequence[str], kind: str) -> None:
    """Raise a `CircuitsError` unless a file's name ends as its kind asks."""
    if path.suffix not in endings:
        raise CircuitsError(f"a {kind} cannot be saved as {path}: end the name in {', '.join(endings)}")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically; numbers that are not finite, which JSON has none of, as null."""
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_file(path) as temporary:
        temporary.write_text(f"{text}\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        CircuitsError: the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CircuitsError(f"there is no file {path}") from None
    except ValueError as error:
        raise CircuitsError(f"{path} is not a JSON file: {error}") from None


def claim(path: Path, facts: Mapping[str, Any], what: str, free: Collection[str] = ()) -> None:
    """Say in a file what a folder is for, or check that it says so already.

    Args:
        path: a JSON file in the folder.
        facts: what is made there; must be the same when it goes on.
        what: what to call it, such as ``an analysis``.
        free: facts that may have been others, such as the path to what is the same.

    Raises:
        CircuitsError: the folder holds something else, or the same with other facts.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "plan.json"
        >>> claim(file, {"seed": 0}, "an analysis")
        >>> claim(file, {"seed": 1}, "an analysis")
        Traceback (most recent call last):
        circuits.errors.CircuitsError: ... holds an analysis with seed 0, not 1: choose another folder or delete it
    """
    folder, wanted = path.parent, flatten(json.loads(json.dumps(facts)))
    if not path.is_file():
        if folder.exists() and any(not file.name.startswith(".") for file in folder.iterdir()):
            raise CircuitsError(f"{folder} holds something that is not {what}: choose another folder")
        write_json(path, facts)
        return
    found = flatten(read_json(path))
    for name in (*wanted, *found):
        if found.get(name) == wanted.get(name) or name in free:
            continue
        if name not in wanted:
            differs = f"with {name} {found[name]}, and none is given now"
        elif name not in found:
            differs = f"without {name}, and {wanted[name]} is given now"
        else:
            differs = f"with {name} {found[name]}, not {wanted[name]}"
        raise CircuitsError(f"{folder} holds {what} {differs}: choose another folder or delete it")


def stamp(path: Path) -> tuple[int, int]:
    """What tells a file from one of the same name on another machine; zeros if it is not there."""
    try:
        found = path.stat()
    except OSError:
        return (0, 0)
    return found.st_ino, found.st_mtime_ns


def write_table(path: Path, table: "pandas.DataFrame", facts: Mapping[str, Any], csv: bool = False) -> None:
    """Write a result table as parquet and, if asked, as CSV beside it, atomically.

    Args:
        path: the parquet file.
        table: the table.
        facts: what it came from; `provenance` of them is kept in the file, and is in ``table.attrs`` when pandas
            reads it.
        csv: also write CSV, which has no room for provenance.
    """
    table = with_plain_columns(table)
    table.attrs = provenance(**facts)
    with atomic_file(path) as temporary:
        table.to_parquet(temporary, index=False)
    if csv:
        with atomic_file(path.with_suffix(".csv")) as temporary:
            table.to_csv(temporary, index=False)


def with_plain_columns(table: "pandas.DataFrame") -> "pandas.DataFrame":
    """A shallow copy in which columns of texts and numbers mixed, which parquet has no type for, are all text.

    Example:
        >>> import pandas
        >>> with_plain_columns(pandas.DataFrame({"group": [3, "Ann and Bo"], "start": [1, 2]})).to_dict("list")
        {'group': ['3', 'Ann and Bo'], 'start': [1, 2]}
    """
    kinds = {name: {*map(type, table[name].dropna())} for name in table if table[name].dtype == object}
    mixed = [name for name, types in kinds.items() if len(types) > 1 and types & {str, bool}]
    return table.assign(**{name: table[name].map(str, na_action="ignore") for name in mixed})


def write_tensors(path: Path, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, Any]) -> None:
    """Write tensors as safetensors with ``metadata`` as JSON in the header, atomically."""
    from safetensors.torch import save_file

    with atomic_file(path) as temporary:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            temporary,
            {"circuits": json.dumps(metadata)},
        )


def read_tensors(path: Path, kind: str) -> tuple[dict[str, "Tensor"], dict[str, Any]]:
    """Read what `write_tensors` wrote.

    Args:
        path: the safetensors file.
        kind: what the file must hold: the metadata's ``kind``.

    Raises:
        CircuitsError: the file is missing, damaged, or holds something else.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise CircuitsError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("circuits", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise CircuitsError(f"{path} is damaged or is not a safetensors file: {error}") from None
    if metadata.get("kind") != kind:
        held = f"a {metadata['kind']}" if "kind" in metadata else "no result of circuits"
        raise CircuitsError(f"{path} holds {held}, not a {kind}")
    return tensors, metadata
