"""Adapters: what trains, what a merge gives, what is refused, and a whole train stage with them."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from distill.config import Lora, Recipe, SftPhase, recipe_from
from distill.documents import Documents
from distill.errors import ModelError
from distill.interrupts import Stop
from distill.models import find_model, load_config, load_model
from distill.records import Example, Message, Prompt, digest_json, write_records
from distill.runs import RunOptions, SealedRun, Step, open_run, open_sealed
from distill.students import train
from distill.students.adapters import check_adapters, merged, with_adapters
from distill.students.loop import Trainer
from distill.students.objective import PackTensors, StudentObjective
from distill.students.packing import lay_out

Live = Callable[..., Any]
MakeDocuments = Callable[..., Documents]
MakePhase = Callable[..., SftPhase]
TinyModel = Callable[[str], Path]

LENGTHS, PROMPTS = [9, 14, 5, 6, 20, 12, 7, 11, 16, 8], [3, 1, 4, 2, 11, 6, 2, 5, 8, 4]
VOCABULARY = ["lm_head", "embed_tokens"]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture
def documents(make_documents: MakeDocuments) -> Documents:
    return make_documents(LENGTHS, PROMPTS)


def adapted(live: Live, lora: Lora, family: str = "llama", seed: int = 0, **given: Any) -> Any:
    return with_adapters(live(family, tie_word_embeddings=not lora.modules_to_save, **given), lora, seed)


def trained(model: Any, documents: Documents, phase: SftPhase, work: Path, precision: str = "fp32") -> Trainer:
    work.mkdir(exist_ok=True)
    trainer = Trainer(model, documents, phase, precision, work)
    list(trainer.run(Stop()))
    return trainer


# --- what trains ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_all_linear_is_every_projection_of_every_layer_and_nothing_else(live: Live, family: str) -> None:
    model = adapted(live, Lora(rank=4), family)
    training = {name for name, p in model.named_parameters() if p.requires_grad}
    layer = "base_model.model.model.layers.{}.{}.{}.lora_{}.default.weight"
    part = {name: "self_attn" if name in PROJECTIONS[:4] else "mlp" for name in PROJECTIONS}
    assert training == {layer.format(i, part[name], name, ab) for i in (0, 1) for name in PROJECTIONS for ab in "AB"}


def test_an_adapter_starts_as_nothing_and_from_its_seed(live: Live) -> None:
    ids = torch.arange(3, 30)[None]
    plain = live(attention="sdpa")
    with torch.no_grad():
        before = plain(ids).logits
        one, same, other = (adapted(live, Lora(rank=4), seed=seed, attention="sdpa") for seed in (1, 1, 2))
        assert torch.equal(one(ids).logits, before)
    drawn = [{n: p for n, p in model.named_parameters() if "lora_A" in n} for model in (one, same, other)]
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    assert not any(torch.equal(drawn[0][name], drawn[2][name]) for name in drawn[0])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("saved", [[], VOCABULARY, ["norm"]], ids=["adapters", "vocabulary too", "norms too"])
def test_training_changes_adapters_and_what_is_saved_beside_them_only(
    live: Live, documents: Documents, phase: MakePhase, tmp_path: Path, saved: list[str], precision: str
) -> None:
    lora = Lora(rank=4, modules_to_save=saved)
    model = adapted(live, lora)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    training = {name for name, p in model.named_parameters() if p.requires_grad}
    assert sum("modules_to_save" in name for name in training) == {"": 0, "l": 2, "n": 5}["".join(saved)[:1]]
    trainer = trained(model, documents, phase(lora=lora, lr=0.01, epochs=2), tmp_path / "work", precision)
    assert set(trainer.weights.names) == training
    state = trainer.weights.state()
    for name, p in model.named_parameters():
        if name in training:
            assert not torch.equal(state[name], before[name]), name
        else:
            assert torch.equal(p, before[name].to(p.dtype)), name


def test_gradients_are_those_of_the_adapted_weights_by_the_chain_rule(
    live: Live, documents: Documents, phase: MakePhase
) -> None:
    """W + (alpha / rank) B A: so d A = scale * B^T dW and d B = scale * dW A^T, with dW of the merged plain model."""
    lora = Lora(rank=4, alpha=6.0)
    model = adapted(live, lora, dtype="float64")
    randomised(model)
    pack = PackTensors.of(lay_out(documents, range(len(documents))), "cpu")
    StudentObjective(model, phase())(pack).total.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    factors = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    plain = model.merge_and_unload().requires_grad_(True)
    plain.zero_grad()
    StudentObjective(plain, phase())(pack).total.backward()
    for name, parameter in plain.named_parameters():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.default.weight" in found:
            a, b = (factors[f"{stem}.lora_{ab}.default.weight"] for ab in "AB")
            for ab, expected in (("A", 1.5 * b.T @ parameter.grad), ("B", 1.5 * parameter.grad @ a.T)):
                gradient = found.pop(f"{stem}.lora_{ab}.default.weight")
                assert float((gradient - expected).abs().max()) < 1e-8, name
    assert not found


def randomised(model: Any) -> Any:
    """Adapters that matter: B is zero at the start."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(0.05 * torch.randn(p.shape, generator=generator))
    return model


