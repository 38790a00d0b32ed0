"""Renders mathematics to MathML at build time: no script, no other host."""

import html
import re
from typing import Any

from latex2mathml.converter import convert


_INLINE = re.compile(
    r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL
)
_DISPLAY = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', re.DOTALL)


# What the converter leaves to the browser: a minus sign or a bar would get the
# spaces of an operator between two terms, and so would the names of some
# functions. A bar would also stretch, and hang below the line if it has an
# exponent.
_BAR = '<mo stretchy="false" lspace="0" rspace="0">&#x0007C;'
_SPACING = (
    (
        r"((?:&#x00028;|&#x0002C;|&#x0003D;)</mo>)<mo>&#x02212;",
        r'\1<mo form="prefix">&#x02212;',
    ),
    (r'<mo(?: stretchy="false")?>&#x0007C;', _BAR),
    (r"<mo>&#x02202;</mo>", '<mi mathvariant="normal">&#x02202;</mi>'),
    (r"<mo>([a-z]{2,})</mo>", r"<mi>\1</mi>"),  # min, max, and `\operatorname`
    (r"(<mi>[a-z]{2,}</mi>)(?!<mo)", r'\1<mspace width="0.17em" />'),
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
