"""Pieces of a page in one file: tables, pictures and plots inside it, nothing that is loaded from elsewhere."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
td { white-space: nowrap; } th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid var(--line); vertical-align: bottom; }
tbody tr:first-child { background: var(--soft); }
figure { margin: 1rem 0; } figcaption { color: #777; font-size: .9rem; }
.grids { display: flex; flex-wrap: wrap; gap: 1.2rem; }
.grids img { image-rendering: pixelated; width: 15rem; border: 1px solid var(--line); }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; }
.plots img { max-width: 100%; width: 34rem; background: white; }
.note { color: #777; font-size: .9rem; }
"""


def document(title: str, parts: Sequence[str], refresh: int | None = None) -> str:
    """HTML of a page, `parts` one under the other; with `refresh` a browser reads it again after that many seconds."""
    again = f'<meta http-equiv="refresh" content="{refresh}">' if refresh else ""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width">{again}<style>{STYLE}</style></head><body>'
        + "\n".join(parts)
        + "</body></html>\n"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of texts under a header; what stands in brackets after `b/N` goes under its number."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(text: str) -> str:
    """What stands in brackets after a number goes under it."""
    value, bracket, rest = html.escape(text).partition(" (b/N")
    return f"{value}<br><small>(b/N{rest}</small>" if bracket else value


def picture(data: bytes, caption: str, alt: str = "", kind: str = "png") -> str:
    """A picture, the bytes of a PNG or of another `kind`, with its caption; `alt` is what is read out in its place."""
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    text = html.escape(caption)
    return f'<figure><img src="{source}" alt="{html.escape(alt) or text}"><figcaption>{text}</figcaption></figure>'


def plot() -> tuple[Any, Any]:
    """A figure without a window, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def as_png(figure: Any) -> bytes:
    """The figure as the bytes of a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
