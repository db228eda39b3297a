"""What a person at a terminal sees: tables, what is going on, and how far it is. `--quiet` leaves only errors."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from fedprune_cli.errors import one_line

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

Record = Mapping[str, Any]  # of a round
FRAME = 3  # columns of a terminal that a table's frame takes for each of its own, and one more for its end
_quiet: ContextVar[bool] = ContextVar("quiet", default=False)
EVERY_S = 2.0  # between lines of progress where there is no terminal
GLANCE_S = 0.5  # between looks at what others have done


def be_quiet(quiet: bool) -> None:
    """Whether only errors are to be seen from here on."""
    _quiet.set(quiet)


@dataclass(frozen=True)
class Table:
    """Rows of text for a terminal of any width.

    Cells of the first column and of those in `folding` are words, which may fold at a space; all others are numbers, which never do.
    Columns stand in the order of their importance: the last ones are left out where they have no room, and a line below says which, and
    where they are (`elsewhere`). The first `always` ones stay; they are broken within words where nothing else is left.
    """

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    folding: frozenset[str] = frozenset()
    elsewhere: str = "in the report"
    always: int = 1

    @classmethod
    def of(
        cls,
        title: str,
        headers: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        folding: Collection[str] = (),
        elsewhere: str = "in the report",
    ) -> Table:
        """Returns the table; what would move a terminal's cursor is escaped."""
        cells = tuple(tuple(map(one_line, row)) for row in rows)
        return cls(title, tuple(map(one_line, headers)), cells, frozenset(map(one_line, folding)), elsewhere)

    @classmethod
    def of_facts(
        cls, title: str, facts: Sequence[Sequence[str]], headers: Sequence[str] = ("figure", "value")
    ) -> Table:
        """Returns a table of what each fact is and its value, both in words; no column of it is ever left out."""
        cells = tuple(tuple(map(one_line, fact)) for fact in facts)
        return cls(title, tuple(headers), cells, frozenset(headers), always=len(headers))

    def plain(self) -> str:
        """Returns it for what is not a terminal: a line a row, whole, its columns aligned."""
        from rich.cells import cell_len

        lines = [self.headers, *self.rows]
        widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
        text = [self.title]
        for line in lines:
            cells = []
            for at, (cell, width) in enumerate(zip(line, widths, strict=True)):
                space = " " * (width - cell_len(cell))
                cells.append(cell + space if self._is_words(at) else space + cell)
            text.append("  ".join(cells).rstrip())
        return "\n".join(text)

    def fit(self, width: int) -> tuple[list[int], tuple[str, ...]]:
        """Returns how wide each column is that has room on a terminal of `width` columns, and the headers of the others."""
        needs = [self._needs(at) for at in range(len(self.headers))]
        if needs[0][0] > width - FRAME and len(needs) > self.always:
            needs[0] = (width // 2, needs[0][1])  # the name is broken anyway: let it leave room for the others
        count = len(needs)
        while count > self.always and sum(least + FRAME for least, _ in needs[:count]) + 1 > width:
            count -= 1
        least, widths = ([need[at] for need in needs[:count]] for at in (0, 1))
        room = width - 1 - FRAME * count
        while sum(widths) > room:
            loose = [at for at in range(count) if widths[at] > least[at]]
            if not loose:  # not even words have room
                loose = [at for at in range(count) if self._is_words(at) and widths[at] > 1]
            if not loose:
                break
            widths[max(loose, key=lambda at: widths[at])] -= 1
        return widths, self.headers[count:]

    def _is_words(self, at: int) -> bool:
        return at == 0 or self.headers[at] in self.folding

    def _needs(self, at: int) -> tuple[int, int]:
        """Returns the least width in which nothing of a column is broken, and the one in which nothing of it folds."""
        from rich.cells import cell_len

        cells, header = [row[at] for row in self.rows], self.headers[at]
        whole = [word for cell in cells for word in cell.split()] if self._is_words(at) else cells
        least = max(map(cell_len, [*whole, *header.split()]), default=1)
        return max(least, 1), max(map(cell_len, [*cells, header, "-"]))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table as Grid
        from rich.text import Text

        table = _encodable(self, options.encoding)
        widths, left_out = table.fit(options.max_width)
        grid = Grid(title=Text(table.title), title_justify="left")
        for at, width in enumerate(widths):
            side: Literal["left", "right"] = "left" if self._is_words(at) else "right"
            grid.add_column(Text(table.headers[at]), justify=side, width=width, overflow="fold")
        for row in table.rows:
            grid.add_row(*map(Text, row[: len(widths)]))
        yield grid
        if left_out:
            yield Text(f"not shown at {options.max_width} columns: {', '.join(left_out)}; all are {table.elsewhere}")


def _encodable(table: Table, encoding: str) -> Table:
    """Returns the table in characters that the encoding has."""

    def shown(text: str) -> str:
        return printable(text, encoding)

    return replace(
        table,
        title=shown(table.title),
        headers=tuple(map(shown, table.headers)),
        rows=tuple(tuple(map(shown, row)) for row in table.rows),
        folding=frozenset(map(shown, table.folding)),
    )


def printable(text: str, encoding: str) -> str:
    """Returns the text in characters that the encoding has: +- for ±, escapes for others that it lacks."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.replace("±", "+-").encode(encoding, "backslashreplace").decode(encoding)
    return text


def show(result: Table | str) -> None:
    """Prints a table or a text, which is what the command was asked for: whole lines where there is no terminal."""
    from rich.console import Console

    if _quiet.get():
        return
    console = Console(markup=False, emoji=False)  # names are the user's, and may look like markup
    if console.is_terminal:
        console.print(result if isinstance(result, Table) else printable(result, console.encoding))
    else:
        say(result.plain() if isinstance(result, Table) else result)


def say(line: str) -> None:
    """Prints a line that belongs to the result."""
    if not _quiet.get():
        print(printable(line, sys.stdout.encoding or "utf-8"), flush=True)


def note(line: str) -> None:
    """Prints a line about what is going on."""
    if not _quiet.get():
        print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def live() -> Iterator[Callable[[Table], None]]:
    """Yields a function that shows a table in the place of the one before; where there is no terminal, below it."""
    from rich.console import Console
    from rich.live import Live

    if not Console().is_terminal or _quiet.get():
        yield show
        return
    with Live(console=Console(markup=False, emoji=False), auto_refresh=False) as shown:
        yield lambda table: shown.update(table, refresh=True)


@contextlib.contextmanager
def status(text: str) -> Iterator[None]:
    """Says what is going on while it takes long, on a terminal only."""
    from rich.console import Console

    with Console(stderr=True, quiet=_quiet.get()).status(text):
        yield


@contextlib.contextmanager
def counting(text: str, count: Callable[[], int]) -> Iterator[None]:
    """Says how many of something are done while others do them: live on a terminal, else a line when there are more."""
    from rich.console import Console

    console, done = Console(stderr=True, quiet=_quiet.get()), threading.Event()

    def look(tell: Callable[[str], None]) -> None:
        seen = 0
        while not done.wait(GLANCE_S if console.is_terminal else EVERY_S):
            now = count()
            if now != seen:
                seen = now
                tell(f"{now} {text}")

    with contextlib.ExitStack() as stack:
        tell: Callable[[str], None] = note
        if console.is_terminal:
            tell = stack.enter_context(console.status(f"0 {text}")).update
        watcher = threading.Thread(target=copy_context().run, args=(look, tell), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()


@contextlib.contextmanager
def progress(title: str, rounds: int) -> Iterator[Callable[[Record], None]]:
    """Yields a function that shows a record, of `rounds` in all: a live bar on a terminal, else a line every two seconds at most."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if _quiet.get():
        yield lambda record: None
        return
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(title, total=rounds, figures="")
            yield lambda record: bar.update(task, completed=record["round"], figures=figures_of(record))
        return
    started = shown = time.monotonic()
    first = 0

    def line(record: Record) -> None:
        nonlocal shown, first
        first = first or record["round"] - 1
        now, left = time.monotonic(), rounds - record["round"]
        if now - shown >= EVERY_S or not left:
            shown = now
            eta = (now - started) / (record["round"] - first) * left
            note(f"round {record['round']}/{rounds}  {figures_of(record)}  ETA {eta:.0f} s")

    yield line


def figures_of(record: Record) -> str:
    """Returns a round's figures in a few words."""
    accuracy = "" if record["accuracy"] is None else f"accuracy {100 * record['accuracy']:.1f} %  "
    ratio = "" if record["mean_ratio"] is None else f"  ratio {record['mean_ratio']:.2f}"
    return f"{accuracy}simulated {record['simulated_s']:.4g} s{ratio}"