def test_recomputing_activations_changes_no_gradient_of_an_adapter(
    live: Live, documents: Documents, phase: MakePhase
) -> None:
    """The embedding is frozen, so nothing that enters the first layer asks for a gradient."""
    pack = PackTensors.of(lay_out(documents, range(len(documents))), "cpu")
    found = []
    for checkpointed in (False, True):
        model = randomised(adapted(live, Lora(rank=4))).train()
        if checkpointed:
            model.activation_checkpointing_enable()
        StudentObjective(model, phase())(pack).total.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(gradient is not None and gradient.any() for gradient in found[0])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_end_token_learns_from_where_it_is_read_where_a_trained_copy_of_the_embedding_pads_with_it(
    live: Live, make_documents: MakeDocuments, phase: MakePhase, tmp_path: Path
) -> None:
    documents = make_documents([12], [6])
    documents.ids(0)[2] = 0  # the pad token of the tiny models, in the prompt: read, never predicted
    lora = Lora(rank=2, modules_to_save=VOCABULARY)
    model = adapted(live, lora)
    before = model.get_input_embeddings().weight.detach().clone()
    trained(model, documents, phase(lora=lora), tmp_path / "work")
    moved = (model.get_input_embeddings().weight.detach() != before).any(-1)
    assert set(moved.nonzero().flatten().tolist()) == set(documents.ids(0)[:-1].tolist())


def trained_until(trainer: Trainer, reports: int) -> None:
    running: Iterator[Any] = trainer.run(Stop())
    for _ in range(reports):
        next(running)
    running.close()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("saved", [[], VOCABULARY], ids=["adapters", "vocabulary too"])
def test_a_resumed_training_of_adapters_is_bit_equal(
    live: Live, documents: Documents, phase: MakePhase, tmp_path: Path, precision: str, saved: list[str]
) -> None:
    lora = Lora(rank=4, dropout=0.2, modules_to_save=saved)
    chosen = phase(lora=lora, epochs=4, checkpoint_every_steps=3, ema_decay=0.8, neftune_alpha=5.0)
    whole = trained(adapted(live, lora), documents, chosen, tmp_path / "whole", precision)
    (tmp_path / "killed").mkdir()
    trained_until(Trainer(adapted(live, lora), documents, chosen, precision, tmp_path / "killed"), 5)
    # adapters of another seed: everything that trains comes from the checkpoint
    again = Trainer(adapted(live, lora, seed=9), documents, chosen, precision, tmp_path / "killed")
    assert again.resumed_from == 3
    list(again.run(Stop()))
    ours, theirs = again.weights.state(), whole.weights.state()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    checkpoint = torch.load(next((tmp_path / "killed").glob("*.pt")), weights_only=True)
    assert checkpoint["weights"].keys() == theirs.keys(), "the base is not in it"


