"""The file: written whole or not at all, and rejected if a single bit is wrong."""

import contextlib
import importlib
import json
import math
import os
import re
import secrets
import zlib
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn, TypeAlias

import numpy as np

from .._paths import describe
from .._typing import DType


try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None


FORMAT = "eqx_ademamix"
# Increase this by one when an older reader could misread a newer file. The checksum of
# the header must stay the same in all versions.
FORMAT_VERSION = 1


class CheckpointError(ValueError):
    """A checkpoint does not exist, is damaged, or does not fit."""


def as_path(path: object) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(
            f"`path` is {describe(path)}, but the path of a file was expected. The "
            "order of the arguments is `save(path, tree)` and `load(path, like)`."
        )
    return Path(os.fspath(path))


def _safetensors() -> Any:
    try:
        return importlib.import_module("safetensors")
    except ImportError as error:
        raise ImportError(
            "Checkpoints need the package safetensors. Install it with "
            '`pip install "eqx_ademamix[checkpoint]"`.'
        ) from error


#
# The format: the size of the header in eight bytes, the header in JSON, the tensors
#

Raw: TypeAlias = np.ndarray

# The dtypes that the NumPy side of safetensors reads in every version, with its names.
DTYPES = {
    "bool": "BOOL",
    **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"F{bits}" for bits in (16, 32, 64)},
    "bfloat16": "BF16",
}


class Tensor(NamedTuple):
    """A tensor whose data is read only when it is written."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    read: Callable[[], Raw]


def _head(tensors: Sequence[Tensor], metadata: dict[str, str]) -> bytes:
    """The beginning of a file, up to the tensors."""
    entries: dict[str, Any] = {"__metadata__": {**metadata, "header_crc32": _BLANK}}
    end = 0
    for name, dtype, shape, _ in tensors:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        code = DTYPES[dtype.name]
        entries[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    return _sealed(len(text).to_bytes(8, "little") + text)


# CRC-32 detects every flipped bit and every burst of up to 32 bits, and zlib computes
# it at 1 to 3 GB/s. The hashes in `hashlib` take three to five times as long. They
# would also detect tampering, which is not the purpose here.
_BLANK = "0" * 8
_MARK = b'"header_crc32":"'


def checksum(data: memoryview | bytes) -> str:
    return f"{zlib.crc32(data):08x}"


def as_bytes(tensor: Raw) -> memoryview:
    return tensor.reshape(-1).view(np.uint8).data


def _sealed(head: bytes) -> bytes:
    """The beginning of a file with its own checksum filled in. The checksum is computed
    with zeros in its place."""
    at = head.find(_MARK) + len(_MARK)
    start, end = head[:at], head[at + len(_BLANK) :]
    return start + checksum(start + _BLANK.encode() + end).encode() + end


def _read_head(file: IO[bytes]) -> bytes:
    size = file.read(8)
    rest = os.fstat(file.fileno()).st_size  # the size may be wrong
    return size + file.read(min(int.from_bytes(size, "little"), rest))


#
# Writing
#


def write(
    path: Path,
    tensors: Sequence[Tensor],
    metadata: Callable[[dict[str, str]], dict[str, str]],
) -> None:
    """Replaces an older file, which stays as it is if this fails.

    The tensors are read one by one. `metadata` gets their checksums by name. The size
    of what it returns must not depend on them, since the header comes first in the
    file.

    The library's own writer needs all tensors at once, and uses a temporary file that
    it does not flush and that we cannot lock. So this function writes the file, and the
    library checks the header."""
    library = _safetensors()
    target = Path(os.path.realpath(path))  # through links, as `open` does
    ordered = sorted(tensors, key=lambda x: -x.dtype.itemsize)  # so each is aligned
    try:
        folders = _make_folders(target.parent)
        with _temporary(target) as file:
            _fill(file, ordered, metadata)
            with library.safe_open(file.name, framework="np"):
                pass  # it has checked the header
            os.fsync(file.fileno())
            if fcntl is None:
                file.close()  # Windows does not rename open files
            os.replace(file.name, target)
    except OSError as error:
        raise OSError(
            f"Could not write {path}: {error}. If it existed before, it is unchanged."
        ) from error
    for folder in folders:
        _sync_folder(folder)


def _fill(
    file: IO[bytes],
    tensors: Sequence[Tensor],
    metadata: Callable[[dict[str, str]], dict[str, str]],
) -> None:
    checksums = {x.name: _BLANK for x in tensors}
    file.write(_head(tensors, metadata(checksums)))
    for x in tensors:
        data = as_bytes(x.read())
        checksums[x.name] = checksum(data)
        file.write(data)
    file.seek(0)
    file.write(_head(tensors, metadata(checksums)))
    file.flush()


def _make_folders(folder: Path) -> list[Path]:
    """Makes a folder. Returns all folders that have a new entry now or soon."""
    missing = [x for x in (folder, *folder.parents) if not x.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return [folder, *(x.parent for x in missing)]


def _sync_folder(folder: Path) -> None:
    """Flushes the names in a folder to disk. Windows cannot do that."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# A writer that is killed leaves its temporary file behind. A running writer holds a
