"""Reads text as bytes and splits it into batches.

The default text is the source code of Python's standard library.
"""

import hashlib
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Int, UInt8


Bytes: TypeAlias = UInt8[np.ndarray, " bytes"]
Windows: TypeAlias = UInt8[np.ndarray, "*batches windows length"]

VALIDATION_BYTES = 2**17
VALIDATION_BATCH = 64


class DataError(Exception):
    """There is no usable text to train on."""


class Text(NamedTuple):
    """Bytes to train on, and held-out bytes for validation."""

    train: Bytes
    validation: Bytes

    @property
    def fingerprint(self) -> str:
        """A hash that identifies the text."""
        digest = hashlib.sha256(self.train.tobytes())
        digest.update(self.validation.tobytes())
        return digest.hexdigest()[:16]


def read_text(path: Path | None, context: int) -> Text:
    """Reads a file, all text files in a folder, or Python's standard library.

    Every tenth file is held out. If there is only one file, its last tenth is held out.
    """
    files = _read_files(path)
    source = path or "Python's standard library"
    if not any(files):
        raise DataError(f"There is no text in {source}.")
    if len(files) == 1:
        split = len(files[0]) * 9 // 10
        train, validation = files[0][:split], files[0][split:]
    else:
        train = b"".join(file for i, file in enumerate(files) if i % 10 != 0)
        validation = b"".join(files[::10])
    if min(len(train), len(validation)) <= context:
        raise DataError(
            f"The text in {source} is too short: it has {len(train)} bytes for "
            f"training and {len(validation)} for validation, but each must have more "
            f"than {context} bytes (the context)."
        )
    return Text(np.frombuffer(train, np.uint8), np.frombuffer(validation, np.uint8))


def _read_files(path: Path | None) -> list[bytes]:
    try:
        if path is None:
            library = Path(sysconfig.get_paths()["stdlib"])
            return _texts(library.glob("*.py"))
        if path.is_dir():
            return _texts(path.rglob("*"))
        return [path.read_bytes()]
    except OSError as error:
        raise DataError(f"Cannot read {error.filename}: {error.strerror}.") from error


def _texts(paths: Iterable[Path]) -> list[bytes]:
    """The contents of all text files among the paths, sorted by path."""
    contents = [path.read_bytes() for path in sorted(paths) if path.is_file()]
    return [content for content in contents if content and _is_text(content)]


def _is_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def training_batch(
    text: Bytes, size: int, context: int, seed: int, step: int
) -> Windows:
    """Random windows of the text. The choice depends only on the seed and the step."""
    rng = np.random.default_rng((seed, step))
    starts = rng.integers(len(text) - context, size=size)
    return _windows(text, starts, context)


def validation_batches(text: Bytes, context: int) -> Windows:
    """Windows that are spaced evenly over the text."""
    num_bytes = min(len(text), VALIDATION_BYTES)
    num_batches = max(1, num_bytes // (VALIDATION_BATCH * context))
    last = len(text) - context - 1
    starts = np.linspace(0, last, num_batches * VALIDATION_BATCH).astype(int)
    return _windows(text, starts.reshape(num_batches, VALIDATION_BATCH), context)


def _windows(text: Bytes, starts: Int[np.ndarray, "..."], context: int) -> Windows:
    """Windows of the bytes that a model sees, plus the byte that follows them."""
    return text[starts[..., None] + np.arange(context + 1)]
