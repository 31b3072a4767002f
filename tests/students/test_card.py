"""The checkpoint's card: true to the recipe and to what was counted, ready to run, and broken by no name."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.config import Recipe, recipe_from
from distill.format import encode_prompt, render_prompt, set_template
from distill.models import find_model, load_tokenizer
from distill.records import Example, Message, Prompt, write_records
from distill.runs import RunOptions, Step, open_run
from distill.students.card import CARD_FILE, CardFacts, card, facts_of, write_card

TinyModel = Callable[[str], Path]

SFT = {"kind": "sft", "lr": 2e-5, "epochs": 2.0}
REPLAY = {"name": "chats", "hub": {"id": "allenai/tulu-3"}, "weight": 0.25, "licence": "ODC-BY"}
COUNTS = {
    "documents": 3, "too_long": 1, "seam_differs": 0, "steps": 92, "tokens": 90292, "supervised_tokens": 61234,
    "packing_efficiency": 0.9731, "first_loss": 1.25, "last_loss": 0.0625, "train_seconds": 272.04,
    "replay": {"chats": {"documents": 17}}, "best_step": 50,
}  # fmt: skip
TEACHER = {"model": "deepseek-reasoner", "revision": None, "engine": "openai", "engine_version": "2", "licence": "MIT"}
SELECTED = {
    "samples": 5, "examples": 3, "prompts": 3, "dropped": 2, "teachers": [TEACHER | {"examples": 3}],
    "funnel": [{"reason": "wrong", "why": "answer did not match the reference", "dropped": 2, "remaining": 3}],
}  # fmt: skip


def recipe_of(*phases: Mapping[str, Any], **sections: Any) -> Recipe:
    plain: dict[str, Any] = {
        "name": "r1-tiny",
        "prompts": [
            {"name": "gsm8k", "hub": {"id": "openai/gsm8k", "config": "main"}, "licence": "MIT",
             "template": "{question}\n{instruction}", "instruction": "Answer in \\boxed{}."},
            {"name": "own", "file": "/home/ada/problems/own.jsonl", "licence": "Apache-2.0"},
        ],
        "teacher": {
            "engine": "openai", "model": "deepseek-reasoner", "licence": "MIT", "sampling": {"temperature": 0.6},
            "endpoint": {"base_url": "http://inside.example/v1", "api_key_env": "OUR_KEY"},
        },
        "student": {"init": "Qwen/Qwen2.5-0.5B", "licence": "Apache-2.0", "phases": [*phases] or [SFT]},
    }  # fmt: skip
    for name, section in sections.items():
        plain[name] = plain.get(name, {}) | section if isinstance(section, dict) else section
    return recipe_from(plain)


def example(number: int, source: str = "gsm8k", licence: str | None = "MIT") -> Example:
    prompt = Prompt.of([Message(role="user", content=f"{number} + 1?")], gold="1", source=source, licence=licence)
    return Example(prompt=prompt, trace_id=f"t{number}", reasoning="I add.", answer="\\boxed{1}")


EXAMPLES = [example(1), example(2), example(3, "own", "Apache-2.0")]


def steps_of(
    runs: Path, recipe: Recipe, examples: Sequence[Example] = EXAMPLES, selected: Mapping[str, Any] = SELECTED
) -> list[Step]:
    """The train steps of a recipe behind a sealed select run; all but the last are sealed."""
    assert recipe.student is not None
    options = RunOptions(runs=runs, quiet=True)
    select = Step("select", "select", "r", "5" * 16, {}, {}, runs)
    with open_run(select, options) as run:
        write_records(run.path("examples.jsonl"), examples)
        run.seal("d", selected)
    steps: list[Step] = []
    for number, _ in enumerate(recipe.student.phases):
        if steps:
            with open_run(steps[-1], options) as run:
                run.seal("d", {"steps": 7, "last_loss": 0.5, "train_seconds": 9.0})
        upstream = {"examples": select} | ({"model": steps[-1]} if steps else {})
        fields = {} if steps else {"base": {"init": "Qwen/Qwen2.5-0.5B", "root": f"Qwen/Qwen2.5-0.5B@{'c' * 40}"}}
        steps.append(Step("train", f"train:{number}", "r", f"{number}" * 16, fields, upstream, runs, {"phase": number}))
    return steps


@pytest.fixture
def facts(tmp_path: Path) -> Callable[..., CardFacts]:
    """A function from a recipe to what the card of its last phase is made from."""

    def make(
        recipe: Recipe, counts: Mapping[str, Any] = COUNTS, looks: Sequence[Mapping[str, Any]] = (), **of: Any
    ) -> CardFacts:
        return facts_of(recipe, steps_of(tmp_path / "runs", recipe, **of)[-1], counts, looks)

    return make


def header_of(text: str) -> dict[str, Any]:
    """What a hub reads, by its own pattern for the block."""
    repocard = pytest.importorskip("huggingface_hub.repocard")
    found = repocard.REGEX_YAML_BLOCK.search(text)
    assert found is not None
    return dict(yaml.safe_load(found.group(2)))


def sections_of(text: str) -> dict[str, str]:
    """Text below each heading of the second level."""
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


# --- what hubs read -------------------------------------------------------------------------------------------------


def test_the_header_is_what_hubs_read(facts: Callable[..., CardFacts]) -> None:
    text = card(facts(recipe_of(SFT | {"replay": [REPLAY]})))
    assert header_of(text) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "base_model": "Qwen/Qwen2.5-0.5B",
        "datasets": ["openai/gsm8k", "allenai/tulu-3"],
        "tags": ["reasoning", "knowledge-distillation", "distill"],
    }
    from huggingface_hub import ModelCard

    assert ModelCard(text).data.base_model == "Qwen/Qwen2.5-0.5B"


def test_what_is_on_no_hub_is_in_no_header(facts: Callable[..., CardFacts], tiny_model: TinyModel) -> None:
    recipe = recipe_of(
        prompts=[{"name": "own", "file": "own.jsonl", "licence": "MIT"}],
        student={"init": str(tiny_model("llama")), "licence": "MIT"},
    )
    header = header_of(card(facts(recipe, examples=[example(1, "own")])))
    assert header["license"] == "mit" and not {"base_model", "datasets"} & header.keys()


# --- use ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", [None, "", 'Say "hi" in `code`\nand ```stop```'])
@pytest.mark.parametrize("template", ["keep", "r1"])
def test_the_code_in_the_card_sends_what_training_saw(
    facts: Callable[..., CardFacts], tiny_model: TinyModel, tmp_path: Path, system: str | None, template: str
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    recipe = recipe_of(format={"system": system, "template": template, "max_tokens": 60})
    folder = tmp_path / "model"
    tokenizer = load_tokenizer(find_model(str(tiny_model("llama"))))
    set_template(tokenizer, recipe.format)
    AutoModelForCausalLM.from_pretrained(tiny_model("llama")).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_card(folder, facts(recipe))
    use = sections_of((folder / CARD_FILE).read_text(encoding="utf-8"))["Use"]
    fence, program = re.findall(r"^(`{3,})python\n(.*?)\n\1$", use, re.MULTILINE | re.DOTALL)[0]
    assert len(fence) == (4 if system and "```" in system else 3)
    room: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(program.replace("FOLDER", str(folder)), room)

    asked = [Message(role="user", content="What is 17 + 25?\nAnswer in \\boxed{}.")]
    assert room["inputs"]["input_ids"][0].tolist() == encode_prompt(
        tokenizer, render_prompt(tokenizer, asked, recipe.format)
    )
    assert room["written"].shape[1] - room["inputs"]["input_ids"].shape[1] <= 60
    assert ("Send the system message with every conversation" in use) == (system is not None)


def test_a_generated_problem_is_asked_as_it_trained_and_no_prompt_of_the_users_own_is_shown(
    facts: Callable[..., CardFacts],
) -> None:
    gym = {"name": "sums", "reasoning_gym": {"task": "chain_sum", "size": 9}, "licence": "Apache-2.0"}
    made = card(facts(recipe_of(prompts=[gym]), examples=[example(1, "sums"), example(2, "sums")]))
    assert "{'role': 'user', 'content': '1 + 1?'}" in made
    for number in (1, 2, 3):
        assert f"{number} + 1?" not in card(facts(recipe_of()))


def test_the_student_is_asked_as_it_is_evaluated(facts: Callable[..., CardFacts]) -> None:
    def use(**sections: Any) -> str:
        return sections_of(card(facts(recipe_of(**sections))))["Use"]

    evaluate = {"sets": {"own": {"source": {"name": "o", "file": "o.jsonl"}}}, "sampling": {"max_new_tokens": 99}}
    assert "max_new_tokens=4096, do_sample=False" in use()
    assert "max_new_tokens=99, do_sample=False" in use(evaluate=evaluate)
    evaluate["sampling"] = {"max_new_tokens": 99, "temperature": 0.6, "top_p": 0.95}
    assert "max_new_tokens=99, do_sample=True, temperature=0.6, top_p=0.95" in use(evaluate=evaluate)
    assert "rpartition('</think>')" in use() and "rpartition" not in use(select={"reasoning": "none"})


# --- what it says ---------------------------------------------------------------------------------------------------


def test_the_card_says_what_trained_it_and_how(facts: Callable[..., CardFacts]) -> None:
    later = {"kind": "sft", "lr": 1e-6, "replay": [REPLAY], "lora": {"rank": 8}}
    text = card(facts(recipe_of(SFT, later, student={"precision": "fp32"})))
    for line in (
        "[Qwen/Qwen2.5-0.5B](https://huggingface.co/Qwen/Qwen2.5-0.5B) was trained on 3 examples of deepseek-reasoner.",
        "It writes its reasoning, ended by `</think>`, and then its answer.",
        "| gsm8k | `openai/gsm8k` main train | MIT | 2 |",
        "| own | file `own.jsonl` | Apache-2.0 | 1 |",
        "- gsm8k: `'{question}\\n{instruction}'`, where the instruction is `'Answer in \\\\boxed{}.'`",
        "| deepseek-reasoner | not known | openai 2 | MIT | 3 |",
        "- Sampling: temperature 0.6, top_p 1, at most 2,048 tokens.",
        "- Of 5 answers, 3 to 3 prompts were selected.",
        "| wrong | answer did not match the reference | 2 |",
        "| 1 | chats | `allenai/tulu-3` train | ODC-BY | 0.25 |",
        f"- Started from `Qwen/Qwen2.5-0.5B` at commit `{'c' * 40}`.",
        "- Precision: fp32 compute,",
        "| setting | phase 0 | phase 1 |",
        "| `lr` | 2e-05 | 1e-06 |",
        "| `epochs` | 2 | 1 |",
        "| `lora.rank` |  | 8 |",
        "- Low-rank adapters (LoRA) were trained and merged: this is a plain checkpoint.",
        "| optimizer steps | 7 | 92 |",
        "| tokens, prompts included |  | 90,292 |",
        "| supervised tokens |  | 61,234 |",
        "| packing efficiency |  | 0.9731 |",
        "| `replay.chats.documents` |  | 17 |",
        "| loss of the first step, nats a token |  | 1.25 |",
        "| loss of the last step, nats a token | 0.5 | 0.0625 |",
        "Every part states a licence that is known",
        "4,096 tokens, prompt included (1 longer one left out)",
        "The identity of the last phase is `1111111111111111`",
        "phase 1 |\n| --- | --- | --- |\n| loss of the first step",
    ):
        assert line in text, line
    assert "`replay." not in text.partition("| setting |")[2].partition("| counted |")[0]
    assert set(sections_of(text)) == {
        "Use", "Training data", "Training procedure", "Metrics", "Licences", "Limits", "Make it again", "Versions",
    }  # fmt: skip
    assert re.search(r"^distill \S+, .*transformers \d", sections_of(text)["Versions"].strip())


def test_times_and_speeds_are_left_out_so_that_a_resumed_run_has_the_same_card(
    facts: Callable[..., CardFacts],
) -> None:
    timed = COUNTS | {"train_seconds": 1.5, "tokens_per_s": 31.4, "peak_gb": 3.25}
    assert card(facts(recipe_of(), timed)) == card(facts(recipe_of(), COUNTS))


def test_what_the_monitor_measured_is_shown_at_first_last_and_best(facts: Callable[..., CardFacts]) -> None:
    looks = [
        {"step": step, "heldout_loss": {"think": 1.5 - step / 100, "eos": 0.25}, "accuracy": {"gsm8k-test": step / 200},
         "lm_eval": {"arc_easy": {"acc": 0.5}}, "seconds": 12.5, "is_best": step == 50}
        for step in (0, 25, 50, 92)
    ]  # fmt: skip
    stopping = {"metric": "heldout_loss", "patience": 2}
    monitored = {"monitor": {"every_steps": 25, "problems": 16}, "heldout_traces": 1, "early_stopping": stopping}
    text = card(facts(recipe_of(SFT | monitored), looks=looks))
    for line in (
        "| measured in phase 0 | step 0 | step 50 (best) | step 92 |",
        "| `heldout_loss.think` | 1.5 | 1 | 0.58 |",
        "| `heldout_loss.eos` | 0.25 | 0.25 | 0.25 |",
        "| `accuracy.gsm8k-test` | 0.0% | 25.0% | 46.0% |",
        "| `lm_eval.arc_easy.acc` | 0.5 | 0.5 | 0.5 |",
        "Its weights were chosen by heldout_loss in the loop, so that figure above flatters it.",
    ):
        assert line in text, line
    assert "is_best" not in text and "12.5" not in text
    one = card(facts(recipe_of(), looks=looks[:1]))
    assert "| measured in phase 0 | step 0 |\n" in one
    assert "Nothing else was measured while training." in card(facts(recipe_of()))


def test_a_select_run_that_did_not_count_its_teachers_leaves_it_to_the_recipe(
    facts: Callable[..., CardFacts],
) -> None:
    text = card(facts(recipe_of(), selected={}))
    assert "| deepseek-reasoner | not known | openai | MIT | not counted |" in text
    assert "were selected" not in text and "dropped for" not in text


def test_a_pruned_student_of_a_program_says_so(facts: Callable[..., CardFacts]) -> None:
    solved = {"engine": "solver", "model": "", "sampling": {}, "endpoint": {}}
    student = {"prune": {"layers": [0, 1, 3]}, "new_tokens": ["<think>", "a`b"]}
    text = card(facts(recipe_of(teacher=solved, student=student), selected={}))
    assert "a pruned [Qwen/Qwen2.5-0.5B]" in text and "worked solutions that a program wrote" in text
    assert "- Pruned before training: layers 0, 1, 3." in text
    assert "- Tokens added to the vocabulary: `<think>`, <code>a&#96;b</code>." in text
    assert "no language model" in sections_of(text)["Limits"] and "smaller than its base" in text


# --- licences -------------------------------------------------------------------------------------------------------


def test_open_questions_of_licences_are_named_and_contradictions_reported(facts: Callable[..., CardFacts]) -> None:
    replay = [REPLAY | {"licence": "GPL-3.0"}, {"name": "mine", "file": "mine.jsonl"}]
    recipe = recipe_of(SFT | {"replay": replay}, teacher={"licence": "Own | terms"}, student={"licence": "llama3.2"})
    mixed = [example(1, licence="CC BY-SA 4.0"), example(2, licence="CC BY-NC 4.0")]
    text = card(facts(recipe, examples=mixed))
    told = sections_of(text)["Licences"]
    for line in (
        "- replay set mine: no licence is stated; once it is known, say it where this model is published, and"
        " set student.phases.0.replay.1.licence in the recipe of the next one.",
        "- teacher deepseek-reasoner: <code>Own &#124; terms</code> is no licence that hubs have an id for;",
        "- prompt source gsm8k: `cc-by-nc-4.0` forbids commercial use.",
        "- prompt source gsm8k: `CC BY-NC 4.0` and `CC BY-SA 4.0` are stated side by side.",
        "contradict one another: `cc-by-sa-4.0` (prompt source gsm8k), `gpl-3.0` (replay set chats).",
        "- base Qwen/Qwen2.5-0.5B: `llama3.2` asks that this model's name begin with `Llama`.",
        "| replay set mine | **not stated** |",
    ):
        assert line in told, line
    assert header_of(text)["license"] == "unknown" and "Every part states" not in told
    known = card(facts(recipe_of(student={"licence": "llama3.2"}), examples=[example(1, licence="CC BY-SA 4.0")]))
    assert header_of(known)["license"] == "other"


# --- what must not be in it -----------------------------------------------------------------------------------------

EVIL = '"|` </code>\n---\nlicense: mit\n---\n# <script>alert(1)</script> ![x](http://y) [z](http://w)'


def test_no_name_breaks_the_card(facts: Callable[..., CardFacts]) -> None:
    from markdown_it import MarkdownIt

    teachers = [TEACHER | {"model": EVIL, "revision": EVIL, "engine_version": EVIL, "licence": EVIL, "examples": 3}]
    recipe = recipe_of(
        SFT | {"replay": [REPLAY | {"hub": {"id": EVIL, "config": EVIL, "split": EVIL}, "licence": EVIL}]},
        prompts=[{"name": "gsm8k", "hub": {"id": EVIL}, "instruction": EVIL, "template": "{question}{instruction}"}],
        teacher={"model": EVIL, "system": EVIL},
        format={"system": EVIL, "close_marker": EVIL},
        student={"init": EVIL, "licence": EVIL, "new_tokens": [EVIL]},
    )
    counts = COUNTS | {EVIL: EVIL}
    looks = [{"step": 0, EVIL: {EVIL: 0.5}}]
    text = card(facts(recipe, counts, looks, examples=[example(1, licence=EVIL)], selected={"teachers": teachers}))
    assert header_of(text)["license"] == "other"
    assert header_of(text).keys() == {"library_name", "pipeline_tag", "license", "license_name", "tags"}
    body = text.split("\n---\n", 1)[1]
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    inside = [one for token in tokens for one in (token.children or ())]
    assert {token.content for token in inside if token.type == "html_inline"} <= {"<code>", "</code>"}
    assert not {"link_open", "image", "html_block"} & {token.type for token in (*tokens, *inside)}
    headings = [tokens[at + 1].content for at, token in enumerate(tokens) if token.type == "heading_open"]
    assert headings == [
        "r1-tiny", "Use", "Training data", "Prompts", "Teacher", "Selection", "Replay", "Training procedure", "Metrics",
        "Licences", "Limits", "Make it again", "Versions",
    ]  # fmt: skip


def test_folders_addresses_and_keys_are_not_told(
    facts: Callable[..., CardFacts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("OUR_KEY", "sk-secret")
    recipe = recipe_of(
        SFT | {"replay": [{"name": "mine", "file": "/home/ada lovelace/chats.jsonl"}]},
        teacher={"engine": "transformers", "model": "/home/ada lovelace/r1", "endpoint": {}},
        format={"template": "/home/ada lovelace/chat.jinja"},
        student={"init": "/home/ada lovelace/base.gguf"},
        prompts=[
            {"name": "own", "file": "/home/ada lovelace/own.jsonl", "verifier": {"file": "/home/ada lovelace/v.py"}}
        ],
    )
    local = SELECTED | {"teachers": [TEACHER | {"model": "/home/ada lovelace/r1", "examples": 3}]}
    counts = COUNTS | {"started_from": "/home/ada lovelace/base.gguf"}
    text = card(facts(recipe, counts, examples=[example(1, "own")], selected=local))
    for private in ("lovelace", "/home", "inside.example", "OUR_KEY", "secret", str(tmp_path)):
        assert private not in text, private
    for name in ("`base.gguf`", "file `chats.jsonl`", "file `own.jsonl`", "| r1 |", "chat.jinja", "v.py"):
        assert name in text, name


def test_the_recipe_in_the_card_trains_the_same_student(facts: Callable[..., CardFacts]) -> None:
    stopping = {"metric": "accuracy", "patience": 2}
    monitored = {"monitor": {"sets": ["test"]}, "early_stopping": stopping, "replay": [REPLAY]}
    source = {"name": "test", "hub": {"id": "openai/gsm8k", "split": "test"}}
    recipe = recipe_of(SFT | monitored, evaluate={"sets": {"test": {"source": source}}}, format={"max_tokens": 99})
    text = sections_of(card(facts(recipe)))["Make it again"]
    again = recipe_from(yaml.safe_load(text.partition("```yaml\n")[2].partition("\n```")[0]))
    assert again.student == recipe.student and again.format == recipe.format and again.select == recipe.select
    assert again.teacher and recipe.teacher and again.teacher.sampling == recipe.teacher.sampling
    assert again.prompts[0] == recipe.prompts[0]


# --- the file -------------------------------------------------------------------------------------------------------


def test_the_card_takes_the_place_of_another_and_leaves_nothing_beside_it(
    facts: Callable[..., CardFacts], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / CARD_FILE).write_text("of the base")
    found = facts(recipe_of())
    write_card(folder, found)
    assert [path.name for path in folder.iterdir()] == [CARD_FILE]
    assert (folder / CARD_FILE).read_text(encoding="utf-8") == card(found)
    json.dumps(header_of(card(found)))
