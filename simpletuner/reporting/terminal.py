"""The live display of a terminal: a bar for each task that is under way, the figures of training beneath, lines above."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console as Terminal
from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

__all__ = ["OnTerminal"]

WIDE = 70
"""Columns from which a terminal has room for bars besides time left and speed."""
FRAMES_PER_S = 4


class Status(ProgressColumn):
    """Time left and speed; where the terminal is narrow this column is cut, not the others."""

    def __init__(self) -> None:
        super().__init__(table_column=Column(no_wrap=False))

    def render(self, task: Task) -> Text:
        return _cut(task.fields["status"])


class Bars(Progress):
    """The bars, and beneath them each task's further lines: `get_renderables` is rich's own place for such."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield from (_cut(f"  {line}") for line in task.fields["lines"])


class OnTerminal:
    """What stands on the terminal while a task is under way; lines scroll above."""

    def __init__(self, terminal: Terminal) -> None:
        bar = [BarColumn(20)] if terminal.width >= WIDE else []
        columns = (TextColumn("{task.description}", markup=False), *bar, MofNCompleteColumn(), Status())
        self._bars = Bars(*columns, console=terminal, refresh_per_second=FRAMES_PER_S)
        self._tasks: dict[str, TaskID] = {}

    def line(self, text: str, *, warn: bool) -> None:
        """One line that stays."""
        shown, style = (f"warning: {text}", "yellow") if warn else (text, None)
        self._bars.console.print(shown, style=style, markup=False, highlight=False, soft_wrap=True)

    def show(self, task: str, done: int, total: int, status: str) -> None:
        """A task stands at `done` of `total`."""
        if task not in self._tasks:
            self._bars.start()
            self._tasks[task] = self._bars.add_task(task, total=total, completed=done, status=status, lines=())
        self._bars.update(self._tasks[task], completed=done, total=total, status=status)

    def figures(self, task: str, figures: str, upcoming: str) -> None:
        """The lines beneath a task that is shown."""
        if task in self._tasks:
            self._bars.update(self._tasks[task], lines=tuple(line for line in (figures, upcoming) if line))

    def end(self, task: str) -> None:
        """A task is over."""
        if task not in self._tasks:
            return
        self._bars.refresh()  # what came after the last frame
        self._bars.remove_task(self._tasks.pop(task))
        if not self._tasks:
            self._bars.stop()

    def close(self) -> None:
        """The run is over."""
        for task in list(self._tasks):
            self.end(task)


def _cut(text: str) -> Text:
    """One line, however narrow the terminal."""
    return Text(text, style="dim", no_wrap=True, overflow="ellipsis")
