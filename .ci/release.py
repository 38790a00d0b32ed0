"""Checks that a tag can be released, and prints the notes: its part of the changelog.

python .ci/release.py v0.1.0
"""

import pathlib
import re
import sys
import tomllib


ROOT = pathlib.Path(__file__).parents[1]


def notes(changelog: str, version: str) -> str:
    """What a changelog says about a version, without the heading."""
    heading = rf"^## {re.escape(version)} - \d{{4}}-\d\d-\d\d$"
    found = re.split(heading, changelog, flags=re.MULTILINE)[1:]
    if len(found) != 1:
        raise ValueError(
            f"CHANGELOG.md has {len(found)} headings such as '## {version} - "
            "2026-01-31', but one was expected."
        )
    text = re.split(r"^## ", found[0], flags=re.MULTILINE)[0].strip()
    if not text:
        raise ValueError(f"CHANGELOG.md says nothing about version {version}.")
    return text


def check_tag(tag: str, version: str, repository: str) -> None:
    if tag != f"v{version}":
        raise ValueError(
            f"The tag is {tag}, but _version.py has {version}: tag v{version}, or "
            "change the version."
        )
    if not repository:
        raise ValueError(
            "`repository` is empty in pyproject.toml. Write the address there, so that "
            "the links of the README on PyPI lead somewhere."
        )


def main(tag: str) -> None:
    source = (ROOT / "eqx_ademamix/_version.py").read_text(encoding="utf-8")
    version = re.findall(r'"(\d.*)"', source)[0]
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    hook = pyproject["tool"]["hatch"]["metadata"]["hooks"]["custom"]
    check_tag(tag, version, hook["repository"])
    print(notes((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), version))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ValueError as error:
        sys.exit(str(error))