# --- merging --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved", [[], VOCABULARY, ["norm"]], ids=["adapters", "vocabulary too", "norms too"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_merged_student_has_the_logits_of_the_adapted_one(
    live: Live, documents: Documents, phase: MakePhase, tmp_path: Path, family: str, saved: list[str]
) -> None:
    lora = Lora(rank=4, alpha=12, modules_to_save=saved)
    model = adapted(live, lora, family)
    trainer = trained(model, documents, phase(lora=lora, lr=0.01, epochs=3), tmp_path / "work")
    base = live(family, attention="sdpa", tie_word_embeddings=not saved)
    plain = merged(base, lora, trainer.weights.state(), seed=5)
    assert type(plain) is type(base) and not any("lora" in name for name, _ in plain.named_parameters())
    assert [name for name, _ in plain.named_parameters()] == [
        name for name, _ in live(family, tie_word_embeddings=not saved).named_parameters()
    ]
    model.eval().set_attn_implementation("sdpa")
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        ours, theirs = plain(ids).logits, model(ids).logits
        untouched = live(family, attention="sdpa", tie_word_embeddings=not saved)(ids).logits
    assert float((ours - theirs).abs().max()) < 3e-6 * float(theirs.abs().max())
    assert float((untouched - theirs).abs().max()) > 0.1


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens", "model.embed_tokens"])
def test_adapters_on_head_or_embedding_are_refused(name: str) -> None:
    with pytest.raises(ValidationError, match=f"targets: {name} is refused: .* name it in modules_to_save"):
        Lora(targets=["q_proj", name])
    Lora(targets=["q_proj", "v_proj"], modules_to_save=[name])


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens", "model.embed_tokens"])
def test_a_trained_copy_of_one_end_of_tied_weights_is_refused(tiny_model: TinyModel, name: str) -> None:
    config = load_config(find_model(str(tiny_model("llama"))))
    assert config.tie_word_embeddings
    with pytest.raises(ModelError, match=rf"modules_to_save: {name} shares its weights .*remove lora"):
        check_adapters(config, Lora(modules_to_save=[name]))
    check_adapters(config, Lora(modules_to_save=["norm"]))
    check_adapters(config, None)
    config.tie_word_embeddings = False
    check_adapters(config, Lora(modules_to_save=[name]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"targets": ["nope"]}, r"lora\.targets: no module of this model is called 'nope'; its layers have .*q_proj"),
        ({"targets": ["q_proj", "proj"]}, r"lora\.targets: no module of this model is called 'proj'"),
        ({"modules_to_save": ["head"]}, r"lora\.modules_to_save: no module of this model is called 'head'"),
        ({"targets": ["norm"]}, r"lora\.targets \['norm'\]: Target module .* is not supported"),
    ],
)
def test_names_that_fit_no_module_are_refused(live: Live, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        with_adapters(live(), Lora(**given), 0)


# --- the whole stage (helpers as in test_train.py) ------------------------------------------------------------------


def example(a: int, b: int) -> Example:
    prompt = Prompt.of([Message(role="user", content=f"{a} + {b}?")], gold=str(a + b))
    return Example(
        prompt=prompt, trace_id=prompt.prompt_id, reasoning=f"{a} + {b} = {a + b}", answer=f"\\boxed{{{a + b}}}"
    )


EXAMPLES = [example(a, b) for a in (1, 20, 33) for b in (4, 17, 58, 70)]


def stage(runs: Path, recipe: Recipe) -> SealedRun:
    """Train the only phase of a recipe; its sealed run."""
    options = RunOptions(runs=runs, device="cpu", threads=1, quiet=True)
    digest = digest_json([one.model_dump(mode="json") for one in EXAMPLES])
    select = Step("select", "select", "r", digest[:16], {}, {}, runs)
    with open_run(select, options) as run:
        write_records(run.path("examples.jsonl"), EXAMPLES)
        run.seal(digest, {})
    assert recipe.student is not None
    fields = recipe.student.phases[0].model_dump(mode="json")
    step = Step(
        "train", "train:0", "r", digest_json(fields)[:16], fields, {"examples": select}, runs, {"phase": 0, "sets": {}}
    )
    train.preflight(recipe, step, options)
    train.run(recipe, step, options)
    return open_sealed(step.folder)


def recipe_with(init: Path, lora: dict[str, Any], precision: str = "bf16", **more: Any) -> Recipe:
    phase = {
        "kind": "sft", "lr": 0.02, "step_tokens": 256, "micro_batch_tokens": 128, "epochs": 4, "lora": lora, **more
    }  # fmt: skip
    return recipe_from(
        {
            "name": "r",
            "prompts": [{"name": "sums", "file": "sums.jsonl"}],
            "teacher": {"engine": "solver"},
            "format": {"max_tokens": 256},
            "student": {"init": str(init), "phases": [phase], "precision": precision},
        }
    )


OUTSIDER = """
import json, sys
import transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert not any(name.split(".")[0] in ("peft", "distill") for name in sys.modules)
print(json.dumps({"class": type(model).__name__, "dtype": str(model.dtype),
                  "names": [name for name, _ in model.named_parameters()]}))
"""


@pytest.mark.slow
def test_a_student_trained_with_adapters_is_a_plain_checkpoint(tiny_model: TinyModel, tmp_path: Path) -> None:
    base = tiny_model("qwen3")
    more = {"gradient_checkpointing": True, "neftune_alpha": 1.0, "ema_decay": 0.5}
    result = stage(tmp_path / "runs", recipe_with(base, {"rank": 8, "dropout": 0.1}, **more))
    folder = result.path("model")
    said = subprocess.run(
        [sys.executable, "-I", "-W", "ignore", "-c", OUTSIDER, str(folder)],
        capture_output=True, text=True, check=True, env={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}, cwd=tmp_path,
    )  # fmt: skip
    seen = json.loads(said.stdout)
    assert (seen["class"], seen["dtype"]) == ("Qwen3ForCausalLM", "torch.bfloat16")
    before, after = load_model(find_model(str(base))), load_model(find_model(str(folder)))
    assert seen["names"] == [name for name, _ in before.named_parameters()]
    assert not list(folder.glob("adapter*"))
    assert "lora" not in "".join(path.read_text() for path in folder.glob("*.json")).lower()
    for (name, a), b in zip(before.named_parameters(), after.parameters(), strict=True):
        assert torch.equal(a.bfloat16(), b.bfloat16()) is not name.endswith("_proj.weight"), name
    rows = [json.loads(line) for line in result.path("metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.95 * rows[0]["loss"]


def test_the_saved_student_is_the_one_that_trained(tiny_model: TinyModel, tmp_path: Path) -> None:
    """The last look at the adapted model and the first at what was saved of it see the same held-out loss."""
    more = {"monitor": {"every_steps": 100}, "heldout_traces": 3}
    first = stage(tmp_path / "runs", recipe_with(tiny_model("llama"), {"rank": 8}, "fp32", **more))
    again = stage(tmp_path / "more", recipe_with(first.path("model"), {"rank": 8}, "fp32", max_steps=1, **more))
    before, after = (result.counts["looks"] for result in (first, again))
    assert after["first"]["heldout_loss"] == pytest.approx(before["last"]["heldout_loss"], abs=1e-5)
    assert before["last"]["heldout_loss"] < before["first"]["heldout_loss"] - 0.1


def test_a_stage_refuses_a_trained_copy_of_tied_weights_before_any_work(tiny_model: TinyModel, tmp_path: Path) -> None:
    chosen = recipe_with(tiny_model("llama"), {"modules_to_save": ["lm_head"]})
    with pytest.raises(ModelError, match="shares its weights"):
        stage(tmp_path / "runs", chosen)
    assert not list((tmp_path / "runs").glob("train*"))
