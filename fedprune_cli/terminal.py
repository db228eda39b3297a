"""What a person at a terminal sees: tables, what is going on, and how far it is. `--quiet` leaves only errors."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from fedprune_cli.errors import OutputError, one_line

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

    from fedprune_cli.store.record import RoundRecord

FRAME = 3  # columns of a terminal that a table's frame takes for each of its own, and one more for its end
SHORTEST = 8  # to which words are broken before numbers have no room
_quiet: ContextVar[bool] = ContextVar("quiet", default=False)
ROUND_S = 0.2  # between lines of rounds where there is no terminal
EVERY_S = 2.0  # between lines of progress where there is no terminal
GLANCE_S = 0.5  # between looks at what others have done


def be_quiet(quiet: bool) -> bool:
    """Sets and returns whether only errors are to be seen from here on; raises OutputError when more is, and stdout cannot take it."""
    _quiet.set(quiet)
    need_stdout(not quiet)
    return quiet


def need_stdout(needed: bool) -> bool:
    """Returns whether stdout is `needed`; raises OutputError, before anything is done, when it is and is closed or full."""
    with contextlib.suppress(ValueError, io.UnsupportedOperation):  # held in memory
        descriptor = sys.stdout.fileno()
        try:
            os.write(descriptor, b"") if needed else None
        except OSError as error:
            raise OutputError(f"cannot write to stdout: {error.strerror}; --quiet needs none") from None
    return needed


def hold_streams() -> None:
    """Puts something in the place of standard streams that are closed, so that no file that is opened is taken for one of them.

    What cannot be encoded is written in other letters.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            # a stdout that refuses what is written: that it is closed is an error only for who needs it
            opened = os.open(os.devnull, os.O_WRONLY if name == "stderr" else os.O_RDONLY)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
            setattr(sys, name, open(descriptor, "r" if name == "stdin" else "w", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="plain")


PLAIN = {"±": "+-", "−": "-", "–": "-", "×": "x", "≤": "<=", "≥": ">=", "…": "...", "·": "*", "λ": "lambda", "ρ": "rho"}


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):  # what is read is not made plain
        raise error
    return "".join(PLAIN.get(char, "?") for char in error.object[error.start : error.end]), error.end


codecs.register_error("plain", _plain)


def let_go() -> OutputError | None:
    """Ends what is written to the standard streams, so that nothing is left for Python to fail with; returns why stdout took not all."""
    refused = None
    for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError) as error:
            if descriptor == 1:
                refused = OutputError(f"cannot write to stdout: {getattr(error, 'strerror', error)}")
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return refused


