"""What the report adds to the style sheet of all pages; print and a phone's width among it.

Heat maps are in cividis, legible to all.
"""

STYLE = """
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
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
