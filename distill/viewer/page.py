"""The frame of the page: what stands in it before the script fills it in, and what the browser is told to refuse.

Data comes as blocks the browser does not run. The content policy names the one script and the one style sheet by
their hashes and allows nothing else: no other script, no address, no image, no markup made from text.
"""

import base64
import hashlib
from html import escape

from .script import SCRIPT
from .style import CSS


def policy() -> str:
    """The content policy of the page."""
    return (
        f"default-src 'none'; script-src '{_hash(SCRIPT)}'; style-src '{_hash(CSS)}'; base-uri 'none';"
        " form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def opening(title: str, note: str, index: str) -> str:
    """All that stands before the records; with it the list is there before they are read."""
    asked = f'<p class="note">Only: {escape(note)}</p>' if note else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy()}">'
        f"<title>{escape(title)}: traces</title><style>{CSS}</style></head>\n<body>"
        f"{FRAME.replace('NOTE', asked, 1).replace('TITLE', escape(title), 1)}"
        f'<script type="text/plain" id="index">{index}</script>\n<script>{SCRIPT}</script>\n'
    )


def part_element(number: int, packed: str) -> str:
    """The element that holds a part of the records."""
    return f'<script type="text/plain" id="part-{number}">{packed}</script>\n'


CLOSING = "</body></html>\n"
"""What stands behind the records."""

FRAME = """
<header>
  <div class="name"><p class="kicker">distill traces</p><h1 dir="auto">TITLE</h1>NOTE</div>
  <div class="find" role="search">
    <label class="hidden" for="query">Search the whole text of every trace</label>
    <input id="query" type="search" placeholder="Search prompts, reasoning, answers, verdicts …" autocomplete="off"
      autocapitalize="off" spellcheck="false" enterkeyhint="search">
    <button id="filters" type="button" aria-expanded="false" aria-controls="facets">Filters</button>
    <button id="help" type="button" aria-label="Keyboard shortcuts">?</button>
  </div>
  <dl id="tiles" aria-label="Sums over the traces in the list"></dl>
</header>
<noscript><p class="trouble">This page unpacks its traces with a script of its own, and scripts are switched off. Allow
  them for this file, or read the traces in a terminal with <code>distill inspect</code>.</p></noscript>
<p id="trouble" class="trouble" role="alert" hidden></p>
<main>
  <nav id="facets" aria-label="Filters"></nav>
  <section id="traces" aria-label="Traces">
    <div class="bar">
      <span id="count" role="status">Unpacking …</span>
      <button id="clear" type="button" hidden>Clear</button>
      <label class="sort"><span>Order</span> <select id="sort"></select></label>
    </div>
    <progress id="progress" max="1" value="0" aria-label="Search" hidden></progress>
    <div id="list" role="listbox" tabindex="0" aria-label="Traces"><div id="rows" role="presentation"></div></div>
  </section>
  <article id="detail" aria-label="The chosen trace" tabindex="-1"></article>
</main>
<dialog id="keys" aria-label="Keyboard shortcuts">
  <h2>Keyboard</h2>
  <dl>
    <div><dt><kbd>j</kbd> <kbd>k</kbd></dt><dd>next and previous trace</dd></div>
    <div><dt><kbd>Enter</kbd></dt><dd>open the trace</dd></div>
    <div><dt><kbd>Esc</kbd></dt><dd>leave the search, close the trace</dd></div>
    <div><dt><kbd>/</kbd></dt><dd>search</dd></div>
    <div><dt><kbd>Space</kbd></dt><dd>read on in the trace</dd></div>
    <div><dt><kbd>r</kbd></dt><dd>unfold or fold the reasoning</dd></div>
    <div><dt><kbd>[</kbd> <kbd>]</kbd></dt><dd>other samples of the same prompt</dd></div>
    <div><dt><kbd>?</kbd></dt><dd>this list</dd></div>
  </dl>
  <button type="button" id="dismiss">Close</button>
</dialog>
"""
"""Everything that is always there."""
