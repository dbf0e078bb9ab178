"""Pages of HTML that need nothing else: their shell, their look, and strangers' text made harmless."""

from __future__ import annotations

from html import escape

from loraduct.text import printable

LONGEST = 600  # characters of one text

# Series are Okabe and Ito's colours for the colour-blind (jfly.uni-koeln.de/color), darkened on
# white and lightened on black until each stands out by 3 to 1.
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
p { margin: .4rem 0; }
.scroll { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .875rem; overflow-wrap: normal; }
"""


def text(value: object, most: int = LONGEST) -> str:
    """Anything as words: control characters visible, markup inert."""
    return escape(printable(str(value), most), quote=True)


def page(title: str, style: str, body: str, head: str = "") -> str:
    """A whole page. All parts are HTML already; ``style`` is added to STYLE, ``head`` to the head."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"{head}<title>{title}</title>\n<style>{STYLE}{style}</style></head>\n"
        f"<body><main>\n{body}</main></body></html>\n"
    )
