"""Renders mathematics to MathML at build time: no script, no other host."""

import html
import re
from typing import Any

from latex2mathml.converter import convert


_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_DISPLAY = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    content = _INLINE.sub(lambda found: _render(found[1], "inline"), content)
    return _DISPLAY.sub(
        lambda found: f'<div class="math">{_render(found[1], "block")}</div>', content
    )


def _render(latex: str, display: str) -> str:
    return convert(html.unescape(latex.strip()), display=display)
