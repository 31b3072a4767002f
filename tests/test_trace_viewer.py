"""The trace viewer: every trace is in the page once and as it was, and nothing a model wrote can act in it.

What the page holds is unpacked here by other means than its own script. The tests in a real browser need Chromium and
are left out where there is none.
"""

import base64
import hashlib
import importlib.util
import json
import random
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.errors import DataError, RecipeError
from distill.inspection import Shown
from distill.records import Flag, Message, Outcome, Prompt, Teacher, Trace, Usage, Verdict, write_records
from distill.viewer import write_page
from distill.viewer.data import PART_BYTES, raw_parts
from distill.viewer.page import policy

Cli = Callable[..., Any]
HOSTILE = (
    "</script><script>window.pwned = 1; alert(1)</script><img src=x onerror=alert(2)><svg onload=alert(3)>"
    "<!--<script>\" onmouseover='alert(4)' javascript:alert(5) ${alert(6)} TITLE NOTE &lt;b&gt; \\u003c ]]> "
    "\u2028\u2029\x00\x1b[31m\u202etfel ot thgir\u202c\u200f\ufeff\r\n\ttail"
)
"""Everything that has ever ended a script, opened an element, or turned a line around."""
FACETS = ("verdict", "selection", "flag", "source", "model", "finish", "think", "stage")


def question(number: int, text: str = "", source: str = "sums") -> Prompt:
    content = text or f"What is {number} + 1?"
    return Prompt.of([Message(role="user", content=content)], gold=str(number + 1), source=source)


def trace_of(prompt: Prompt, number: int, **changes: Any) -> Trace:
    given: dict[str, Any] = {
        "trace_id": f"t{number}", "prompt_id": prompt.prompt_id, "cfg": "c", "sample": 0,
        "reasoning": f"I add {number}.", "answer": f"\\boxed{{{number + 1}}}",
        "raw": f"<think>\nI add {number}.\n</think>\n\n\\boxed{{{number + 1}}}",
        "think": "closed", "finish_reason": "stop", "usage": Usage(input=5, output=40, reasoning=30), "cost_usd": 0.002,
        "latency_s": 1.5, "teacher": Teacher(engine="openai", model="R1"),
    }  # fmt: skip
    return Trace(**{**given, **changes})


def shown_of(number: int, outcome: Outcome = "correct", **changes: Any) -> Shown:
    prompt = question(number)
    trace = trace_of(prompt, number, **changes)
    verdict = Verdict(trace_id=trace.trace_id, gold=prompt.gold, verifier="number@1", outcome=outcome, detail="boxed 1")
    return Shown("select", trace, prompt, verdict, kept=outcome == "correct")


# --- reading a page back ----------------------------------------------------------------------------------------------


class Elements(HTMLParser):
    """Every element of a page: its name and attributes, and its text up to the next tag."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._inside = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), []))
        self._inside = True

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.found[-1][2].append(data)

    def texts(self, tag: str, **attributes: str) -> list[str]:
        return ["".join(text) for name, has, text in self.found if name == tag and attributes.items() <= has.items()]

    @property
    def policy(self) -> dict[str, str]:
        """Directives of the content policy."""
        content = next(has["content"] or "" for name, has, _ in self.found if has.get("http-equiv"))
        return {part.split()[0]: " ".join(part.split()[1:]) for part in content.split(";")}


def unpacked(text: str) -> Any:
    return json.loads(zlib.decompress(base64.b64decode(text, validate=True)))


def held(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The index and the records of a page, with their raw text joined again."""
    elements = Elements(path.read_text(encoding="utf-8"))
    blocks = {has["id"]: "".join(text) for name, has, text in elements.found if has.get("type") == "text/plain"}
    index = unpacked(blocks.pop("index"))
    parts = [unpacked(blocks.pop(f"part-{number}")) for number in range(len(index["parts"]))]
    assert not blocks and [len(part) for part in parts] == index["parts"]
    records = [record for part in parts for record in part]
    for trace in (record["trace"] for record in records):
        if isinstance(trace["raw"], list):
            before, between, behind = trace["raw"]
            trace["raw"] = before + (trace["reasoning"] or "") + between + trace["answer"] + behind
    return index, records


