"""How figures are drawn, as SVG for a page and as PDF for a paper.

Colours are Okabe and Ito's, safe for the colour-blind; lines and text take the page's colour.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, PURPLE, SKY, RED = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
)
MARKERS = "osD^vPX*<"  # of another length than the colours: more than seven curves still differ
INK = "#123456"  # stands for the page's text colour until the SVG is written
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED, INK)  # their yellow cannot be read on white

STYLE: dict[str, object] = {
    "text.parse_math": False,  # text is shown as it is: names are the user's and may hold dollars
    "svg.fonttype": "none", "svg.hashsalt": "fedprune", "font.family": "sans-serif", "font.size": 10,
    "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.grid": True, "grid.color": INK, "grid.alpha": 0.15, "axes.axisbelow": True, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "figure.facecolor": "none", "axes.facecolor": "none",
}  # fmt: skip
PAPER_INK = dict.fromkeys((key for key, value in STYLE.items() if value == INK), "black")


@dataclass(frozen=True)
class Drawing:
    """What `plot` draws on one pair of axes, or on an array of `columns` side by side; the same drawing gives the same bytes."""

    plot: Callable[[Axes], None] | Callable[[np.ndarray], None]
    width: float = 7.2
    height: float = 3.6
    columns: int = 1

    def svg(self) -> str:
        """Returns it for a page: text stays text, and takes the page's colour."""
        return self._svg

    @functools.cached_property
    def _svg(self) -> str:  # a page shows it, and a file holds it
        svg = self._save("svg", STYLE, {"Date": None, "Creator": None}).decode()
        return svg[svg.index("<svg") :].replace(INK, "currentColor").replace(INK.upper(), "currentColor")

    def pdf(self) -> bytes:
        """Returns it for a paper: fonts embedded, black on nothing."""
        style = STYLE | PAPER_INK | {"pdf.fonttype": 42}
        return self._save("pdf", style, {"CreationDate": None, "Creator": None, "Producer": None})

    def _save(self, kind: str, style: Mapping[str, object], metadata: Mapping[str, None]) -> bytes:
        import matplotlib as mpl
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        with mpl.rc_context(dict(style)):
            figure = Figure(figsize=(self.width, self.height), layout="constrained")
            FigureCanvasAgg(figure)
            self.plot(figure.subplots(1, self.columns))
            if engine := figure.get_layout_engine():
                engine.execute(figure)
                figure.set_layout_engine("none")  # it would draw everything twice, to lay it out again
            data = io.BytesIO()
            figure.savefig(data, format=kind, metadata=dict(metadata))
        return data.getvalue()


def embed(svg: str, label: str, prefix: str) -> str:
    """Returns the SVG for a page: scaled to its box, named for screen readers, its ids its own."""
    svg = re.sub(r'id="', f'id="{prefix}-', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}-", svg)
    svg = re.sub(r'href="#', f'href="#{prefix}-', svg)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
