"""Write tables, figures and texts as one self-contained HTML page.

The page fetches nothing: pictures are part of it. It follows the reader's light or dark scheme and
the width of the screen.
"""

import base64
from collections.abc import Iterable
from html import escape
from pathlib import Path

from rich.table import Table
from rich.text import Text

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 70rem; padding: 1rem; }
h1, h2 { line-height: 1.2; }
h2 { border-top: 1px solid var(--line); margin-top: 2.5rem; padding-top: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; font-size: 0.85rem; opacity: 0.8; padding-top: 0.4rem;
  text-align: left; }
th, td { border-bottom: 1px solid var(--line); padding: 0.3rem 0.8rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
tbody tr:nth-child(odd) { background: var(--soft); }
figure { margin: 1.5rem 0; }
img { background: #fff; border-radius: 0.5rem; height: auto; max-width: 100%; }
figcaption { font-size: 0.9rem; opacity: 0.85; }
pre { background: var(--soft); border-radius: 0.5rem; overflow-x: auto; padding: 0.8rem; }
summary { cursor: pointer; }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """Put a page together from parts that are HTML already."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def heading(text: str) -> str:
    """Return the heading of a section."""
    return f"<h2>{escape(text)}</h2>"


def table(table: Table) -> str:
    """Return a table as the terminal shows it, without its title."""
    columns = [[_plain(column.header), *map(_plain, column.cells)] for column in table.columns]
    head, *body = zip(*columns, strict=True)
    rows = "".join(f"<tr>{_cells('td', row)}</tr>" for row in body)
    caption = f"<caption>{escape(_plain(table.caption))}</caption>" if table.caption else ""
    return (
        f'<div class="wide"><table>{caption}<thead><tr>{_cells("th", head)}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _cells(tag: str, row: Iterable[str]) -> str:
    return "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row)


def _plain(cell: object) -> str:
    return Text.from_markup(str(cell)).plain


def figure(path: Path, caption: str) -> str:
    """Return a PNG file as part of the page, with its caption."""
    content = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img src="data:image/png;base64,{content}" alt="{escape(caption, quote=True)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def preformatted(text: str) -> str:
    """Return a text as it is, line by line."""
    return f"<pre>{escape(text)}</pre>"


def folded(title: str, text: str) -> str:
    """Return a text that opens on demand."""
    return f"<details><summary>{escape(title)}</summary>{preformatted(text)}</details>"
