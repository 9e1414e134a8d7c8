"""A report as one self-contained HTML page: pictures embedded, nothing loaded, every value escaped."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from orion_unet.findings import Finding, options_and_sentences
from orion_unet.monitor.changed_options import changed_options
from orion_unet.monitor.evidence import evidence
from orion_unet.monitor.gpus import summary
from orion_unet.monitor.page_curves import curves
from orion_unet.monitor.page_script import SCRIPT, policy
from orion_unet.monitor.page_style import STYLE
from orion_unet.monitor.panels import Panel, closest
from orion_unet.monitor.report import Report
from orion_unet.text import clean, duration, short_number


def page(
    report: Report,
    figure_png: bytes,
    refresh_s: float | None = None,
    panels: Sequence[Panel] = (),
    x: str = "epoch",
) -> str:
    """The report as HTML; with ``refresh_s`` the browser reloads it at that interval."""
    return document(Path(report.run).name or report.run, [body(report, figure_png, panels, x)], refresh_s)


def body(report: Report, figure_png: bytes, panels: Sequence[Panel] = (), x: str = "epoch") -> str:
    """What a page shows of the report: findings with the lines that prove them, curves over ``x``, sanity panels,
    figure, tables, and the options that differ from the recipe."""
    name = Path(report.run).name or report.run
    planned = f" of {report.planned}" if report.planned else ""
    facts = [
        ("state", report.life.state + (f" ({report.life.reason})" if report.life.reason else "")),
        ("epochs", f"{len(report.epochs)}{planned}"),
        ("time per epoch", duration(report.epoch_s)),
        ("time left", duration(report.left_s)),
    ]
    if report.best is not None:
        best = f"{short_number(report.best_value)} in epoch {report.epochs[report.best]}"
        facts.insert(2, (f"best {report.best_name}", best))
    message = report.status.get("message")
    if message:
        facts.append(("message", clean(message, 500)))
    if report.gpus:
        facts.append(("GPUs of this machine", summary(report.gpus)))
    newest = report.reader.channels.newest()
    known = sorted(newest.items(), key=lambda item: -item[1]["pearson"] if abs(item[1]["pearson"]) <= 1 else 2)
    shown = known if len(known) <= 40 else [*known[:20], *known[-20:]]
    markers = [
        [marker, *(short_number(values[metric], 3) for metric in ("pearson", "mae", "ssim"))]
        for marker, values in shown
    ]
    last = range(max(len(report.epochs) - 10, 0), len(report.epochs))
    rate, pearson = report.reader.column("lr"), report.reader.column("pearson")
    epochs = [
        [str(report.epochs[at]), *(short_number(float(c[at])) for c in (report.train, report.val, pearson, rate))]
        for at in last
    ]
    left_out = f" ({len(known) - 40} between best and worst left out)" if len(known) > 40 else ""
    shown_parts = [
        f"<h1>{_safe(name)}</h1>",
        _table((), facts, "plain"),
        "<h2>Warnings</h2>" if report.findings else "<p>No warnings.</p>",
        *_findings(report.findings, report),
        *curves(report, x),
        *_panels(report, panels),
        "<h2>Figure</h2>",
        f'<div class="enlarge">{_image(figure_png)}</div>',
        '<div class="tables">',
        "<div><h2>Last epochs</h2>",
        _table(("epoch", "train", "val", "pearson", "lr"), epochs),
        f"</div><div><h2>Markers{_safe(left_out)}</h2>",
        _table(("marker", "pearson", "mae", "ssim"), markers),
        "</div><div>",
        *_options(report),
        "</div></div>",
        *(f'<p class="quiet">{_safe(note)}</p>' for note in report.notes),
    ]
    return "\n".join(shown_parts)


def waiting_body(reason: str) -> str:
    """What a page shows before there is a run."""
    return f"<h1>Waiting for the run</h1><p>{_safe(reason)}</p>"


def comparison_page(columns: Sequence[str], rows: Sequence[Sequence[str]], figure_png: bytes) -> str:
    """Several runs as one table and one figure."""
    return document("Runs compared", ["<h1>Runs compared</h1>", _table(columns, rows), _image(figure_png)])


def document(
    title: str, body: Iterable[str], refresh_s: float | None = None, poll_s: float = 0.0, tag: str = ""
) -> str:
    """A whole page around the body; its security policy allows its own script, and nothing from elsewhere.

    ``poll_s`` is for a page that the monitor serves: the seconds after which its script asks whether the body still
    has the ``tag``.
    """
    refresh = f'<meta http-equiv="refresh" content="{max(refresh_s, 1):.0f}">' if refresh_s else ""
    poll = f' data-poll="{poll_s:g}" data-tag="{escape(tag)}"' if poll_s else ""
    return "\n".join(
        [
            '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy(bool(poll_s))}">{refresh}',
            '<meta name="viewport" content="width=device-width">',
            f"<title>{_safe(title)}</title><style>{STYLE}</style></head><body{poll}>",
            '<p id="lost" hidden>The monitor does not answer.</p><main>',
            *body,
            f"</main><script>{SCRIPT}</script></body></html>\n",
        ]
    )


def _options(report: Report) -> list[str]:
    """Findings about the options, and the options that differ from the recipe."""
    if not report.options:
        return []
    usual, rows = changed_options(report.config)
    found = ["<h2>Options</h2>", *_findings(report.config_findings, report)]
    if not rows:
        return [*found, f"<p>No option differs from the {_safe(usual)}.</p>"]
    rows = [(f"--{name}", value, other) for name, value, other in rows]
    return [*found, _table(("differing option", "this run", usual), rows, "plain")]


def _panels(report: Report, panels: Sequence[Panel]) -> list[str]:
    """The sanity panels, of which a slider shows one: at first the last one, and only that one without scripts."""
    if not panels:
        return []
    epochs = [panel.epoch for panel in panels]
    best = int(report.epochs[report.best]) if report.best is not None else None
    best_at = epochs.index(closest(epochs, best)) if best is not None else None
    losses = dict(zip(report.epochs.tolist(), report.val.tolist(), strict=True))
    figures = []
    for index, panel in enumerate(panels):
        marks = [f"validation loss {short_number(losses[panel.epoch])}"] if panel.epoch in losses else []
        if index == best_at:
            marks.append("best" if panel.epoch == best else f"closest to the best, epoch {best}")
        marks += ["last"] if index == len(panels) - 1 else []
        hidden = "" if index == len(panels) - 1 else " hidden"
        caption = f"Epoch {panel.epoch}" + (f": {', '.join(marks)}" if marks else "")
        figures.append(
            f'<figure class="panel" data-epoch="{panel.epoch}"{hidden}><figcaption>{_safe(caption)}</figcaption>'
            f"{_image(panel.png, f'Sanity panel of epoch {panel.epoch}')}</figure>"
        )
    to_best = f'<button type="button" data-at="{best_at}">best</button>' if best_at is not None else ""
    last = len(panels) - 1
    ticks = "".join(f'<option value="{at}" label="{epoch}"></option>' for at, epoch in enumerate(epochs))
    return [
        '<h2>Sanity panels</h2><div id="choose" hidden><label for="panel">epoch</label>',
        f'<input id="panel" type="range" min="0" max="{last}" step="1" value="{last}" list="epochs">',
        f'<datalist id="epochs">{ticks}</datalist>{to_best}<button type="button" data-at="{last}">last</button></div>',
        *figures,
    ]


def _safe(text: object) -> str:
    return escape(clean(text if isinstance(text, str) else str(text), 600), quote=True)


def _image(png: bytes, alt: str = "Training progress") -> str:
    return f'<img alt="{_safe(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table of numbers, or with ``plain`` as its kind one of words; without a heading if there are no columns."""
    head = "<tr>" + "".join(f"<th>{_safe(column)}</th>" for column in columns) + "</tr>" if columns else ""
    cells = ("<tr>" + "".join(f"<td>{_safe(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}">{head}{"".join(cells)}</table></div>'


def _findings(findings: Iterable[Finding], report: Report) -> list[str]:
    shown = []
    for finding in findings:
        advice = "; ".join(
            "try " + " or ".join(f"<code>{_safe(item)}</code>" for item in group) if pasted else _safe("; ".join(group))
            for pasted, group in options_and_sentences(finding.advice)
        )
        proof = ""
        if finding.lines is not None:
            title, columns, rows = evidence(report, finding.lines)
            table = _table(columns, rows)
            proof = f'<details data-code="{_safe(finding.code)}"><summary>{_safe(title)}</summary>{table}</details>'
        shown.append(
            f'<div class="finding {_safe(finding.severity)}"><b>{_safe(finding.code)}</b>: {_safe(finding.message)}'
            f"{f'<br>{advice}' if advice else ''}{proof}</div>"
        )
    return shown
