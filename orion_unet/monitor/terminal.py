"""The terminal view: plain lines for a pipe, one screen for a live view. All text is cleaned first."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from rich.cells import cell_len, set_cell_size
from rich.console import Console, Group, JustifyMethod, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from orion_unet.findings import Finding, options_and_sentences
from orion_unet.monitor.all_runs import HEADINGS, Row
from orion_unet.monitor.gpus import summary
from orion_unet.monitor.report import Report, finite_or_nan
from orion_unet.text import clean, duration, short_number

BLOCKS = "▁▂▃▄▅▆▇█"
ASCII_BLOCKS = "_.:-=+*#"
STATE_STYLES = {
    "finished": "green",
    "early_stopped": "green",
    "training": "cyan",
    "validating": "cyan",
    "starting": "cyan",
    "waiting": "yellow",
    "interrupted": "yellow",
}
# Heading and column of the log; narrow windows leave out the last ones.
EPOCH_COLUMNS = (
    ("train", "train_loss"),
    ("val", "val_loss"),
    ("gap", ""),
    ("pearson", "pearson"),
    ("lr", "lr"),
    ("time", "duration_s"),
    ("r2", "r2"),
    ("mae", "mae"),
    ("ssim", "ssim"),
    ("psnr dB", "psnr_db"),
    ("grad", "grad_norm"),
    ("patch/s", "samples_per_s"),
)


def make_console(file: TextIO, width: int | None = None) -> Console:
    """A console that interprets nothing in its text, and sends no escape sequences to a pipe."""
    return Console(
        file=file,
        width=width,
        force_terminal=file.isatty(),
        markup=False,
        highlight=False,
        emoji=False,
        soft_wrap=False,
        legacy_windows=False,
    )


def view(report: Report, console: Console, height: int | None = None, footer: str = "") -> RenderableType:
    """The report in the console's width, and in ``height`` lines if given; the tables are shortened first."""
    width = console.width
    head = _header(report, width, _blocks(console))
    findings = _findings(report, width)
    foot = [Text(clean(note, width), style="dim") for note in report.notes]
    if footer:
        foot.append(Text(footer, style="dim", no_wrap=True, overflow="ellipsis"))
    space = [Text()]
    if height is None:
        return Group(*head, *space, *_tables(report, width, 8), *space, *findings, *foot)
    fixed = sum(len(console.render_lines(part, pad=False)) for part in (*head, *findings, *foot))
    rows = height - fixed - 1
    if rows >= 8:
        rows -= 2
    else:
        space = []
    rows = max(3, min(rows, 40))
    lines = console.render_lines(Group(*head, *space, *_tables(report, width, rows), *space, *findings), pad=False)
    room = height - len(foot)
    if len(lines) > room:
        more = f"... {len(lines) - room + 1} more lines: enlarge the window, or run once without --watch"
        lines = [*lines[: room - 1], [Segment(set_cell_size(more, min(len(more), width)))]]
    return Group(_Lines(lines), *foot)


class _Lines:
    """Lines that are already rendered."""

    def __init__(self, lines: list[list[Segment]]) -> None:
        self.lines = lines

    def __rich_console__(self, console: Console, options: Any) -> Any:
        for line in self.lines:
            yield from line
            yield Segment.line()


