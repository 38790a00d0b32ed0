"""Text as bytes, by default the source code of Python's own library, in batches."""

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
    """There is no text to train on."""


class Text(NamedTuple):
    """Bytes to train on, and others that are held out."""

    train: Bytes
    validation: Bytes

    @property
    def fingerprint(self) -> str:
        """Differs for different text."""
        digest = hashlib.sha256(self.train.tobytes())
        digest.update(self.validation.tobytes())
        return digest.hexdigest()[:16]


def read_text(path: Path | None, context: int) -> Text:
    """Reads a file, or all text files in a folder, or Python's standard library.

    Of several files every tenth is held out; of a single one, its last tenth.
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
            f"The text in {source} is too short: {len(train)} bytes to train on and "
            f"{len(validation)} to validate on, but more than {context} (the context) "
            "are needed of each."
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
    """The contents of those files that are text, in the order of their names."""
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
    """Random windows of the text. Which, depends on the seed and the step alone."""
    rng = np.random.default_rng((seed, step))
    starts = rng.integers(len(text) - context, size=size)
    return _windows(text, starts, context)


def validation_batches(text: Bytes, context: int) -> Windows:
    """Windows spread evenly over the text."""
    num_bytes = min(len(text), VALIDATION_BYTES)
    num_batches = max(1, num_bytes // (VALIDATION_BATCH * context))
    last = len(text) - context - 1
    starts = np.linspace(0, last, num_batches * VALIDATION_BATCH).astype(int)
    return _windows(text, starts.reshape(num_batches, VALIDATION_BATCH), context)


def _windows(text: Bytes, starts: Int[np.ndarray, "..."], context: int) -> Windows:
    """The bytes that a model sees, each with its successor: one more than it sees."""
    return text[starts[..., None] + np.arange(context + 1)]
