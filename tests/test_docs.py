"""Every Python block in the README, the docs, and the docstrings runs.

Everything public is documented, links work, and figures have alternative texts.
"""

import contextlib
import importlib.util
import inspect
import pathlib
import re
from typing import Any

import jax
import pytest

import eqx_ademamix

from .helpers import HAS_HOST_MEMORY


ROOT = pathlib.Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("**/*.md"))
PAGES = (ROOT / "README.md", *DOCS)
MKDOCS = (ROOT / "mkdocs.yml").read_text()
API = "".join(page.read_text() for page in sorted((ROOT / "docs/api").glob("*.md")))
PRESETS = {
    f"presets.{name}": obj
    for name, obj in vars(eqx_ademamix.presets).items()
    if inspect.isfunction(obj)
    and obj.__module__ == "eqx_ademamix.presets"
    and not name.startswith("_")
}
PUBLIC: dict[str, Any] = PRESETS | {
    name: obj
    for name, obj in vars(eqx_ademamix).items()
    if not name.startswith("_") and not inspect.ismodule(obj)
}
BLOCK = re.compile(r"^( *)```python\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
ONE_PROGRAM = "<!-- The Python blocks of this page are one program. -->"


def docstrings() -> dict[str, str]:
    found: dict[str, str] = {}
    for name, obj in PUBLIC.items():
        found[name] = inspect.getdoc(obj) or ""
        if inspect.isclass(obj):
            members = vars(obj).items()
            found |= {f"{name}.{k}": inspect.getdoc(v) or "" for k, v in members}
    return found


def programs(text: str) -> list[str]:
    """The Python blocks of a text, one program each, unless the text says otherwise."""
    found = [inspect.cleandoc("\n" + code) for _, code in BLOCK.findall(text)]
    return ["\n\n".join(found)] if ONE_PROGRAM in text else found


# The extra `recipes`, which the oldest dependencies do not have.
OTHER_LIBRARIES = ("diffrax", "flax", "flowjax", "haiku", "optimistix")
MISSING = [name for name in OTHER_LIBRARIES if not importlib.util.find_spec(name)]


def blocks() -> list[Any]:
    texts = {page.relative_to(ROOT).as_posix(): page.read_text() for page in PAGES}
    return [
        pytest.param(code, id=f"{name}-{i}")
        for name, text in (texts | docstrings()).items()
        for i, code in enumerate(programs(text))
        if not any(re.search(rf"^(from|import) {x}\b", code, re.M) for x in MISSING)
    ]


@pytest.mark.parametrize("code", blocks())
def test_block_runs(code: str):
    is_too_old = "Offloaded(" in code and not HAS_HOST_MEMORY
    error = pytest.raises(ValueError, match="`Offloaded` needs jax")
    # Uses JAX's default promotion, as users do.
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        error if is_too_old else contextlib.nullcontext(),
    ):
        exec(compile(code, "<block>", "exec"), {"__name__": "block"})


def test_there_are_blocks():
    assert len(blocks()) >= 50


def test_getting_started_is_the_quickstart():
    """The page explains every line of the example and no other lines."""
    [shown] = programs((ROOT / "docs/getting-started.md").read_text())
    source = (ROOT / "examples/quickstart.py").read_text().split('"""\n', 1)[1]
    around = ("def main() -> None:", 'if __name__ == "__main__":', "main()")
    assert lines_of(shown) == [x for x in lines_of(source) if x not in around]


def lines_of(code: str) -> list[str]:
    return [line.strip() for line in code.splitlines() if line.strip()]


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_names_are_documented(name: str):
    obj = PUBLIC[name]
    assert inspect.getdoc(obj), name
    assert API.count(f"::: eqx_ademamix.{name}\n") == 1
    if inspect.isfunction(obj):
        text = inspect.getdoc(obj) or ""
        assert "**Arguments:**" in text and "**Returns:**" in text
        for argument in inspect.signature(obj).parameters:
            assert f"`{argument}`" in text, argument


def test_every_module_has_a_docstring():
    for folder in ("eqx_ademamix", "tests", "examples", "benchmarks", ".ci"):
        for path in (ROOT / folder).glob("**/*.py"):
            if path.read_text():
                assert path.read_text().startswith('"""'), path


def test_links_are_relative_and_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            if target.startswith(("#", "http")):
                assert page.name != "README.md" or target.startswith("#"), target
                continue
            assert (page.parent / target.split("#")[0]).exists(), (page, target)


@pytest.mark.parametrize("page", DOCS, ids=[page.stem for page in DOCS])
def test_pages_have_a_title_a_description_and_a_place(page: pathlib.Path):
    head = re.match(
        r"---\ntitle: .+\ndescription: .+\.\n(.+\n)*---\n", page.read_text()
    )
    assert head, "begin the page with its title and description"
    name = page.relative_to(ROOT / "docs").as_posix()
    place = rf"^ +(- (.+: )?)?{re.escape(name)}$"  # in `nav` or in `not_in_nav`
    assert re.search(place, MKDOCS, re.MULTILINE), "not in mkdocs.yml"


def test_figures_have_alternative_texts():
    for page in PAGES:
        for text in re.findall(r"!\[(.*?)\]\(", page.read_text(), re.DOTALL):
            assert len(text) > 20, (page, text)


def test_the_version():
    text = (ROOT / "eqx_ademamix/_version.py").read_text()
    assert f'__version__ = "{eqx_ademamix.__version__}"' in text