# lock on its file, so the next writer knows which files it may remove.


@contextlib.contextmanager
def _temporary(target: Path) -> Generator[IO[bytes], None, None]:
    """A new file next to the target. At the end, it is removed, unless it was
    renamed."""
    _remove_abandoned(target)
    while True:
        name = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        file = name.open("x+b")
        try:
            if _is_locked(file):
                yield file
                return
        finally:
            with contextlib.suppress(
                OSError
            ):  # closing flushes, and the disk may be full
                file.close()
            name.unlink(missing_ok=True)


def _is_locked(file: IO[bytes]) -> bool:
    """Locks a new file. Returns `False` if another writer has just mistaken the file
    for an abandoned one. That cannot happen on a file system without locks."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return os.path.exists(file.name)


def _remove_abandoned(target: Path) -> None:
    if fcntl is None:
        return
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.tmp")
    for name in target.parent.iterdir():
        if pattern.fullmatch(name.name):
            with contextlib.suppress(OSError), name.open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                name.unlink()


#
# Reading
#


class Opened(NamedTuple):
    """A file with a valid header."""

    path: Path
    metadata: dict[str, str]
    tensors: Any  # `safetensors.safe_open`

    def tensor(self, name: str, expected: str) -> Raw:
        """A tensor with the expected checksum."""
        array = self.tensors.get_tensor(name)
        if checksum(as_bytes(array)) != expected:
            raise_damaged(self.path, f"the checksum of {name} is wrong")
        return array


@contextlib.contextmanager
def opened(path: Path) -> Generator[Opened, None, None]:
    if not path.exists():
        raise CheckpointError(f"There is no checkpoint {path}.")
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file, so it is not a checkpoint.")
    head, tensors = _open_both(path)
    with tensors:
        metadata = tensors.metadata() or {}
        _check_head(path, head, metadata)
        yield Opened(path, metadata, tensors)


def _open_both(path: Path) -> tuple[bytes, Any]:
    """The header as it is in the file, and the file as safetensors opens it."""
    library = _safetensors()
    while True:
        with path.open("rb") as file:
            try:
                tensors = library.safe_open(str(path), framework="np")
            except (library.SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{path} is damaged or not a checkpoint: {error}."
                ) from error
            # Otherwise a writer has replaced the file between the two.
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return _read_head(file), tensors


def _check_head(path: Path, head: bytes, metadata: dict[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is a safetensors file, but `eqx_ademamix.save` did not write it."
        )
    if head != _sealed(head):
        raise_damaged(path, "the checksum of the header is wrong")
    version = metadata.get("format_version", "")
    if not version.isdecimal():
        raise_damaged(path, "the version of the format is not a number")
    if int(version) > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has version {version} of the format, but this package reads only "
            f"versions up to {FORMAT_VERSION}. Install a newer `eqx_ademamix`."
        )


def raise_damaged(path: Path, reason: str) -> NoReturn:
    raise CheckpointError(f"{path} is damaged: {reason}. Load an older checkpoint.")