def sparkline(values: np.ndarray, width: int, low: float, high: float, blocks: str = BLOCKS) -> str:
    """The values as at most ``width`` blocks from ``low`` to ``high``; x if not finite, blank if not measured."""
    parts = (
        np.array_split(values, width) if len(values) > width else np.split(values, len(values)) if len(values) else []
    )
    shown = []
    for part in parts:
        finite = part[np.isfinite(part)]
        if np.isinf(part).any():
            shown.append("x")
        elif not len(finite):
            shown.append(" ")
        else:
            share = (float(finite.mean()) - low) / (high - low) if high > low else 0.0
            shown.append(blocks[min(max(int(share * len(blocks)), 0), len(blocks) - 1)])
    return "".join(block * min(max(width // len(shown), 1), 4) for block in shown)


def one_line(report: Report) -> str:
    """The run in one plain line, to log what changes."""
    parts = [report.life.state, _progress(report)]
    if len(report.epochs):
        parts += [f"train {short_number(report.train[-1])}", f"val {short_number(report.val[-1])}", _best(report)]
    elif report.newest_step is not None:
        loss = short_number(report.newest_step["smoothed_loss"])
        parts.append(f"step {report.newest_step['step']:.0f}, step loss {loss}")
    parts += [f"{finding.severity}: {finding.code}" for finding in report.findings]
    return ", ".join(part for part in parts if part)


def comparison_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table without lines, its cells cleaned."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(Text(clean(column)), justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*[Text(clean(cell, 300)) for cell in row])
    return table


def runs_view(rows: Sequence[Row], width: int, height: int | None = None, footer: str = "") -> RenderableType:
    """Every run in one line of ``width`` characters, and in ``height`` lines together if given: the last runs are left
    out first, which are those that have ended."""
    room = len(rows) if height is None else height - 1 - bool(footer)
    if len(rows) > room:
        room = max(room - 1, 1)
    cells = [row.cells() for row in rows[:room]]
    widths = [max(cell_len(cell) for cell in column) for column in zip(HEADINGS, *cells, strict=True)]
    # Names and warnings share what the other columns leave, and a short one leaves the other more.
    name, warnings = HEADINGS.index("run"), HEADINGS.index("warnings")
    left = width - 2 * (len(HEADINGS) - 1) - sum(widths) + widths[name] + widths[warnings]
    widths[name] = max(min(widths[name], max(left - widths[warnings], left // 2)), 4)
    widths[warnings] = max(min(widths[warnings], left - widths[name]), 4)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading, size in zip(HEADINGS, widths, strict=True):
        justify: JustifyMethod = "right" if heading in ("epoch", "best", "age") else "left"
        table.add_column(heading, justify=justify, no_wrap=True, overflow="ellipsis", width=size)
    for row, words in zip(rows, cells, strict=False):
        texts = [Text(word) for word in words]
        texts[1].stylize(STATE_STYLES.get(row.state, "red"))
        if row.report is None or row.report.warnings:
            texts[warnings].stylize("bold red")
        table.add_row(*texts)
    foot = [f"... {len(rows) - room} more runs"] if len(rows) > room else []
    foot += [footer] if footer else []
    return Group(table, *(Text(line, style="dim", no_wrap=True, overflow="ellipsis") for line in foot))


def _blocks(console: Console) -> str:
    return BLOCKS if console.encoding.lower().replace("-", "").startswith("utf") else ASCII_BLOCKS


def _header(report: Report, width: int, blocks: str) -> list[RenderableType]:
    state = report.life.state
    title = Text(no_wrap=True, overflow="ellipsis")
    title.append(
        set_cell_size(clean(Path(report.run).name or report.run, 60), min(60, max(width - 30, 10))).rstrip(), "bold"
    )
    title.append("  ")
    title.append(state, f"bold {STATE_STYLES.get(state, 'red')}")
    if report.life.reason:
        title.append(f" ({clean(report.life.reason)})", "dim")
    message = clean(report.status.get("message") or "", width)
    lines: list[RenderableType] = [title]
    if message:
        lines.append(Text(message, no_wrap=True, overflow="ellipsis"))
    step = ""
    if state in ("training", "validating", "stalled") and _whole(report.status.get("steps_per_epoch")):
        step = f"step {_whole(report.status.get('step')) or 0}/{_whole(report.status.get('steps_per_epoch'))}"
    each = f"{duration(report.epoch_s)}/epoch" if report.epoch_s is not None else ""
    left = f"{duration(report.left_s)} left" if report.left_s else ""
    parts = (_progress(report), step, each, left, _best(report))
    lines.append(Text(" | ".join(part for part in parts if part), no_wrap=True, overflow="ellipsis"))
    if len(report.epochs):
        lines += _sparklines(report, width, blocks)
    lines += _steps(report, width, blocks)
    if report.gpus:
        lines.append(Text(f"      {summary(report.gpus)}", no_wrap=True, overflow="ellipsis"))
    return lines


def _sparklines(report: Report, width: int, blocks: str) -> list[RenderableType]:
    both = np.concatenate([report.train, report.val])
    finite = both[np.isfinite(both)]
    # A high first loss would flatten the rest.
    low, high = (float(finite.min()), float(np.percentile(finite, 97))) if len(finite) else (0.0, 1.0)
    lines: list[RenderableType] = []
    for name, values, style in (("train", report.train, "blue"), ("val", report.val, "yellow")):
        ends = f"{short_number(values[0])} -> {short_number(values[-1])}"
        line = Text(f"{name:<6}", no_wrap=True, overflow="ellipsis")
        line.append(sparkline(values, max(width - 8 - len(ends), 10), low, high, blocks), style)
        line.append(f" {ends}")
        lines.append(line)
    return lines


def _steps(report: Report, width: int, blocks: str) -> list[RenderableType]:
    """The steps of this epoch and the one before it; until an epoch has finished, rate and gradient as well."""
    newest, curves = report.newest_step, report.newest_curves
    if newest is None:
        return []
    # Broken losses are drawn where they happened: the smoothed curve goes on over them.
    loss = np.where(np.isinf(curves.loss), np.inf, curves.smooth)
    shown = [("steps", loss, "blue")]
    if not len(report.epochs):
        shown += [("rate", curves.rate, "green"), ("grad", curves.grad, "magenta")]
    lines: list[RenderableType] = []
    for name, values, style in shown:
        finite = values[np.isfinite(values)]
        low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
        ends = f"{short_number(values[0], 3)} -> {short_number(values[-1], 3)}"
        line = Text(f"{name:<6}", no_wrap=True, overflow="ellipsis")
        line.append(sparkline(values, max(width - 8 - len(ends), 10), low, high, blocks), style)
        line.append(f" {ends}")
        lines.append(line)
    wait = newest["data_wait_fraction"]
    parts = (
        f"step {newest['step']:.0f}",
        f"lr {short_number(newest['lr'], 2)}",
        f"max gradient {short_number(newest['largest_grad_norm'], 3)}",
        f"{short_number(newest['samples_per_s'], 3)} patch/s",
        f"data wait {wait:.0%}" if wait <= 1 else "",
    )
    lines.append(Text("      " + " | ".join(part for part in parts if part), no_wrap=True, overflow="ellipsis"))
    return lines


def _progress(report: Report) -> str:
    return f"epoch {report.current_epoch}" + (f" of {report.planned}" if report.planned else "")


def _best(report: Report) -> str:
    if report.best is None:
        return ""
    chosen_by = "Pearson " if report.best_by == "pearson" else ""
    return f"best {chosen_by}{short_number(report.best_value)} (epoch {report.epochs[report.best]})"


def _tables(report: Report, width: int, rows: int) -> list[RenderableType]:
    """The last epochs on the left, the best and worst markers on the right: ``rows`` lines each, and a heading."""
    if not len(report.epochs):
        return [Text("no epoch has finished yet", style="dim")]
    markers = _aligned(_markers(report, rows, wide=width >= 110), left=1)
    room = width - (cell_len(markers[0]) + 3 if markers else 0)
    table, best = _epochs(report, rows, room)
    epochs = _aligned(table)
    while cell_len(epochs[0]) > room and len(table[0]) > 2:
        table = [row[:-1] for row in table]
        epochs = _aligned(table)
    lines: list[RenderableType] = []
    for at in range(max(len(epochs), len(markers))):
        line = Text(no_wrap=True, overflow="crop")
        line.append(epochs[at] if at < len(epochs) else " " * cell_len(epochs[0]), "bold" if at in (0, best) else "")
        if at < len(markers):
            line.append("   ").append(markers[at], "bold" if at == 0 else "")
        lines.append(line)
    return lines


def _aligned(rows: list[list[str]], left: int = 0) -> list[str]:
    """Rows of cells as lines of columns, of which the first ``left`` are aligned to the left."""
    sizes = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        pads = [" " * (size - cell_len(cell)) for size, cell in zip(sizes, row, strict=True)]
        cells = [c + pad if at < left else pad + c for at, (c, pad) in enumerate(zip(row, pads, strict=True))]
        lines.append("  ".join(cells))
    return lines


def _epochs(report: Report, rows: int, room: int) -> tuple[list[list[str]], int | None]:
    """Cells of the last epochs in as many columns as fit, and the row of the best epoch."""
    shown = EPOCH_COLUMNS[: max((room - 7) // 9, 1)]
    columns = {name: report.reader.column(name)[-rows:] for _, name in shown if name}
    gap = finite_or_nan(report.val[-rows:]) - finite_or_nan(report.train[-rows:])
    table = [["epoch", *[f"{heading:>7}" for heading, _ in shown]]]
    first = max(len(report.epochs) - rows, 0)
    for at in range(len(report.epochs) - first):
        cells = [_cell(name, float(columns[name][at] if name else gap[at])) for _, name in shown]
        table.append([str(report.epochs[first + at]), *cells])
    best = None if report.best is None or report.best < first else report.best - first + 1
    return table, best


def _markers(report: Report, rows: int, wide: bool) -> list[list[str]]:
    """Cells of the best and worst markers of the newest epoch; no rows if there are no markers."""
    newest = report.reader.channels.newest()
    if not newest:
        return []
    known = sorted((n for n in newest if np.isfinite(newest[n]["pearson"])), key=lambda n: -newest[n]["pearson"])
    order = [*known, *(name for name in newest if not np.isfinite(newest[name]["pearson"]))]
    left_out = len(order) - rows + 1 if len(order) > rows else 0
    upper = rows // 2 if left_out else len(order)
    table = [["marker", "pearson", *(["mae"] if wide else [])]]
    for name in [*order[:upper], *([None] if left_out else []), *order[upper + left_out :]]:
        if name is None:
            cells = [f"+{left_out} more", "", ""]
        else:
            label = clean(name, 24 if wide else 12)
            label = label if cell_len(label) <= 24 else set_cell_size(label, 24)
            cells = [label, _cell("pearson", newest[name]["pearson"]), _cell("mae", newest[name]["mae"])]
        table.append(cells[: len(table[0])])
    return table


def _cell(name: str, value: float) -> str:
    """A number of at most ten characters; correlations and similarities have three decimals."""
    if name == "duration_s":
        return duration(value)
    if np.isinf(value):
        return "inf"
    if name in ("pearson", "ssim") and abs(value) <= 1:
        return f"{value:.3f}"
    return short_number(value, 2 if name == "lr" else 4)[:10]


def _findings(report: Report, width: int) -> list[RenderableType]:
    lines: list[RenderableType] = []
    for finding in report.findings:
        lines += _finding(finding, width, "bold red" if finding.severity == "warning" else "cyan")
    for finding in report.config_findings:
        text = Text("option ", style="cyan")
        text.append(f"{finding.message}: {_advice(finding.advice)}", "default")
        lines.append(text)
    if not report.findings and len(report.epochs) >= 6:
        lines.append(Text("no warnings", style="green"))
    return lines


def _finding(finding: Finding, width: int, style: str) -> list[RenderableType]:
    first = Text(f"{finding.severity} ", style=style)
    first.append(f"{finding.code}: ", "bold")
    first.append(clean(finding.message, 400), "default")
    # Broken between options, but not between an option and its value.
    advice = re.sub(r"(--\w+) (?!-)", "\\1\xa0", _advice(finding.advice))
    lines = textwrap.wrap(advice, max(width - 2, 20), break_on_hyphens=False)
    return [first, *(Text("  " + line.replace("\xa0", " "), style="italic") for line in lines)]


def _advice(items: Iterable[str]) -> str:
    """Advice in one sentence: options are alternatives to try, sentences are steps."""
    parts = [
        "try " + ", or ".join(clean(item, 200) for item in group) if pasted else "; ".join(map(clean, group))
        for pasted, group in options_and_sentences(items)
    ]
    return "; ".join(parts)


def _whole(value: Any) -> int | None:
    return value if type(value) is int and 0 < value < 10**9 else None
