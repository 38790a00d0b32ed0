"""The page of the docs, from the stored results and `page_template.md`."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from string import Template

from . import cases, text
from .results import Case, Results, absent, cases_of, growth_of, sides_of


TEMPLATE = Path(__file__).parent / "page_template.md"
NOTHING = "Nothing."
PHASES = ("trace", "lower", "compile", "all")


def page(results: Results) -> str:
    """The whole page."""
    step, host, compiled, eager = (
        cases_of(results, kind) for kind in ("step", "host", "compile", "eager")
    )
    return Template(TEMPLATE.read_text()).substitute(
        machine=machine(results),
        glance=glance(results),
        step_plot=image("step", step),
        step=step_tables(step),
        memory=memory(step),
        host_plot=image("host", host),
        host=ratio_table(host, "call"),
        compile_plot=image("compile", compiled),
        trace_and_lower=ratio_table(compiled, "trace + lower"),
        compile=ratio_table(compiled, "compile"),
        all=ratio_table(compiled, "all"),
        exponents=exponents(compiled),
        instructions=instructions(compiled),
        eager=ratio_table(eager, "step"),
        missing=missing(results),
    )


def machine(results: Results) -> str:
    """What it was measured on."""
    facts = results["machine"] | {"duration of the run": f"{results['seconds']} s"}
    return "; ".join(f"{name}: {value}" for name, value in facts.items())


def missing(results: Results) -> str:
    """The sides and the cases that this run does not have."""
    lines = [f"- {name}: {reason}." for name, reason in absent(results).items()]
    lines += [f"- `{line}`" for line in results["left_out"]]
    return "\n".join(lines) or NOTHING


IMAGES = {
    "step": (
        "Step time divided by that of optax.contrib.ademamix, against the number of "
        "parameters, in one panel for each number of leaves. The axis ends at 0.2 and "
        "12. The tables below have all numbers."
    ),
    "host": (
        "Host time against the number of leaves. Top: divided by that of "
        "optax.contrib.ademamix. Bottom: in seconds."
    ),
    "compile": (
        "Time to trace, lower and compile a step against the number of leaves. Top: "
        "divided by that of optax.contrib.ademamix. Bottom: in seconds."
    ),
}


def image(kind: str, found: Sequence[Case]) -> str:
    return f"![{IMAGES[kind]}](images/benchmarks_{kind}.png)" if found else NOTHING


#
# Names of cases
#


def leaves_of(case: Case) -> int:
    return case["case"]["leaves"]


def leaves_name(case: Case) -> str:
    return text.leaves(leaves_of(case))


def parameters_name(case: Case) -> str:
    return text.parameters(case["case"]["parameters"])


def step_name(case: Case) -> str:
    return f"{parameters_name(case)} parameters, {leaves_name(case)}"


#
# Tables
#


def glance(results: Results) -> str:
    """The ratios of float32 and compact, in the cases that a user meets first."""
    compiled, host = (cases_of(results, kind) for kind in ("compile", "host"))
    rows = [
        *glance_rows(largest(cases_of(results, "step")), "step", "step", step_name),
        *glance_rows(compiled, "compile", "compile"),
        *glance_rows(compiled, "trace and lower", "trace + lower"),
        *glance_rows(host, "host time of a training step", "call"),
    ]
    return text.table(("", cases.BASELINE, cases.FLOAT32, cases.COMPACT), rows)


def largest(found: Sequence[Case]) -> list[Case]:
    """For each number of leaves, the case with the most sides of ours, then
    parameters."""
    counts = sorted({leaves_of(case) for case in found})
    return [
        max((x for x in found if leaves_of(x) == count), key=rank) for count in counts
    ]


def rank(case: Case) -> tuple[int, int]:
    ours = [name for name in case["sides"] if name in cases.OURS]
    return len(ours), case["case"]["parameters"]


def glance_rows(
    found: Iterable[Case],
    title: str,
    quantity: str,
    name: Callable[[Case], str] = leaves_name,
) -> list[list[str]]:
    return [
        [
            f"{title}, {name(case)}",
            text.seconds(case["sides"][cases.BASELINE][quantity]["median"]),
            *(median(case, x, quantity) for x in (cases.FLOAT32, cases.COMPACT)),
        ]
        for case in found
    ]


def median(case: Case, side: str, quantity: str) -> str:
    if side not in case["sides"]:
        return "-"
    return text.factor(case["sides"][side][quantity]["ratio"]["median"])


def ratio_table(
    found: Sequence[Case], quantity: str, name: Callable[[Case], str] = leaves_name
) -> str:
    """A row for each side, and a column for each case."""
    return text.table(
        ("", *map(name, found)),
        [[side, *(cell(x, side, quantity) for x in found)] for side in sides_of(found)],
    )


def cell(case: Case, side: str, quantity: str) -> str:
    """The time of optax, or a ratio to it."""
    if side not in case["sides"]:
        return "-"
    measured = case["sides"][side][quantity]
    if side == cases.BASELINE:
        return text.seconds(measured["median"])
    return text.ratio(measured["ratio"])


def step_tables(found: Sequence[Case]) -> str:
    """A table for each number of leaves."""
    tables: list[str] = []
    for count in sorted({leaves_of(case) for case in found}):
        some = [case for case in found if leaves_of(case) == count]
        content = ratio_table(some, "step", parameters_name)
        tables.append(f"### {text.leaves(count).capitalize()}\n\n{content}")
    return "\n\n".join(tables)


def memory(found: Sequence[Case]) -> str:
    if not found:
        return NOTHING
    case = max(found, key=rank)
    rows = [
        [side, fact(case, side, "state"), fact(case, side, "temporaries")]
        for side in case["sides"]
        if "state" in case["facts"][side]
    ]
    return text.table((step_name(case), "state", "temporaries"), rows)


def fact(case: Case, side: str, name: str, form: str = "{:.3f}") -> str:
    facts = case["facts"].get(side, {})
    return form.format(facts[name]) if name in facts else "-"


def exponents(found: Sequence[Case]) -> str:
    rows = [
        [side, *(exponent(growth_of(found, side, phase)) for phase in PHASES)]
        for side in sides_of(found)
    ]
    return text.table(("", *PHASES), rows)


def exponent(found: float | None) -> str:
    return "-" if found is None else f"{found:.2f}"


def instructions(found: Sequence[Case]) -> str:
    rows = [
        [side, *(fact(case, side, "instructions", "{:,}") for case in found)]
        for side in sides_of(found)
    ]
    return text.table(("", *map(leaves_name, found)), rows)
