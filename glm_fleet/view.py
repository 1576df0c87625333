"""What a run looks like: a table that is kept up to date in a terminal, else a line for each thing that happens."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from rich import filesize
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.segment import Segment
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from glm_fleet.journal import Line

STYLES = {
    "done": "green",
    "failed": "bold red",
    "unreachable": "bold red",
    "go back": "yellow",
    "waiting": "dim",
    "prepared": "dim",
}
AT_REST = ("waiting", "prepared", "done", "failed", "unreachable")  # nothing is being done to the node
UNBOUNDED = 100_000  # columns of a pipe or a file: whoever reads it wants whole lines
TOGETHER = 30  # seconds between two lines of a log about what all nodes download
NARROW = 64  # columns; below, a node's line has no detail beside it
CONTROLS = dict.fromkeys([*(code for code in range(0x20) if code != ord("\n")), *range(0x7F, 0xA0)])


class Screen(Console):
    """A console that prints what it is given, whose reader may leave: then it is silent, and the run goes on."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False)
        if not self.is_terminal:
            self.width = UNBOUNDED

    def on_broken_pipe(self) -> None:
        self.quiet = True

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """What a node says reaches the terminal as text: it cannot clear it, nor write to its clipboard."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(segment.text.translate(CONTROLS), segment.style)


class State:
    """What is known of each node, from the lines of the journal."""

    def __init__(self, title: str, nodes: Sequence[str]) -> None:
        self.title, self.begun = title, time.monotonic()
        self.nodes: dict[str, dict[str, Any]] = {
            node: {"phase": "waiting", "since": self.begun, "detail": "", "wave": 0} for node in nodes
        }
        self.play, self.wave, self.note = "", 0, ""
        self.ended = 0.0
        self.facts: dict[str, dict[str, Any]] = {}  # what a command was run for: checks, figures, commands

    def take(self, line: Line) -> None:
        """Each kind of line has a method of its name."""
        method = getattr(self, f"_{line['what']}", None)
        if method:
            method(line, self.nodes.get(line.get("host", ""), {}))

    def _play(self, line: Line, _: dict[str, Any]) -> None:
        self.play = line["play"]
        if line["waves"] and not self.wave:
            for node in self.nodes.values():
                node.update(phase="prepared", since=time.monotonic(), detail="")

    def _wave(self, line: Line, node: dict[str, Any]) -> None:
        self.wave = node["wave"] = line["number"]

    def _phase(self, line: Line, node: dict[str, Any]) -> None:
        node.update(phase=line["phase"], since=time.monotonic(), detail="", download={})

    def _progress(self, line: Line, node: dict[str, Any]) -> None:
        node["detail"] = line["text"].partition(" · ")[2] or line["text"]  # the phase says which unit
        if "total" in line:
            node["download"] = {name: line[name] for name in ("done", "total", "rate")}
            node["download"]["sources"] = line.get("sources", {})

    def downloads(self) -> str:
        """What the nodes download, all of them together; the last one is done when the slowest is."""
        meters = [node["download"] for node in self.nodes.values() if node.get("download")]
        if len(meters) < 2:
            return ""
        done, total, rate = (sum(meter[name] for meter in meters) for name in ("done", "total", "rate"))
        text = f"{len(meters)} nodes: {filesize.decimal(done)} of {filesize.decimal(total)}, {filesize.decimal(rate)}/s"
        sources: Counter[str] = Counter()
        for meter in meters:
            sources.update(meter["sources"])
        left = [(meter["total"] - meter["done"]) / meter["rate"] for meter in meters if meter["rate"]]
        if len(left) == len(meters):
            text += f", ETA {clock(max(left))}"
        return ", ".join([text, *shares(sources)])

    def _result(self, line: Line, node: dict[str, Any]) -> None:
        if line["outcome"] != "changed":
            node["detail"] = line["message"].splitlines()[0] if line["message"] else ""

    def _fact(self, line: Line, _: dict[str, Any]) -> None:
        self.facts.setdefault(line["host"], {})[line["name"]] = line["value"]

    def _approval(self, _line: Line, _: dict[str, Any]) -> None:
        self.note = "waiting for an answer: go on with the next wave?"

    def _interrupt(self, line: Line, _: dict[str, Any]) -> None:
        self.note = "stopping" if line["now"] else "ending after the wave in hand; Ctrl-C again stops at once"

    def _end(self, line: Line, _: dict[str, Any]) -> None:
        self.ended = time.monotonic()
        for name, outcome in line["hosts"].items():
            if name in self.nodes:
                phase = "done" if outcome in ("ok", "changed") else outcome
                self.nodes[name].update(phase=phase, since=self.ended)


def shares(sources: Counter[str]) -> list[str]:
    """12 % from the hub."""
    total = sources.total()
    return [
        f"{100 * size / total:.0f} % from {'the hub' if source == 'hub' else source}"
        for source, size in sources.items()
        if total
    ]


def clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Silent:
    """For --json: nothing but the result."""

    def __init__(self, state: State) -> None:
        self.state = state

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, at: TracebackType | None
    ) -> None:
        pass

    def line(self, line: Line) -> None:
        self.state.take(line)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While the user is asked something."""
        yield


