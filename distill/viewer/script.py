"""What the page does in the browser: unpack, list, filter, search, show.

Plain JavaScript without a library. Everything a model wrote becomes a text node (`make`, `marked`), never markup. The
list holds only the rows in view; a search reads the records part by part and gives the browser its turn in between;
what is seen (search, filters, order, trace) stands in the address behind `#`.
"""

SCRIPT = r"""
"use strict";
(() => {
const ROW_PX = 62, OVERSCAN = 8;          // height of a row, as in the style sheet; rows drawn beyond the visible ones
const KEPT_PARTS = 8;                     // unpacked parts kept for reading
const SLICE_MS = 12;                      // how long a search works before the browser has its turn
const DRAW_EVERY_MS = 120;                // how often a search shows what it has found so far
const DEBOUNCE_MS = 200;                  // pause in typing after which a search begins
const HIT_CHARS = 90;                     // what a row shows of the text behind a hit
const MOST_MARKS = 500;                   // highlighted hits in one text
const FIRST_VALUES = 10;                  // values of a filter shown before "more"
const TEXT_CHUNK = 200000;                // characters of one text shown before "show all"

const ORDERS = [
  ["file", "as written", null],
  ["tokens", "most tokens", row => -index.columns.output[row]],
  ["short", "shortest text", row => index.columns.chars[row]],
  ["long", "longest text", row => -index.columns.chars[row]],
  ["cost", "highest cost", row => -index.columns.cost[row]],
  ["slow", "slowest", row => -index.columns.latency[row]],
];
const NOT_SELECTED = "not selected", NO_FLAG = "no flag";       // values that say there is none
const GOOD = new Set(["correct", "kept"]), BAD = new Set(["wrong", "failed", "error", "timeout"]);

const state = { query: "", order: "file", chosen: new Map(), row: -1, open: false, unfolded: false };
let index = null;                         // the small fields of every trace, by column
let starts = [];                          // first row of each part
let view = [];                            // rows in the list, in its order
let hits = null;                          // rows the search has found, with the first hit of each; null without one
let finished = { query: "", hits: null }; // the last search that came to its end
let siblings = new Map();                 // rows by prompt

const $ = id => document.getElementById(id);
const parsed = document.readyState === "loading"
  ? new Promise(done => addEventListener("DOMContentLoaded", done, { once: true })) : Promise.resolve();
const rest = () => new Promise(done => setTimeout(done));

// --- making elements -------------------------------------------------------------------------------------------------

// An element; strings among its children become text. `on…` are listeners, all else are attributes.
function make(tag, properties, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter(child => child !== null && child !== undefined));
  return element;
}

const bdi = (...children) => make("bdi", null, children);
const chip = (word, kind) =>
  make("span", { class: "chip " + (kind || (GOOD.has(word) ? "good" : BAD.has(word) ? "bad" : "")) }, bdi(word));

const whole = value => value.toLocaleString("en-US");
const dollars = usd => "$" + (usd === 0 || usd >= 0.1
  ? usd.toLocaleString("en-US", { minimumFractionDigits: 2, maximumFractionDigits: 2 })
  : usd.toLocaleString("en-US", { maximumSignificantDigits: 2, maximumFractionDigits: 9 }));
const seconds = s => !s ? "" : s < 10 ? s.toFixed(1) + " s" : Math.round(s) + " s";
const compact = value => value < 10000 ? whole(value)
  : value.toLocaleString("en-US", { notation: "compact", maximumSignificantDigits: 3 });
const percent = (part, all) => all ? (100 * part / all).toFixed(1) + "%" : "n/a";
const plural = (count, word) => whole(count) + " " + word + (count === 1 ? "" : "s");

// --- unpacking -------------------------------------------------------------------------------------------------------

function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const text = atob(base64), bytes = new Uint8Array(text.length);
  for (let at = 0; at < text.length; at++) bytes[at] = text.charCodeAt(at);
  return bytes;
}

async function unpack(element) {
  const stream = new Blob([bytesOf(element.textContent)]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

async function readPart(part) {
  if (!$("part-" + part)) await parsed;   // the page is still coming in
  return unpack($("part-" + part));
}

const kept = new Map();                   // unpacked parts by number, the longest unused first
function part(number) {
  const records = kept.get(number) || readPart(number);
  kept.delete(number);
  kept.set(number, records);
  if (kept.size > KEPT_PARTS) kept.delete(kept.keys().next().value);
  return records;
}

function partOf(row) {
  let low = 0, high = starts.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (starts[middle] <= row) low = middle; else high = middle - 1;
  }
  return low;
}

async function record(row) {
  const number = partOf(row);
  return (await part(number))[row - starts[number]];
}

function rawOf(trace) {
  if (typeof trace.raw === "string") return trace.raw;
  const [before, between, behind] = trace.raw;
  return before + (trace.reasoning || "") + between + trace.answer + behind;
}

// --- searching -------------------------------------------------------------------------------------------------------

// The text as typed, in any case, with any white space between its words.
function patternOf(query, flags) {
  const words = query.split(/\s+/u).map(word => word.replace(/[\\^$.*+?()[\]{}|\/]/g, "\\$&"));
  return new RegExp(words.join("\\s+"), flags);
}

// Every text of a record that a reader can see.
function* textsOf({ trace, prompt, verdict, flags, dropped }) {
  yield trace.reasoning || "";
  yield trace.answer;
  yield* typeof trace.raw === "string" ? [trace.raw] : trace.raw;
  yield trace.error || "";
  yield trace.trace_id;
  yield trace.prompt_id;
  if (prompt) {
    for (const message of prompt.messages) yield message.content;
    yield prompt.gold || "";
    yield JSON.stringify(prompt.row);
  }
  if (verdict) yield* [verdict.detail, verdict.gold || "", verdict.verifier];
  for (const flag of flags) yield* [flag.flag, flag.detail];
  yield dropped || "";
}

// The first hit in a record with a few words around it, or null.
function firstHit(record, pattern) {
  for (const text of textsOf(record)) {
    const match = pattern.exec(text);
    if (!match) continue;
    const start = match.index, end = start + match[0].length;
    const around = [text.slice(Math.max(0, start - HIT_CHARS / 4), start), match[0], text.slice(end, end + HIT_CHARS)];
    return structuredClone(around);       // a copy: a slice would keep the whole text in memory
  }
  return null;
}

let searches = 0;                         // the latest one ends all others
async function search(query) {
  const mine = ++searches, isCurrent = () => mine === searches;
  if (!query) {
    hits = null;
    showProgress(null);
    return refresh();
  }
  const narrowed = finished.hits && query.toLowerCase().includes(finished.query.toLowerCase()) ? finished.hits : null;
  const pattern = patternOf(query, "iu"), found = new Map();
  hits = found;
  let sliceEnd = performance.now() + SLICE_MS, drawn = performance.now();
  showProgress(0);
  for (let number = 0; number < starts.length; number++) {
    const first = starts[number], last = first + index.parts[number];
    if (narrowed && !hasRow(narrowed, first, last)) continue;
    const records = await (kept.get(number) || readPart(number));
    if (!isCurrent()) return;
    for (let row = first; row < last; row++) {
      if (narrowed && !narrowed.has(row)) continue;
      const hit = firstHit(records[row - first], pattern);
      if (hit) found.set(row, hit);
      if (performance.now() > sliceEnd) {
        await rest();
        if (!isCurrent()) return;
        sliceEnd = performance.now() + SLICE_MS;
      }
    }
    if (performance.now() - drawn > DRAW_EVERY_MS) {
      showProgress(last / index.size);
      refresh();
      drawn = performance.now();
    }
  }
  finished = { query, hits: found };
  showProgress(null);
  refresh();
}

function hasRow(rows, first, last) {
  for (let row = first; row < last; row++) if (rows.has(row)) return true;
  return false;
}

function showProgress(share) {
  $("progress").hidden = share === null;
  $("progress").value = share || 0;
}

// --- filtering, counting, ordering -----------------------------------------------------------------------------------

// What is in the list, and for every value of a filter how many traces it would leave there.
function refresh() {
  const shown = [], facets = index.facets;
  for (const facet of facets) facet.counts = new Uint32Array(facet.values.length);
  for (let row = 0; row < index.size; row++) {
    if (hits && !hits.has(row)) continue;
    let failing = null, fails = 0;
    for (const facet of facets) {
      if (facet.wanted && !facet.of[row].some(code => facet.wanted.has(code))) { failing = facet; fails++; }
    }
    if (fails > 1) continue;
    for (const facet of failing ? [failing] : facets) for (const code of facet.of[row]) facet.counts[code]++;
    if (!failing) shown.push(row);
  }
  const key = ORDERS.find(([name]) => name === state.order)[2];
  if (key) {
    const keys = shown.map(key), places = shown.map((_, place) => place);
    places.sort((a, b) => keys[a] - keys[b] || a - b);
    view = places.map(place => shown[place]);
  } else view = shown;
  drawTiles();
  drawFacets();
  drawCount();
  drawList();
  drawPosition();
}

function setWanted() {
  for (const facet of index.facets) {
    const names = state.chosen.get(facet.name);
    facet.wanted = names && names.size ? new Set([...names].map(name => facet.values.indexOf(name))) : null;
  }
}

function toggle(facet, value) {
  const names = state.chosen.get(facet.name) || new Set();
  if (!names.delete(value)) names.add(value);
  state.chosen.set(facet.name, names);
  setWanted();
  $("list").scrollTop = 0;
  refresh();
  remember();
}

const isFiltered = () => Boolean(state.query) || index.facets.some(facet => facet.wanted);

// --- sums ------------------------------------------------------------------------------------------------------------

function drawTiles() {
  const { accepted, input, output, reasoning, cost } = index.columns;
  const sum = { accepted: 0, input: 0, output: 0, reasoning: 0, cost: 0, counted: 0 };
  for (const row of view) {
    sum.accepted += accepted[row];
    sum.input += input[row];
    sum.output += output[row];
    if (reasoning[row] !== null) { sum.reasoning += reasoning[row]; sum.counted++; }
    sum.cost += cost[row];
  }
  const isCounted = index.columns.output.some(Boolean), isPriced = index.columns.cost.some(Boolean);
  const thought = sum.counted ? compact(sum.reasoning) + " of them reasoning" : "reasoning not counted apart";
  const tiles = [
    ["Traces", whole(view.length), isFiltered() ? "of " + whole(index.size) : plural(index.prompts.length, "prompt")],
    ["Accepted", percent(sum.accepted, view.length),
      whole(sum.accepted) + (index.isSelected ? " kept by selection" : " judged correct")],
    ["Tokens written", isCounted ? compact(sum.output) : "n/a", isCounted ? thought : "none are recorded"],
    ["Tokens read", isCounted ? compact(sum.input) : "n/a", "in prompts"],
    ["Cost", isPriced ? dollars(sum.cost) : "n/a",
      isPriced ? dollars(sum.cost / Math.max(1, view.length)) + " a trace" : "none is recorded"],
    ["Per accepted trace", isPriced && sum.accepted ? dollars(sum.cost / sum.accepted) : "n/a", !sum.accepted
      ? "none is accepted" : isCounted ? compact(Math.round(sum.output / sum.accepted)) + " tokens written" : ""],
  ];
  $("tiles").replaceChildren(...tiles.map(([name, value, more]) =>
    make("div", null, make("dt", null, name), make("dd", null, value, make("small", null, more)))));
}

// --- filters ---------------------------------------------------------------------------------------------------------

// Once: a group a facet, a button a value, the frequent ones first.
function makeFacets() {
  for (const facet of index.facets) {
    const totals = new Uint32Array(facet.values.length);
    for (const codes of facet.of) for (const code of codes) totals[code]++;
    const order = facet.values.map((_, code) => code).sort((a, b) => totals[b] - totals[a] || a - b);
    facet.buttons = new Map();
    const items = order.map((code, place) => {
      const count = make("span", { class: "n" });
      const button = make("button", { type: "button", "aria-pressed": "false",
        onclick: () => toggle(facet, facet.values[code]) },
        make("span", { class: "value" }, bdi(facet.values[code])), count);
      facet.buttons.set(code, { button, count, total: totals[code] });
      return make("li", place >= FIRST_VALUES ? { class: "further" } : null, button);
    });
    const list = make("ul", null, items);
    if (items.length > FIRST_VALUES) {
      list.append(make("li", null, make("button", { type: "button", class: "more",
        onclick: event => { list.classList.add("all"); event.currentTarget.parentNode.remove(); } },
        whole(items.length - FIRST_VALUES) + " more …")));
    }
    const isOpen = items.length > 1 || facet.name === "verdict";
    const only = items.length === 1 ? make("span", { class: "only" }, bdi(facet.values[0])) : null;
    $("facets").append(make("details", { open: isOpen ? "" : null, "data-facet": facet.name },
      make("summary", null, facet.title, only), list));
  }
}

function drawFacets() {
  for (const facet of index.facets) {
    const most = Math.max(1, ...facet.counts);
    for (const [code, { button, count }] of facet.buttons) {
      count.textContent = whole(facet.counts[code]);
      button.setAttribute("aria-pressed", String(Boolean(facet.wanted && facet.wanted.has(code))));
      button.classList.toggle("zero", facet.counts[code] === 0);
      button.style.setProperty("--share", facet.counts[code] / most);
    }
  }
  drawFiltersButton();
}

function drawFiltersButton() {
  const active = index.facets.filter(facet => facet.wanted).length;
  const isOpen = document.body.classList.contains("filtering");
  $("filters").textContent = isOpen ? "Done" : active ? "Filters (" + active + ")" : "Filters";
}

// --- the list --------------------------------------------------------------------------------------------------------

function drawCount() {
  const searching = !$("progress").hidden;
  const text = isFiltered() ? whole(view.length) + " of " + whole(index.size) : plural(index.size, "trace");
  $("count").textContent = searching ? text + " so far" : text;
  $("clear").hidden = !isFiltered();
}

let drawnRange = "";
function drawList() {
  drawnRange = "";
  $("rows").style.height = view.length * ROW_PX + "px";
  drawRows();
}

function drawRows() {
  const list = $("list");
  const first = Math.max(0, Math.floor(list.scrollTop / ROW_PX) - OVERSCAN);
  const last = Math.min(view.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW_PX) + OVERSCAN);
  const range = [first, last, state.row].join();
  if (range === drawnRange) return;
  drawnRange = range;
  const rows = [];
  for (let place = first; place < last; place++) rows.push(rowElement(view[place], place));
  if (!view.length) rows.push(make("p", { class: "empty" }, index.size
    ? $("progress").hidden ? "No trace is left. Take a filter off or search for less." : "Searching …"
    : "There are no traces here."));
  $("rows").replaceChildren(...rows);
  if ($("row-" + state.row)) list.setAttribute("aria-activedescendant", "row-" + state.row);
  else list.removeAttribute("aria-activedescendant");
}

const valueOf = (name, row) => {
  const facet = index.facets.find(facet => facet.name === name);
  return facet.of[row].map(code => facet.values[code]);
};

function rowElement(row, place) {
  const columns = index.columns, [, excerpt] = index.prompts[columns.prompt[row]];
  const isOneOfMany = siblings.get(columns.prompt[row]).length > 1;
  const element = make("div", { class: columns.accepted[row] ? "row accepted" : "row", role: "option", id: "row-" + row,
      "aria-selected": String(row === state.row), "aria-posinset": place + 1, "aria-setsize": view.length,
      onclick: () => choose(row, true) },
    make("div", { class: "first" }, chip(valueOf("verdict", row)[0]),
      make("span", { class: "excerpt" }, bdi(excerpt || columns.opening[row] || columns.id[row])),
      isOneOfMany ? make("span", { class: "sample", title: "sample of its prompt" }, "#" + columns.sample[row]) : null),
    make("div", { class: "second" }, remark(row), marksOf(row).slice(0, 3).map(mark => chip(mark, "none"))));
  element.style.top = place * ROW_PX + "px";
  return element;
}

// What the search found in a trace; without a search its size, price and time, and what verifier or error say.
function remark(row) {
  const hit = hits && hits.get(row), columns = index.columns;
  if (hit) return make("span", { class: "excerpt" }, bdi(hit[0], make("mark", null, hit[1]), hit[2]));
  const facts = [columns.output[row] ? whole(columns.output[row]) + " tokens" : "",
    columns.cost[row] ? dollars(columns.cost[row]) : "", seconds(columns.latency[row])].filter(Boolean).join(" · ");
  return [facts ? make("span", { class: "facts" }, facts) : null,
    make("span", { class: "excerpt" }, bdi(columns.note[row]))];
}

// The flags of a trace, and why it was dropped where neither they nor the verdict say it.
function marksOf(row) {
  const [verdict] = valueOf("verdict", row), [selection] = valueOf("selection", row);
  const flags = valueOf("flag", row).filter(flag => flag !== NO_FLAG);
  return ["kept", NOT_SELECTED, verdict, ...flags].includes(selection) ? flags : [selection, ...flags];
}

function scrollTo(place) {
  const list = $("list"), top = place * ROW_PX;
  if (top < list.scrollTop) list.scrollTop = top;
  else if (top + ROW_PX > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW_PX - list.clientHeight;
}

// --- choosing a trace ------------------------------------------------------------------------------------------------

// Make a row the current one, and show its trace if one is open or `opening`.
function choose(row, opening) {
  const opens = opening && !state.open;
  state.row = row;
  state.open = state.open || Boolean(opening);
  const place = view.indexOf(row);
  if (place >= 0) scrollTo(place);
  drawRows();
  remember(opens);
  return showDetail();
}

function step(by) {
  if (!view.length) return;
  choose(view[Math.min(view.length - 1, Math.max(0, view.indexOf(state.row) + by))], false);
}

function stepSibling(by) {
  if (state.row < 0) return;
  const rows = siblings.get(index.columns.prompt[state.row]), place = rows.indexOf(state.row) + by;
  if (rows[place] !== undefined) choose(rows[place], false);
}

function close() {
  state.open = false;
  remember();
  showDetail();
  $("list").focus();
}

// --- the trace -------------------------------------------------------------------------------------------------------

let details = 0;
async function showDetail() {
  const mine = ++details;
  document.body.classList.toggle("reading", state.open && state.row >= 0);
  if (!state.open || state.row < 0) {
    $("detail").replaceChildren(make("p", { class: "empty" }, "Choose a trace, or press j. The ? key lists all keys."));
    return;
  }
  const row = state.row;
  try {
    const found = await record(row);
    if (mine !== details) return;
    $("detail").replaceChildren(...detailParts(row, found));
    $("detail").scrollTop = 0;
    drawPosition();
    const mark = $("detail").querySelector("mark");
    if (mark) mark.scrollIntoView({ block: "center" });
    if (matchMedia("(max-width: 759px)").matches) $("detail").focus({ preventScroll: true });
  } catch (error) {
    trouble("This trace cannot be unpacked: the page is damaged or was cut off. (" + error.message + ")");
  }
}

function drawPosition() {
  const position = $("position");
  if (!position) return;
  const place = view.indexOf(state.row);
  position.textContent = place < 0 ? "not in the list" : whole(place + 1) + " of " + whole(view.length);
}

function detailParts(row, { label, trace, prompt, verdict, flags, dropped, kept: isKept }) {
  const pattern = state.query ? patternOf(state.query, "giu") : null;
  const text = content => marked(content, pattern);
  const chips = [chip(verdict ? verdict.outcome : trace.error === null ? "not judged" : "failed"),
    isKept === true ? chip("kept") : dropped ? chip("dropped: " + dropped, "none") : null,
    ...flags.map(flag => chip(flag.flag, "none"))];
  return [
    make("div", { class: "head" },
      make("button", { type: "button", class: "close", onclick: close, "aria-label": "Close the trace" }, "←"),
      make("div", { class: "chips" }, chips),
      make("span", { class: "steps" },
        make("button", { type: "button", "aria-label": "Previous trace", onclick: () => step(-1) }, "‹"),
        make("span", { id: "position" }),
        make("button", { type: "button", "aria-label": "Next trace", onclick: () => step(1) }, "›"))),
    make("div", { class: "body" },
      siblingList(row),
      promptSections(text, prompt),
      trace.error === null ? null : section("Error", block(text, trace.error, "bad")),
      reasoningSection(text, trace),
      trace.error === null || trace.answer ? section("Answer", block(text, trace.answer)) : null,
      verdictSection(text, verdict, prompt),
      flags.length || dropped ? flagSection(text, flags, dropped) : null,
      section("Facts", factTable(label, trace, prompt)),
      section("Names", idTable(row, trace)),
      fold("Raw text", rawOf(trace), text),
      prompt && Object.keys(prompt.row).length ? fold("Source row", JSON.stringify(prompt.row, null, 2), text) : null),
  ];
}

const section = (title, ...children) => make("section", null, make("h2", null, bdi(title)), ...children);

// Text as it is, in its own direction; a very long one in pieces.
function block(text, content, kind) {
  const pre = make("pre", { class: "text " + (kind || ""), dir: "auto" });
  if (!content) return make("p", { class: "note" }, "empty");
  pre.append(...text(content.slice(0, TEXT_CHUNK)));
  if (content.length <= TEXT_CHUNK) return pre;
  const more = make("button", { type: "button", class: "more", onclick: () => {
    pre.replaceChildren(...text(content));
    more.remove();
  } }, "Show all " + whole(content.length) + " characters");
  return make("div", null, pre, more);
}

function promptSections(text, prompt) {
  if (!prompt) return section("Prompt", make("p", { class: "note" }, "not kept beside these traces"));
  return prompt.messages.map(message =>
    section(message.role === "user" ? "Prompt" : message.role, block(text, message.content)));
}

// The text as nodes, with what was searched for in it highlighted.
function marked(content, pattern) {
  if (!pattern) return [content];
  const nodes = [];
  let from = 0, count = 0;
  for (const match of content.matchAll(pattern)) {
    if (++count > MOST_MARKS) break;
    nodes.push(content.slice(from, match.index), make("mark", null, match[0]));
    from = match.index + match[0].length;
  }
  nodes.push(content.slice(from));
  return nodes;
}

function reasoningSection(text, trace) {
  const reasoning = trace.reasoning;
  if (reasoning === null && trace.error !== null) return null;
  if (reasoning === null) return section("Reasoning", make("p", { class: "note" }, "none"));
  const tokens = trace.usage.reasoning === null ? "" : " · " + plural(trace.usage.reasoning, "token");
  const shown = block(text, reasoning), found = shown.querySelectorAll("mark").length;
  const facts = plural(reasoning.length, "character") + tokens
    + (trace.think === "closed" ? "" : " · " + trace.think) + (found ? " · " + plural(found, "hit") : "");
  const details = make("details", { class: "reasoning", id: "reasoning" },
    make("summary", null, make("h2", null, "Reasoning"), make("span", { class: "note" }, facts)), shown);
  details.open = state.unfolded || found > 0;
  details.querySelector("summary").addEventListener("click", () => { state.unfolded = !details.open; remember(); });
  return details;
}

function toggleReasoning() {
  const details = $("reasoning");
  if (!details) return;
  details.open = !details.open;
  state.unfolded = details.open;
  remember();
}

function fold(title, content, text) {
  const details = make("details", null, make("summary", null, make("h2", null, title),
    make("span", { class: "note" }, plural(content.length, "character"))));
  details.addEventListener("toggle", () => details.append(block(text, content)), { once: true });
  return details;
}

const asText = value => typeof value === "string" ? value : JSON.stringify(value);
const isSaid = value => value !== null && value !== undefined && value !== "" && asText(value) !== "{}";

// Rows of name and value; what says nothing is left out.
function table(rows) {
  return make("dl", { class: "facts" }, rows.filter(([, value]) => isSaid(value)).map(([name, value]) =>
    make("div", null, make("dt", null, bdi(name)),
      make("dd", { dir: "auto" }, ...(Array.isArray(value) ? value : [asText(value)])))));
}

const others = (values, known) => Object.entries(values).filter(([name]) => !known.includes(name))
  .map(([name, value]) => [name.replaceAll("_", " "), value === null || value === false ? null : asText(value)]);

function verdictSection(text, verdict, prompt) {
  if (!verdict) return prompt && prompt.gold !== null ? section("Reference", block(text, prompt.gold)) : null;
  const gold = verdict.gold !== null ? verdict.gold : prompt ? prompt.gold : null;
  return section("Verdict", table([
    ["reference", gold === null ? "none" : gold === "" ? "empty" : text(gold)],
    ["outcome", [chip(verdict.outcome)]],
    ["verifier", verdict.verifier],
    ["detail", verdict.detail ? text(verdict.detail) : null],
    ...others(verdict, ["schema", "trace_id", "gold", "outcome", "verifier", "detail"]),
  ]));
}

function flagSection(text, flags, dropped) {
  const rows = flags.map(flag => [flag.flag, text(flag.detail || "yes")]);
  if (dropped) rows.unshift(["dropped for", text(dropped)]);
  return section(dropped ? "Selection and flags" : "Flags", table(rows));
}

function factTable(label, trace, prompt) {
  const { teacher, usage } = trace;
  const tokens = [plural(usage.output, "token") + " written",
    usage.reasoning === null ? "" : whole(usage.reasoning) + " of them reasoning", whole(usage.input) + " read"];
  const sampling = Object.entries(trace.sampling).map(([name, value]) => name + " " + asText(value));
  return table([
    ["tokens", usage.output || usage.input ? tokens.filter(Boolean).join(", ") : "not recorded"],
    ["cost", trace.cost_usd ? dollars(trace.cost_usd) : null],
    ["latency", seconds(trace.latency_s)],
    ["finish reason", trace.finish_reason],
    ["reasoning", trace.think],
    ["sample", String(trace.sample) + (trace.attempt ? ", attempt " + trace.attempt : "")],
    ["source", prompt ? prompt.source : null],
    ["source licence", prompt ? prompt.licence : null],
    ["model", teacher.model + (teacher.revision ? " @ " + teacher.revision : "")],
    ["engine", teacher.engine + (teacher.engine_version ? " " + teacher.engine_version : "")],
    ["model licence", teacher.licence],
    ["sampling", sampling.join(", ")],
    ["written", trace.timestamp],
    ["stage", label],
    ...others(trace, ["schema", "trace_id", "prompt_id", "cfg", "sample", "attempt", "reasoning", "answer", "raw",
      "think", "finish_reason", "usage", "cost_usd", "latency_s", "teacher", "sampling", "error", "timestamp"]),
  ]);
}

function idTable(row, trace) {
  const copying = (value, what) => [make("code", null, value), " ", copyButton(() => value, what)];
  return make("div", null,
    table([["trace", copying(trace.trace_id, "trace id")], ["prompt", copying(trace.prompt_id, "prompt id")],
      ["configuration", trace.cfg ? copying(trace.cfg, "configuration id") : null]]),
    make("p", { class: "copies" },
      copyButton(() => location.href, "link to this view"),
      copyButton(async () => {
        const found = await record(row);
        return JSON.stringify({ ...found, trace: { ...found.trace, raw: rawOf(found.trace) } }, null, 2);
      }, "record as JSON")));
}

function copyButton(valueOf, what) {
  const button = make("button", { type: "button", class: "copy", onclick: async () => {
    await copy(await valueOf());
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy " + what; }, 1200);
  } }, "Copy " + what);
  return button;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {                               // not allowed or not there: by way of a selection
    const area = make("textarea", { class: "hidden" });
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
}

function siblingList(row) {
  const rows = siblings.get(index.columns.prompt[row]);
  if (rows.length < 2) return null;
  return make("nav", { class: "siblings", "aria-label": "Samples of this prompt" },
    make("span", { class: "note" }, plural(rows.length, "sample") + " of this prompt"),
    rows.map(other => make("button", { type: "button", "aria-current": other === row ? "true" : null,
      onclick: () => choose(other, true) },
      "#" + index.columns.sample[other] + " ", chip(valueOf("verdict", other)[0]))));
}

// --- the address -----------------------------------------------------------------------------------------------------

function remember(newEntry) {
  const words = new URLSearchParams();
  if (state.query) words.set("q", state.query);
  for (const [name, values] of state.chosen) for (const value of values) words.append(name, value);
  if (state.order !== "file") words.set("order", state.order);
  if (state.unfolded) words.set("unfolded", "1");
  if (state.open && state.row >= 0) words.set("trace", index.columns.id[state.row]);
  const hash = "#" + words;
  if (hash === (location.hash || "#")) return;
  if (newEntry) history.pushState(null, "", hash); else history.replaceState(null, "", hash);
}

function recall() {
  const words = new URLSearchParams(location.hash.slice(1)), before = state.query;
  state.query = (words.get("q") || "").trim();
  state.order = ORDERS.some(([name]) => name === words.get("order")) ? words.get("order") : "file";
  state.unfolded = words.has("unfolded");
  state.chosen = new Map(index.facets.map(facet =>
    [facet.name, new Set(words.getAll(facet.name).filter(value => facet.values.includes(value)))]));
  const row = words.has("trace") ? index.columns.id.indexOf(words.get("trace")) : -1;
  state.open = row >= 0;
  if (row >= 0) state.row = row;
  $("query").value = state.query;
  $("sort").value = state.order;
  setWanted();
  if (state.query !== before) search(state.query);
  refresh();
  if (row >= 0 && view.indexOf(row) >= 0) scrollTo(view.indexOf(row));
  showDetail();
}

// --- keys and events -------------------------------------------------------------------------------------------------

const KEYS = {
  j: () => step(1), k: () => step(-1), r: toggleReasoning,
  "[": () => stepSibling(-1), "]": () => stepSibling(1),
  "/": () => { $("query").focus(); $("query").select(); },
  "?": () => $("keys").showModal(),
  " ": event => $("detail").scrollBy({ top: (event.shiftKey ? -0.8 : 0.8) * $("detail").clientHeight }),
  Escape: () => {
    if (document.body.classList.contains("filtering")) showFilters(false);
    else if (state.open) close();
  },
};
const LIST_KEYS = {
  ArrowDown: () => step(1), ArrowUp: () => step(-1),
  PageDown: () => step(Math.floor($("list").clientHeight / ROW_PX)),
  PageUp: () => step(-Math.floor($("list").clientHeight / ROW_PX)),
  Home: () => step(-index.size), End: () => step(index.size),
  Enter: () => { if (view.length) choose(view.includes(state.row) ? state.row : view[0], true); },
};

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || $("keys").open) return;
  const at = event.target;
  if (at === $("query")) {
    if (event.key === "Escape" || event.key === "Enter") {
      event.preventDefault();
      typed.now();
      $("list").focus();
    }
    return;
  }
  if (at.matches("select, input, textarea")) return;
  const isFree = at === document.body || at === $("list") || at === $("detail");
  const isPress = event.key === " " || event.key === "Enter";           // of a button that has the focus
  const act = isPress && !isFree ? null
    : KEYS[event.key] || (at === $("list") || isPress ? LIST_KEYS[event.key] : null);
  if (!act) return;
  event.preventDefault();
  act(event);
}

let waiting = 0;
const typed = {
  soon: () => { clearTimeout(waiting); waiting = setTimeout(typed.now, DEBOUNCE_MS); },
  now: () => {
    clearTimeout(waiting);
    const query = $("query").value.trim();
    if (query === state.query) return;
    state.query = query;
    $("list").scrollTop = 0;
    remember();
    search(query);
  },
};

function showFilters(open) {
  document.body.classList.toggle("filtering", open);
  $("filters").setAttribute("aria-expanded", String(open));
  drawFiltersButton();
}

function reorder() {
  state.order = $("sort").value;
  $("list").scrollTop = 0;
  refresh();
  remember();
}

function clear() {
  state.chosen.clear();
  setWanted();
  $("query").value = "";
  state.query = "";
  remember();
  search("");
}

function listen() {
  $("query").addEventListener("input", typed.soon);
  $("sort").addEventListener("change", reorder);
  $("clear").addEventListener("click", clear);
  $("filters").addEventListener("click", () => showFilters(!document.body.classList.contains("filtering")));
  $("help").addEventListener("click", () => $("keys").showModal());
  $("dismiss").addEventListener("click", () => $("keys").close());
  $("list").addEventListener("scroll", () => requestAnimationFrame(drawRows), { passive: true });
  new ResizeObserver(() => drawRows()).observe($("list"));
  addEventListener("keydown", onKey);
  addEventListener("popstate", recall);
}

function trouble(text) {
  $("trouble").textContent = text;
  $("trouble").hidden = false;
}

// --- beginning -------------------------------------------------------------------------------------------------------

async function begin() {
  if (!("DecompressionStream" in window)) {
    trouble("This browser cannot unpack the traces (no DecompressionStream); use one from 2023 or later.");
    return;
  }
  index = await unpack($("index"));
  index.size = index.columns.id.length;
  const selections = index.facets.find(facet => facet.name === "selection").values;
  index.isSelected = selections.some(value => value !== NOT_SELECTED);
  let first = 0;
  starts = index.parts.map(count => (first += count) - count);
  index.columns.prompt.forEach((prompt, row) => {
    if (siblings.has(prompt)) siblings.get(prompt).push(row); else siblings.set(prompt, [row]);
  });
  $("sort").append(...ORDERS.map(([name, title]) => make("option", { value: name }, title)));
  makeFacets();
  listen();
  recall();
  document.body.classList.add("ready");
}

begin().catch(error => trouble("This page cannot be shown: it is damaged or was cut off. (" + error.message + ")"));
})();
"""
