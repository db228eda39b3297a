"""Leakage for the terminal, as CSV and as one page with the pictures."""

from __future__ import annotations

import base64
import html
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from fedprune_cli.audit.leak import MAX_DEVICES, Cell, Row
from fedprune_cli.audit.leak_views import DELTA, Case, Scene
from fedprune_cli.report.page import csv_text, html_page, html_section, html_table, write_files
from fedprune_cli.store.state import Array
from fedprune_cli.terminal import Table

HTML, CSV = "leakage.html", "leakage.csv"
SIDE_PX = 56  # of a picture on the page
READING = (
    "First number: what the best attack rebuilt. Second: the same guesses held against samples that were not in the update; only what is "
    "well above it was learnt from the update. An attack that fails proves nothing: a better one may not."
)
NOISE = (
    "Noise: a device's share, under a secure sum of all devices, of the Gaussian noise that gives the whole run this epsilon at delta "
    f"{DELTA:g}; its clip bound is the update's own norm."
)


@dataclass(frozen=True)
class Leakage:
    """All that was found: who was attacked and how, the cells view by view, and the rows on membership."""

    scene: Scene
    trials: int
    cells: tuple[Cell, ...]
    members: tuple[Row, ...]

    @property
    def rows(self) -> list[Row]:
        """All rows."""
        return [*(row for cell in self.cells for row in cell.rows), *self.members]

    @property
    def picture(self) -> bool:
        """Whether SSIM was measured: whether samples are pictures."""
        return any(row.ssim is not None for row in self.rows)

    @property
    def cases(self) -> list[Case]:
        """The cases, in order."""
        return list(dict.fromkeys(cell.case for cell in self.cells))


def tables(found: Leakage) -> list[Table]:
    """Returns what the terminal shows: reconstruction, labels, and membership."""
    shown = [
        Table.of(title, headers, rows, elsewhere=f"in {CSV}")
        for title, headers, rows in (_rebuilt(found), _labels(found))
        if rows
    ]
    return [*shown, Table.of_facts("membership by loss in a device's own model", _membership(found))]


def sentence(found: Leakage) -> str:
    """Returns the answer in a sentence or two."""
    run, seed = found.scene, found.scene.seed
    said = f"Device {run.device}, the round after round {run.state.round}, seed {seed}, {found.trials} trials."
    sharpest = max((cell for cell in found.cells if cell.best), key=lambda cell: cell.best.psnr_db or 0.0, default=None)  # type: ignore[union-attr]
    if sharpest is None or (row := sharpest.best) is None:
        return f"{said} No attack here rebuilds tokens."
    return (
        f"{said} Most is given away by {row.view}, {sharpest.case.name}: {_amount(found, row)} by {row.attack}, "
        f"the mean {'image' if found.picture else 'sample'} as a guess {_amount(found, row, 'guess_')}."
    )


def _amount(found: Leakage, row: Row, whose: str = "") -> str:
    if found.picture:
        return f"{getattr(row, whose + 'psnr_db'):.1f} dB"
    return f"a mean squared error of {getattr(row, whose + 'mse'):.2g}"


def _rebuilt(found: Leakage) -> tuple[str, list[str], list[list[str]]]:
    """Returns title, headers and rows of the reconstructions: a view a row, a case a column."""
    unit = "PSNR in dB" if found.picture else "mean squared error, of columns with range 1"
    views = list(dict.fromkeys(cell.view.name for cell in found.cells))
    best = {(cell.view.name, cell.case): cell.best for cell in found.cells}
    rows = [[view, *(_pair(found, best[view, case]) for case in found.cases)] for view in views]
    if not any(best.values()):
        return "", [], []
    guess = [_guess(found, [best[view, case] for view in views]) for case in found.cases]
    mean = f"(the mean {'image' if found.picture else 'sample'})"
    return f"rebuilt / held against others: {unit}", ["", *(case.name for case in found.cases)], [*rows, [mean, *guess]]


def _pair(found: Leakage, row: Row | None) -> str:
    if row is None:
        return "-"
    if found.picture:
        others = "-" if row.others_psnr_db is None else f"{row.others_psnr_db:.0f}"
        return f"{row.psnr_db:.0f} / {others}"
    others = "-" if row.others_mse is None else f"{row.others_mse:.1g}"
    return f"{row.mse:.1g} / {others}"


def _guess(found: Leakage, of: Sequence[Row | None]) -> str:
    values = [row.guess_psnr_db if found.picture else row.guess_mse for row in of if row is not None]
    mean = float(np.mean([value for value in values if value is not None]))
    return f"{mean:.1f}" if found.picture else f"{mean:.1g}"


def _labels(found: Leakage) -> tuple[str, list[str], list[list[str]]]:
    """Returns title, headers and rows of the labels that the head's bias tells."""
    of = {(row.view, row.attack, row.samples, row.steps): row for row in found.rows if row.jaccard is not None}
    names = list(dict.fromkeys((view, attack) for view, attack, _, _ in of))
    rows = []
    for view, attack in names:
        cells = [of.get((view, attack, case.samples, case.steps)) for case in found.cases]
        rows.append(
            [f"{view}, by {attack.removeprefix('labels, ')}"]
            + ["-" if row is None else f"{row.jaccard:.2f} / {row.chance_jaccard:.2f}" for row in cells]
        )
    title = "labels by the head's bias / by chance: Jaccard"
    return title, ["", *(case.name for case in found.cases)], rows