class LiveView(Silent):
    """The table. It is drawn some times a second, whatever comes in."""

    def __init__(self, state: State, console: Console, transient: bool = False) -> None:
        super().__init__(state)
        self.console = console
        self.spinner = Spinner("dots", style="cyan")
        self.live = Live(console=console, refresh_per_second=4, get_renderable=self.render, transient=transient)

    def __enter__(self) -> Self:
        self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, at: TracebackType | None
    ) -> None:
        self.live.stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.live.stop()
        try:
            yield
        finally:
            self.state.note = ""
            self.live.start()

    def line(self, line: Line) -> None:
        self.state.take(line)
        if line["what"] == "hangup":
            self.console.quiet = True

    def render(self) -> RenderableType:
        state, wide = self.state, self.console.width >= NARROW
        waves = wide and any(node["wave"] for node in state.nodes.values())
        shown = self._shown()
        now = state.ended or time.monotonic()
        head = Text.assemble(
            (state.title, "bold"), ("  ", ""), (clock(now - state.begun), "cyan"), overflow="ellipsis", no_wrap=True
        )
        if state.wave:
            head.append(f"  wave {state.wave}", "magenta")
        table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, header_style="dim", expand=wide)
        table.add_column("NODE", no_wrap=True, overflow="ellipsis")
        if waves:
            table.add_column("WAVE", justify="right")
        table.add_column("PHASE", no_wrap=True, min_width=10)
        table.add_column("FOR", justify="right", no_wrap=True, min_width=5)
        if wide:
            table.add_column("", no_wrap=True, overflow="ellipsis", ratio=1)
        for name, node in shown:
            style = STYLES.get(node["phase"], "cyan")
            cells: list[Any] = [name]
            if waves:
                cells.append(str(node["wave"] or ""))
            elapsed = "" if node["phase"] in AT_REST else clock(now - node["since"])
            cells += [Text(node["phase"], style), elapsed]
            if wide:
                cells.append(Text(node["detail"], "red" if style == "bold red" else "dim"))
            table.add_row(*cells)
        foot = Text(
            state.note or " · ".join(filter(None, (state.play, state.downloads()))),
            "yellow" if state.note else "dim",
            overflow="ellipsis",
            no_wrap=True,
        )
        parts: list[RenderableType] = [head, table]
        hidden = len(state.nodes) - len(shown)
        if hidden:
            counts = Counter(node["phase"] for node in state.nodes.values())
            words = ", ".join(f"{count} {phase}" for phase, count in counts.items())
            parts.append(Text(f"… {hidden} more; all: {words}", "dim", overflow="ellipsis", no_wrap=True))
        if not state.ended:
            line = Table.grid(padding=(0, 1))
            line.add_column(width=1)
            line.add_column(no_wrap=True, overflow="ellipsis")
            line.add_row(self.spinner, foot)
            parts.append(line)
        return Group(*parts)

    def _shown(self) -> list[tuple[str, dict[str, Any]]]:
        """As many nodes as the terminal has lines for: those being worked on first."""
        room = max(3, self.console.height - 5)
        nodes = list(self.state.nodes.items())
        if len(nodes) <= room:
            return nodes
        rank = {"failed": 0, "unreachable": 0, "waiting": 3, "prepared": 3, "done": 2}
        ranked = sorted(range(len(nodes)), key=lambda index: (rank.get(nodes[index][1]["phase"], 1), index))
        return [nodes[index] for index in sorted(ranked[:room])]


class PlainView(Silent):
    """For a log or a pipe: a line when a node goes into another phase, makes progress, or fails."""

    def __init__(self, state: State, console: Console) -> None:
        super().__init__(state)
        self.console = console
        self.said = 0.0  # when the nodes' downloads were

    def line(self, line: Line) -> None:
        self.state.take(line)
        what = line["what"]
        if what == "hangup":
            self.console.quiet = True
        elif what == "phase":
            self._say(line["host"], line["phase"])
        elif what == "progress":
            self._say(line["host"], line["text"])
            self._say_all()
        elif what == "result" and line["outcome"] != "changed":
            first = line["message"].splitlines()[0] if line["message"] else ""
            self._say(line["host"], f"{line['outcome']}: {first}")
        elif what in ("approval", "interrupt"):
            self._say("", self.state.note)

    def _say_all(self) -> None:
        """All nodes' downloads together, from time to time."""
        if (text := self.state.downloads()) and time.monotonic() - self.said >= TOGETHER:
            self.said = time.monotonic()
            self._say("", text)

    def _say(self, host: str, text: str) -> None:
        elapsed = clock(time.monotonic() - self.state.begun)
        self.console.print(f"{elapsed:>7}  {host}{'  ' if host else ''}{text}", soft_wrap=True)


View = Silent


def view(state: State, console: Console, silent: bool, transient: bool) -> View:
    """The one that fits where the output goes; a transient one leaves the place to the command's own result."""
    if silent:
        return Silent(state)
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveView(state, console, transient)
    return PlainView(state, console)
