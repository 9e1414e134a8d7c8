"""A report as one self-contained HTML page: figure embedded, nothing loaded, every value escaped."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from orion_unet.findings import Finding, options_and_sentences
from orion_unet.monitor.report import Report
from orion_unet.text import clean, duration, short_number

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin: 1.6rem 0 .4rem; }
img { width: 100%; height: auto; } .quiet { color: #666; }
table { border-collapse: collapse; } td, th { padding: .15rem .8rem .15rem 0; text-align: right; }
td:first-child, th:first-child { text-align: left; } tr:nth-child(even) td { background: #f5f5f5; }
.finding { border-left: 4px solid #0072B2; padding: .2rem .8rem; margin: .5rem 0; }
.warning { border-color: #D55E00; } code { background: #f0f0f0; padding: 0 .3rem; }
.tables { display: flex; gap: 3rem; flex-wrap: wrap; }
"""


def page(report: Report, figure_png: bytes, refresh_s: float | None = None) -> str:
    """The report as HTML; with ``refresh_s`` the browser reloads it at that interval."""
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
    body = [
        f"<h1>{_safe(name)}</h1>",
        _table(("", ""), facts, heading=False),
        "<h2>Warnings</h2>" if report.findings else "<p>No warnings.</p>",
        *_findings(report.findings),
        "<h2>Options</h2>" if report.config_findings else "",
        *_findings(report.config_findings),
        _image(figure_png),
        '<div class="tables">',
        "<div><h2>Last epochs</h2>",
        _table(("epoch", "train", "val", "pearson", "lr"), epochs),
        f"</div><div><h2>Markers{_safe(left_out)}</h2>",
        _table(("marker", "pearson", "mae", "ssim"), markers),
        "</div></div>",
        *(f'<p class="quiet">{_safe(note)}</p>' for note in report.notes),
    ]
    return document(name, body, refresh_s)


def comparison_page(columns: Sequence[str], rows: Sequence[Sequence[str]], figure_png: bytes) -> str:
    """Several runs as one table and one figure."""
    return document("Runs compared", ["<h1>Runs compared</h1>", _table(columns, rows), _image(figure_png)])


def document(title: str, body: Iterable[str], refresh_s: float | None = None) -> str:
    """A whole page around the body; its security policy forbids scripts and anything from elsewhere."""
    refresh = f'<meta http-equiv="refresh" content="{max(refresh_s, 1):.0f}">' if refresh_s else ""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return "\n".join(
        [
            '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">{refresh}',
            '<meta name="viewport" content="width=device-width">',
            f"<title>{_safe(title)}</title><style>{_STYLE}</style></head><body>",
            *body,
            "</body></html>\n",
        ]
    )


def _safe(text: object) -> str:
    return escape(clean(text if isinstance(text, str) else str(text), 600), quote=True)


def _image(png: bytes) -> str:
    return f'<img alt="Training progress" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], heading: bool = True) -> str:
    head = "<tr>" + "".join(f"<th>{_safe(column)}</th>" for column in columns) + "</tr>" if heading else ""
    cells = ("<tr>" + "".join(f"<td>{_safe(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{head}{''.join(cells)}</table>"


def _findings(findings: Iterable[Finding]) -> list[str]:
    shown = []
    for finding in findings:
        advice = "; ".join(
            "try " + " or ".join(f"<code>{_safe(item)}</code>" for item in group) if pasted else _safe("; ".join(group))
            for pasted, group in options_and_sentences(finding.advice)
        )
        shown.append(
            f'<div class="finding {_safe(finding.severity)}"><b>{_safe(finding.code)}</b>: {_safe(finding.message)}'
            f"{f'<br>{advice}' if advice else ''}</div>"
        )
    return shown
