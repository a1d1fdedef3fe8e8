"""Tables and progress for the command line: by rich where it is installed, else in plain text."""

from __future__ import annotations

import importlib.util
import io
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

PLAIN_INTERVAL = 5.0  # seconds between progress lines where no bar can be drawn
PLAINER = str.maketrans("█▀▄", "#'.")  # blocks of `plotting.text_mask`


class Terminal:
    """Where the commands write; rich draws on terminals only, and never where `plain` is True."""

    def __init__(self, stream: TextIO | None = None, *, plain: bool | None = None) -> None:
        self.stream = stream or sys.stdout or io.StringIO()  # a process may have no output
        if plain is None:
            plain = not self.stream.isatty() or importlib.util.find_spec("rich") is None
        self.plain = plain
        self._console: Any = None
        if not self.plain:
            from rich.console import Console

            self._console = Console(file=self.stream, highlight=False, soft_wrap=True)

    def print(self, text: str = "") -> None:
        """Write one line; what the stream has no characters for in plainer ones."""
        encoding = self.stream.encoding or "utf-8"
        try:
            text.encode(encoding)
        except UnicodeEncodeError:
            text = text.translate(PLAINER).encode(encoding, "replace").decode(encoding)
        print(text, file=self.stream, flush=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Write a table; columns whose cells all read as numbers are set to the right."""
        cells = [[str(cell) for cell in row] for row in rows]
        numeric = [all(_is_number(row[i]) for row in cells) for i in range(len(columns))]
        if self._console is None:
            self._plain_table(columns, cells, numeric)
            return
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for name, right in zip(columns, numeric, strict=True):
            table.add_column(name, justify="right" if right else "left", overflow="fold")
        for row in cells:
            table.add_row(*(_escape(cell) for cell in row))
        self._console.print(table, soft_wrap=False)

    def _plain_table(
        self, columns: Sequence[str], cells: list[list[str]], numeric: list[bool]
    ) -> None:
        widths = [max(len(row[i]) for row in [list(columns), *cells]) for i in range(len(columns))]

        def line(row: Sequence[str]) -> str:
            parts = (
                cell.rjust(width) if right else cell.ljust(width)
                for cell, width, right in zip(row, widths, numeric, strict=True)
            )
            return "  ".join(parts).rstrip()

        self.print(line(columns))
        self.print("  ".join("-" * width for width in widths))
        for row in cells:
            self.print(line(row))

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Progress]:
        """Show how far `total` steps have come: a bar on a terminal, else a line now and then."""
        if self._console is not None:
            import rich.progress as rp
            from rich.table import Column

            count = Column(min_width=2 * len(str(total)) + 1)  # narrow terminals cut the note
            columns = (
                rp.TextColumn("{task.description}"),
                rp.BarColumn(bar_width=20),
                rp.MofNCompleteColumn(table_column=count),
                rp.TimeElapsedColumn(table_column=Column(min_width=7)),
                rp.TextColumn("{task.fields[note]}", table_column=Column(overflow="ellipsis")),
            )
            with rp.Progress(*columns, console=self._console) as bar:
                task = bar.add_task(label, total=total, note="")
                yield _RichProgress(bar, task)
            return
        plain = _PlainProgress(self, label, total)
        yield plain
        plain.finish()


class Progress:
    """Handle of a running progress display."""

    def advance(self, note: str = "") -> None:
        """One step further; `note` is shown beside the count."""
        raise NotImplementedError


class _RichProgress(Progress):
    def __init__(self, bar: Any, task: Any) -> None:
        self._bar, self._task = bar, task

    def advance(self, note: str = "") -> None:
        self._bar.update(self._task, advance=1, note=_escape(note))


class _PlainProgress(Progress):
    """A line when `PLAIN_INTERVAL` has passed, and a last one."""

    def __init__(self, terminal: Terminal, label: str, total: int) -> None:
        self._terminal, self._label, self._total = terminal, label, total
        self._done, self._note = 0, ""
        self._began = self._shown = time.monotonic()

    def advance(self, note: str = "") -> None:
        self._done, self._note = self._done + 1, note
        if time.monotonic() - self._shown >= PLAIN_INTERVAL:
            self._show()

    def finish(self) -> None:
        self._show()

    def _show(self) -> None:
        self._shown = time.monotonic()
        seconds = self._shown - self._began
        line = f"{self._label}  {self._done}/{self._total}  {seconds:.0f} s  {self._note}"
        self._terminal.print(line.rstrip())


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", "").rstrip("x%"))
    except ValueError:
        return text in ("", "-")
    return True


def _escape(text: str) -> str:
    """Keep square brackets from being read as rich's markup."""
    from rich.markup import escape

    return escape(text)
