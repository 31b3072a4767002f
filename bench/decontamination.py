r"""Decontamination on labelled pairs: the curve over n-gram length and tokenization that the defaults come from.

    .venv/bin/python bench/decontamination.py            print the tables, write build/bench/decontamination.json
    .venv/bin/python bench/decontamination.py --check    also exit 1 when a bar (below) is missed

The pairs are 93 problems of MATH-500 and the training row that each was found in by its source, which counted a pair as
overlapping from five shared 13-grams of words and symbols on. A training row met by its own problem is recall; the
93 x 92 mismatched pairs give the false hits, although some of them share as much as labelled ones do. More negatives:
the same rows against 88 problems of MATH-500 in which the source found no overlap; GSM8K train against the 93 problems;
and 300 problems of MATH train against all of these problems, some of which do share a wording, so no bar is set there.

The data lie beside the checkout (shared/data) and never in it.
"""

import argparse
import json
import random
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from distill.records import Message, Prompt
from distill.teachers.decontamination import NGRAMS, STOCK, Decontaminator, tokenize

RECALL = 0.95
"""Bar: share of the labelled pairs that are met, at least."""
FALSE_HITS = 0.015
"""Bar: share of the mismatched pairs that are met, at most."""
GSM8K_HITS = 0
"""Bar: prompts of GSM8K train met by the 93 problems, at most."""
CPU_SECONDS = 60.0
"""Bar: time for 100,000 training prompts against 5,000 evaluation prompts on one core, at most."""

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
OUT = ROOT / "build" / "bench" / "decontamination.json"
SPLITS = 20
"""Ways to cut the pairs in two: the rule is chosen on one half and measured on the other."""

TOKENIZATIONS: dict[str, tuple[Callable[[str], list[str]], Sequence[int]]] = {
    "words": (re.compile(r"[^\W\d_]+").findall, (6, 7, 8, 10, 13, 16)),
    "words, numbers": (re.compile(r"[^\W\d_]+|\d+").findall, (6, 7, 8, 10, 13, 16)),
    "LaTeX symbols too": (re.compile(r"[^\W\d_]+|\d+|[^\w\s]|_").findall, (8, 10, 11, 12, 13, 14, 15, 16, 20)),
    "symbols less layout": (lambda text: tokenize(text).texts, (8, 10, 11, 12, 13, 14, 15, 16, 20)),
    "characters": (re.compile(r"\S").findall, (20, 25, 30, 40, 50)),
}
"""Plain n-grams for the curve: a text is met if it has one in common with a problem. `symbols less layout` are the
tokens of the product; the others are made here."""


class Data(NamedTuple):
    """Texts of the labelled pairs, by row, and of the negatives."""

    problems: list[str]
    rows: list[str]
    clean: list[str]
    gsm8k: list[str]
    math_train: list[str]


class Result(NamedTuple):
    """Who met whom: (number of the problem, number of the text)."""

    rows: set[tuple[int, int]]
    """Rows met by the 93 problems and, from 93 on, by the clean ones."""
    gsm8k: set[int] | None
    """Numbers of the prompts met; None where that was not measured."""
    math_train: set[int] | None

    def recall(self, pairs: Sequence[int]) -> float:
        """Of these pairs."""
        return sum((pair, pair) in self.rows for pair in pairs) / len(pairs)

    def false_hits(self, pairs: Sequence[int]) -> float:
        """Among the mismatched pairs of these."""
        chosen = set(pairs)
        wrong = sum(problem != row and problem in chosen and row in chosen for problem, row in self.rows)
        return wrong / (len(chosen) * (len(chosen) - 1))

    def clean_hits(self, pairs: int) -> int:
        """Rows met by clean problems."""
        return sum(problem >= pairs for problem, _ in self.rows)


# --- data -----------------------------------------------------------------------------------------------------------


def read(folder: Path) -> Data:
    """The labelled pairs and the negatives; clean problems that are in a pair are left out."""
    pairs = lines(folder / "contamination" / "openthoughts_lexical_pairs.jsonl")
    paired = {pair["math500_id"] for pair in pairs}
    clean = lines(folder / "contamination" / "clean_pairs.jsonl")
    traces = folder / "traces" / "math_train_r1_distill_qwen_1.5b.jsonl"
    return Data(
        problems=[pair["math500_problem"] for pair in pairs],
        rows=[pair["train_problem"] for pair in pairs],
        clean=[one["problem"] for one in clean if one["math500_id"] not in paired],
        gsm8k=[one["question"] for one in lines(folder / "problems" / "gsm8k_train.jsonl")],
        math_train=sorted({one["problem_text"] for one in lines(traces)}),
    )


