"""What a run prints: a bar on a terminal, plain lines elsewhere, and the same lines in train.log."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from orion_unet.distributed import is_main_process, note_progress
from orion_unet.run_log import LOG_FILE


class Console:
    """Prints on rank 0 only, to standard output, and to train.log once the run folder exists."""

    def __init__(self) -> None:
        self.speaks = is_main_process()
        self.on_terminal = self.speaks and sys.stdout.isatty() and sys.stderr.isatty()
        self._log: Path | None = None
        self._bar: tqdm[Any] | None = None

    def log_to(self, run_dir: Path) -> None:
        """Write every further line to train.log too."""
        self._log = run_dir / LOG_FILE

    def say(self, text: str) -> None:
        """One or more lines, above the bar if there is one."""
        if not self.speaks:
            return
        # A terminal that has gone must not end the run, which has its log.
        with suppress(OSError):
            if self._bar is not None:
                tqdm.write(text, file=sys.stdout)
            else:
                print(text, flush=True)
        if self._log is not None:
            stamp = datetime.now().astimezone().isoformat(timespec="seconds")
            with open(self._log, "a", encoding="utf-8") as file:
                file.writelines(f"{stamp} {line}\n" for line in text.splitlines())

    def progress(self, total: int, text: str) -> Callable[[], None]:
        """A bar for something slow at the start; returns what to call after each of ``total`` parts."""
        if not self.on_terminal or total == 0:
            return note_progress
        bar = tqdm(total=total, desc=text, leave=False, dynamic_ncols=True)

        def step() -> None:
            note_progress()
            bar.update()
            if bar.n >= total:
                bar.close()

        return step

    def start_bar(self, text: str, patches: int, done: int = 0) -> None:
        """Begin the bar of a pass over ``patches`` patches."""
        if self.on_terminal:
            self._bar = tqdm(
                total=patches, initial=done, desc=text, unit="patch", leave=False, dynamic_ncols=True, smoothing=0.1
            )

    def advance(self, patches: int, **shown: str) -> None:
        """Move the bar."""
        if self._bar is not None:
            with suppress(OSError):
                if shown:
                    self._bar.set_postfix(shown, refresh=False)
                self._bar.update(patches)

    def end_bar(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            with suppress(OSError):
                self._bar.close()
            self._bar = None

    def epoch_line(self, record: dict[str, Any], epochs: int) -> None:
        """The summary of an epoch from its metrics.jsonl record."""
        width = len(str(epochs))
        pearson = record["val"]["metrics"]["pearson"]
        took = record["duration_s"]
        # Fits 80 columns: a wrapped line would hide its last word, "best".
        parts = [
            f"epoch {record['epoch']:>{width}}/{epochs}",
            f"train {_number(record['train']['loss'])}",
            f"val {_number(record['val']['loss'])}",
            f"Pearson {'n/a' if pearson is None else f'{pearson:.3f}'}",
            f"lr {record['lr']:.1e}",
            f"{took:.1f} s" if took < 10 else f"{took:.0f} s",
        ]
        if record["best"]:
            parts.append("best")
        if record["skipped_steps"]:
            parts.append(f"{record['skipped_steps']} steps skipped")
        self.say("  ".join(parts))


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.5f}"
