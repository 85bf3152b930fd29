"""What a person sees while something runs: a live line on a terminal, JSON lines elsewhere, always on stderr.

The rest of the package reports events, small dictionaries with an `event` key; only this file knows how they look.
Results go to stdout (`results` puts them into words) and are the command's business. Imports neither MLX nor, unless it
draws, rich.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, TextIO

from mlx_impl.errors import legible
from mlx_impl.results import duration, size

Event = dict[str, Any]
SECONDS_BETWEEN_LINES = 1.0


class Reporter:
    """Show events until the `with` block ends. `quiet` shows none; without a terminal, steps come once a second.

    Whoever reads stderr may leave: the rest is then not shown, and what is being reported on goes on.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet or sys.stderr is None  # closed by whoever started us
        self.terminal = not self.quiet and sys.stderr.isatty()
        self._last_line = 0.0
        self._live: _Live | None = None

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            try:
                self._live.stop()
            except OSError:
                self._leave()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if self.quiet:
            return
        try:
            if self.terminal:
                self._live = self._live or _Live()
                self._live.show(event)
            else:
                self._as_line(event)
        except OSError:
            self._leave()

    def _leave(self) -> None:
        """The reader of stderr has left, the terminal is gone or the disk is full: nothing more is shown."""
        self.quiet = True
        silence(sys.stderr)
        live, self._live = self._live, None
        if live is not None:
            live.stop()  # which gives stdout back

    def say(self, text: str) -> None:
        """Show a line of text."""
        self({"event": "note", "text": legible(text)})

    def warn(self, text: str) -> None:
        """Show a line of text that --quiet does not silence: what was asked for was not all done."""
        if self.quiet and sys.stderr is not None:
            with contextlib.suppress(OSError):
                print(legible(text), file=sys.stderr, flush=True)
        else:
            self.say(text)

    def _as_line(self, event: Event) -> None:
        if event["event"] == "note":
            print(event["text"], file=sys.stderr, flush=True)
            return
        frequent = event["event"] in ("step", "tokenizing", "measuring")
        last = (
            event.get("step") == event.get("steps")
            if event["event"] == "step"
            else event.get("done") == event.get("total")
        )
        now = time.monotonic()
        if frequent and not last and now - self._last_line < SECONDS_BETWEEN_LINES:
            return
        if frequent:
            self._last_line = now
        print(json.dumps(event), file=sys.stderr, flush=True)


def silence(stream: TextIO) -> None:
    """Let what is still written to a stream, and what Python flushes at its end, go nowhere: its reader has left."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class _Live:
    """The terminal's view: lines that stay above one that moves."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[figures]}"),
        )
        # What goes to stdout meanwhile is printed above the moving line, unless it goes somewhere else anyway.
        to_terminal = sys.stdout is not None and sys.stdout.isatty()
        console = Console(stderr=True, highlight=False)
        self._progress = Progress(*columns, console=console, transient=True, redirect_stdout=to_terminal)
        self._task: Any = None

    def stop(self) -> None:
        self._progress.stop()

    def show(self, event: Event) -> None:
        handler: Callable[[Event], None] | None = getattr(self, f"_{event['event']}", None)
        if handler is not None:
            handler(event)

    def _move(self, what: str, done: float, total: float | None, figures: str) -> None:
        if self._task is None:
            self._progress.start()  # not before there is something that moves: others draw on this terminal too
            self._task = self._progress.add_task(what, total=total, figures=figures)  # None: nobody knows
        self._progress.update(self._task, description=what, completed=done, total=total, figures=figures)

    def _line(self, text: str) -> None:
        self._progress.console.print(text, markup=False, soft_wrap=True)

    def _note(self, event: Event) -> None:
        self._line(event["text"])

    def _tokenizing(self, event: Event) -> None:
        self._move("reading", event["done"], event["total"], f"{event['done'] / 1e6:,.1f} MB")

    def _plan(self, event: Event) -> None:
        self._line(plan_text(event))

    def _measuring(self, event: Event) -> None:
        self._move("measuring", event["done"], event["total"], f"{duration(event['eta_seconds'])} left")

    def _begin(self, event: Event) -> None:
        held = f", {event['heldout']:,} held out" if event["heldout"] else ""
        memory = f"; memory: about {size(event['predicted_memory'])}" if event.get("predicted_memory") else ""
        self._line(f"{event['tokens']:,} tokens to learn{held}{memory}")

    def _measured(self, event: Event) -> None:
        self._line(f"loss {event['when']}: {event['loss']:.3f} nats per token")

    def _step(self, event: Event) -> None:
        figures = [f"loss {event['loss']:.3f}"]
        if event.get("tokens_per_second"):
            figures.append(f"{event['tokens_per_second']:,.0f} tok/s")
        if event.get("eta_seconds") is not None:
            figures.append(f"{duration(event['eta_seconds'])} left")
        if event.get("peak_memory"):
            figures.append(f"peak {event['peak_memory'] / 1e9:.1f} GB")
        of_all = "" if event["steps"] is None else f"/{event['steps']}"
        self._move(f"step {event['step']}{of_all}", event["step"], event["steps"], " · ".join(figures))

    def _eval(self, event: Event) -> None:
        mark = ", the best so far" if event["best"] else ""
        self._line(f"step {event['step']}: held-out loss {event['heldout_loss']:.3f}{mark}")

    def _resumed(self, event: Event) -> None:
        self._line(f"resumed after step {event['step']}")


def plan_text(event: Event) -> str:
    """What a training run will do and cost, in words."""
    length = f"{event['steps']:,} steps of" if event["steps"] else "steps of"
    return (
        f"{event['parameters']:,} parameters, {event['tokens']:,} tokens, "
        f"{event['tokens_per_parameter']:.2g} a parameter; "
        f"{length} {event['tokens_per_step']:,} tokens in {event['dtype']}; "
        f"predicted: {event['predicted_memory'] / 1e9:.1f} GB, {duration(event['predicted_seconds'])}"
    )