def lines(path: Path) -> list[Any]:
    """The rows of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- measuring ------------------------------------------------------------------------------------------------------


def plain(data: Data, tokens: Callable[[str], list[str]], n: int) -> Result:
    """Plain n-grams: a text is met if it has one in common with a problem."""

    def grams(text: str) -> set[tuple[str, ...]]:
        found = tokens(text.lower())
        return {tuple(found[at : at + n]) for at in range(len(found) - n + 1)}

    owners: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, problem in enumerate([*data.problems, *data.clean]):
        for gram in grams(problem):
            owners[gram].append(number)
    paired = {gram for gram, problems in owners.items() if problems[0] < len(data.problems)}
    return Result(
        {(problem, row) for row, text in enumerate(data.rows) for g in grams(text) for problem in owners.get(g, ())},
        {at for at, text in enumerate(data.gsm8k) if not grams(text).isdisjoint(paired)},
        {at for at, text in enumerate(data.math_train) if not grams(text).isdisjoint(owners.keys())},
    )


def ours(data: Data, others: Iterable[str] = (), **parameters: Any) -> Result:
    """The product, with all problems in one set as a user has them; `others` are further problems of that set."""
    numbers: dict[str, int] = {}
    both = Decontaminator(**parameters)
    paired = Decontaminator(**parameters)
    for number, text in enumerate([*data.problems, *data.clean, *others]):
        prompt = as_prompt(text)
        numbers[prompt.prompt_id] = number
        both.add("math500", prompt)
        if number < len(data.problems):
            paired.add("math500", prompt)
    known = len(data.problems) + len(data.clean)
    met = {(numbers[hit.prompt_id], row) for row, text in enumerate(data.rows) for hit in both.hits(text)}
    return Result(
        {(problem, row) for problem, row in met if problem < known},
        {at for at, text in enumerate(data.gsm8k) if paired.hit(text)},
        {at for at, text in enumerate(data.math_train) if both.hit(text)},
    )


def one_by_one(data: Data) -> Result:
    """The product with a set of a single problem each time, where nothing is known of stock phrases."""
    met: set[tuple[int, int]] = set()
    for number, text in enumerate([*data.problems, *data.clean]):
        alone = Decontaminator()
        alone.add("math500", as_prompt(text))
        met |= {(number, row) for row, train in enumerate(data.rows) if alone.hit(train)}
    return Result(met, None, None)


def as_prompt(text: str) -> Prompt:
    """A problem as the user's turn."""
    return Prompt.of([Message(role="user", content=text)])


def cpu_seconds(data: Data, evaluation: int = 5_000, training: int = 100_000) -> float:
    """CPU time to look `training` prompts up among `evaluation` ones, with making the index."""
    texts = [*data.gsm8k[evaluation:], *data.math_train, *data.rows]
    decontaminator = Decontaminator()
    for text in data.gsm8k[:evaluation]:
        decontaminator.add("gsm8k", as_prompt(text))
    begin = time.process_time()
    for at in range(training):
        decontaminator.hit(texts[at % len(texts)])
    return time.process_time() - begin


def either(one: Result, other: Result) -> Result:
    """What two rules meet together."""
    return Result(
        one.rows | other.rows,
        (one.gsm8k or set()) | (other.gsm8k or set()),
        (one.math_train or set()) | (other.math_train or set()),
    )