def as_inspected(shown: Shown) -> dict[str, Any]:
    """What `inspect --json` prints, less the token ids."""
    value: dict[str, Any] = json.loads(json.dumps(shown.to_json()))
    del value["trace"]["token_ids"]
    return value


def frame(text: str) -> str:
    """A page less the data it holds."""
    return re.sub(r'(<script type="text/plain"[^>]*>)[^<]*', r"\1", text)


# --- what is in it ----------------------------------------------------------------------------------------------------


def test_every_trace_is_in_the_page_once_and_as_inspect_gives_it(tmp_path: Path) -> None:
    filler = random.Random(0).randbytes(3000).hex()  # long and hard to compress, so that there are several parts
    shown = [
        shown_of(number, "wrong" if number % 3 else "correct", reasoning=filler + str(number)) for number in range(400)
    ]
    failed = trace_of(
        question(400), 400, error="503 from the server", answer="", reasoning=None, raw="", think="absent"
    )
    shown.append(
        Shown("select", failed, question(400), None, (Flag(trace_id="t400", flag="api-error"),), "api-error", False)
    )
    written = write_page(shown, tmp_path / "page.html", "sums")
    index, records = held(tmp_path / "page.html")
    assert written.traces == 401 and len(index["parts"]) >= 400 * 6000 // PART_BYTES
    assert records == [as_inspected(one) for one in shown]
    assert records[400]["trace"]["error"] == "503 from the server"


def test_the_index_has_what_lists_sums_and_filters_need(tmp_path: Path) -> None:
    prompt = question(1, source="gsm8k")
    cut = trace_of(prompt, 2, sample=1, finish_reason="length", think="unclosed", answer="", reasoning="Hmm " * 9)
    flags = (Flag(trace_id="t2", flag="truncated"), Flag(trace_id="t2", flag="loop"), Flag(trace_id="t2", flag="loop"))
    wrong = Verdict(trace_id="t2", gold="2", verifier="number@1", outcome="wrong", detail="no answer")
    bare = trace_of(question(3), 3, answer="So\n it is 4.", teacher=Teacher(engine="solver"), usage=Usage())
    shown = [
        Shown("select", trace_of(prompt, 1), prompt, shown_of(1).verdict, kept=True),
        Shown("select", cut, prompt, wrong, flags, "truncated", kept=False),
        Shown("traces.jsonl", bare),
        Shown("traces.jsonl", trace_of(question(4), 4, error="no route", answer="", reasoning=None)),
    ]
    write_page(shown, tmp_path / "page.html", "sums")
    index, _ = held(tmp_path / "page.html")
    columns = index["columns"]
    assert [index["prompts"][number][1] for number in columns["prompt"]] == ["What is 1 + 1?", "What is 1 + 1?", "", ""]
    assert columns["id"] == ["t1", "t2", "t3", "t4"] and columns["sample"] == [0, 1, 0, 0]
    assert columns["accepted"] == [1, 0, 0, 0] and columns["reasoning"] == [30, 30, None, 30]
    assert columns["opening"] == ["", "", "So it is 4.", ""]
    assert columns["note"] == ["boxed 1", "no answer · reference 2", "", "no route"]
    assert columns["chars"][1] == 36
    values = {f["name"]: [[f["values"][code] for code in codes] for codes in f["of"]] for f in index["facets"]}
    assert tuple(values) == FACETS
    assert values["verdict"] == [["correct"], ["wrong"], ["not judged"], ["failed"]]
    assert values["selection"] == [["kept"], ["truncated"], ["not selected"], ["not selected"]]
    assert values["flag"] == [["no flag"], ["truncated", "loop"], ["no flag"], ["no flag"]]
    assert values["source"] == [["gsm8k"], ["gsm8k"], ["unknown"], ["unknown"]]
    assert values["model"] == [["R1"], ["R1"], ["solver"], ["R1"]]
    assert values["finish"][1] == ["length"] and values["think"][1] == ["unclosed"]
    assert values["stage"] == [["select"], ["select"], ["traces.jsonl"], ["traces.jsonl"]]


