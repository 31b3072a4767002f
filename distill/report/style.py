"""The page's style sheet: light and dark, wide and narrow, screen and paper."""

COLOURS = """
:root {
  color-scheme: light dark;
  --ink: #1c2230; --soft: #5c6577; --faint: #8b93a3; --line: #e3e6ec; --page: #fff; --panel: #f6f7f9; --track: #eceef2;
  --good: #14713d; --good-bg: #e2f4e9; --bad: #b3261e; --bad-bg: #fce8e6; --none: #7a5300; --none-bg: #fdf1d8;
  --teacher: #7c4dcc; --base: #868e9b; --student: #1f6feb;
  --v0: #0e8a74; --v1: #c07600; --v2: #cf3f79; --v3: #5a7d0a; --v4: #0a7ea4;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e7eaf0; --soft: #a5adbb; --faint: #7d8595; --line: #2c323d; --page: #12151b; --panel: #1a1e26;
    --track: #242a34;
    --good: #6fd39a; --good-bg: #14301f; --bad: #ff9b93; --bad-bg: #3d1816; --none: #f0c063; --none-bg: #352709;
    --teacher: #b396f0; --base: #9aa3b2; --student: #6ea8ff;
    --v0: #3fc6ab; --v1: #eba53a; --v2: #f27aa8; --v3: #a5cb4f; --v4: #52bfe3;
  }
}
"""
"""The colours by name, in both schemes; other pages of the house take them from here."""