def tell_error(error: object) -> None:
    """Prints an error's line, whether or not stderr takes it."""
    with contextlib.suppress(OSError):
        print(f"error: {error}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Table:
    """Rows of text for a terminal of any width.

    Cells of the first column and of those in `folding` are words, which may fold at a space; all others are numbers, which never do.
    Columns stand in the order of their importance: the last ones are left out where they have no room, and a line below says which, and
    where they are (`elsewhere`). The first `always` ones stay; their words are broken where nothing else is left.
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
        """Returns a table of what each fact is and its value, both in words; neither column is ever left out."""
        return replace(cls.of(title, headers, facts, folding=headers), always=2)

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

    def fit(self, width: int) -> list[int]:
        """Returns the widths of the columns that have room on a terminal of `width` columns: of the first ones, at least of `always`.

        First headers fold once, then words fold, then headers fold further, and at last words are broken.
        """
        least, tidy, whole = (list(of) for of in zip(*map(self._needs, range(len(self.headers))), strict=True))
        if least[0] + FRAME >= width and len(least) > self.always:
            least[0] = width // 2  # a name that is broken anyway leaves room for the others
        count = len(least)
        while count > self.always and sum(least[:count]) + FRAME * count >= width:
            count -= 1
        widths, room = whole[:count], width - 1 - FRAME * count
        words = [self._is_words(at) for at in range(count)]
        headers_fold = [whole[at] if words[at] else tidy[at] for at in range(count)]
        words_fold = [least[at] if words[at] else tidy[at] for at in range(count)]
        name_breaks = [min(SHORTEST, least[0]), *least[1:count]]
        words_break = [min(SHORTEST, least[at]) if words[at] else least[at] for at in range(count)]
        for floors in (headers_fold, words_fold, least[:count], name_breaks, words_break):
            while sum(widths) > room and (loose := [at for at in range(count) if widths[at] > floors[at]]):
                widths[max(loose, key=widths.__getitem__)] -= 1
        return widths

    def _is_words(self, at: int) -> bool:
        return at == 0 or self.headers[at] in self.folding

    def _needs(self, at: int) -> tuple[int, int, int]:
        """Returns the widths in which no word or number of a column breaks, in which its header folds once, and in which nothing folds."""
        from rich.cells import cell_len

        cells, header = [row[at] for row in self.rows], self.headers[at].split()
        kept = cells
        if self._is_words(at):
            kept = [piece for cell in cells for piece in ([cell] if _is_quantity(cell) else cell.split())]
        least = max(map(cell_len, [*kept, *header, "-"]))
        folded = (max(cell_len(" ".join(part)) for part in (header[:k], header[k:])) for k in range(len(header) + 1))
        return least, max(least, min(folded)), max(map(cell_len, [*cells, self.headers[at], "-"]))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table as Grid
        from rich.text import Text

        table = self.encodable(options.encoding)
        widths = table.fit(options.max_width)
        grid = Grid()
        for at, width in enumerate(widths):
            side: Literal["left", "right"] = "left" if self._is_words(at) else "right"
            grid.add_column(Text(table.headers[at]), justify=side, width=width, overflow="fold")
        for row in table.rows:
            grid.add_row(*map(Text, row[: len(widths)]))
        yield Text(table.title, style="italic")
        yield grid
        if left_out := table.headers[len(widths) :]:
            yield Text(f"not shown at {options.max_width} columns: {', '.join(left_out)}; all are {table.elsewhere}")

    def encodable(self, encoding: str) -> Table:
        """Returns the table in characters that the encoding has."""
        headers, folding = (
            tuple(printable(text, encoding) for text in texts) for texts in (self.headers, self.folding)
        )
        rows = tuple(tuple(printable(cell, encoding) for cell in row) for row in self.rows)
        return replace(
            self, title=printable(self.title, encoding), headers=headers, rows=rows, folding=frozenset(folding)
        )


def _is_quantity(cell: str) -> bool:
    """Whether a cell is a number with its unit, which stay together."""
    return cell[:1].isdigit() and len(cell.split()) == 2


def printable(text: str, encoding: str) -> str:
    """Returns the text in characters that the encoding has."""
    return text.encode(encoding, "plain").decode(encoding)


def show(result: Table | str) -> None:
    """Prints a table or a text, which is what the command was asked for: in whole lines where there is no terminal."""
    from rich.console import Console

    if not sys.stdout.isatty():
        say(result.encodable(sys.stdout.encoding).plain() if isinstance(result, Table) else result)
    elif not _quiet.get():
        console = Console(markup=False, emoji=False)  # names are the user's, and may look like markup
        with console.capture() as shown:
            console.print(result)
        tell(shown.get())


def say(line: str) -> None:
    """Prints a line that belongs to the result."""
    if not _quiet.get():
        tell(f"{line}\n")


def print_json(value: object) -> None:
    """Prints a result for programs on one line, which --quiet leaves as it is."""
    tell(json.dumps(value) + "\n")


def tell(text: str) -> None:
    """Writes to stdout, at once; raises OutputError when the system refuses."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        raise OutputError(f"cannot write to stdout: {error.strerror}") from None


def note(line: str) -> None:
    """Prints a line about what is going on."""
    if not _quiet.get():
        with contextlib.suppress(OSError):
            print(one_line(line), file=sys.stderr, flush=True)  # what nodes and libraries say may be in it


@contextlib.contextmanager
def live() -> Iterator[Callable[[Table, Sequence[str] | None], None]]:
    """Yields a function that shows a table in the place of the one before; where there is no terminal, the lines that say what is new.

    Without such lines, None, it shows the table there too, below the one before.
    """
    from rich.console import Console
    from rich.live import Live

    if not sys.stdout.isatty() or _quiet.get():
        yield _tell_news
        return
    with Live(console=Console(markup=False, emoji=False), auto_refresh=False) as shown:
        yield lambda table, lines: shown.update(table, refresh=True)


def _tell_news(table: Table, lines: Sequence[str] | None) -> None:
    """Prints what is new in a table, or where nobody says what is the whole of it."""
    if lines is None:
        show(table)
    for line in lines or ():
        say(one_line(line))


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
def progress(title: str, rounds: int) -> Iterator[Callable[[RoundRecord], None]]:
    """Yields a function that shows a record, of `rounds` in all: a live bar on a terminal, else a line per round as it comes.

    Rounds that follow each other faster than five a second share a line. A round of which every update was refused has one anyway.
    """
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

            def advance(record: RoundRecord) -> None:
                bar.update(task, completed=record.round, figures=figures_of(record))
                if refused := all_refused(record):
                    bar.console.print(refused)

            yield advance
        return
    started = shown = time.monotonic()
    first = 0

    def line(record: RoundRecord) -> None:
        nonlocal shown, first
        first = first or record.round - 1
        now, left = time.monotonic(), rounds - record.round
        if now - shown >= ROUND_S or not left:
            shown = now
            eta = (now - started) / (record.round - first) * left
            note(f"{title}: round {record.round}/{rounds}  {figures_of(record)}  ETA {eta:.0f} s")
        if refused := all_refused(record):
            note(refused)

    yield line


def all_refused(record: RoundRecord) -> str:
    """Returns a line about a round of which every update was refused, nothing for any other."""
    log, trained = record.faults, len(record.devices.id)
    if log is None or not trained or len(log.refused) < trained:
        return ""
    return f"round {record.round}: all {trained} updates were refused; the shared part stays as it was"


def figures_of(record: RoundRecord) -> str:
    """Returns the figures of a round in a few words."""
    accuracy = "" if record.accuracy is None else f"accuracy {100 * record.accuracy:.1f} %  "
    ratio = "" if record.mean_ratio is None else f"  ratio {record.mean_ratio:.2f}"
    return f"{accuracy}simulated {record.simulated_s:.4g} s{ratio}"