texts = st.text(alphabet="ab\n<é", max_size=6)


@given(reasoning=texts | st.none(), answer=texts, raw=texts | st.none())
def test_the_raw_text_is_whole_again_when_its_pieces_are_joined(
    reasoning: str | None, answer: str, raw: str | None
) -> None:
    said = f"<think>{reasoning or ''}</think>{answer}" if raw is None else raw
    pieces = raw_parts(trace_of(question(1), 1, reasoning=reasoning, answer=answer, raw=said))
    if isinstance(pieces, list):
        assert pieces[0] + (reasoning or "") + pieces[1] + answer + pieces[2] == said
    else:
        assert pieces == said and (raw is not None), "what was joined from its pieces is never kept twice"


def test_token_ids_stay_out(tmp_path: Path) -> None:
    write_page([shown_of(1, token_ids=(918273645,) * 100)], tmp_path / "page.html", "sums")
    assert "918273645" not in json.dumps(held(tmp_path / "page.html"))


def test_equal_records_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        write_page([shown_of(number) for number in range(30)], tmp_path / name, "sums", "wrong")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    write_page([shown_of(number) for number in range(29)], tmp_path / "b.html", "sums", "wrong")
    assert (tmp_path / "a.html").read_bytes() != (tmp_path / "b.html").read_bytes()


def test_a_page_without_traces_is_whole(tmp_path: Path) -> None:
    assert write_page([], tmp_path / "page.html", "sums").traces == 0
    index, records = held(tmp_path / "page.html")
    assert index["parts"] == records == index["columns"]["id"] == []


def test_nothing_but_records_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-never-in-a-page")
    write_page([shown_of(1)], tmp_path / "page.html", "sums")
    text = (tmp_path / "page.html").read_text(encoding="utf-8") + json.dumps(held(tmp_path / "page.html"))
    assert "sk-never" not in text and str(tmp_path) not in text and str(Path.home()) not in text


# --- hostile texts ----------------------------------------------------------------------------------------------------


def hostile() -> list[Shown]:
    """Traces that try to be more than text, in every field that is text."""
    prompt = Prompt.of(
        [Message(role="system", content=HOSTILE), Message(role="user", content=HOSTILE)],
        gold=HOSTILE, source=HOSTILE, licence=HOSTILE, row={HOSTILE: HOSTILE, "__proto__": {"polluted": 1}},
    )  # fmt: skip
    attack = {"trace_id": HOSTILE, "cfg": HOSTILE, "reasoning": HOSTILE, "answer": HOSTILE, "raw": HOSTILE}
    teacher = Teacher(engine=HOSTILE, engine_version=HOSTILE, model=HOSTILE, revision=HOSTILE, licence=HOSTILE)
    trace = trace_of(prompt, 0, **attack, teacher=teacher, sampling={HOSTILE: HOSTILE}, timestamp=HOSTILE)
    verdict = Verdict(trace_id=HOSTILE, gold=HOSTILE, verifier=HOSTILE, outcome="wrong", detail=HOSTILE)
    flags = tuple(Flag(trace_id=HOSTILE, flag=flag, detail=HOSTILE) for flag in (HOSTILE, "__proto__", "constructor"))
    failed = trace_of(prompt, 1, trace_id="__proto__", error=HOSTILE, answer="", reasoning=None)
    return [
        Shown(HOSTILE, trace, prompt, verdict, flags, HOSTILE, False),
        Shown(HOSTILE, failed, prompt, None, (), "constructor", False),
        shown_of(2, reasoning="long " * 200_000, answer="לפני the end", raw=""),
        shown_of(3, reasoning="half \ud83d a pair", answer="\udc00", raw="", cost_usd=float("nan")),
        shown_of(4, reasoning="", answer="", raw="", think="empty"),
    ]


