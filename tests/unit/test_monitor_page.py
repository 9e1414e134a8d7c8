"""The page: curves with values, sanity panels, one script that the policy allows, and the page served live."""

import base64
import hashlib
import http.client
import io
import json
import os
import re
import socket
import struct
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest
from monitor_runs import epoch_record, former_losses, healthy_losses, step_record, write_run, write_steps

from orion_unet.cli.monitor import main
from orion_unet.config import STAIN_AUGMENTATION, UPSAMPLING, TrainConfig
from orion_unet.errors import InputError
from orion_unet.findings import Lines
from orion_unet.monitor import watch
from orion_unet.monitor.changed_options import changed_options
from orion_unet.monitor.chart import LEFT, RIGHT, WIDTH, Curve, chart, thinned
from orion_unet.monitor.diagnostics import Thresholds
from orion_unet.monitor.evidence import evidence
from orion_unet.monitor.page import page
from orion_unet.monitor.panels import MAX_BYTES, MAX_PANELS, Panel, Panels, chosen
from orion_unet.monitor.report import Run
from orion_unet.monitor.serve import Server
from orion_unet.recipes import RECIPES

HOSTILE = '</svg><script>alert(1)</script>"\' onload="x\x1b\u202e'
VOID = {"meta", "img", "input", "br", "option"}


