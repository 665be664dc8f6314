"""What mkdocs calls while it builds the site: formulas become MathML, and no page may load anything from elsewhere."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
ROLE = re.compile(r":(?:func|mod|class|meth|attr):<code>~?([^<]*)</code>")
LOADED = re.compile(
    r'<(?:script|img|iframe|source|video|audio|embed|input)\b[^>]*\ssrc="?(https?:|//)|<link\b[^>]*\shref="?(https?:|//)'
    r"|@import\s+(?:url\()?[\"']?(https?:|//)|url\([\"']?(https?:|//)"
)


def on_page_content(content: str, **_: Any) -> str:
    """Browsers draw MathML themselves, so the site needs neither scripts nor fonts for it."""
    content = ROLE.sub(r"<code>\1</code>", content)
    return FORMULA.sub(lambda found: _math(found[2], block=found[1] == "div"), content)


def on_post_build(config: Any, **_: Any) -> None:
    """Fail where a page or a style sheet would load from another host."""
    for file in Path(config.site_dir).rglob("*"):
        if file.suffix in (".html", ".css") and (found := LOADED.search(file.read_text())):
            raise SystemExit(f"{file} loads from elsewhere: {found[0]}")


def _math(latex: str, *, block: bool) -> str:
    return convert(html.unescape(latex).strip(), display="block" if block else "inline")