def _membership(found: Leakage) -> list[list[str]]:
    facts = [[row.view, f"AUC {row.auc:.3f}, chance 0.5"] for row in found.members]
    return facts or [["own models", "no device has samples of both kinds"]]


def files(found: Leakage) -> dict[str, str]:
    """Returns the page and the table by their names; the same figures give the same bytes."""
    names = [field.name for field in fields(Row)]
    values = [[_cell(getattr(row, name)) for name in names] for row in found.rows]
    return {HTML: _page(found), CSV: csv_text(names, values)}


def _cell(value: object) -> object:
    return "" if value is None else float(f"{value:.6g}") if isinstance(value, float) else value


def write(found: Leakage, out: Path) -> Path:
    """Writes the page and the table into a folder; returns the path of the page."""
    return write_files(out, files(found))


def as_json(found: Leakage, page: Path) -> dict[str, object]:
    """Returns it for programs."""
    return {
        "report": str(page), "device": found.scene.device, "round": found.scene.state.round, "seed": found.scene.seed,
        "trials": found.trials, "rows": [asdict(row) for row in found.rows],
    }  # fmt: skip


def _page(found: Leakage) -> str:
    experiment = found.scene.setup.experiment
    body = [
        f"<p class=answer>{html.escape(sentence(found))}</p>",
        *(_section(*table) for table in (_rebuilt(found), _labels(found)) if table[2]),
        f"<p class=note>{READING} {NOISE}</p>",
        html_section("Membership", html_table(["loss in a device's own model", "AUC"], _membership(found)))
        + f"<p class=note>Training samples against the device's own test samples; at most {MAX_DEVICES} devices.</p>",
        *_pictures(found),
        html_section("All figures", _everything(found)),
        html_section("Reproduce", html_table(["what", "value"], [
            ["configuration", f"{experiment.config_hash}, seed {experiment.seed}"],
            ["attacked", f"device {found.scene.device}, the round after round {found.scene.state.round}"],
            ["seed of the attacks", str(found.scene.seed)], ["trials", str(found.trials)],
        ])),
    ]  # fmt: skip
    return html_page(f"What an update gives away: {experiment.method.name}, seed {experiment.seed}", body)


def _section(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return html_section(title, html_table(headers, rows))


def _everything(found: Leakage) -> str:
    kinds = {
        "psnr_db": "PSNR dB", "others_psnr_db": "others", "guess_psnr_db": "guess", "ssim": "SSIM", "guess_ssim": "guess", "mse": "MSE",
        "others_mse": "others", "guess_mse": "guess", "jaccard": "Jaccard", "chance_jaccard": "chance", "auc": "AUC",
    }  # fmt: skip
    headers = ["view", "samples", "steps", "attack", *kinds.values()]
    rows = [
        [row.view, str(row.samples or "own"), str(row.steps or "own"), row.attack]
        + ["-" if (value := getattr(row, kind)) is None else f"{value:.3g}" for kind in kinds]
        for row in found.rows
    ]
    return html_table(headers, rows)


def _pictures(found: Leakage) -> Iterator[str]:
    """Yields a section a case: the originals, and below them what the best attack on each view made of them."""
    for case in found.cases if found.picture else ():
        cells = [cell for cell in found.cells if cell.case == case and len(cell.originals)]
        if not cells:
            continue
        rows = [("original", _strip(cells[0].originals)), *((cell.view.name, _strip(cell.guesses)) for cell in cells)]
        body = "".join(
            f"<tr><td>{html.escape(name)}</td><td><img alt='{html.escape(name, quote=True)}' src='{source}' "
            f"style='height:{SIDE_PX}px;image-rendering:pixelated'></td></tr>"
            for name, source in rows
        )
        yield html_section(f"Pictures: {case.name}", f"<div class=scroll><table>{body}</table></div>")


def _strip(pictures: Array) -> str:
    """Returns pictures [n, C, H, W] in the range 0 to 1 side by side, as the address of a PNG that lies in the page."""
    grey = pictures if pictures.shape[1] in (1, 3) else pictures[:, :1]
    padded = np.pad(grey, ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=1.0)
    whole = np.concatenate(list(padded), axis=2)[:, :, :-1]
    return f"data:image/png;base64,{base64.b64encode(png(np.rint(255 * whole).astype(np.uint8))).decode()}"


def png(picture: Array) -> bytes:
    """Returns a picture, uint8 [1 or 3, H, W], as a PNG."""
    channels, height, width = picture.shape
    rows = picture.transpose(1, 2, 0).reshape(height, -1)
    lines = np.column_stack([np.zeros((height, 1), dtype=np.uint8), rows]).tobytes()  # no filter

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines, 9)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
