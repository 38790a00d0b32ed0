"""Logs numbers during a run: to a CSV file, and for TensorBoard."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import jax


Row: TypeAlias = dict[str, float]


def read_log(path: Path) -> list[Row]:
    """The rows of a CSV file. A killed process may leave the last one incomplete."""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if None not in row.values()]
    return [{name: float(x) for name, x in row.items()} for row in rows]


class Log:
    """The log of a run: one row every few steps."""

    def __init__(self, path: Path, done: int, events: Path | None = None):
        """Continues a log after step `done`. Later rows are from a process that was
        killed, and their steps are taken again."""
        old = read_log(path) if done and path.exists() else []
        self.path, self.rows = path, [row for row in old if row["step"] <= done]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        if self.rows:
            self._write([list(self.rows[0]), *map(_cells, self.rows)])
        self.events = None if events is None else _event_writer(events, done)

    def add(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Adds a row, once the device has computed its numbers."""
        columns = jax.device_get(list(numbers.values()))  # one transfer
        values = dict(zip(numbers, map(float, columns), strict=True))
        row: Row = {"step": step, **values}
        self._write([_cells(row)] if self.rows else [list(row), _cells(row)])
        self.rows.append(row)
        if self.events is not None:
            for name, value in values.items():
                self.events.add_scalar(name, value, step)

    def close(self) -> None:
        if self.events is not None:
            self.events.close()

    def _write(self, lines: list[list[Any]]) -> None:
        """Adds lines to the file and closes it, so that a killed process loses none."""
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerows(lines)


def _cells(row: Row) -> list[float]:
    return [int(row["step"]), *list(row.values())[1:]]


def _event_writer(folder: Path, done: int) -> Any:
    """A writer of event files. TensorBoard drops later steps from older files."""
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(folder), purge_step=done + 1)
