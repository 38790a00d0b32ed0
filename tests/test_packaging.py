"""What is released: metadata, notes, the conda recipe, and the table of versions."""

import importlib.util
import pathlib
import re
import tomllib
from types import ModuleType
from typing import Any

import pytest

import eqx_ademamix


ROOT = pathlib.Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
ADDRESS = "https://example.org/someone/eqx_ademamix"
VERSION = eqx_ademamix.__version__


def script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("script", ROOT / path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


#
# Metadata
#


if importlib.util.find_spec("hatchling"):

    def metadata_at(repository: str) -> dict[str, Any]:
        make = script("hatch_build.py").AddressHook
        hook = make(str(ROOT), {"repository": repository})
        metadata: dict[str, Any] = {}
        hook.update(metadata)
        return metadata

    def test_an_address_makes_links_absolute():
        metadata = metadata_at(f"{ADDRESS}/")
        assert metadata["urls"]["Repository"] == ADDRESS
        assert metadata["urls"]["Changelog"] == f"{ADDRESS}/blob/main/CHANGELOG.md"
        text = metadata["readme"]["text"]
        assert f"]({ADDRESS}/blob/main/docs/precision.md)" in text
        assert f"{ADDRESS}/raw/main/docs/images/" in text
        links = re.findall(r'(?:\]\(|(?:href|src|srcset)=")([^)"\s]+)', prose(text))
        assert len(links) > 20
        assert all(link.startswith(("https://", "#")) for link in links)

    def test_code_stays_as_it_is():
        code = re.findall(r"```.*?```", (ROOT / "README.md").read_text(), re.DOTALL)
        text = metadata_at(ADDRESS)["readme"]["text"]
        assert len(code) >= 3 and re.findall(r"```.*?```", text, re.DOTALL) == code

    def prose(text: str) -> str:
        return "".join(re.split(r"```.*?```", text, flags=re.DOTALL))

    def test_without_an_address():
        metadata = metadata_at("")
        assert metadata["urls"] == {}
        assert metadata["readme"]["text"] == (ROOT / "README.md").read_text()

    LINKS = (
        ("[a](b.md#c)", f"[a]({ADDRESS}/blob/main/b.md#c)"),
        ("![a](b.png)", f"![a]({ADDRESS}/raw/main/b.png)"),
        ('<img src="b.svg" alt="[c](d)">', None),
        ("[a](#b) [c](https://d.e)", "[a](#b) [c](https://d.e)"),
        ("```\nf[a](b)\n```", "```\nf[a](b)\n```"),
    )

    @pytest.mark.parametrize("link,expected", LINKS)
    def test_links(link: str, expected: str | None):
        found = script("hatch_build.py").with_absolute_links(link, ADDRESS)
        start = f'<img src="{ADDRESS}/raw/main/b.svg"'
        assert found.startswith(start) if expected is None else found == expected


def test_the_address_is_in_one_place():
    """The package, the docs and the release read the same line."""
    assert set(PYPROJECT["tool"]["hatch"]["metadata"]["hooks"]) == {"custom"}
    assert {"readme", "urls"} <= set(PROJECT["dynamic"])
    assert "repo_url" not in (ROOT / "mkdocs.yml").read_text()
    assert "docs/_hooks/repository.py" in (ROOT / "mkdocs.yml").read_text()


def test_the_docs_link_to_the_repository(tmp_path: pathlib.Path):
    class Config:
        config_file_path = str(tmp_path / "mkdocs.yml")
        repo_url: str | None = None

    on_config = script("docs/_hooks/repository.py").on_config
    for address, expected in ((ADDRESS, ADDRESS), ("", None)):
        text = f'[tool.hatch.metadata.hooks.custom]\nrepository = "{address}"\n'
        (tmp_path / "pyproject.toml").write_text(text)
        assert on_config(Config()).repo_url == expected


#
# The notes of a release
#


CHANGELOG = """\
# Changelog

## Unreleased

- Soon.

## 0.2.0 - 2027-01-31

### Added

- New.

## 0.1.0 - 2026-12-24

- Old.
"""


def test_notes():
    notes = script(".ci/release.py").notes
    assert notes(CHANGELOG, "0.2.0") == "### Added\n\n- New."
    assert notes(CHANGELOG, "0.1.0") == "- Old."
    for version, text in (("0.3.0", CHANGELOG), ("0.1", CHANGELOG), ("0.1.0", "")):
        with pytest.raises(ValueError, match=f"has 0 headings such as '## {version} -"):
            notes(text, version)
    with pytest.raises(ValueError, match="has 2 headings"):
        notes(CHANGELOG + CHANGELOG, "0.1.0")
    with pytest.raises(ValueError, match=r"says nothing about version 9\.0"):
        notes("## 9.0 - 2030-01-01\n\n## 8.0 - 2029-01-01\n\n- Text.\n", "9.0")


def test_the_notes_of_this_version():
    text = script(".ci/release.py").notes((ROOT / "CHANGELOG.md").read_text(), VERSION)
    assert "`AdEMAMix`" in text


def test_tags():
    check = script(".ci/release.py").check_tag
    check("v0.1.0", "0.1.0", ADDRESS)
    for tag in ("0.1.0", "v0.1.1", "v0.1.0rc1"):
        with pytest.raises(ValueError, match=f"The tag is {tag}, but _version.py has"):
            check(tag, "0.1.0", ADDRESS)
    with pytest.raises(ValueError, match=r"`repository` is empty in pyproject\.toml"):
        check("v0.1.0", "0.1.0", "")


def test_the_release_workflow():
    """It builds, checks and publishes without a password."""
    text = (ROOT / ".github/workflows/release.yml").read_text()
    steps = (
        'tags: ["v*"]',
        'python .ci/release.py "$TAG" > notes.md',
        "python -m build",
        "python -m twine check --strict dist/*",
        "id-token: write",
        "gh-action-pypi-publish",
        "--notes-file notes.md",
    )
    places = [text.find(step) for step in steps]
    assert -1 not in places and places == sorted(places)
    assert "password" not in text.split("on:\n")[1] and "secrets." not in text


#
# The conda recipe
#


RECIPE = (ROOT / "recipe/recipe.yaml").read_text()


def listed(section: str) -> dict[str, str]:
    """The requirements in a section of the recipe, with their bounds."""
    [lines] = re.findall(rf"^  {section}:\n((?:    - .*\n)+)", RECIPE, re.MULTILINE)
    pairs = [x.removeprefix("    - ").split(maxsplit=1) for x in lines.splitlines()]
    return {name: bound[0] if bound else "" for name, *bound in pairs}


def as_conda(requirements: list[str]) -> dict[str, str]:
    pairs = [re.fullmatch(r"([\w-]+)(>=.+)", x) for x in requirements]
    return {pair[1]: pair[2] for pair in pairs if pair}


def test_the_recipe_has_the_requirements_of_the_project():
    python, run = ">=${{ python_min }}", listed("run")
    assert run == {"python": python, **as_conda(PROJECT["dependencies"])}
    extra = PROJECT["optional-dependencies"]["checkpoint"]
    assert listed("run_constraints") == as_conda(extra)
    host = [x for x in listed("host") if x not in ("pip", "python")]
    assert host == PYPROJECT["build-system"]["requires"]


def test_the_recipe_has_the_facts_of_the_project():
    assert f'  version: "{VERSION}"\n' in RECIPE
    assert f"  license: {PROJECT['license']}\n" in RECIPE
    assert f'  summary: "{PROJECT["description"]}"\n' in RECIPE
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert f'python_min: ["{oldest}"]' in (ROOT / ".ci/recipe.py").read_text()


#
# Versions
#


WORKFLOW = (ROOT / ".github/workflows/ci.yml").read_text()
MINORS = re.findall(
    r"Python :: (3\.\d+)$", "\n".join(PROJECT["classifiers"]), re.MULTILINE
)


def test_every_python_is_tested():
    assert MINORS == ["3.11", "3.12", "3.13", "3.14"]
    versions = ", ".join(f'"{minor}"' for minor in MINORS)
    assert f"python: [{versions}]" in WORKFLOW


def test_rows_of_the_same_versions_are_replaced(module: Any):
    compatibility = module("compatibility")
    row = lambda python, jax, text: f"| {python} | {jax} | f | Auto | {text} | 1 | 0 |"
    line = "| --- | --- | --- | --- | --- | --- | --- |"
    page = lambda *rows: "Text.\n\n" + compatibility.HEAD + "\n".join([line, *rows, ""])
    a, b = row("3.11", "0.4.27", "yes"), row("3.9", "0.12.0.1", "yes")
    old, new = row("3.11", "0.10.2", "yes"), row("3.11", "0.10.2", "no")
    assert compatibility.with_rows(page(), [b]) == page(b)
    assert compatibility.with_rows(page(a, old), [new]) == page(a, new)
    assert compatibility.with_rows(page(a, old), [b]) == page(b, a, old)


def test_what_the_table_says():
    """Each version that was tested computes the same numbers, compiles once, and
    exchanges nothing."""
    text = (ROOT / "docs/compatibility.md").read_text()
    rows = [x.split(" | ") for x in re.findall(r"^\| (3\..*) \|$", text, re.MULTILINE)]
    versions = {(row[0], row[1]) for row in rows}
    assert len(versions) >= 3 and len(rows) == 8 * len(versions)
    measured = [row[4:] for row in rows if row[4] != "not in this JAX"]
    assert len(measured) > len(rows) // 2
    assert all(row == ["yes", "1", "0"] for row in measured)
    oldest = [x for x in PROJECT["dependencies"] if x.startswith("jax>=")]
    assert oldest == [f"jax>={min(versions, key=number)[1]}"]


def number(versions: tuple[str, str]) -> list[int]:
    return [int(x) for x in versions[1].split(".")]
