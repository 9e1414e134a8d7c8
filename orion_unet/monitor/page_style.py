"""How the monitor's page looks: light or dark as the reader's system is, on a wide screen and on a narrow one."""

STYLE = """
:root { color-scheme: light dark; --ink: #222; --quiet: #5f5f5f; --paper: #fff; --stripe: #f4f4f4; --line: #ddd;
  --note: #0072B2; --warn: #c44e00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e4e4; --quiet: #a8a8a8; --paper: #16181a; --stripe: #222528;
  --line: #3a3d40; --note: #56B4E9; --warn: #ff8a3d; } }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px; padding: 0 1rem;
  color: var(--ink); background: var(--paper); overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin: 1.6rem 0 .4rem; }
img { width: 100%; height: auto; border-radius: 3px; } .quiet, .where, details { color: var(--quiet); }
.wide { overflow-x: auto; } table { border-collapse: collapse; overflow-wrap: normal; }
td, th { padding: .15rem .8rem .15rem 0; text-align: right; font-variant-numeric: tabular-nums; }
th { white-space: nowrap; }
td:first-child, th:first-child { text-align: left; } tr:nth-child(even) td { background: var(--stripe); }
.plain td, .plain th { text-align: left; vertical-align: top; overflow-wrap: anywhere; }
.plain td:first-child { overflow-wrap: normal; }
.finding { border-left: 4px solid var(--note); padding: .2rem .8rem; margin: .5rem 0; }
.warning { border-color: var(--warn); } code { background: var(--stripe); padding: 0 .3rem; }
summary { cursor: pointer; } details table { color: var(--ink); font-size: .9rem; }
.tables { display: flex; gap: 0 3rem; flex-wrap: wrap; } .tables > div { max-width: 100%; }
figure { margin: 0; } .charts { display: grid; gap: 1.4rem 2rem; }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(28rem, 100%), 1fr)); } .chart { max-width: 40rem; }
.chart.many { grid-column: 1 / -1; max-width: none; } .many .curves { max-width: 40rem; }
@media (min-width: 60rem) { .many { display: grid; grid-template-columns: 1fr 1fr; gap: 0 2rem; }
  .many figcaption { grid-column: 1 / -1; } .many .keys { order: 1; align-content: flex-start; } }
.keys { display: flex; flex-wrap: wrap; gap: .1rem .3rem; margin: .2rem 0 .1rem; }
button { font: inherit; color: inherit; background: none; border: 1px solid var(--line); border-radius: 4px;
  padding: 0 .4rem; cursor: pointer; white-space: nowrap; } button:disabled { color: inherit; cursor: default; }
.keys button[aria-pressed=false] { opacity: .5; border-style: dotted; } .keys output { display: inline-block;
  min-width: 3.6rem; text-align: left; font-variant-numeric: tabular-nums; }
.all { border-style: dashed; }
.curves { width: 100%; height: auto; display: block; touch-action: pan-y; }
.curves text { font-size: 11px; fill: var(--quiet); } .curves [data-curve].off { display: none; }
.curve { fill: none; stroke-width: 1.8; stroke-linecap: round; stroke-linejoin: round; }
.grid { stroke: var(--line); } .key { width: 24px; height: 8px; }
.pointer { stroke: var(--quiet); visibility: hidden; } .pointer.on { visibility: visible; }
#choose { display: flex; gap: .6rem; align-items: center; } #choose[hidden] { display: none; }
#panel { flex: 1; max-width: 40rem; min-width: 4rem; }
#lost { background: var(--warn); color: var(--paper); padding: .3rem .8rem; }
@media (max-width: 34rem) { body { margin: 1rem auto; padding: 0 .7rem; } .curves text { font-size: 16px; }
  .curves .fine { display: none; } .curve { stroke-width: 2.4; } td, th { padding-right: .5rem; }
  .enlarge { overflow-x: auto; } .enlarge img { width: 50rem; max-width: none; } }
"""