CSS = (
    COLOURS
    + """
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif;
  font-variant-numeric: tabular-nums;
}
main, header, nav, footer { max-width: 1080px; margin: 0 auto; padding: 0 20px }
a { color: var(--student); text-decoration-thickness: 1px; text-underline-offset: 2px }
code, pre { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace }
code { overflow-wrap: anywhere }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere }
h1 { font-size: 30px; line-height: 1.15; margin: 0; letter-spacing: -.01em }
h2 { font-size: 21px; line-height: 1.25; margin: 0 0 4px }
h3 { font-size: 15px; margin: 28px 0 8px }
h4 { font-size: 14px; margin: 0 0 6px }
header { padding-top: 36px }
.kicker { margin: 0 0 4px; color: var(--soft); font-size: 13px }
.meta { margin: 6px 0 0; color: var(--soft); font-size: 13px }
.lead { color: var(--soft); margin: 0 0 18px; max-width: 76ch }
.note, .notes { color: var(--soft); font-size: 13px; max-width: 90ch }
.notes { margin: 6px 0 0; padding: 0; list-style: none }
section { padding: 30px 0 6px; margin-top: 30px; border-top: 1px solid var(--line); scroll-margin-top: 8px }
nav ul { display: flex; flex-wrap: wrap; gap: 4px 18px; list-style: none; padding: 0; margin: 22px 0 0;
  font-size: 14px }
footer { padding-top: 26px; padding-bottom: 40px; color: var(--faint); font-size: 13px }

.m-teacher { --c: var(--teacher) } .m-base { --c: var(--base) } .m-student { --c: var(--student) }
.m-v0 { --c: var(--v0) } .m-v1 { --c: var(--v1) } .m-v2 { --c: var(--v2) } .m-v3 { --c: var(--v3) }
.m-v4 { --c: var(--v4) } .m-plain { --c: var(--student) }

.answer { list-style: none; display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; gap: 34px; padding: 0;
  margin: 26px 0 0 }
.answer li { position: relative; border-top: 4px solid var(--c); padding-top: 10px; min-width: 0 }
.answer li + li::before { content: "→"; position: absolute; left: -27px; top: 31px; color: var(--faint);
  font-size: 20px }
.answer .who { font-weight: 600; font-size: 14px }
.answer .big { display: block; font-size: 36px; line-height: 1.2; font-weight: 650; letter-spacing: -.02em }
.answer .big.na { color: var(--faint) }
.answer .small { display: block; color: var(--soft); font-size: 13px }
.verdict { font-size: 17px; margin: 22px 0 0 }
.verdict span { white-space: nowrap }
.verdict span + span::before { content: "·"; margin: 0 12px 0 8px; color: var(--faint) }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 14px 24px; margin: 16px 0 0;
  padding: 0 }
.tiles dt { color: var(--soft); font-size: 13px }
.tiles dd { margin: 0; font-size: 18px; font-weight: 600 }
.tiles dd small { display: block; font-size: 13px; font-weight: 400; color: var(--soft) }
.missing { background: var(--none-bg); color: var(--none); border-radius: 6px; padding: 10px 14px; margin: 20px 0 0 }
.missing strong { font-weight: 650 }

.chip { display: inline-block; border-radius: 4px; padding: 0 7px; font-size: 13px; font-weight: 600;
  white-space: nowrap; background: var(--track); color: var(--soft) }
.chip.good { background: var(--good-bg); color: var(--good) }
.chip.bad { background: var(--bad-bg); color: var(--bad) }
.chip.none { background: var(--none-bg); color: var(--none) }
.swatch { display: inline-block; width: 10px; height: 10px; border-radius: 2px; background: var(--c);
  margin-right: 7px; vertical-align: 0 }
.na { color: var(--faint); font-weight: 400 }
sup { font-size: 11px; line-height: 0 }

.scroll { overflow-x: auto; margin: 18px 0 0 }
.scroll:focus-visible { outline: 2px solid var(--student); outline-offset: 2px }
table { border-collapse: collapse; width: 100%; font-size: 14px }
caption { text-align: left; font-weight: 600; padding: 0 0 6px; font-size: 14px }
th, td { text-align: left; padding: 6px 14px 6px 0; vertical-align: top; border-bottom: 1px solid var(--line) }
th:last-child, td:last-child { padding-right: 0 }
thead th { color: var(--soft); font-weight: 500; font-size: 13px; vertical-align: bottom; line-height: 1.3 }
tbody th { font-weight: 600; white-space: nowrap }
.n { text-align: right; white-space: nowrap }
.n small, td small { color: var(--soft); font-size: 13px; white-space: nowrap }
.wide { min-width: 110px; width: 28% }
.text { min-width: 340px }
.slim { max-width: 460px }
.nowrap { white-space: nowrap }
.mono { font: 12px/1.7 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; color: var(--soft);
  white-space: nowrap }
.mono b { color: var(--ink); font-weight: 400 }
.total th, .total td { border-bottom: 0 } .total .n { font-weight: 600 }

.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 8px 44px }
figure { margin: 18px 0 0; min-width: 0 }
figcaption { font-weight: 600; font-size: 14px; margin-bottom: 8px }
.bar { display: grid; grid-template-columns: 84px minmax(60px, 1fr) 148px; gap: 12px; align-items: center;
  min-height: 28px; font-size: 14px }
.bar .name { font-weight: 600; overflow-wrap: anywhere; line-height: 1.2 }
.bar .value { white-space: nowrap }
.bar .absent { grid-column: 2 / 4; color: var(--soft); font-size: 13px; line-height: 1.25 }
.bar .detail { color: var(--soft); font-size: 13px }
.track { position: relative; display: block; height: 16px; background: var(--track); border-radius: 2px }
.fill { position: absolute; inset: 0 auto 0 0; background: var(--c); border-radius: 2px; opacity: .85 }
.whisker { position: absolute; top: 7px; height: 2px; background: var(--ink) }
.whisker::before, .whisker::after { content: ""; position: absolute; top: -3px; width: 2px; height: 8px;
  background: var(--ink) }
.whisker::before { left: 0 } .whisker::after { right: 0 }
.bar.axis { min-height: 18px }
.scale { position: relative; height: 14px; font-size: 12px; line-height: 1; color: var(--soft) }
.scale span { position: absolute; top: 2px; transform: translateX(-50%) }
.grid .track { background-image: repeating-linear-gradient(90deg, transparent 0 calc(25% - 1px),
  var(--page) calc(25% - 1px) 25%) }
.pair .bar { grid-template-columns: 70px minmax(60px, 1fr) 70px }
.track.inline { height: 12px; margin: 5px 0; display: flex; background: none }
.track.inline .fill, .track.inline .lost { position: static; flex: none; min-width: 1px }
.lost { background: repeating-linear-gradient(-45deg, var(--faint) 0 2px, transparent 2px 5px); opacity: .8 }

.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 13px; margin-bottom: 8px }
.key svg { width: 24px; height: 6px; margin-right: 6px; vertical-align: 2px }
.plot { position: relative; padding: 8px 14px 40px 50px }
.area { position: relative; height: 210px; border-bottom: 1px solid var(--faint) }
.plot.small .area { height: 84px }
.area svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible }
polyline, .key path { fill: none; stroke: var(--c); stroke-width: 2; vector-effect: non-scaling-stroke;
  stroke-linejoin: round }
.faint { stroke-opacity: .32; stroke-width: 1.2 }
.dash1 { stroke-dasharray: 7 3 } .dash2 { stroke-dasharray: 2 3 } .dash3 { stroke-dasharray: 9 3 2 3 }
.gridline { stroke: var(--line); stroke-width: 1; vector-effect: non-scaling-stroke }
.xtick, .ytick, .xtitle { position: absolute; font-size: 12px; color: var(--soft); white-space: nowrap;
  line-height: 1 }
.xtick { top: calc(100% + 7px); transform: translateX(-50%) }
.ytick { right: calc(100% + 8px); transform: translateY(50%) }
.xtitle { bottom: 4px; right: 14px }
.dot { position: absolute; width: 8px; height: 8px; margin: 0 0 -4px -4px; border-radius: 50%; background: var(--c);
  box-shadow: 0 0 0 1.5px var(--page) }
.upright { position: absolute; width: 2px; margin-left: -1px; background: var(--c); opacity: .55 }
.upright::before, .upright::after { content: ""; position: absolute; left: -3px; width: 8px; height: 2px;
  background: var(--c) }
.upright::before { top: 0 } .upright::after { bottom: 0 }
.pointname { position: absolute; margin: 0 0 3px 7px; font-size: 12px; line-height: 1; color: var(--ink) }
.parallel { padding: 8px 60px 34px 14px }
.parallel .area { height: 240px; border-bottom: 0 }
.ptick { position: absolute; margin-left: 5px; transform: translateY(50%); font-size: 12px; line-height: 1;
  color: var(--soft); background: var(--page); white-space: nowrap }
.pname { position: absolute; top: calc(100% + 10px); transform: translateX(-50%); font-size: 12px; font-weight: 600;
  line-height: 1.1; white-space: nowrap }
.named .bar { grid-template-columns: 190px minmax(60px, 1fr) 130px }

details { margin: 8px 0 }
summary { cursor: pointer }
summary:focus-visible { outline: 2px solid var(--student); outline-offset: 2px }
.block { background: var(--panel); border-radius: 6px; padding: 12px 14px; overflow-x: auto }
.case { border: 1px solid var(--line); border-radius: 8px; margin: 8px 0 }
.case > summary { padding: 9px 14px; display: flex; flex-wrap: wrap; gap: 6px 14px; align-items: center;
  list-style: none }
.case > summary::-webkit-details-marker { display: none }
.case > summary::before { content: "▸"; color: var(--faint); width: 10px }
.case[open] > summary::before { content: "▾" }
.case .q { flex: 1 1 260px; min-width: 0; overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
.case .marks { display: flex; flex-wrap: wrap; gap: 4px 12px; font-size: 13px; color: var(--soft) }
.mark { white-space: nowrap } .mark.good b { color: var(--good) } .mark.bad b { color: var(--bad) }
.case .body { padding: 4px 14px 14px }
.gold { margin: 8px 0 14px; font-size: 14px }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 215px), 1fr)); gap: 18px 22px }
.answers article { border-top: 3px solid var(--c); padding-top: 8px; min-width: 0 }
.answers h4 { display: flex; justify-content: space-between; gap: 8px; align-items: baseline }
.answers pre { max-height: 22em; overflow: auto }
.answers details { font-size: 14px; margin: 4px 0 8px }
.answers details pre { border-left: 2px solid var(--line); padding-left: 10px; margin-top: 6px; color: var(--soft) }
.label { color: var(--soft); font-size: 13px; margin: 0 0 2px }
.why { color: var(--soft); font-size: 13px; margin: 8px 0 0; overflow-wrap: anywhere }

@media (max-width: 640px) {
  main, header, nav, footer { padding-left: 16px; padding-right: 16px }
  .answer { grid-auto-flow: row; gap: 12px }
  .answer li { display: grid; grid-template-columns: 86px 1fr; column-gap: 12px; align-items: baseline;
    padding-top: 6px }
  .answer li + li::before { content: none }
  .answer .big { font-size: 26px }
  .answer .small { grid-column: 2 }
  .verdict { font-size: 15px }
  .verdict span { display: block }
  .verdict span + span::before { content: none }
  .bar { grid-template-columns: 62px minmax(50px, 1fr) 92px; gap: 10px }
  .pair .bar { grid-template-columns: 62px minmax(50px, 1fr) 60px }
  .bar .detail { display: block; line-height: 1.2 }
  .named .bar { grid-template-columns: 110px minmax(50px, 1fr) 70px }
  .plot { padding-left: 42px; padding-right: 8px }
}
@media print {
  :root {
    color-scheme: light;
    --ink: #000; --soft: #444; --faint: #777; --line: #ccc; --page: #fff; --panel: #f4f4f4; --track: #eee;
    --good: #14713d; --good-bg: #e2f4e9; --bad: #b3261e; --bad-bg: #fce8e6; --none: #7a5300; --none-bg: #fdf1d8;
    --teacher: #7c4dcc; --base: #868e9b; --student: #1f6feb; --v0: #0e8a74; --v1: #c07600; --v2: #cf3f79;
    --v3: #5a7d0a; --v4: #0a7ea4;
  }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact }
  body { font-size: 11pt }
  nav { display: none }
  main, header, footer { max-width: none; padding: 0 }
  section { margin-top: 14px; padding-top: 16px }
  figure, tr, .case, .tiles, .answer { break-inside: avoid }
  h2, h3, .lead, caption, figcaption { break-after: avoid }
  .scroll { overflow: visible }
  .answers pre { max-height: none }
  .case::details-content { content-visibility: visible; display: block }
}
"""
)
