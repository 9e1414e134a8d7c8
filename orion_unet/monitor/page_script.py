"""The one script of the monitor's page, and the security policy that allows it and no other."""

from __future__ import annotations

import base64
import hashlib

# It sets text and attributes only. The page it fetches, from the monitor that served it, is escaped as a whole.
SCRIPT = """
"use strict";
(() => {
  const place = "orion page " + location.pathname + " ";
  const recall = (what) => { try { return sessionStorage.getItem(place + what); } catch { return null; } };
  const keep = (what, value) => {
    try { sessionStorage.setItem(place + what, value); } catch { /* not allowed in this window */ }
  };

  const readyPanels = (root) => {
    const slider = root.querySelector("#panel");
    if (!slider) return;
    const panels = [...root.querySelectorAll(".panel")];
    const show = (at) => { panels.forEach((panel, index) => { panel.hidden = index !== at; }); slider.value = at; };
    const choose = (at) => {
      show(at);
      keep("panel", at === panels.length - 1 ? "last" : panels[at].dataset.epoch);
    };
    slider.addEventListener("input", () => choose(Number(slider.value)));
    for (const button of root.querySelectorAll("button[data-at]"))
      button.addEventListener("click", () => choose(Number(button.dataset.at)));
    const kept = panels.findIndex((panel) => panel.dataset.epoch === recall("panel"));
    if (kept >= 0) show(kept);
    root.querySelector("#choose").hidden = false;
  };

  const readyDetails = (root) => {
    for (const details of root.querySelectorAll("details")) {
      const what = "details " + details.dataset.code;
      details.open = recall(what) === "open";
      details.addEventListener("toggle", () => keep(what, details.open ? "open" : ""));
    }
  };

  const readyChart = (chart) => {
    const { at, places, values } = JSON.parse(chart.dataset.points);
    const figure = chart.parentElement, what = "curves " + chart.getAttribute("aria-label");
    const keys = [...figure.querySelectorAll("button[data-curve]")];
    const lines = [...chart.querySelectorAll("path[data-curve]")];
    const where = figure.querySelector(".where"), pointer = chart.querySelector(".pointer");
    const write = (point) => {
      where.textContent = places[point];
      keys.forEach((key, index) => { key.querySelector("output").textContent = values[index][point]; });
    };
    const switched = (index, on) => {
      keys[index].setAttribute("aria-pressed", on);
      lines[index].classList.toggle("off", !on);
    };
    const isOn = (key) => key.getAttribute("aria-pressed") === "true";
    // By name: the curves are in the order of their newest values, which changes.
    const remember = () => keep(what, JSON.stringify(keys.map((key) => [key.dataset.name, isOn(key)])));
    let before = new Map();
    try { before = new Map(JSON.parse(recall(what) || "[]")); } catch { /* not ours */ }
    keys.forEach((key, index) => {
      if (before.has(key.dataset.name)) switched(index, before.get(key.dataset.name));
      key.disabled = false;
      key.addEventListener("click", () => { switched(index, !isOn(key)); remember(); });
    });
    for (const button of figure.querySelectorAll("button[data-all]")) {
      button.hidden = false;
      button.addEventListener("click", () => {
        keys.forEach((_, index) => switched(index, button.dataset.all === "all"));
        remember();
      });
    }
    chart.addEventListener("pointermove", (event) => {
      const box = chart.getBoundingClientRect();
      const x = (event.clientX - box.left) / box.width * chart.viewBox.baseVal.width;
      let nearest = 0;
      at.forEach((known, index) => { if (Math.abs(known - x) < Math.abs(at[nearest] - x)) nearest = index; });
      pointer.setAttribute("transform", `translate(${at[nearest]} 0)`);
      pointer.classList.add("on");
      write(nearest);
    });
    chart.addEventListener("pointerleave", () => {
      pointer.classList.remove("on");
      write(places.length - 1);
    });
  };

  const main = document.querySelector("main"), lost = document.querySelector("#lost");
  const ready = () => {
    readyPanels(main);
    readyDetails(main);
    main.querySelectorAll("svg.curves").forEach(readyChart);
  };
  ready();

  const every = Number(document.body.dataset.poll);
  let tag = document.body.dataset.tag;
  const poll = async () => {
    try {
      const answer = await fetch("body", { headers: { "If-None-Match": tag }, cache: "no-store" });
      if (answer.status === 200) {
        tag = answer.headers.get("ETag");
        main.innerHTML = await answer.text();
        ready();
      }
      lost.hidden = answer.status === 200 || answer.status === 304;
    } catch {
      lost.hidden = false;
    }
    setTimeout(poll, 1000 * every);
  };
  if (every) setTimeout(poll, 1000 * every);
})();
"""


def policy(served: bool) -> str:
    """The page's content security policy: this script, images and styles of the page itself, nothing from elsewhere.

    A page that the monitor serves may also ask that monitor for news.
    """
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    more = "; connect-src 'self'" if served else ""
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'{more}"
