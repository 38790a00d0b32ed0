"""Checkpoints: one line of JSON, then the arrays of a PyTree, in one file."""

import json
import os
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import jax


Tree = TypeVar("Tree")
Json = dict[str, Any]


class CheckpointError(Exception):
    """A checkpoint is missing, is damaged, or belongs to another run."""


def save(path: Path, header: Json, tree: Any) -> None:
    """Writes a checkpoint: all of it, or none, whatever happens meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(json.dumps(header).encode() + b"\n")
            eqx.tree_serialise_leaves(file, tree)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_header(path: Path) -> Json:
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint {path} to resume from.")
    with path.open("rb") as file:
        try:
            return dict(json.loads(file.readline()))
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is not a checkpoint.") from error


def check_settings(path: Path, settings: Json) -> None:
    """Complains unless there is a checkpoint whose header has these "settings"."""
    found = read_header(path).get("settings", {})
    names = [name for name in settings if found.get(name) != settings[name]]
    if names:
        changes = ", ".join(f"{n}={found.get(n)} (now {settings[n]})" for n in names)
        raise CheckpointError(
            f"Cannot resume from {path}, which was made with other settings: {changes}."
        )


def load(path: Path, like: Tree) -> tuple[Json, Tree]:
    """Reads the header and the tree of a checkpoint."""
    header = read_header(path)
    with path.open("rb") as file:
        file.readline()
        try:
            tree = eqx.tree_deserialise_leaves(file, like)
        except (ValueError, RuntimeError, EOFError, OSError) as error:
            raise CheckpointError(f"{path} is damaged.") from error
    # The arrays may still lie in memory that NumPy owns. Copies can safely be donated.
    return header, jax.tree.map(lambda x: x.copy() if eqx.is_array(x) else x, tree)
