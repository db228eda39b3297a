"""How results look as files: CSV, LaTeX and one self-contained HTML page."""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedprune_cli.report.drawing import Drawing, embed
from fedprune_cli.store import folder


def percent(value: float | None) -> str:
    """Returns a share in percent, or a dash."""
    return "-" if value is None else f"{100 * value:.2f} %"


def seconds(value: float) -> str:
    """Returns seconds with their unit."""
    return f"{value:.4g} s"


def csv_text(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Returns CSV text; a text cell that a spreadsheet would take for a formula gets a leading apostrophe."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in [headers, *rows]:
        writer.writerow(
            [f"'{cell}" if isinstance(cell, str) and cell[:1] in tuple("=+-@\t\r") else cell for cell in row]
        )
    return text.getvalue()


LATEX = str.maketrans(
    {char: f"\\{char}" for char in "%_&#${}"}
    | {
        "\\": r"\textbackslash{}",
        "^": r"\textasciicircum{}",
        "~": r"\textasciitilde{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
    }
    | {"±": r"$\pm$", "\n": " ", "\r": " "}
)


def latex_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns the rows as a LaTeX tabular."""

    def line(cells: Sequence[str]) -> str:
        return " & ".join(cell.translate(LATEX) for cell in cells) + r" \\"

    return "\n".join(
        [
            rf"\begin{{tabular}}{{l{'r' * (len(headers) - 1)}}}",
            r"\hline",
            line(headers),
            r"\hline",
            *map(line, rows),
            r"\hline",
            r"\end{tabular}",
            "",
        ]
    )


def html_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns the rows as an HTML table that scrolls by itself on a narrow screen."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in headers)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def html_section(title: str, content: str) -> str:
    """Returns `content`, HTML, under a title."""
    return f"<section><h2>{html.escape(title)}</h2>{content}</section>"


def html_figure(name: str, drawing: Drawing, caption: str) -> str:
    """Returns the drawing inlined as SVG, with its caption."""
    svg = embed(drawing.svg(), html.escape(caption, quote=True), name)
    return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"


def html_details(title: str, values: object) -> str:
    """Returns values to open when wanted, as JSON."""
    return f"<details><summary>{html.escape(title)}</summary><pre>{html.escape(json.dumps(values, indent=1))}</pre></details>"


STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --soft: #5a6472; --line: #d5dae1; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --paper: #15181c; --soft: #a2abb8; --line: #39404a; } }
@media print { :root { --ink: #000; --paper: #fff; } details, section:has(details):not(:has(p)) { display: none; }
  figure, section { break-inside: avoid; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 52rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.answer { font-size: 1.15rem; border-left: 4px solid #0072B2; padding-left: .8rem; margin: 0 0 1.5rem; }
figure { margin: 1.5rem 0; } figure svg { width: 100%; height: auto; display: block; }
figcaption, .note { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { text-align: right; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 8rem; }
td:nth-child(2):last-child { white-space: normal; overflow-wrap: anywhere; }
pre { overflow-x: auto; font-size: .8rem; border: 1px solid var(--line); padding: .6rem; }
code { overflow-wrap: anywhere; } summary { cursor: pointer; padding: .3rem 0; }
"""


def html_page(title: str, body: Sequence[str]) -> str:
    """Returns the whole page: `body`, HTML, under a title; it needs no other file."""
    return (
        f'<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width, initial-scale=1">'
        f'<link rel=icon href="data:,"><title>fedprune: {html.escape(title)}</title><style>{STYLE}</style></head>'
        f"<body><main><h1>{html.escape(title)}</h1>{''.join(body)}</main></body></html>\n"
    )


def write_files(out: Path, files: Mapping[str, str | bytes]) -> Path:
    """Writes the files of a folder, which is made when it is not there; returns the path of the first."""
    with folder.writing(out):
        out.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            folder.write_whole(out / name, text if isinstance(text, bytes) else text.encode(errors="replace"))
    return out / next(iter(files))
