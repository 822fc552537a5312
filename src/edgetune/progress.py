"""Progress on stderr and in ``gen-model/events.jsonl``: a live bar on a terminal, plain lines elsewhere."""

import io
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.filesize import decimal, pick_unit_and_suffix

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

_PLAIN_INTERVAL = 5.0  # seconds between two plain lines of one step


class _LibraryOutput(io.TextIOBase):
    """Takes what libraries print; one object for all stages, since log handlers keep the stream they met first."""

    file: TextIO | None = None

    def write(self, text: str) -> int:
        return self.file.write(text) if self.file is not None else len(text)

    def flush(self) -> None:
        if self.file is not None:
            self.file.flush()


class Progress:
    """Tells a person, and a file, what a run is doing."""

    def __init__(self, events: Path, stream: TextIO | None = None) -> None:
        self.events = events
        self.stream = sys.stderr if stream is None else stream
        self.live = self.stream.isatty()
        self.stage = ""
        self._bar: Bar | None = None
        self._last_plain = 0.0
        self._transfer_start: tuple[float, int] | None = None
        self._pace: tuple[float, float] | None = None  # when counting began, and where
        self._last = 0.0, 0.0  # done and total of the last report
        self._libraries = _LibraryOutput()

    def say(self, text: str, **fields: Any) -> None:
        """Report something that was done or decided in the current stage."""
        self._event("note", text=text, **fields)
        self._write(f"{self.stage:<9} {text}" if self.stage else text)

    def skip(self, stage: str) -> None:
        """Report a stage that has nothing to do."""
        self.stage = stage
        self._event("up to date")
        self._write(f"{stage:<9} up to date")
        self.stage = ""

    def advance(self, done: float, total: float, text: str = "") -> None:
        """Report how far the current stage is; called as often as convenient."""
        if self.live:
            self._move_bar(done, total, text)
        left = self._time_left(done, total)
        if not self._is_due(time.monotonic(), finished=done >= total):
            return
        self._event("progress", done=done, total=total, text=text)
        if not self.live:
            self._write(f"{self.stage:<9} {done:g}/{total:g}  {text}{left}".rstrip())

    def transfer(self, done: int, total: int) -> None:
        """Report how many bytes are there; the first report of a stage says how many were there before it."""
        now = time.monotonic()
        since, before = self._transfer_start = self._transfer_start or (now, done)
        if self.live:
            self._move_bar(done, total, "", in_bytes=True)
        if not self._is_due(now, finished=done == total):
            return
        rate = round((done - before) / max(now - since, 0.001))
        self._event("progress", done=done, total=total, unit="B", rate=rate)
        if not self.live:
            self._write(f"{self.stage:<9} {_bytes(done, total)}  {decimal(rate, precision=0)}/s")

    def _time_left(self, done: float, total: float) -> str:
        """Say how long the rest takes at the pace since counting began; nothing while there is no pace yet."""
        now = time.monotonic()
        if self._pace is None or done < self._last[0] or total != self._last[1]:
            self._pace = now, done
        since, first = self._pace
        self._last = done, total
        seconds = round((now - since) * (total - done) / (done - first)) if done > first else 0
        return f"  ({timedelta(seconds=seconds)} left)" if seconds else ""

    def _is_due(self, now: float, *, finished: bool) -> bool:
        """Tell whether it is time for a line: some seconds after the last one, and at the end."""
        if now - self._last_plain < _PLAIN_INTERVAL and not finished:
            return False
        self._last_plain = now
        return True

    @contextmanager
    def running(self, stage: str, log: Path) -> Iterator[None]:
        """Name the current stage and keep what libraries print meanwhile in ``log``."""
        self.stage, self._transfer_start, self._pace = stage, None, None
        self._last_plain = started = time.monotonic()
        self._event("start")
        log.parent.mkdir(parents=True, exist_ok=True)
        output = self._libraries
        try:
            with log.open("w", encoding="utf-8") as output.file, redirect_stdout(output), redirect_stderr(output):
                yield
        except BaseException as error:
            self._event("failed", error=type(error).__name__)
            raise
        else:
            self._event("done", seconds=round(time.monotonic() - started, 2))
        finally:
            output.file = None
            self._close_bar()
            self.stage = ""

    def _event(self, event: str, **fields: Any) -> None:
        entry = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "stage": self.stage,
            "event": event,
        }
        self.events.parent.mkdir(parents=True, exist_ok=True)
        with self.events.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry | fields, ensure_ascii=False) + "\n")

    def _write(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            self.stream.write(line + "\n")
            self.stream.flush()

    def _move_bar(self, done: float, total: float, text: str, *, in_bytes: bool = False) -> None:
        if self._bar is None:
            self._bar = self._new_bar(in_bytes=in_bytes)
            self._bar.start()
            self._bar.add_task(f"{self.stage:<9}", completed=int(done), total=total, text=text)
        self._bar.update(self._bar.task_ids[0], completed=done, total=total, text=text)

    def _new_bar(self, *, in_bytes: bool) -> "Bar":
        from rich import progress
        from rich.console import Console

        amount = (
            (progress.DownloadColumn(), progress.TransferSpeedColumn())
            if in_bytes
            else (progress.MofNCompleteColumn(),)
        )
        return progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            *amount,
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[text]}"),
            console=Console(file=self.stream),
            transient=True,
            redirect_stdout=False,  # what libraries print goes to the stage's log
            redirect_stderr=False,
        )

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class Silent(Progress):
    """Tells nobody: another process does."""

    def say(self, text: str, **fields: Any) -> None:
        """Do nothing."""

    def advance(self, done: float, total: float, text: str = "") -> None:
        """Do nothing."""


def _bytes(done: int, total: int) -> str:
    """Return both numbers in the unit of the second, or the first alone when the second is not known."""
    if done > total:
        return decimal(done)
    unit, suffix = pick_unit_and_suffix(total, ["bytes", "kB", "MB", "GB", "TB"], 1000)
    return f"{done / unit:.1f}/{total / unit:.1f} {suffix}"
