"""Reading and writing files so that none is ever half written or silently damaged.

A file is written under a temporary name in the same folder, flushed to the disk and then
moved into place: whoever reads sees the old file or the new one. JSON files carry a schema
version and a checksum, and tensor files (safetensors) a checksum over names, types, shapes,
bytes and metadata, so that a single flipped bit is reported with the file's name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from supple.errors import CheckpointError, SettingError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "check_folder",
    "checksum",
    "read_json",
    "read_tensors",
    "replacing",
    "replacing_folder",
    "sweep",
    "write_json",
    "write_tensors",
    "write_text",
]


_TEMPORARY = re.compile(r"\..*\.[0-9a-f]{12}(\.\w+)?")


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary path to write to, and moves the file into place at the end.

    On an exception the temporary file is removed and `path` stays as it was; an `OSError` says
    then which file could not be written. Missing folders are created.

    Args:
        path: The file that is to exist in the end.

    Yields:
        A path in the same folder, with the same suffix.

    Raises:
        CheckpointError: The folder can't be created or written to, or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:12]}{path.suffix}")
    try:
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch(exist_ok=False)
        with _writing(path):
            yield temporary
            _flush(temporary)
            os.replace(temporary, path)
            _flush(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: str | os.PathLike[str], ours: Container[str] = ()) -> Iterator[Path]:
    """Gives a new folder to write to, beside another, and puts it in its place at the end.

    On an exception `path` stays as it was; an `OSError` says then which folder could not be
    written. Missing folders above it are created.

    Args:
        path: The folder that is to exist in the end.
        ours: Names of files that the old folder may lose; what else is in it is kept.

    Yields:
        An empty folder.

    Raises:
        CheckpointError: The folder can't be created, written to or moved.
    """
    target, mark = Path(path), uuid.uuid4().hex[:12]
    new, old = (target.with_name(f".{target.name}.{mark}.{kind}") for kind in ("new", "old"))
    try:
        with _writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            new.mkdir()
        with _writing(target):
            yield new
            _swap(new, target, old, ours)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def sweep(folder: str | os.PathLike[str]) -> None:
    """Removes what `replacing` had begun to write when its process was killed.

    Args:
        folder: Searched with all that is below it; nobody may be writing there.
    """
    for path in Path(folder).rglob(".*"):
        if _TEMPORARY.fullmatch(path.name) and path.is_file():
            with contextlib.suppress(OSError):  # what can't be removed does no harm
                path.unlink()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file (UTF-8) atomically.

    Args:
        path: The file. Missing folders are created.
        text: Its whole content.

    Raises:
        CheckpointError: The file can't be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(
    path: str | os.PathLike[str], obj: Mapping[str, Any], *, schema: int = 1
) -> None:
    """Writes a mapping as JSON, atomically, with a schema version and a checksum.

    Args:
        path: The file. Missing folders are created.
        obj: What to write; its keys are strings, `"schema"` and `"sha256"` are taken.
        schema: Version of the layout of `obj`, counted up when old files can't be read.

    Raises:
        SettingError: `obj` is no mapping, uses a taken key, or has a value JSON can't hold.
        CheckpointError: The file can't be written.
    """
    if not isinstance(obj, Mapping) or {"schema", "sha256"} & set(obj):
        raise SettingError(
            "write_json takes a mapping without the keys 'schema' and 'sha256', got "
            f"{sorted(obj) if isinstance(obj, Mapping) else type(obj).__name__}"
        )
    try:
        # What a reader will see: tuples are lists then, and every key is text.
        content = json.loads(json.dumps({"schema": schema, **obj}))
    except (TypeError, ValueError) as error:
        raise SettingError(f"can't write {path} as JSON: {error}") from error
    content["sha256"] = checksum(content)
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_json(
    path: str | os.PathLike[str], *, schema: int = 1, checked: bool = True
) -> dict[str, Any]:
    """Reads a JSON file that `write_json` wrote.

    Args:
        path: The file.
        schema: The layout version that the caller understands.
        checked: Whether the file must carry a schema version and a valid checksum; False reads
            a file that another program wrote, as it is.

    Returns:
        The mapping that was written, without schema version and checksum.

    Raises:
        CheckpointError: The file is missing, malformed, damaged or of another version.
    """
    try:
        obj = json.loads(_read(path).decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); it is damaged") from error
    if not isinstance(obj, dict):
        raise CheckpointError(
            f"{path} must hold a JSON object, it holds a {type(obj).__name__}"
        )
    if not checked:
        return obj
    if obj.pop("sha256", None) != checksum(obj):
        raise CheckpointError(
            f"{path} doesn't match its checksum; it is damaged or was edited by hand"
        )
    if obj.pop("schema", None) != schema:
        raise CheckpointError(f"{path} was written by another version of Supple")
    return obj


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors as safetensors, atomically, with a checksum over everything.

    Tensors that share storage are written once per name; keep track of sharing yourself.

    Args:
        path: The file. Missing folders are created.
        tensors: Tensors by name, of any shape, dtype and device.
        metadata: Texts to keep in the header; the key `"sha256"` is taken.

    Raises:
        CheckpointError: The file can't be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = _separate(tensors)
    header = {str(key): str(value) for key, value in (metadata or {}).items()}
    header["sha256"] = _tensor_checksum(plain, header)
    with replacing(path) as temporary:
        mode = temporary.stat().st_mode
        try:
            save_file(plain, temporary, metadata=header)
        except SafetensorError as error:  # how it tells of a full disk
            raise OSError(str(error)) from error
        temporary.chmod(mode)  # it makes a file that only its owner may read


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads a safetensors file, and checks it where it carries our checksum.

    Args:
        path: The file, written by `write_tensors` or by another program.

    Returns:
        Tensors by name, and the header's texts without the checksum.

    Raises:
        CheckpointError: The file is missing, malformed or damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise CheckpointError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no readable safetensors file ({error})") from error
    expected = metadata.pop("sha256", None)
    if expected is not None and expected != _tensor_checksum(tensors, metadata):
        raise CheckpointError(f"{path} doesn't match its checksum; it is damaged")
    return tensors, metadata


def checksum(obj: Any) -> str:
    """Gives the SHA-256 of bytes, or of anything JSON can hold in its canonical form.

    Args:
        obj: Bytes, or a JSON-able value.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> checksum({"a": 1, "b": 2}) == checksum({"b": 2, "a": 1})
        True
    """
    if not isinstance(obj, bytes):
        obj = json.dumps(obj, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.sha256(obj).hexdigest()


def check_folder(folder: Path, ours: Callable[[Path], bool], what: str) -> None:
    """Makes sure, before any work, that a folder is one that may be written or replaced.

    Args:
        folder: It need not exist.
        ours: Tells of a folder that holds files whether they are what is to be replaced.
        what: What it may hold, with an article.

    Raises:
        CheckpointError: It is a file, holds something else, or can't be read.
    """
    with _writing(folder):
        if folder.exists() and not folder.is_dir():
            raise CheckpointError(f"{folder} is a file; choose another folder")
        if folder.is_dir() and any(folder.iterdir()) and not ours(folder):
            raise CheckpointError(
                f"{folder} holds files that are not {what}; choose an empty folder or one that "
                "does not exist"
            )


@contextlib.contextmanager
def _writing(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(
            f"can't write {path}: {reason}; choose a folder that exists or can be created, "
            "that you may write to and that has room"
        ) from error


def _swap(new: Path, target: Path, old: Path, ours: Container[str]) -> None:
    if not target.exists():
        os.rename(new, target)
        return
    os.rename(target, old)
    try:
        os.rename(new, target)
    except OSError:
        os.rename(old, target)
        raise
    for other in old.iterdir():  # what somebody else keeps there
        if other.name not in ours:
            os.rename(other, target / other.name)
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read(path: str | os.PathLike[str]) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no file {path}") from error
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror or error}") from error


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # safetensors refuses tensors that share storage, so such a tensor gets memory of its own.
    separate: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != plain.nbytes:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        separate[name] = plain
    return separate


def _tensor_checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    import torch

    total = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
