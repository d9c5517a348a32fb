"""Text of others in HTML, without its power; the whole page around what it holds."""

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

MARK = "<!doctype html><!-- devinterp report -->"
"""How every report begins, by which it is recognised"""


POLICY = "style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
LICENCE = "Vega, Vega-Lite, Vega-Embed: Copyright University of Washington Interactive Data Lab and others, BSD-3-Clause"


@dataclass(frozen=True)
class Raw:
    """HTML that was made here."""

    text: str


def inert(text: Any) -> str:
    """Text for HTML: nothing in it is a tag or an attribute's end, and control characters are spelled out."""
    shown = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in str(text))
    return html.escape(shown, quote=True)


def tag(name: str, *parts: Any, **attributes: Any) -> Raw:
    """An element; what is not Raw is text. `class_` is written class, `data_v` data-v."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{inert(value)}"' for key, value in attributes.items() if value is not None
    )
    return Raw(f"<{name}{written}>{joined(parts)}</{name}>")


def joined(parts: Iterable[Any]) -> str:
    return "".join(part.text if isinstance(part, Raw) else inert(part) for part in parts)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], caption: str, **marks: Sequence[Any]) -> Raw:
    """A table that sorts by a click on a heading. A cell is a value, or (value to sort by, what is shown).

    `marks` are attributes of the rows, one value each: `data_at=[...]`.
    """
    head = [tag("th", tag("button", name, type="button"), scope="col") for name in columns]
    body = []
    for number, row in enumerate(rows):
        cells = []
        for value in row:
            by, shown = value if isinstance(value, tuple) else (value, value)
            numeric = isinstance(by, int | float) and not isinstance(by, bool)
            key = ("" if isinstance(by, float) and math.isnan(by) else repr(by)) if numeric else str(by)
            cells.append(tag("td", shown, data_v=key, class_="number" if numeric else None))
        body.append(tag("tr", *cells, **{key: values[number] for key, values in marks.items()}))
    return tag(
        "div",
        tag("table", tag("caption", caption), tag("thead", tag("tr", *head)), tag("tbody", *body), class_="sorts"),
        class_="wide",
    )


def data(value: Any) -> str:
    """JSON that cannot end the script element around it; what is no number is null."""
    text = json.dumps(_finite(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def page(title: str, body: Raw, values: Any, library: str) -> str:
    """The file. A browser runs the two scripts whose hashes stand in its policy and no other, and opens no connection."""
    scripts = [_script(text) for text in (library, _file("page.js"))]
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in scripts)
    policy = f"default-src 'none'; script-src {hashes}; {POLICY}"
    return "\n".join(
        [
            MARK,
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="referrer" content="no-referrer">',
            f"<title>{inert(title)}</title>",
            f"<style>{_file('page.css')}</style></head>",
            f"<body>{body.text}",
            f'<script type="application/json" id="values">{data(values)}</script>',
            f"<!-- {LICENCE} -->",
            f"<script>{scripts[0]}</script>",
            f"<script>{scripts[1]}</script>",
            "</body></html>",
        ]
    )


def _script(text: str) -> str:
    """With names of its own, and as a browser reads it: line ends as it normalises them, nothing that ends the element."""
    safe = re.sub(r"</(script)", r"<\\/\1", text.replace("\r\n", "\n"), flags=re.IGNORECASE).replace("<!--", "<\\!--")
    return f"(() => {{\n{safe}\n}})();"


def _file(name: str) -> str:
    return (files("devinterp.pictures.page") / name).read_text(encoding="utf-8")