def halves(pairs: int, seed: int = 0) -> tuple[list[int], list[int]]:
    """The pairs, cut in two by a seed: one half to choose by, one to report on."""
    shuffled = random.Random(seed).sample(range(pairs), pairs)
    return sorted(shuffled[: pairs // 2]), sorted(shuffled[pairs // 2 :])


def chosen_on(half: Sequence[int], candidates: dict[str, Result]) -> str:
    """The rule with the highest recall on a half of the pairs, then the fewest false hits, within the bar on those."""
    fit = [name for name, result in candidates.items() if result.false_hits(half) <= FALSE_HITS]
    return max(fit, key=lambda name: (candidates[name].recall(half), -candidates[name].false_hits(half)))


def cross_validated(candidates: dict[str, Result], default: Result, pairs: int) -> dict[str, Any]:
    """What the rules chosen on one half are worth on the other, and the default there; means over the splits."""
    splits = [halves(pairs, seed) for seed in range(SPLITS)]
    chosen = [chosen_on(first, candidates) for first, _ in splits]
    return {
        "chosen": dict(Counter(chosen).most_common()),
        "recall": mean(candidates[name].recall(second) for name, (_, second) in zip(chosen, splits)),
        "false_hits": mean(candidates[name].false_hits(second) for name, (_, second) in zip(chosen, splits)),
        "default_recall": mean(default.recall(second) for _, second in splits),
        "default_false_hits": mean(default.false_hits(second) for _, second in splits),
    }


# --- the report -----------------------------------------------------------------------------------------------------


def rules(data: Data) -> tuple[dict[str, Result], dict[str, Result]]:
    """The curve of plain n-grams, with pairs of a short one on words and a long one on symbols; and the product."""
    curve = {
        f"{name}: {n}": plain(data, tokens, n) for name, (tokens, lengths) in TOKENIZATIONS.items() for n in lengths
    }
    both = {
        f"words, numbers: {short} or {symbols}: {long}": either(
            curve[f"words, numbers: {short}"], curve[f"{symbols}: {long}"]
        )
        for symbols in ("LaTeX symbols too", "symbols less layout")
        for short, long in product((7, 8, 10), (12, 13, 14, 15))
    }
    product_rows = {
        f"distill {NGRAMS} (default)": ours(data),
        "distill (8,)": ours(data, ngrams=(8,)),
        "distill (13,)": ours(data, ngrams=(13,)),
        "distill (), whole problems only": ours(data, ngrams=()),
        "distill, no stock phrases": ours(data, stock=STOCK._replace(problems=sys.maxsize)),
        "distill, MATH train in the set too": ours(data, others=data.math_train)._replace(math_train=None),
        "distill, one problem at a time": one_by_one(data),
    }
    return curve | both, product_rows


def figures(result: Result, data: Data) -> dict[str, Any]:
    """One row of the table."""
    first, second = halves(len(data.problems))
    everything = range(len(data.problems))
    return {
        "recall": result.recall(everything),
        "recall_half_a": result.recall(first),
        "recall_half_b": result.recall(second),
        "false_hits": result.false_hits(everything),
        "clean_hits": result.clean_hits(len(data.problems)) / (len(data.clean) * len(data.rows)),
        "gsm8k_hits": None if result.gsm8k is None else len(result.gsm8k),
        "math_train_hits": None if result.math_train is None else len(result.math_train),
    }


def over_bars(row: dict[str, Any]) -> list[str]:
    """The bars that a rule misses."""
    return [
        f"{key} {row[key]:.4g}, bar {bar}"
        for key, bar, missed in (
            ("recall", RECALL, row["recall"] < RECALL),
            ("false_hits", FALSE_HITS, row["false_hits"] > FALSE_HITS),
            ("gsm8k_hits", GSM8K_HITS, (row["gsm8k_hits"] or 0) > GSM8K_HITS),
        )
        if missed
    ]


def table(title: str, rows: dict[str, dict[str, Any]]) -> Table:
    """Rules down, figures across; a star where recall, false hits and GSM8K are within the bars."""
    shown = Table("", "rule: n", title=title, title_justify="left")
    for heading in ("recall", "half A", "half B", "false hits", "clean", "GSM8K", "MATH train"):
        shown.add_column(heading, justify="right")
    for name, row in rows.items():
        shares = [f"{row[key]:.1%}" for key in ("recall", "recall_half_a", "recall_half_b")]
        rates = [f"{row[key]:.2%}" for key in ("false_hits", "clean_hits")]
        counts = ["" if row[key] is None else str(row[key]) for key in ("gsm8k_hits", "math_train_hits")]
        shown.add_row("" if over_bars(row) else "*", name, *shares, *rates, *counts)
    return shown


def measure(data: Data) -> dict[str, Any]:
    """All figures, and the bars that are missed."""
    curve, product_rows = rules(data)
    default, *_, alone = product_rows
    found = {name: figures(result, data) for name, result in product_rows.items()}
    seconds = cpu_seconds(data)
    slow = [f"{seconds:.0f} s of CPU, bar {CPU_SECONDS:.0f}"] if seconds > CPU_SECONDS else []
    return {
        "plain": {name: figures(result, data) for name, result in curve.items()},
        "distill": found,
        "cross_validated": cross_validated(curve, product_rows[default], len(data.problems)),
        "cpu_seconds": seconds,
        "missed": slow + [f"{name}: {bar}" for name in (default, alone) for bar in over_bars(found[name])],
    }


def show(report: dict[str, Any]) -> None:
    """Print the tables and what follows from them."""
    console = Console(width=140)
    console.print(
        table("plain n-grams (* within the bars; half A and B: recall on two halves of the pairs)", report["plain"])
    )
    console.print(table("distill", report["distill"]))
    halved = report["cross_validated"]
    console.print(
        f"{SPLITS} splits, the plain rule chosen on one half, measured on the other: recall {halved['recall']:.1%},"
        f" false hits {halved['false_hits']:.2%}; the default there: {halved['default_recall']:.1%},"
        f" {halved['default_false_hits']:.2%}; chosen: {halved['chosen']}"
    )
    console.print(f"100,000 training prompts against 5,000 evaluation prompts: {report['cpu_seconds']:.1f} s of CPU")
    for bar in report["missed"]:
        console.print(f"missed: {bar}")


def main() -> int:
    """Measure, print, write; 1 if `--check` finds a bar missed or no data."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 when a bar is missed")
    parser.add_argument("--data", type=Path, default=SHARED, help="folder with contamination/, problems/ and traces/")
    options = parser.parse_args()
    if not options.data.exists():
        print(f"{options.data}: no such folder; give the labelled pairs with --data", file=sys.stderr)
        return int(options.check)
    report = measure(read(options.data))
    show(report)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return int(options.check and bool(report["missed"]))


if __name__ == "__main__":
    sys.exit(main())
