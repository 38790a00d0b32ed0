"""Adds what depends on the address of the repository to the package's metadata."""

import pathlib
import re
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class AddressHook(MetadataHookInterface):
    """Makes the README's links absolute and lists the project's URLs. If no repository
    address is set, it leaves the links alone and lists no URLs."""

    def update(self, metadata: dict[str, Any]) -> None:
        text = pathlib.Path(self.root, "README.md").read_text(encoding="utf-8")
        address = self.config["repository"].rstrip("/")
        text = with_absolute_links(text, address) if address else text
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        metadata["urls"] = pages(address) if address else {}


def pages(address: str) -> dict[str, str]:
    return {
        "Repository": address,
        "Documentation": f"{address}/blob/main/docs/index.md",
        "Changelog": f"{address}/blob/main/CHANGELOG.md",
        "Issues": f"{address}/issues",
    }


# The target of a link or an image, in Markdown or in HTML, unless it is absolute.
_TARGET = re.compile(
    r"""(\]\(|(?:href|src|srcset)=")(?!\#|[a-z]+:)([^)"\s]+)""", re.VERBOSE
)
_IMAGE = re.compile(r"\.(png|svg|jpg)$")


def with_absolute_links(text: str, address: str) -> str:
    """PyPI shows the README, but not the files that it links to."""

    def absolute(link: re.Match[str]) -> str:
        folder = "raw" if _IMAGE.search(link[2]) else "blob"
        return f"{link[1]}{address}/{folder}/main/{link[2]}"

    parts = re.split(r"(^```.*?^```)", text, flags=re.DOTALL | re.MULTILINE)
    parts[::2] = [_TARGET.sub(absolute, part) for part in parts[::2]]
    return "".join(parts)
