"""Pages that need no network and no script: one head and one stylesheet, for light and dark."""

from __future__ import annotations

from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#1b1b1f, #ececf1); --grey: light-dark(#63636e, #a0a0ac);
  --rule: light-dark(#d8d8de, #3a3a42); --paper: light-dark(#fff, #17171a);
  --link: light-dark(#2f5bd0, #93b0ff); }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
p, figcaption { max-width: 46rem; }
.about, figcaption { color: var(--grey); }
a { color: var(--link); }
th, td { text-align: right; font-weight: 400; }
"""


def page(title: str, style: str, body: str) -> str:
    """Returns a whole page. title: text. style: CSS beside `STYLE`. body: HTML."""
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}{style}</style>
{body}
</html>
"""
