"""Numbers and tables, as Markdown."""

from collections.abc import Iterable, Sequence
from typing import Any


UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (header, *rows)]
    rule = f"| {' | '.join('---' for _ in header)} |"
    return "\n".join([lines[0], rule, *lines[1:]])


def seconds(x: float) -> str:
    """Three digits, in the largest unit in which the number is at least 1."""
    scale, unit = next((u for u in UNITS if x >= u[0]), UNITS[-1])
    return f"{_three_digits(x / scale)} {unit}"


def _three_digits(x: float) -> str:
    """Without an exponent. A number above 1000 keeps all digits before the point."""
    before = len(str(int(x)))
    return f"{x:,.{max(3 - before, 0)}f}"


def ratio(found: dict[str, Any]) -> str:
    """The median and the quartiles."""
    low, high = found["low"], found["high"]
    return f"**{found['median']:.2f}** ({low:.2f} to {high:.2f})"


def parameters(count: int) -> str:
    """In words: 33.6 million."""
    if count >= 10**6:
        return f"{count / 10**6:.3g} million"
    return f"{count:,}"


def leaves(count: int) -> str:
    return "1 leaf" if count == 1 else f"{count} leaves"