class Reader(HTMLParser):
    """Elements of a page in order, its texts, and whether every element is closed."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.texts = [], [], {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    def all(self, tag, **wanted):
        wanted = {name.rstrip("_"): value for name, value in wanted.items()}
        return [a for t, a in self.elements if t == tag and wanted.items() <= a.items()]


def report(folder):
    return Run(folder, Thresholds()).poll()


def small_png(shade=0):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes([0, shade]))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def with_panels(folder, epochs):
    (folder / "sanity").mkdir()
    for epoch in epochs:
        (folder / "sanity" / f"epoch_{epoch:04d}.png").write_bytes(small_png(epoch))
    return folder


def policy_of(read):
    return read.all("meta", http_equiv="") or [
        a for t, a in read.elements if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    ]


def test_the_policy_allows_the_one_script_and_nothing_from_elsewhere(tmp_path):
    read = Reader(page(report(write_run(tmp_path / "run", *healthy_losses(5))), small_png()))
    (script,) = read.texts["script"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = policy_of(read)
    parts = dict(part.strip().split(" ", 1) for part in policy["content"].split(";"))
    assert parts == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": "'unsafe-inline'",
        "script-src": f"'sha256-{digest}'",
    }
    assert not [name for _, attributes in read.elements for name in attributes if name.startswith("on")]
    addresses = [a[name] for _, a in read.elements for name in ("src", "href", "xlink:href") if name in a]
    assert addresses
    assert all(address.startswith("data:image/png;base64,") for address in addresses)


def test_the_pointer_shows_the_values_of_the_log(tmp_path):
    train, val = healthy_losses(12)
    val[4] = None
    folder = write_run(tmp_path / "run", train, val)
    read = Reader(page(report(folder), small_png()))
    loss, pearson, markers = (json.loads(a["data-points"]) for a in read.all("svg", class_="curves"))
    assert loss["places"] == [f"epoch {epoch}" for epoch in range(1, 13)]
    assert loss["values"][0] == [f"{value:.4g}" for value in train]
    assert (loss["values"][1][3], loss["values"][1][4]) == (f"{val[3]:.4g}", "-")
    assert pearson["values"] == [["0.6"] * 12]
    # Blank has no correlation, and no curve.
    assert [a["data-name"] for a in read.all("button") if "data-name" in a][3:] == ["Hoechst", "CD45", "Pan-CK"]
    assert [row[0] for row in markers["values"]] == ["0.9", "0.8", "0.7"]
    assert len(loss["at"]) == 12
    np.testing.assert_allclose(np.diff(loss["at"]), np.diff(loss["at"]).mean(), atol=0.11)


def test_the_pointer_names_the_place_on_another_axis(tmp_path):
    folder = write_run(tmp_path / "run", *healthy_losses(3), steps_per_epoch=50)
    read = Reader(page(report(folder), small_png(), x="step"))
    first = json.loads(read.all("svg", class_="curves")[0]["data-points"])["places"][0]
    assert first == "epoch 1, step 50"


def test_a_line_is_interrupted_where_a_value_is_missing_and_log_where_it_spans_decades():
    values = np.array([1000.0, 100.0, np.nan, 10.0, 1.0])
    text = chart("t", "epoch", np.arange(5.0), [str(at) for at in range(5)], [Curve("a", values, "#000")])
    drawn = re.search(r'data-curve="0" d="(M[^"]+)"/>', text)[1]
    assert drawn.count("M") == 2
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", drawn)]
    np.testing.assert_allclose(np.diff(heights)[[0, 2]], np.diff(heights).sum() / 3, atol=0.11)


def test_points_at_one_place_are_drawn_in_the_middle():
    curve = Curve("a", np.array([1.0, 2.0]), "#000")
    (svg,) = Reader(chart("t", "epoch", np.ones(2), ["step 1", "step 2"], [curve])).all("svg", class_="curves")
    assert json.loads(svg["data-points"])["at"] == [(LEFT + WIDTH - RIGHT) / 2] * 2


def test_a_long_curve_keeps_its_peaks():
    values = np.zeros(100_000)
    values[[31_415, 65_359]] = 1, -1
    kept = thinned([values, np.full(100_000, np.nan)])
    assert {31_415, 65_359, 99_999} <= set(kept.tolist())
    assert len(kept) <= 600


def test_best_and_worst_markers_are_shown_at_first_and_the_middle_of_many_left_out(tmp_path):
    names = [f"m{at:02d}" for at in range(50)]
    folder = write_run(tmp_path / "run", *healthy_losses(2))
    record = epoch_record(3, 0.1, 0.1, markers=names)
    for at, name in enumerate(names):
        record["val"]["per_channel"][name]["pearson"] = at / 100
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    read = Reader(page(report(folder), small_png()))
    markers = [a for a in read.all("button") if a.get("data-name", "").startswith("m") and "mean" not in a["data-name"]]
    order = [f"m{at:02d}" for at in [*range(49, 29, -1), *range(19, -1, -1)]]
    assert [a["data-name"] for a in markers] == order
    shown = [a["data-name"] for a in markers if a["aria-pressed"] == "true"]
    assert shown == ["m49", "m48", "m47", "m02", "m01", "m00"]


def test_steps_are_drawn_before_the_first_epoch_has_ended(tmp_path):
    folder = write_run(tmp_path / "run", [], [], state="training", steps_per_epoch=40)
    write_steps(folder, [step_record(1, step, 1 / step) for step in (10, 20, 30)])
    read = Reader(page(report(folder), b""))
    titles = [a["aria-label"] for a in read.all("svg", class_="curves")]
    assert titles == ["Loss of the steps", "Learning rate", "Largest gradient norm"]
    assert json.loads(read.all("svg", class_="curves")[0]["data-points"])["places"][1] == "epoch 1 step 20"


def test_a_warning_names_its_lines_and_the_page_has_them(tmp_path):
    train, val = former_losses()
    found = report(write_run(tmp_path / "run", train, val))
    lines = {finding.code: finding.document().get("lines") for finding in found.findings}
    assert lines["overfitting"] == {"log": "metrics.jsonl", "first": [16], "last": [20]}
    assert lines["slow_convergence"] == {"log": "metrics.jsonl", "first": [15], "last": [20]}
    text = page(found, small_png())
    table = text[text.index('data-code="overfitting"') :]
    assert table.index("<summary>metrics.jsonl, epochs 16 to 20</summary>") < table.index("</table>")
    assert re.findall(r"<tr><td>(\d+)</td><td>([\d.]+)</td>", table[: table.index("</table>")]) == [
        (str(epoch), f"{train[epoch - 1]:.4g}") for epoch in range(16, 21)
    ]


def test_the_lines_of_steps_are_those_of_the_log_and_of_many_some(tmp_path):
    folder = write_run(tmp_path / "run", [], [], state="training", steps_per_epoch=1000)
    write_steps(folder, [step_record(1, s, 0.5, skipped_steps=int(s > 100), non_finite_steps=0) for s in range(1, 401)])
    found = report(folder)
    lines = next(finding.lines for finding in found.findings if finding.code == "skipped_steps")
    title, columns, rows = evidence(found, lines)
    assert title == "steps.jsonl, epoch 1 step 381 to epoch 1 step 400"
    assert [row[1] for row in rows] == [str(step) for step in range(381, 401)]
    assert {row[columns.index("skipped")] for row in rows} == {"1"}
    title, _, rows = evidence(found, Lines("steps.jsonl", (1, 1), (1, 400)))
    assert title.endswith("epoch 1 step 400, 24 of 400 lines")
    assert (len(rows), rows[0][1], rows[-1][1]) == (24, "1", "400")


@pytest.mark.parametrize(
    ("recipe", "title"),
    [("stable", "recipe stable"), ("none", "defaults"), (None, "defaults"), ("<b>", "defaults"), ([1], "defaults")],
)
def test_options_are_compared_with_the_recipe_of_the_run_or_the_defaults(recipe, title):
    usual = TrainConfig.from_options({}).options() | (RECIPES[recipe].values if recipe == "stable" else {})
    options = {**usual, "epochs": 12, "output_dir": "elsewhere", "pixel_size_um": 0.5, "later": {"a": [1]}}
    config = {"options": options, "recipe": recipe, "automatic_learning_rate": 4e-4}
    assert changed_options(config) == (title, [("epochs", "12", "30"), ("later", '{"a": [1]}', "-")])


def test_what_the_trainer_chose_for_an_open_option_is_no_difference():
    usual = TrainConfig.from_options(RECIPES["stable"].values, "stable").options()
    config = {"recipe": "stable", "automatic_learning_rate": 4e-4}
    chosen = {
        "learning_rate": 4e-4, "statistics_batches": 16, "stain_augmentation": STAIN_AUGMENTATION,
        "upsampling": UPSAMPLING,
    }  # fmt: skip
    assert changed_options({**config, "options": usual | chosen}) == ("recipe stable", [])
    changed = {
        "learning_rate": 1e-3, "statistics_batches": 4, "stain_augmentation": 0.5, "fold": "1/5", "use_amp": False,
    }  # fmt: skip
    assert changed_options({**config, "options": usual | changed})[1] == [
        ("fold", "1/5", "none"),
        ("stain_augmentation", "0.5", "auto"),
        ("learning_rate", "0.001", "auto"),
        ("statistics_batches", "4", "auto"),
        ("use_amp", "off", "on"),
    ]
    for options in (None, 3, [], "x"):
        assert changed_options({"options": options})[1] == []


@pytest.mark.parametrize("values", [[np.nan], [np.inf, 1.0], [0.0], [-1e29, 1e29], [1e-29, 1e29], [5.0, 5.0]])
def test_any_values_make_a_well_formed_chart(values):
    values = np.array(values)
    text = chart(
        HOSTILE, HOSTILE, np.arange(float(len(values))), [HOSTILE] * len(values), [Curve(HOSTILE, values, "#0")]
    )
    if text:
        read = Reader(text)
        assert not read.all("script")
        assert "nan" not in "".join(a.get("d", "") for _, a in read.elements)
        assert "inf" not in "".join(a.get("d", "") for _, a in read.elements)
    assert bool(text) == bool(np.isfinite(values).any())


def test_best_and_last_panels_are_marked_and_the_last_is_shown(tmp_path):
    train, val = healthy_losses(12)
    val[7] = 0.01
    folder = with_panels(write_run(tmp_path / "run", train, val), (4, 8, 12))
    assert main(["--output_dir", str(folder), "--html", str(tmp_path / "page.html")]) == 0
    read = Reader((tmp_path / "page.html").read_text())
    panels = read.all("figure", class_="panel")
    assert [(a["data-epoch"], "hidden" in a) for a in panels] == [("4", True), ("8", True), ("12", False)]
    captions = [text for text in read.texts["figcaption"] if text.startswith("Epoch")]
    assert captions[1] == "Epoch 8: validation loss 0.01, best"
    assert captions[2].endswith(", last")
    assert [a["data-at"] for a in read.all("button") if "data-at" in a] == ["1", "2"]
    (slider,) = read.all("input")
    assert (slider["min"], slider["max"], slider["value"]) == ("0", "2", "2")
    pictures = [base64.b64decode(a["src"].partition(",")[2]) for a in read.all("img")]
    assert pictures[:3] == [small_png(epoch) for epoch in (4, 8, 12)]


def test_a_panel_close_to_the_best_epoch_says_so(tmp_path):
    train, val = healthy_losses(6)
    val[3] = 0.01
    text = page(report(write_run(tmp_path / "run", train, val)), b"", panels=[Panel(2, b""), Panel(5, b"")])
    assert f"Epoch 5: validation loss {val[4]:.4g}, closest to the best, epoch 4, last<" in text


def test_few_of_many_panels_are_chosen_and_the_ends_and_the_best_are_among_them():
    found = chosen(range(1, 201), 137)
    assert len(found) <= MAX_PANELS
    assert {1, 137, 200} <= set(found)
    assert max(np.diff(found)) <= 20
    assert chosen([3, 6], 4) == [3, 6]
    assert chosen([], None) == []


def test_only_pngs_of_this_run_are_read_and_only_once(tmp_path, monkeypatch):
    folder = with_panels(tmp_path, (1, 2, 9))
    sanity = folder / "sanity"
    (sanity / "epoch_0003.png").write_bytes(b"<svg onload='alert(1)'>")
    (sanity / "epoch_0004.png").write_bytes(small_png() + bytes(MAX_BYTES))
    os.mkfifo(sanity / "epoch_0005.png")
    (sanity / "epoch_0006.png").mkdir()
    (sanity / "other.png").write_bytes(small_png())
    panels = Panels(folder)
    assert [panel.epoch for panel in panels.poll(8, 1)] == [1, 2]
    from orion_unet.monitor import panels as module

    opened = []
    monkeypatch.setattr(module, "open_regular", lambda path: opened.append(path.name) or io.BytesIO(path.read_bytes()))
    (sanity / "epoch_0002.png").write_bytes(small_png(7) + b"longer")
    assert panels.poll(8, 1)[1].png == small_png(7) + b"longer"
    assert opened == ["epoch_0002.png"]


def test_a_page_that_has_not_changed_is_not_written_again(tmp_path):
    folder, path = write_run(tmp_path / "run", *healthy_losses(5)), tmp_path / "page.html"
    outputs = watch.Outputs(watch.Request(folder, html=path))
    outputs.write_pictures(report(folder))
    first = path.stat().st_ino
    outputs.write_pictures(report(folder))
    assert path.stat().st_ino == first
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(epoch_record(6, 0.1, 0.1)) + "\n")
    outputs.write_pictures(report(folder))
    assert path.stat().st_ino != first
    path.unlink()
    outputs.write_pictures(report(folder))
    assert path.exists()


def test_a_page_that_once_cannot_be_written_is_noted_and_written_at_the_next_poll(tmp_path, monkeypatch):
    folder, path = write_run(tmp_path / "run", *healthy_losses(5)), tmp_path / "page.html"
    watched = watch._FollowedRun(watch.Request(folder, html=path, until_finished=True))
    write = watch.write_atomic

    def full(target, content, durable):
        if target.suffix in (".html", ".png"):
            raise OSError(28, "No space left on device")
        write(target, content, durable=durable)

    monkeypatch.setattr(watch, "write_atomic", full)
    assert watched.poll() is False
    assert f"cannot write {folder / 'training_progress.png'}: No space left on device" in watched.report.notes
    monkeypatch.setattr(watch, "write_atomic", write)
    watched.poll()
    assert watched.report.notes == []
    assert path.exists() and (folder / "training_progress.png").exists()
    monkeypatch.setattr(watch, "write_atomic", full)
    with pytest.raises(InputError, match=f"--html {path}: cannot be written"):
        watch.report_once(watch.Request(folder, html=path))


@pytest.fixture
def server():
    with Server(0, "<run>", 5.0) as running:
        yield running


def ask(server, path="/", method="GET", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode()
    finally:
        connection.close()


def test_the_served_page_asks_for_its_body_and_gets_it_only_when_it_is_new(server):
    server.show("<h1>one</h1>")
    status, headers, text = ask(server)
    read = Reader(text)
    (body,) = read.all("body")
    assert status == 200
    assert body["data-poll"] == "5"
    assert "<h1>one</h1>" in text
    assert "<title>&lt;run&gt;</title>" in text
    for policy in (headers["Content-Security-Policy"], policy_of(read)[0]["content"]):
        assert policy.startswith("default-src 'none'; ")
        assert policy.endswith("; connect-src 'self'")
    assert ask(server, "/body", **{"If-None-Match": body["data-tag"]})[::2] == (304, "")
    server.show("<h1>two</h1>")
    status, headers, text = ask(server, "/body", **{"If-None-Match": body["data-tag"]})
    assert (status, text) == (200, "<h1>two</h1>")
    assert ask(server, "/body", **{"If-None-Match": headers["ETag"]})[0] == 304


def test_a_name_from_elsewhere_other_paths_and_other_methods_get_nothing(server):
    port = server.server_port
    server.show("secret")
    for host in ("evil.example", f"evil.example:{port}", f"127.0.0.1:{port + 1}", f"localhost.evil:{port}", ""):
        status, _, text = ask(server, "/body", Host=host)
        assert (status, "secret" in text) == (403, False)
    assert ask(server, "/body", Host=f"localhost:{port}")[2] == "secret"
    for path in ("/../metrics.jsonl", "/body/", "/etc/passwd"):
        assert ask(server, path)[0] == 404
    assert ask(server, method="POST")[0] == 501


def test_only_this_machine_can_reach_the_server(server):
    assert server.server_address[0] == "127.0.0.1"
    assert server.socket.getsockname()[0] == "127.0.0.1"


def test_a_port_in_use_and_options_that_exclude_serving_are_one_sentence(tmp_path):
    folder = str(write_run(tmp_path / "run", *healthy_losses(3)))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"--serve {port}: cannot be used .*; give another port"):
            main(["--output_dir", folder, "--serve", str(port)])
    for more in (["--watch"], ["--json"], ["--html", "x.html"], ["--compare", folder], ["--notify", "true"]):
        with pytest.raises(InputError, match=f"--serve and {more[0]} do not go together"):
            main(["--output_dir", folder, "--serve", "0", *more])
    with pytest.raises(InputError, match="--serve 65536: must be"):
        main(["--output_dir", folder, "--serve", "65536"])
