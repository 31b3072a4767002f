"""The page's style sheet: the report's colours, three columns where there is room, one on a phone."""

from distill.report.style import COLOURS

CSS = (
    COLOURS
    + """
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100%; height: 100% }
body {
  margin: 0; height: 100vh; height: 100dvh; overflow: hidden; display: flex; flex-direction: column;
  background: var(--page); color: var(--ink);
  font: 14px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif;
  font-variant-numeric: tabular-nums;
}
h1, h2, p, dl, dd, ul { margin: 0; padding: 0 }
ul { list-style: none }
code, pre, kbd { font: 13px/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace }
bdi, .text, dd { overflow-wrap: anywhere }
button, select, input { font: inherit; color: inherit }
button, select { background: var(--page); border: 1px solid var(--line); border-radius: 6px; padding: 3px 10px;
  cursor: pointer }
button:hover { background: var(--panel) }
:focus-visible { outline: 2px solid var(--student); outline-offset: 1px }
[hidden] { display: none !important }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap }
.note { color: var(--soft); font-size: 13px }
.empty { color: var(--soft); padding: 28px 20px }
.trouble { background: var(--bad-bg); color: var(--bad); padding: 10px 20px }
mark { background: #ffdf5d; color: #1c2230; border-radius: 2px }

.chip { display: inline-block; border-radius: 4px; padding: 0 6px; font-size: 12px; line-height: 18px; font-weight: 600;
  white-space: nowrap; background: var(--track); color: var(--soft); max-width: 24ch; overflow: hidden;
  text-overflow: ellipsis; vertical-align: middle; flex: none }
.chip.good { background: var(--good-bg); color: var(--good) }
.chip.bad { background: var(--bad-bg); color: var(--bad) }
.chip.none { background: var(--none-bg); color: var(--none) }

header { flex: none; display: grid; grid-template-columns: minmax(180px, auto) minmax(260px, 560px); gap: 10px 28px;
  align-items: center; justify-content: space-between; padding: 12px 20px; border-bottom: 1px solid var(--line) }
.kicker { color: var(--soft); font-size: 12px }
h1 { font-size: 19px; line-height: 1.2; letter-spacing: -.01em; overflow-wrap: anywhere }
h1, #facets .value { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 2; overflow: hidden }
.find { display: flex; gap: 8px }
.find input { flex: 1; min-width: 0; padding: 6px 12px; border: 1px solid var(--line); border-radius: 8px;
  background: var(--panel) }
#filters { display: none }
#tiles { grid-column: 1 / -1; display: flex; flex-wrap: wrap; gap: 6px 34px }
#tiles dt { color: var(--soft); font-size: 12px }
#tiles dd { font-size: 18px; line-height: 1.25; font-weight: 650 }
#tiles small { display: block; font-size: 12px; font-weight: 400; color: var(--soft) }

main { flex: 1; min-height: 0; display: grid; grid-template-columns: 218px minmax(340px, 32%) 1fr }
main > * { min-height: 0; min-width: 0 }

#facets, #list, #detail { scrollbar-width: thin }
#facets { overflow-y: auto; padding: 8px 12px 20px 20px; border-right: 1px solid var(--line) }
#facets details { margin: 6px 0 10px }
#facets summary { cursor: pointer; font-size: 12px; font-weight: 600; color: var(--soft); padding: 3px 0 }
#facets .only { font-weight: 400; color: var(--faint); margin-left: 8px; overflow-wrap: anywhere }
#facets button { display: flex; justify-content: space-between; gap: 8px; width: 100%; text-align: left; border: 0;
  padding: 2px 8px; border-radius: 4px; margin: 1px 0; line-height: 1.4; background: no-repeat var(--page);
  background-image: linear-gradient(var(--track), var(--track)); background-size: calc(100% * var(--share, 0)) 100% }
#facets button:hover { box-shadow: inset 0 0 0 1px var(--faint) }
#facets button[aria-pressed="true"] { background: var(--student); color: #fff }
@media (prefers-color-scheme: dark) { #facets button[aria-pressed="true"] { color: #0b1220 } }
#facets .zero { color: var(--faint) }
#facets .value { min-width: 0; overflow-wrap: anywhere }
#facets .n { color: var(--soft); flex: none }
#facets [aria-pressed="true"] .n, #facets .zero .n { color: inherit }
#facets .further { display: none }
#facets .all .further { display: block }
#facets .more { color: var(--student) }

#traces { display: flex; flex-direction: column; border-right: 1px solid var(--line) }
.bar { display: flex; align-items: center; gap: 10px; padding: 6px 12px; border-bottom: 1px solid var(--line);
  font-size: 13px; min-height: 40px }
#count { white-space: nowrap }
.bar .sort { margin-left: auto; color: var(--soft); white-space: nowrap; min-width: 0 }
.bar button, .bar select { padding: 1px 8px; color: var(--ink) }
.bar select { max-width: 100% }
progress { width: 100%; height: 3px; border: 0; flex: none; display: block; appearance: none; background: var(--track);
  accent-color: var(--student) }
progress::-webkit-progress-bar { background: var(--track) }
progress::-webkit-progress-value { background: var(--student) }
progress::-moz-progress-bar { background: var(--student) }
#list { flex: 1; min-height: 0; overflow-y: auto; position: relative; overscroll-behavior: contain }
#list:focus-visible { outline: none }
#list:focus-visible .row[aria-selected="true"] { box-shadow: inset 0 0 0 2px var(--student) }
#traces:has(#list:focus-visible) .bar { box-shadow: inset 0 -2px var(--student) }
#rows { position: relative }
.row { position: absolute; left: 0; right: 0; height: 62px; padding: 8px 12px 0 13px; cursor: pointer;
  border-bottom: 1px solid var(--line); border-left: 3px solid transparent; overflow: hidden }
.row.accepted { border-left-color: var(--good) }
.row:hover { background: var(--panel) }
.row[aria-selected="true"] { background: var(--track) }
.first, .second { display: flex; gap: 8px; align-items: center; min-width: 0; white-space: nowrap; height: 22px }
.first { font-size: 14px }
.second { color: var(--soft); font-size: 12px }
.row .excerpt { flex: 1; min-width: 0; overflow: hidden; text-overflow: ellipsis }
.row .facts { flex: none }
.row .chip { font-size: 11px; line-height: 16px }
.sample { color: var(--soft); font-size: 12px; flex: none }

#detail { overflow-y: auto; overscroll-behavior: contain }
#detail:focus { outline: none }
.head { position: sticky; top: 0; z-index: 1; display: flex; gap: 10px; align-items: center; padding: 6px 22px;
  min-height: 40px; background: var(--page); border-bottom: 1px solid var(--line) }
.chips { flex: 1; min-width: 0; display: flex; flex-wrap: wrap; gap: 4px 6px }
.steps { flex: none; display: flex; gap: 8px; align-items: center; color: var(--soft); font-size: 13px }
.head button { padding: 0 9px; font-size: 17px; line-height: 24px }
.body { padding: 4px 22px 60px; max-width: 980px }
.body > section, .body > details { margin: 16px 0 }
.body h2 { font-size: 12px; font-weight: 600; color: var(--soft); margin-bottom: 5px }
.body h2::first-letter { text-transform: uppercase }
.body summary { cursor: pointer; padding: 2px 0 }
.body summary h2 { display: inline; margin: 0 10px 0 2px }
.body details[open] summary { margin-bottom: 6px }
.text { margin: 0; white-space: pre-wrap; unicode-bidi: plaintext; background: var(--panel); border-radius: 6px;
  padding: 10px 14px }
.text.bad { background: var(--bad-bg); color: var(--bad) }
.reasoning .text { background: none; border-left: 3px solid var(--line); border-radius: 0; padding: 2px 0 2px 14px }
.facts > div { display: grid; grid-template-columns: 130px minmax(0, 1fr); gap: 12px; padding: 3px 0;
  border-bottom: 1px solid var(--line) }
.facts > div:last-child { border-bottom: 0 }
.facts dt { color: var(--soft) }
.facts dd { white-space: pre-wrap; unicode-bidi: isolate }
.siblings { display: flex; flex-wrap: wrap; gap: 6px; align-items: center; margin: 12px 0 0 }
.siblings button { padding: 1px 6px 2px 8px }
.siblings [aria-current] { border-color: var(--student); box-shadow: 0 0 0 1px var(--student) }
.copy, .more { font-size: 12px; padding: 1px 8px; margin: 2px 4px 2px 0; color: var(--soft) }
.copies { margin-top: 8px }

dialog { border: 1px solid var(--line); border-radius: 10px; background: var(--page); color: var(--ink);
  padding: 18px 22px; max-width: 92vw }
dialog::backdrop { background: #0007 }
dialog h2 { font-size: 16px; margin-bottom: 10px }
dialog dl > div { display: grid; grid-template-columns: 80px 1fr; padding: 4px 0 }
dialog dl { margin-bottom: 14px }
kbd { border: 1px solid var(--line); border-radius: 4px; padding: 0 5px; background: var(--panel) }

@media (max-width: 1179px) {
  #filters { display: block }
  .sort span { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%) }
  main { grid-template-columns: minmax(320px, 38%) 1fr; position: relative }
  #facets { display: none; position: absolute; inset: 0 auto 0 0; width: min(320px, 100%); z-index: 3;
    background: var(--page); box-shadow: 0 0 24px #0004; padding-left: 16px }
  .filtering #facets { display: block }
}
@media (max-width: 759px) {
  header { grid-template-columns: minmax(0, 1fr); padding: 8px 14px; gap: 8px }
  .kicker { display: none }
  h1 { font-size: 16px }
  #tiles { flex-wrap: nowrap; overflow-x: auto; gap: 22px; scrollbar-width: none; white-space: nowrap }
  #tiles dd { font-size: 16px }
  .find input { font-size: 16px }
  main { grid-template-columns: minmax(0, 1fr) }
  #traces { border-right: 0 }
  #facets { width: 100% }
  #facets button { padding: 7px 10px }
  #detail { display: none; position: fixed; inset: 0; z-index: 4; background: var(--page) }
  .reading #detail { display: block }
  .head { padding: 8px 12px }
  .head button { padding: 4px 12px }
  .body { padding: 0 14px 40px }
  .facts > div { grid-template-columns: 104px minmax(0, 1fr) }
}
@media print {
  body { display: block; height: auto; overflow: visible }
  header, #facets, #traces, .steps, .close, .copies, .copy { display: none }
  #detail { overflow: visible }
  main { display: block }
}
"""
)
