"""The one script of the monitor's page, and the security policy that allows it and no other."""

from __future__ import annotations

import base64
import hashlib

# It sets text and attributes only. The page it fetches, from the monitor that served it, is escaped as a whole.
SCRIPT = """
"use strict";
(() => {
  const place = "orion panel " + location.pathname;
  const recall = () => { try { return sessionStorage.getItem(place); } catch { return null; } };
  const keep = (epoch) => { try { sessionStorage.setItem(place, epoch); } catch { /* not allowed in this window */ } };

  const readyPanels = (root) => {
    const slider = root.querySelector("#panel");
    if (!slider) return;
    const panels = [...root.querySelectorAll(".panel")];
    const show = (at) => { panels.forEach((panel, index) => { panel.hidden = index !== at; }); slider.value = at; };
    const choose = (at) => { show(at); keep(at === panels.length - 1 ? "last" : panels[at].dataset.epoch); };
    slider.addEventListener("input", () => choose(Number(slider.value)));
    for (const button of root.querySelectorAll("button[data-at]"))
      button.addEventListener("click", () => choose(Number(button.dataset.at)));
    const kept = panels.findIndex((panel) => panel.dataset.epoch === recall());
    if (kept >= 0) show(kept);
    root.querySelector("#choose").hidden = false;
  };

  const readyCurves = (root) => {
    for (const chart of root.querySelectorAll("svg.curves")) {
      const { at, texts } = JSON.parse(chart.dataset.points);
      const pointer = chart.querySelector(".pointer"), words = chart.parentElement.querySelector("output");
      chart.addEventListener("pointermove", (event) => {
        const box = chart.getBoundingClientRect();
        const x = (event.clientX - box.left) / box.width * chart.viewBox.baseVal.width;
        let nearest = 0;
        at.forEach((known, index) => { if (Math.abs(known - x) < Math.abs(at[nearest] - x)) nearest = index; });
        pointer.setAttribute("transform", `translate(${at[nearest]} 0)`);
        pointer.classList.add("on");
        words.textContent = texts[nearest];
      });
      chart.addEventListener("pointerleave", () => {
        pointer.classList.remove("on");
        words.textContent = texts[texts.length - 1];
      });
    }
  };

  const main = document.querySelector("main"), lost = document.querySelector("#lost");
  const ready = () => { readyPanels(main); readyCurves(main); };
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