def test_hostile_texts_neither_break_the_page_nor_get_lost(tmp_path: Path) -> None:
    shown = hostile()
    write_page(shown, tmp_path / "page.html", HOSTILE, HOSTILE)
    write_page([shown_of(1)], tmp_path / "plain.html", "sums", "wrong")
    page = Elements((tmp_path / "page.html").read_text(encoding="utf-8"))
    plain = Elements((tmp_path / "plain.html").read_text(encoding="utf-8"))
    _, records = held(tmp_path / "page.html")
    expected = [as_inspected(one) for one in shown]
    expected[3]["trace"]["cost_usd"] = None  # JSON has no NaN
    assert records == expected
    added = len(page.texts("script", type="text/plain")) - len(plain.texts("script", type="text/plain"))
    names = [name for name, _, _ in page.found]
    assert len(names) == len(plain.found) + added and "img" not in names and "svg" not in names
    assert page.texts("title")[0].startswith("</script><script>window.pwned")


def test_the_title_is_text_only(tmp_path: Path) -> None:
    write_page([], tmp_path / "page.html", "NOTE <b>bold</b> TITLE", "<i>TITLE</i>")
    page = Elements((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.texts("h1") == ["NOTE <b>bold</b> TITLE"] and page.texts("p", **{"class": "note"}) == [
        "Only: <i>TITLE</i>"
    ]
    assert not page.texts("b") and not page.texts("i")


# --- what the browser is told -----------------------------------------------------------------------------------------


def test_the_content_policy_allows_the_page_s_own_script_and_style_and_nothing_else(tmp_path: Path) -> None:
    write_page([shown_of(1)], tmp_path / "page.html", "sums")
    page = Elements((tmp_path / "page.html").read_text(encoding="utf-8"))

    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    scripts = ["".join(text) for name, has, text in page.found if name == "script" and "type" not in has]
    assert page.policy["default-src"] == "'none'"
    assert [digest(script) for script in scripts] == [page.policy["script-src"]]
    assert [digest(style) for style in page.texts("style")] == [page.policy["style-src"]]
    assert page.policy["require-trusted-types-for"] == "'script'" and page.policy["trusted-types"] == "'none'"
    assert not {"unsafe-inline", "unsafe-eval", "*", "data:", "blob:"} & set(policy().replace("'", "").split())


def test_the_page_names_no_address_and_makes_no_markup_of_text(tmp_path: Path) -> None:
    write_page([shown_of(1)], tmp_path / "page.html", "sums")
    text = frame((tmp_path / "page.html").read_text(encoding="utf-8"))
    addresses = ("://", "@import", "url(", "fetch(", "XMLHttpRequest", "WebSocket", "EventSource", "import(", "Worker(")
    markup = ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "Function(", "srcdoc", "parseHTML")
    assert not [word for word in (*addresses, *markup) if word in text]
    attributes = {name for _, has, _ in Elements(text).found for name in has}
    assert not {name for name in attributes if name.startswith("on") or name in ("src", "href", "style", "action")}
    assert "<noscript>" in text


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    """Twelve traces with verdicts beside them, of which four are wrong."""
    shown = [shown_of(number, "correct" if number % 3 else "wrong") for number in range(12)]
    write_records(tmp_path / "verdicts.jsonl", [one.verdict for one in shown if one.verdict])
    write_records(tmp_path / "traces.jsonl", [one.trace for one in shown])
    return tmp_path / "traces.jsonl"


def test_the_command_writes_all_traces_unless_told_otherwise(cli: Cli, traces: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    said = cli("inspect", traces, "--html", page)
    assert (said.code, said.out) == (0, f"{page}\n") and said.err.startswith("traces: 12; ")
    assert [record["trace"]["trace_id"] for record in held(page)[1]] == [f"t{number}" for number in range(12)]
    assert "Only:" not in page.read_text(encoding="utf-8")
    assert cli("inspect", traces, "--html", page, "--wrong", "--limit", 3, "--json").json == {
        "path": str(page), "traces": 3, "bytes": page.stat().st_size,
    }  # fmt: skip
    assert [record["trace"]["trace_id"] for record in held(page)[1]] == ["t0", "t3", "t6"]
    assert "Only: wrong, the first 3<" in page.read_text(encoding="utf-8")


def test_the_terminal_still_shows_ten_at_first(cli: Cli, traces: Path) -> None:
    assert len(cli("inspect", traces, "--json").json) == 10
    assert len(cli("inspect", traces, "--json", "--limit", 0).json) == 12


def test_a_file_that_is_not_named_like_a_page_is_never_written_over(cli: Cli, traces: Path) -> None:
    before = traces.read_bytes()
    said = cli("inspect", traces, "--html", traces)
    assert said.code == 2 and "ends in .html" in said.error_line and traces.read_bytes() == before
    with pytest.raises(RecipeError):
        write_page([], traces.with_suffix(".yaml"), "sums")


def test_a_page_that_cannot_be_finished_leaves_the_older_one(traces: Path, tmp_path: Path, cli: Cli) -> None:
    page = tmp_path / "page.html"
    cli("inspect", traces, "--html", page)
    before = page.read_bytes()
    with traces.open("a") as file:
        file.write("not a trace\n")
    said = cli("inspect", traces, "--html", page)
    assert said.code == 2 and "traces.jsonl:13" in said.error_line
    assert page.read_bytes() == before and not list(tmp_path.glob("*.part"))


def test_a_failing_reader_is_not_blamed_on_the_disk(tmp_path: Path) -> None:
    def damaged() -> Iterator[Shown]:
        yield shown_of(1)
        raise DataError("traces.jsonl:2: not a Trace record")

    with pytest.raises(DataError, match="not a Trace"):
        write_page(damaged(), tmp_path / "pages" / "page.html", "sums")
    assert not list(tmp_path.iterdir())


def test_a_folder_in_the_way_is_said(cli: Cli, traces: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = cli("inspect", traces, "--html", tmp_path / "file" / "page.html")
    assert said.code == 2 and "cannot write" in said.error_line and "a file is in the way" in said.error_line
    (tmp_path / "folder.html").mkdir()
    assert "ends in .html" in cli("inspect", traces, "--html", tmp_path / "folder.html").error_line


# --- in a browser -----------------------------------------------------------------------------------------------------

spec = importlib.util.spec_from_file_location("chromium", Path(__file__).parent / "chromium.py")
assert spec and spec.loader
chromium_module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(chromium_module)
needs_chromium, chromium = chromium_module.needs_chromium, chromium_module.chromium


class Viewer(chromium_module.Chromium):  # type: ignore[misc, name-defined]
    """A tab with the viewer's page."""

    def open(self, page: Path, state: str = "") -> None:
        """Load a page anew and wait until its list is there."""
        ready = "document.body?.classList.contains('ready') && document.readyState === 'complete'"
        self.go(page.as_uri() + state, ready)

    def search(self, words: str) -> None:
        """Type words into the search field and wait for the last hit."""
        self.press("/")
        self.call("Input.insertText", text=words)
        self.press("Enter")
        self.until("document.getElementById('progress').hidden")

    def choose_filter(self, facet: str, value: str) -> None:
        """Click a value of a filter."""
        buttons = f"[...document.querySelectorAll('[data-facet={facet}] li > button')]"
        self.value(
            f"{buttons}.find(button => button.querySelector('bdi')?.textContent === {json.dumps(value)}).click()"
        )


COUNT = "document.getElementById('count')?.textContent"
DETAIL = "document.getElementById('detail').innerText"
ROWS = "document.querySelectorAll('.row').length"
CHOSEN = "document.querySelector('.row[aria-selected=true]')?.id"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Viewer]:
    with chromium(tmp_path_factory.mktemp("profile"), Viewer) as one:
        yield one


def ten_thousand() -> Iterator[Shown]:
    """2,500 prompts with four samples each, about 6 kB a trace: R1's lengths, and counts known beforehand.

    Every fourth is wrong; every 1000th is cut off; every 997th, 11 in all, has a word of its own.
    """
    words = ["so", "the", "sum", "of", "these", "is", "then", "wait", "maybe", "check", "twelve", "apples", "minus"]
    chance = random.Random(0)
    for number in range(10_000):
        prompt = question(number // 4, source="gsm8k" if number < 5000 else "math")
        rare = " quokka\nbird " if number % 997 == 0 else " "
        reasoning = " ".join(chance.choices(words, k=600)) + rare + " ".join(chance.choices(words, k=600))
        is_cut, outcome = number % 1000 == 999, "wrong" if number % 4 == 3 else "correct"
        trace = trace_of(
            prompt, number, sample=number % 4, reasoning=reasoning, finish_reason="length" if is_cut else "stop",
            raw=f"{reasoning}\n</think>\n\n\\boxed{{{number + 1}}}",
        )  # fmt: skip
        flags = (Flag(trace_id=trace.trace_id, flag="truncated", detail="after 40 tokens"),) if is_cut else ()
        verdict = Verdict.model_validate(
            {"trace_id": trace.trace_id, "gold": prompt.gold, "verifier": "number@1", "outcome": outcome}
        )
        dropped = "truncated" if is_cut else "wrong" if outcome == "wrong" else None
        yield Shown("select", trace, prompt, verdict, flags, dropped, kept=dropped is None)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(ten_thousand(), tmp_path_factory.mktemp("large") / "large.html", "ten thousand").path


@pytest.mark.full
@needs_chromium
def test_ten_thousand_traces_are_listed_searched_filtered_and_read_offline(browser: Viewer, large: Path) -> None:
    browser.open(large)
    assert browser.value(COUNT) == "10,000 traces"
    assert 0 < browser.value(ROWS) < 60, "only the rows in view are drawn"
    tiles = browser.value("document.getElementById('tiles').innerText").split()
    assert {"10,000", "75.0%", "7,500", "$20.00", "400K"} <= set(tiles)

    browser.search("QUOKKA bird")
    assert browser.value(COUNT) == "11 of 10,000"
    browser.press("j", "Enter")
    assert browser.until("document.querySelector('#reasoning[open] mark')?.textContent") == "quokka\nbird"
    assert browser.value(CHOSEN) == "row-0" and "What is 0 + 1?" in browser.value(DETAIL)
    browser.press("Escape")
    browser.search("quokka birds")
    assert browser.value(COUNT) == "0 of 10,000"

    browser.value("document.getElementById('clear').click()")
    browser.choose_filter("verdict", "wrong")
    assert browser.value(COUNT) == "2,500 of 10,000"
    browser.choose_filter("flag", "truncated")
    assert browser.value(COUNT) == "10 of 10,000"
    browser.choose_filter("source", "math")
    assert browser.value(COUNT) == "5 of 10,000"
    browser.press("j", "j", "Enter")
    browser.until(f"{DETAIL}.includes('What is 1749 + 1?')")
    assert browser.value("document.getElementById('reasoning').open") is False, "reasoning is folded at first"
    assert not browser.misdeeds()

    address = browser.value("location.hash")
    browser.open(large, address)  # the same view again, as somebody else would get it
    assert browser.value(COUNT) == "5 of 10,000"
    browser.until(f"{DETAIL}.includes('What is 1749 + 1?') && {CHOSEN} === 'row-6999'")
    assert not browser.misdeeds()


@pytest.mark.full
@needs_chromium
def test_the_keyboard_reaches_every_trace_and_its_siblings(browser: Viewer, large: Path) -> None:
    browser.open(large)
    browser.value("document.getElementById('list').focus()")
    browser.press("End")
    browser.until(f"{CHOSEN} === 'row-9999'")
    browser.press("Enter")
    browser.until(f"{DETAIL}.includes('t9999')")
    browser.press("k", "k")
    browser.until(f"{DETAIL}.includes('t9997')")
    browser.press("[")
    browser.until(f"{DETAIL}.includes('t9996')")
    browser.press("r")
    assert browser.value("document.getElementById('reasoning').open") is True
    browser.press("]")
    browser.until(f"{DETAIL}.includes('t9997')")
    assert browser.value("document.getElementById('reasoning').open") is True, "what was unfolded stays unfolded"
    browser.value("document.querySelector('.siblings button').click()")
    browser.until(f"{DETAIL}.includes('t9996')")
    browser.press("Escape")
    assert browser.value("document.body.classList.contains('reading')") is False
    browser.press("Enter")
    browser.until("document.body.classList.contains('reading')")
    browser.value("history.back()")
    browser.until("!document.body.classList.contains('reading')")
    browser.press("?")
    assert browser.value("document.getElementById('keys').open") is True
    browser.press("Escape")
    assert not browser.misdeeds()


@pytest.mark.full
@needs_chromium
def test_an_id_is_copied(browser: Viewer, tmp_path: Path) -> None:
    browser.open(write_page([shown_of(7)], tmp_path / "page.html", "sums").path, "#trace=t7")
    browser.until("document.querySelector('.copy')?.textContent === 'Copy trace id'")
    browser.value("document.querySelector('.copy').click()")
    browser.until("document.querySelector('.copy').textContent === 'Copied'")
    browser.value("document.getElementById('query').focus()")
    browser.call("Input.dispatchKeyEvent", type="keyDown", key="v", commands=["paste"])
    browser.until("document.getElementById('query').value === 't7'")
    assert not browser.misdeeds()


@pytest.mark.full
@needs_chromium
def test_hostile_traces_are_shown_as_text_and_nothing_of_them_runs(browser: Viewer, tmp_path: Path) -> None:
    shown = hostile()
    write_page(shown, tmp_path / "hostile.html", HOSTILE, HOSTILE)
    browser.open(tmp_path / "hostile.html")
    browser.value("document.querySelectorAll('details').forEach(one => one.open = true)")
    for place in range(len(shown)):
        browser.press("j", *(["Enter"] if place == 0 else []))
        browser.until(f"document.getElementById('position')?.textContent === '{place + 1} of {len(shown)}'")
        browser.value("document.querySelectorAll('details').forEach(one => one.open = true)")
        answer = shown[place].trace.answer
        if place in (0, 2):
            texts = browser.value("[...document.querySelectorAll('#detail .text')].map(one => one.textContent)")
            assert answer in texts, "as it was written, to the last character"
    browser.search("onerror=alert")
    assert browser.value(COUNT) == f"2 of {len(shown)}"
    browser.choose_filter("flag", HOSTILE)
    browser.choose_filter("flag", "__proto__")
    assert browser.value(COUNT) == f"1 of {len(shown)}"
    assert browser.value("[typeof window.pwned, typeof ({}).polluted]") == ["undefined", "undefined"]
    assert browser.value("document.querySelectorAll('img, svg, iframe, a, b').length") == 0
    assert browser.value("document.scripts.length") == 2 + len(held(tmp_path / "hostile.html")[0]["parts"])
    assert not browser.misdeeds()


@pytest.mark.full
@needs_chromium
def test_the_page_refuses_markup_even_from_its_own_script(browser: Viewer, tmp_path: Path) -> None:
    write_page([shown_of(1)], tmp_path / "page.html", "sums")
    browser.open(tmp_path / "page.html")
    attempt = "(() => { try { document.body.innerHTML = '<b>x</b>' } catch (error) { return error.name } })()"
    assert browser.value(attempt) == "TypeError"


@pytest.mark.full
@needs_chromium
def test_a_damaged_page_says_so(browser: Viewer, tmp_path: Path) -> None:
    write_page([shown_of(1)], tmp_path / "page.html", "sums")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    (tmp_path / "page.html").write_text(re.sub(r'(id="part-0">)[^<]{20}', r"\1", text), encoding="utf-8")
    browser.open(tmp_path / "page.html")
    browser.press("j", "Enter")
    assert "damaged" in browser.until("!document.getElementById('trouble').hidden && document.body.innerText")


@pytest.mark.full
@needs_chromium
def test_the_watch_sees_what_a_page_must_not_do(browser: Viewer, tmp_path: Path) -> None:
    def misdeeds_of(body: Sequence[str]) -> list[str]:
        (tmp_path / "bad.html").write_text(f'<body class="ready">{"".join(body)}', encoding="utf-8")
        browser.open(tmp_path / "bad.html")
        return browser.misdeeds()

    assert not misdeeds_of(["<p>good"])
    assert "never" in misdeeds_of(["<script>console.error('never')</script>"])[0]
    assert misdeeds_of(["<img src=x onerror='throw Error()'>"])
    assert "http://127.0.0.1:9/x.png" in misdeeds_of(["<img src='http://127.0.0.1:9/x.png'>"])
