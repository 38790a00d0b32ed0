"""Renders mathematics to MathML at build time: no script, no other host."""

import html
import re
from typing import Any

from latex2mathml.converter import convert


_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_DISPLAY = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', re.DOTALL)


# What the converter leaves to the browser, which gives minus signs and bars the spaces
# of operators between two terms, and functions none.
_SPACING = (
    (r"((?:&#x00028;|&#x0002C;)</mo>)<mo>&#x02212;", r'\1<mo form="prefix">&#x02212;'),
    (r'<mo stretchy="false">&#x0007C;', '<mo lspace="0" rspace="0">&#x0007C;'),
    (r"(<mi>(?:log|exp|sin|cos|max)</mi>)(?!<mo)", r'\1<mspace width="0.17em" />'),
)


def on_page_content(content: str, **_: Any) -> str:
    content = _INLINE.sub(lambda found: _render(found[1], "inline"), content)
    return _DISPLAY.sub(lambda found: _block(found[1]), content)


def _block(latex: str) -> str:
    # What is wider than the screen scrolls inside this element.
    return f'<div class="math">{_render(latex, "block")}</div>'


def _render(latex: str, display: str) -> str:
    mathml = convert(html.unescape(latex.strip()), display=display)
    for pattern, replacement in _SPACING:
        mathml = re.sub(pattern, replacement, mathml)
    return mathml
