"""The report's style sheet: light, dark, print, and a phone's width.

Series are Okabe and Ito's colours for the colour-blind (jfly.uni-koeln.de/color), darkened on white
and lightened on black until each stands out by 3 to 1; heat maps are in cividis, legible to all.
"""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --card: #f6f7f9; --ink: #1b1f24; --muted: #57606a; --grid: #d8dee4;
  --good: #00664b; --bad: #a83a00; --warn: #7a5200;
  --series-1: #0072b2; --series-2: #c85200; --series-3: #008763; --series-4: #b0558a;
  --series-5: #8f6600; --series-6: #2a7fb8; --series-7: #57606a; --series-8: #1b1f24;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --card: #1e2327; --ink: #e8ebee; --muted: #a2abb4; --grid: #394047;
    --good: #43c9a0; --bad: #ff9a5c; --warn: #f0c244;
    --series-1: #56b4e9; --series-2: #f58a42; --series-3: #2fc495; --series-4: #dd9bc0;
    --series-5: #e6a817; --series-6: #8fc7ee; --series-7: #a2abb4; --series-8: #e8ebee;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1rem; max-width: 64rem; background: var(--paper); color: var(--ink);
  font: 16px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  overflow-wrap: anywhere;
}
h1 { font-size: 1.35rem; margin: 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; padding-bottom: .2rem;
     border-bottom: 1px solid var(--grid); }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
p { margin: .4rem 0; }
.quiet { color: var(--muted); font-size: .875rem; }
.verdict { margin: 1rem 0; padding: .9rem 1rem; background: var(--card); border-radius: 6px;
           border-left: 6px solid var(--muted); }
.verdict strong { font-size: 1.5rem; display: block; }
.verdict ul { margin: .4rem 0 0; padding-left: 1.2rem; }
.verdict.passed { border-color: var(--good); } .verdict.failed { border-color: var(--bad); }
.passed > strong, .status.passed { color: var(--good); }
.failed > strong, .status.failed { color: var(--bad); }
.status.warning { color: var(--warn); } .status.skipped { color: var(--muted); }
.status { font-weight: 600; white-space: nowrap; }
.scroll { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .875rem; overflow-wrap: normal; }
th, td { padding: .25rem .6rem; text-align: left; vertical-align: top;
         border-bottom: 1px solid var(--grid); }
thead th { color: var(--muted); font-weight: 600; vertical-align: bottom; min-width: 4.5rem; }
tbody th { font-weight: normal; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.keys th { max-width: 24rem; } .keys td { min-width: 6rem; max-width: 40rem; }
.keys th, .keys td { white-space: normal; overflow-wrap: anywhere; }
td.name { min-width: 11rem; max-width: 24rem; overflow-wrap: anywhere; }
td.text { min-width: 13rem; max-width: 36rem; overflow-wrap: anywhere; }
td.hash { min-width: 18rem; overflow-wrap: anywhere; }
td.hash { font: .75rem/1.4 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
code { font: .8125rem/1.4 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
pre { background: var(--card); padding: .6rem .8rem; border-radius: 4px; white-space: pre-wrap;
      margin: .4rem 0; }
.plots { display: grid; gap: 1.2rem 1.6rem; grid-template-columns: 1fr; }
@media (min-width: 48rem) { .plots { grid-template-columns: 1fr 1fr; } }
figure { margin: 0; min-width: 0; }
figcaption { margin-bottom: .2rem; }
figcaption span { display: block; }
svg.plot { display: block; width: 100%; height: auto; font-family: inherit; }
details { margin: .6rem 0; }
summary { cursor: pointer; color: var(--muted); }
@media print {
  :root { color-scheme: light; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  .scroll { overflow: visible; }
  figure, tr, .verdict { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .plots { grid-template-columns: 1fr 1fr; }
}
"""
