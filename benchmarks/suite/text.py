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
    scale, unit = _unit(x)
    return f"{_three_digits(x / scale)} {unit}"


def tick(x: float) -> str:
    """A round number of seconds, in the same unit."""
    scale, unit = _unit(x)
    return f"{x / scale:g} {unit}"


def _unit(x: float) -> tuple[float, str]:
    # A tick such as 10 * 1e-4 may lie an ulp below its unit.
    return next((u for u in UNITS if x * (1 + 1e-9) >= u[0]), UNITS[-1])


def _three_digits(x: float) -> str:
    """Without an exponent. A number above 1000 keeps all digits before the decimal
    point."""
    before = len(str(int(x)))
    return f"{x:,.{max(3 - before, 0)}f}"


def factor(x: float) -> str:
    """Two digits after the decimal point, or two nonzero digits."""
    return f"{x:.2f}" if x >= 0.1 else f"{x:.2g}"


def ratio(found: dict[str, Any]) -> str:
    """The median and the quartiles."""
    low, high = (factor(found[name]) for name in ("low", "high"))
    return f"**{factor(found['median'])}** ({low} to {high})"


def parameters(count: int) -> str:
    """In words: 33.6 million."""
    if count >= 10**6:
        return f"{count / 10**6:.3g} million"
    return f"{count:,}"


def leaves(count: int) -> str:
    return "1 leaf" if count == 1 else f"{count} leaves"
