"""`docs/errors.md` has an entry for every error and warning that the package raises."""

import ast
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import pytest

from .test_errors import CASES


ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs/errors.md").read_text()
PACKAGE = sorted((ROOT / "eqx_ademamix").glob("**/*.py"))
GAP = "…"  # replaces the variable parts of a message


#
# The messages in the package
#


def text(node: ast.expr) -> str | None:
    """A literal message, with `…` in place of the variable parts of an f-string."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return re.sub(f"{GAP}+", GAP, "".join(text(x) or GAP for x in node.values))
    return None


def texts(node: ast.expr, module: ast.Module) -> list[str]:
    """The messages that an expression can produce.

    The expression is a literal, a name to which a message is assigned, or a call to a
    function in the module that returns messages.
    """
    match node:
        case ast.Name(id=name):
            values = assigned(name, module)
        case ast.Call(func=ast.Name(id=name)):
            values = returned(name, module)
        case _:
            literal = text(node)
            return [] if literal is None else [literal]
    return [x for value in values for x in texts(value, module)]


def assigned(name: str, module: ast.Module) -> Iterator[ast.expr]:
    for node in ast.walk(module):
        match node:
            case ast.NamedExpr(ast.Name(target), value) if target == name:
                yield value
            case ast.Assign([ast.Name(target)], value) if target == name:
                yield value
            case _:
                pass


def returned(name: str, module: ast.Module) -> Iterator[ast.expr]:
    """The return values of all functions with this name."""
    for function in ast.walk(module):
        if isinstance(function, ast.FunctionDef) and function.name == name:
            found = (x for x in ast.walk(function) if isinstance(x, ast.Return))
            yield from (x.value for x in found if x.value is not None)


def raised(module: ast.Module) -> Iterator[ast.expr]:
    """The first argument of each error and warning."""
    for node in ast.walk(module):
        match node:
            case ast.Raise(exc=ast.Call(args=[message, *_])):
                yield message
            case ast.Call(func=ast.Attribute(attr="warn"), args=[message, *_]):
                yield message
            case _:
                pass


def messages() -> dict[str, str]:
    """All messages, each with the place where it is raised."""
    found: dict[str, str] = {}
    for path in PACKAGE:
        module = ast.parse(path.read_text())
        for node in raised(module):
            place = f"{path.name}:{node.lineno}"
            assert texts(node, module), f"{place}: write the message as a literal"
            found |= {message: place for message in texts(node, module)}
    return found


#
# The quotes on the page
#


def quotes(page: str) -> list[str]:
    """The block quotes on a page, each as one line."""
    lines = re.findall(r"(?:^>.*\n?)+", page, re.MULTILINE)
    return [" ".join(x.lstrip("> ").rstrip() for x in q.splitlines()) for q in lines]


QUOTES = quotes(PAGE)
MESSAGES = messages()


def as_pattern(quote: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, quote.split(GAP))), re.DOTALL)


def is_on_page(text: str) -> bool:
    """Whether the text of a real error matches a quote on the page."""
    return any(as_pattern(quote).fullmatch(text) for quote in QUOTES)


@pytest.mark.parametrize("message", MESSAGES, ids=MESSAGES.values())
def test_every_message_has_an_entry(message: str):
    assert message in QUOTES, f"paste into docs/errors.md and explain:\n\n> {message}\n"


@pytest.mark.parametrize("quote", QUOTES)
def test_every_entry_is_of_a_message(quote: str):
    assert quote in MESSAGES, "no longer in the source: remove it from docs/errors.md"


def test_no_message_has_two_entries():
    assert len(QUOTES) == len(set(QUOTES)) == len(MESSAGES) >= 50


def test_every_entry_is_explained():
    """After one or more quotes, a paragraph comes before the next heading."""
    for section in re.split(r"^#{2,3} ", PAGE, flags=re.MULTILINE)[1:]:
        lines = [line for line in section.splitlines()[1:] if line.strip()]
        assert not lines or not lines[-1].startswith(">"), section


@pytest.mark.parametrize("user", [case[1] for case in CASES], ids=[x[0] for x in CASES])
def test_what_users_read_is_found(user: Any):
    """The text of a real error matches a quote on the page."""
    with pytest.raises((ValueError, TypeError)) as error:
        user()
    assert is_on_page(str(error.value))
