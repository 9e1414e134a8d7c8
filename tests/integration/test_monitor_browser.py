"""The monitor's page in a real browser; skipped where no Chromium is installed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from browser import Browser, find_browser
from monitor_runs import epoch_record, former_losses, healthy_losses, step_record, write_run, write_steps

from orion_unet.cli.monitor import main

ROOT = Path(__file__).resolve().parents[2]
COMMAND = find_browser()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMMAND is None, reason="no Chromium is installed (chromium, google-chrome)"),
]
HOSTILE = "</svg><script>window.owned = 1</script>"
HOSTILE_FOLDER = "<img src=x onerror='window.owned = 2'>"


@pytest.fixture(scope="module")
def browser():
    with Browser(COMMAND) as running:
        yield running


def panel(path, shade):
    from PIL import Image

    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.full((40, 60, 3), shade, np.uint8)).save(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a warning, steps, panels of four epochs and 12 markers, one of them with a hostile name."""
    train, val = former_losses()
    folder = tmp_path_factory.mktemp("runs") / HOSTILE_FOLDER
    write_run(folder, train, val, options={"learning_rate": 5e-4, "ema_decay": 0.5, HOSTILE: HOSTILE})
    names = (HOSTILE, *(f"marker {at}" for at in range(10)))
    lines = [epoch_record(e, t, v, markers=names) for e, (t, v) in enumerate(zip(train, val, strict=True), 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_steps(folder, [step_record(e, s, 0.5 / e) for e in range(1, 21) for s in range(1, 6)])
    for epoch in (2, 8, 14, 20):
        panel(folder / "sanity" / f"epoch_{epoch:04d}.png", 10 * epoch)
    return folder


@pytest.fixture(scope="module")
def page(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    assert main(["--output_dir", str(run), "--html", str(path)]) == 0
    return path.as_uri()


def figure(title):
    return f"figure.chart:has(svg[aria-label='{title}'])"


def test_the_page_loads_nothing_and_its_policy_refuses_what_is_put_in(browser, page):
    browser.open(page)
    assert browser.requests == [page]
    assert browser.complaints == []
    assert browser.run("[window.refused, window.owned ?? null]") == [[], None]
    assert browser.run("document.querySelector('h1').textContent") == HOSTILE_FOLDER
    assert HOSTILE in browser.run("document.body.innerText")
    assert browser.run("document.scripts.length") == 1
    # What an attacker could have written into the page: a script, a handler, a picture, a request, another frame.
    browser.run(
        "(() => { const s = document.createElement('script'); s.textContent = 'window.owned = 3'; "
        "document.body.append(s); const b = document.createElement('b'); "
        "b.setAttribute('onclick', 'window.owned = 4'); document.body.append(b); b.click(); "
        "const i = document.createElement('img'); i.src = 'http://127.0.0.1:9/x.png'; document.body.append(i); "
        "const f = document.createElement('iframe'); f.src = 'http://127.0.0.1:9/'; document.body.append(f); "
        "return fetch('http://127.0.0.1:9/').catch(() => 0); })()"
    )
    browser.wait("window.refused.length >= 5")
    assert browser.run("window.owned ?? null") is None
    assert browser.requests == [page]


def test_the_pointer_shows_the_values_of_the_nearest_epoch(browser, page):
    train, val = former_losses()
    browser.open(page)
    browser.size(1280)
    # The curves begin 58 and end 12 of 560 units from the edges of the drawing.
    browser.pointer(f"{figure('Loss')} svg.curves", (58 + (560 - 70) * 6 / 19) / 560)
    assert browser.run(f'document.querySelector("{figure("Loss")} .where").textContent') == "epoch 7"
    values = f'[...document.querySelectorAll("{figure("Loss")} button output")].map(o => o.textContent)'
    assert browser.run(values) == [f"{train[6]:.4g}", f"{val[6]:.4g}"]
    browser.pointer("h1")
    assert browser.run(values) == [f"{train[-1]:.4g}", f"{val[-1]:.4g}"]


def test_markers_are_switched_on_and_off_and_stay_so_after_a_reload(browser, page):
    browser.open(page)
    browser.size(1280)
    markers = figure("Validation Pearson of markers")
    drawn = (
        f'[...document.querySelectorAll("{markers} svg.curves path[data-curve]")]'
        ".filter(p => getComputedStyle(p).display !== 'none').map(p => Number(p.dataset.curve))"
    )
    assert browser.run(drawn) == [0, 1, 2, 8, 9, 10]
    for curve in (0, 5):
        browser.pointer(f"{markers} button[data-curve='{curve}']", click=True)
    assert browser.run(drawn) == [1, 2, 5, 8, 9, 10]
    browser.open(page)
    assert browser.run(drawn) == [1, 2, 5, 8, 9, 10]
    browser.pointer(f"{markers} button[data-all='none']", click=True)
    assert browser.run(drawn) == []
    browser.pointer(f"{markers} button[data-all='all']", click=True)
    assert browser.run(drawn) == list(range(11))
    assert browser.complaints == []


def test_the_slider_moves_over_the_epochs_of_the_panels(browser, page):
    browser.open(page)
    shown = "[...document.querySelectorAll('.panel')].filter(p => p.offsetHeight > 20).map(p => p.dataset.epoch)"
    assert browser.run(shown) == ["20"]
    browser.run("document.querySelector('#panel').focus()")
    browser.press("ArrowLeft")
    assert browser.run(shown) == ["14"]
    browser.press("Home")
    assert browser.run(shown) == ["2"]
    assert browser.run("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    browser.open(page)
    assert browser.run(shown) == ["2"]
    browser.pointer("#choose button:last-of-type", click=True)
    assert browser.run(shown) == ["20"]


def test_a_warning_opens_the_lines_that_prove_it_and_options_that_differ_are_listed(browser, page):
    browser.open(page)
    rows = (
        "[...document.querySelectorAll('details[data-code=unstable_validation] tr')].filter(r => r.checkVisibility())"
    )
    assert browser.run(f"{rows}.length") == 0
    browser.pointer("details[data-code=unstable_validation] summary", 0.05, click=True)
    _, val = former_losses()
    assert browser.run(f"{rows}.slice(1).map(r => r.cells[2].textContent)") == [f"{v:.4g}" for v in val[4:]]
    table = "[...document.querySelectorAll('table.plain:last-of-type tr')].map(r => [...r.cells].map(c => c.innerText))"
    found = {tuple(row) for row in browser.run(table)}
    assert {("--learning_rate", "0.0005", "0.0001"), ("--ema_decay", "0.5", "0.0")} <= found
    assert (f"--{HOSTILE}", HOSTILE, "-") in found


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_sticks_out_of_a_wide_or_narrow_window_light_or_dark(browser, page, width, dark):
    browser.size(width, dark=dark)
    browser.open(page)
    assert browser.run("document.documentElement.scrollWidth") <= width
    paper, ink = browser.run("(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))")
    bright = [sum(int(part) for part in colour.strip("rgb()").split(",")) for colour in (paper, ink)]
    assert (bright[0] < bright[1]) == dark
    # Text in the drawings can be read: at least 9 pixels high.
    size = "(s => 11 * s.getBoundingClientRect().width / 560)(document.querySelector('svg.curves'))"
    if width == 400:
        size = size.replace("11 *", "16 *")
    assert browser.run(size) >= 9


def test_a_served_page_shows_news_without_reloading_and_keeps_what_was_chosen(browser, tmp_path):
    folder = write_run(tmp_path / "run", *healthy_losses(5), state="training", host="elsewhere")
    panel(folder / "sanity" / "epoch_0002.png", 50)
    panel(folder / "sanity" / "epoch_0004.png", 90)
    words = [sys.executable, ROOT / "monitor_training.py", "--output_dir", folder, "--serve", "0", "--interval", "0.2"]
    with subprocess.Popen([str(word) for word in words], stdout=subprocess.PIPE, text=True) as server:
        try:
            address = server.stdout.readline().split()[0]
            browser.open(address)
            browser.wait("document.querySelector('h1')?.textContent === 'run'")
            browser.run("window.same = 'page'")
            browser.pointer(f"{figure('Loss')} button[data-curve='0']", click=True)
            browser.run("document.querySelector('#panel').focus()")
            browser.press("Home")
            with open(folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(epoch_record(6, 0.123, 0.234)) + "\n")
            where = f'document.querySelector("{figure("Loss")} .where").textContent'
            browser.wait(f"{where} === 'epoch 6'")
            assert browser.run("window.same") == "page"
            on = f'[...document.querySelectorAll("{figure("Loss")} button")].map(b => b.ariaPressed)'
            assert browser.run(on) == ["false", "true"]
            assert browser.run("[...document.querySelectorAll('.panel')].map(p => p.hidden)") == [False, True]
            assert {request.removeprefix(address) for request in browser.requests} <= {"", "body"}
            assert browser.run("window.refused") == []
            shutil.rmtree(folder)
            browser.wait("document.querySelector('h1').textContent === 'Waiting for the run'")
            server.terminate()
            server.wait(20)
            browser.wait("!document.querySelector('#lost').hidden")
        finally:
            server.kill()
