"""The training loop: the arithmetic of a step, what bf16 must not lose, and going on after any kill."""

import json
import math
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from distill.config import SftPhase
from distill.errors import Interrupted, TrainingError
from distill.interrupts import Stop
from distill.models import PER_DOCUMENT, find_model, load_model
from distill.students.checkpoint import checkpoints, load_newest, save_checkpoint
from distill.students.data import Documents
from distill.students.loop import Masters, StepReport, Trainer, boundaries, learning_rate, pack_loss, write_metrics
from distill.students.packing import lay_out

Live = Callable[..., Any]
MakeDocuments = Callable[..., Documents]
MakePhase = Callable[..., SftPhase]

LENGTHS, PROMPTS = [9, 14, 5, 6, 20, 12, 7, 11, 16, 8], [3, 1, 4, 2, 11, 6, 2, 5, 8, 4]


@pytest.fixture
def documents(make_documents: MakeDocuments) -> Documents:
    return make_documents(LENGTHS, PROMPTS)


def weights_of(trainer: Trainer) -> list[Any]:
    return [weight.clone() for weight in trainer.masters.state()]


def optimizer_of(trainer: Trainer) -> list[Any]:
    state = trainer.optimizer.state_dict()["state"]
    return [tensor for index in sorted(state) for _, tensor in sorted(state[index].items())]


def equal(ours: list[Any], theirs: list[Any]) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs))


# --- learning rate --------------------------------------------------------------------------------------------------


def test_the_learning_rate_by_hand() -> None:
    # 8 steps, a quarter of them warm-up: 2 steps of 0.5 and 1 times the peak, then 6 steps from 1 to the floor of 0.1
    cosine = SftPhase(kind="sft", lr=2.0, warmup_ratio=0.25, min_lr_ratio=0.1)
    falling = [2 * (0.1 + 0.9 * (1 + math.cos(math.pi * k / 6)) / 2) for k in range(6)]
    assert [learning_rate(cosine, step, 8) for step in range(8)] == pytest.approx([1.0, 2.0, *falling])
    assert learning_rate(cosine, 5, 8) == pytest.approx(2 * (0.1 + 0.9 / 2)), "half way down after half of the steps"
    linear = cosine.model_copy(update={"schedule": "linear"})
    expected = [1.0, 2.0, 2.0, 1.7, 1.4, 1.1, 0.8, 0.5]
    assert [learning_rate(linear, step, 8) for step in range(8)] == pytest.approx(expected)
    constant = cosine.model_copy(update={"schedule": "constant"})
    assert [learning_rate(constant, step, 8) for step in range(8)] == [1.0] + [2.0] * 7


def test_warm_up_rounds_up_but_not_beyond_a_whole_number_of_steps() -> None:
    def first_at_peak(ratio: float, total: int) -> int:
        phase = SftPhase(kind="sft", lr=1.0, warmup_ratio=ratio, schedule="constant")
        return next(step for step in range(total) if learning_rate(phase, step, total) == 1.0)

    assert first_at_peak(0, 10) == 0
    assert first_at_peak(0.05, 10) == 0, "one step of warm-up is a step at the peak"
    assert first_at_peak(0.11, 10) == 1
    assert first_at_peak(0.07, 100) == 6, "0.07 * 100 is 7.000000000000001 in floating point"


# --- one step -------------------------------------------------------------------------------------------------------


def plain_steps(model: Any, documents: Documents, phase: SftPhase, plan: list[list[int]]) -> list[tuple[float, float]]:
    """The same training as anyone would write it: one document at a time, torch's own loss, clipping and AdamW."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": phase.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=phase.lr, betas=(phase.beta1, phase.beta2), fused=False, foreach=False)
    model.get_input_embeddings().padding_idx = None
    reports = []
    for step, chosen in enumerate(plan):
        total = sum(documents.supervised[index] for index in chosen)
        loss = 0.0
        for index in chosen:
            tokens = torch.from_numpy(documents.ids[index]).long()
            labels = tokens.clone()
            labels[: documents.prompt_tokens[index]] = -100
            logits = model(tokens[None], use_cache=False).logits[0, :-1]
            part = F.cross_entropy(logits, labels[1:], reduction="sum") / total
            part.backward()
            loss += part.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), phase.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(phase, step, len(plan))
        optimizer.step()
        optimizer.zero_grad()
        reports.append((loss, float(norm)))
    return reports


@pytest.mark.parametrize("clip", [0.05, 1e9], ids=["clipped", "not clipped"])
@pytest.mark.parametrize("micro", [1, 32, 64])
def test_training_is_what_a_plain_pytorch_loop_does(
    live: Live, documents: Documents, phase: MakePhase, tmp_path: Path, micro: int, clip: float
) -> None:
    chosen = phase(micro_batch_tokens=micro, grad_clip=clip, weight_decay=0.1, epochs=2, warmup_ratio=0.3)
    trainer = Trainer(live("qwen3"), documents, chosen, "fp32", tmp_path)
    reports = list(trainer.run(Stop()))
    reference = live("qwen3", attention="sdpa")
    expected = plain_steps(reference, documents, chosen, trainer.plan)
    assert len(reports) == len(trainer.plan) >= 4
    assert [r.loss for r in reports] == pytest.approx([loss for loss, _ in expected], rel=1e-4)
    assert [r.grad_norm for r in reports] == pytest.approx([norm for _, norm in expected], rel=1e-3)
    for (name, ours), theirs in zip(trainer.model.named_parameters(), reference.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-4), name
    moved = max(float((a - b).detach().abs().max()) for a, b in zip(live("qwen3").parameters(), reference.parameters()))
    assert moved > 3e-3, "the comparison is of weights that moved"


def test_a_report_counts_what_its_step_trained_on(
    live: Live, documents: Documents, phase: MakePhase, tmp_path: Path
) -> None:
    trainer = Trainer(live(), documents, phase(epochs=1.5), "fp32", tmp_path)
    reports = list(trainer.run(Stop()))
    assert [r.step for r in reports] == list(range(1, len(trainer.plan) + 1))
    for report, chosen in zip(reports, trainer.plan, strict=True):
        assert report.tokens == sum(LENGTHS[i] for i in chosen) <= 64
        assert report.supervised == sum(LENGTHS[i] - PROMPTS[i] for i in chosen)
        assert 1 <= report.packs <= len(chosen) and report.seconds > 0
        assert report.lr == learning_rate(trainer.phase, report.step - 1, len(trainer.plan))


def test_the_end_token_learns_from_where_it_is_read_even_if_it_pads(
    live: Live, make_documents: MakeDocuments, phase: MakePhase, tmp_path: Path
) -> None:
    documents = make_documents([12], [6])
    documents.ids[0][2] = 0  # the pad token of the tiny models, in the prompt: read, never predicted
    model = live(tie_word_embeddings=False)
    assert model.get_input_embeddings().padding_idx == 0, "transformers asks torch to keep this row's gradient at zero"
    before = model.get_input_embeddings().weight.detach().clone()
    list(Trainer(model, documents, phase(), "fp32", tmp_path).run(Stop()))
    moved = (model.get_input_embeddings().weight.detach() != before).any(-1)
    assert set(np.flatnonzero(moved.numpy())) == set(documents.ids[0][:-1].tolist())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_gradient_checkpointing_changes_no_gradient(live: Live, make_documents: MakeDocuments, family: str) -> None:
    made = make_documents([9, 14, 5], [3, 1, 4])
    pack = lay_out(made.ids, made.prompt_tokens, [0, 1, 2])
    found = []
    for checkpointed in (False, True):
        model = live(family).train()
        if checkpointed:
            model.activation_checkpointing_enable()
        masters = Masters(model, torch.bfloat16)
        pack_loss(model, pack).backward()
        found.append([p.grad for p in masters.params])
    assert equal(*found)


def test_flash_attention_is_given_the_same_boundaries_as_tensors(live: Live) -> None:
    model = live()
    assert boundaries(model, [0, 5, 12]) == {"cu_seq_lens_q": [0, 5, 12]}
    model.config._attn_implementation = "flash_attention_2"
    given = boundaries(model, [0, 5, 12])
    assert given.keys() == {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
    assert given["cu_seq_lens_q"].tolist() == given["cu_seq_lens_k"].tolist() == [0, 5, 12]
    assert given["cu_seq_lens_q"].dtype == torch.int32
    assert given["max_length_q"] == given["max_length_k"] == 7


# --- bf16 with fp32 masters -----------------------------------------------------------------------------------------


def nudged(weight: Any, steps: int) -> None:
    """AdamW with a gradient of one and a rate of 1e-4: each step takes 1e-4 off every weight."""
    optimizer = torch.optim.AdamW([weight], lr=1e-4, weight_decay=0.0)
    for _ in range(steps):
        weight.grad = torch.ones_like(weight)
        optimizer.step()


def test_updates_below_the_resolution_of_bf16_add_up_in_the_masters() -> None:
    model = torch.nn.Linear(3, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    masters = Masters(model, torch.bfloat16)
    nudged(masters.params[0], 60)
    masters.publish()
    assert model.weight.dtype == torch.bfloat16
    assert masters.params[0].detach().flatten().tolist() == pytest.approx([1 - 60e-4] * 3, abs=1e-6)
    # bf16 has 8 bits: below 1 its numbers are 1/256 = 0.0039 apart
    assert model.weight.detach().flatten().tolist() == [1 - 2 / 256] * 3


def test_plain_bf16_weights_lose_the_same_updates() -> None:
    weight = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    nudged(weight, 60)
    assert weight.tolist() == [1.0] * 3


def test_gradients_of_micro_batches_add_up_in_fp32() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    masters = Masters(model, torch.bfloat16)
    # 1 + 600 times 2**-10: in bf16 every addition to 1 would be lost
    for size in [1.0] + [2.0**-10] * 600:
        (model(torch.ones(1, 1, dtype=torch.bfloat16)) * size).sum().backward()
    assert masters.params[0].grad.item() == 1 + 600 * 2.0**-10
    assert model.weight.grad is None
    plain = torch.nn.Linear(1, 1, bias=False).bfloat16()
    for size in [1.0] + [2.0**-10] * 600:
        (plain(torch.ones(1, 1, dtype=torch.bfloat16)) * size).sum().backward()
    assert plain.weight.grad.item() == 1


def test_the_mean_over_tokens_is_taken_in_fp32_and_clipped_there() -> None:
    model = torch.nn.Linear(2, 1, bias=False)
    masters = Masters(model, torch.bfloat16)
    masters.params[0].grad = torch.tensor([[3.0, 4.0]])
    assert masters.average(300, clip=1.0) == pytest.approx(5 / 300)
    assert masters.params[0].grad.tolist()[0] == pytest.approx([3 / 300, 4 / 300], rel=1e-7)
    masters.params[0].grad = torch.tensor([[300.0, 400.0]])
    assert masters.average(10, clip=2.0) == pytest.approx(50)
    assert masters.params[0].grad.tolist()[0] == pytest.approx([1.2, 1.6], rel=1e-5)
    assert abs(torch.tensor(1 / 300, dtype=torch.bfloat16).item() * 300 - 1) > 1e-3, "what bf16 would make of 1/300"


def test_tied_weights_stay_one_parameter_with_one_master(live: Live) -> None:
    model = live()
    masters = Masters(model, torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(masters.params) == len({id(p) for p in model.parameters()}) == len(list(model.parameters()))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_model_that_trains_is_bit_for_bit_the_model_that_will_be_loaded(
    live: Live, tmp_path: Path, family: str
) -> None:
    """Above all its rotary frequencies, which `model.to(bfloat16)` would round: other angles at position 400."""
    model = live(family)
    rounded = live(family).to(torch.bfloat16)
    Masters(model, torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = load_model(find_model(str(tmp_path)), "bfloat16", "cpu", PER_DOCUMENT)
    ids = torch.randint(3, 512, (1, 500), generator=torch.Generator().manual_seed(0))
    bounds = {"cu_seq_lens_q": [0, 500], "use_cache": False}
    with torch.no_grad():
        ours, theirs, wrong = (m(ids, **bounds).logits for m in (model, loaded, rounded))
    assert torch.equal(ours, theirs)
    assert float((ours - wrong).abs().max()) > 0.1, "the check sees rounded frequencies"


# --- checkpoints ----------------------------------------------------------------------------------------------------


def trained_until(trainer: Trainer, reports: int) -> Trainer:
    """Take so many reports and then forget the generator, as a kill between two steps would."""
    running: Iterator[StepReport] = trainer.run(Stop())
    for _ in range(reports):
        next(running)
    return trainer


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("changes", [{}, {"attention_dropout": 0.3}], ids=["as it is", "with dropout"])
def test_training_killed_after_any_step_ends_in_equal_weights_and_optimizer_state(
    live: Live, documents: Documents, phase: MakePhase, tmp_path: Path, precision: str, changes: dict[str, Any]
) -> None:
    chosen = phase(epochs=4, checkpoint_every_steps=2)
    whole = Trainer(live(**changes), documents, chosen, precision, tmp_path / "whole")
    (tmp_path / "whole").mkdir()
    losses = [report.loss for report in whole.run(Stop())]
    assert len(losses) == 8
    for killed in (1, 2, 5, 8):
        work = tmp_path / f"killed-{killed}"
        work.mkdir()
        trained_until(Trainer(live(**changes), documents, chosen, precision, work), killed)
        # a model that differs shows that the checkpoint holds everything; before the first one there is the base only
        seed = 1 if killed > 2 else 7
        again = Trainer(live(seed=seed, **changes), documents, chosen, precision, work)
        assert again.resumed_from == (killed - 1) // 2 * 2, "the newest checkpoint that was written"
        resumed = [report.loss for report in again.run(Stop())]
        assert resumed == losses[again.resumed_from :]
        assert equal(weights_of(again), weights_of(whole))
        assert equal(optimizer_of(again), optimizer_of(whole)) and optimizer_of(whole)
        assert equal(list(again.model.parameters()), list(whole.model.parameters()))


def stopped_at(trainer: Trainer, step: int) -> None:
    stop = Stop()
    with pytest.raises(Interrupted):
        for report in trainer.run(stop):
            if report.step == step:
                stop.signum = signal.SIGTERM
    assert report.step == step


@pytest.mark.parametrize("step", [1, 3, 8])
def test_a_stop_request_checkpoints_at_once_and_costs_no_step(
    live: Live, documents: Documents, phase: MakePhase, tmp_path: Path, step: int
) -> None:
    chosen = phase(epochs=4, checkpoint_every_steps=100)
    (tmp_path / "whole").mkdir()
    (tmp_path / "stopped").mkdir()
    whole = trained_until(Trainer(live(), documents, chosen, "bf16", tmp_path / "whole"), 8)
    stopped_at(Trainer(live(), documents, chosen, "bf16", tmp_path / "stopped"), step)
    again = Trainer(live(seed=1), documents, chosen, "bf16", tmp_path / "stopped")
    assert again.resumed_from == step
    assert len(list(again.run(Stop()))) == 8 - step
    assert equal(weights_of(again), weights_of(whole))


def test_a_checkpoint_of_other_data_is_refused(
    live: Live, documents: Documents, phase: MakePhase, tmp_path: Path
) -> None:
    stopped_at(Trainer(live(), documents, phase(epochs=2), "fp32", tmp_path), 2)
    other = documents._replace(ids=[*documents.ids[:-1], documents.ids[-1] ^ 1])
    with pytest.raises(TrainingError, match=r"checkpoint-00000002\.pt: was written for another data .* delete "):
        Trainer(live(), other, phase(epochs=2), "fp32", tmp_path)
    with pytest.raises(TrainingError, match="was written for another steps"):
        Trainer(live(), documents, phase(epochs=1), "fp32", tmp_path)


def test_the_two_newest_checkpoints_are_kept_and_unfinished_ones_do_not_count(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        save_checkpoint(tmp_path, step, {"data": "d", "weights": [torch.full((2,), float(step))]})
    (tmp_path / "checkpoint-00000008.pt.part").write_bytes(b"half")
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-00000004.pt", "checkpoint-00000006.pt"]
    state = load_newest(tmp_path, {"data": "d"})
    assert state and state["step"] == 6 and state["weights"][0].tolist() == [6, 6]
    assert load_newest(tmp_path / "none", {}) is None


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], share: float
) -> None:
    for step in (2, 4):
        save_checkpoint(tmp_path, step, {"data": "d", "weights": [torch.full((1000,), float(step))]})
    older, newer = checkpoints(tmp_path)
    newer.write_bytes(newer.read_bytes()[: int(share * newer.stat().st_size)])
    state = load_newest(tmp_path, {"data": "d"})
    assert state and state["step"] == 2
    assert "checkpoint-00000004.pt: damaged, passed over" in capsys.readouterr().err
    older.write_bytes(b"")
    with pytest.raises(TrainingError, match="no checkpoint can be read; delete the folder"):
        load_newest(tmp_path, {"data": "d"})


def test_a_loss_that_is_not_finite_stops_with_the_documents_saved(
    live: Live, documents: Documents, phase: MakePhase, tmp_path: Path
) -> None:
    chosen = phase(epochs=1, micro_batch_tokens=16)
    trainer = Trainer(live(), documents, chosen, "bf16", tmp_path)
    assert len(trainer.plan) >= 2
    bad = trainer.plan[1][0]
    poisoned = 511
    documents.ids[bad][:] = poisoned
    for index in set(range(len(LENGTHS))) - {bad}:
        documents.ids[index][documents.ids[index] == poisoned] = 3
    with torch.no_grad():  # an embedding that only the bad document reads; the head is tied, so only just too large
        trainer.masters.params[0][poisoned] = float("nan")
    trainer.masters.publish()
    running = trainer.run(Stop())
    with pytest.raises(TrainingError, match=r"not finite; the documents are in .*bad-step-1\.json; lower student"):
        next(running)
    saved = json.loads((tmp_path / "bad-step-1.json").read_text())["documents"]
    assert saved == [documents.ids[index].tolist() for index in trainer.plan[0]]
    assert not checkpoints(tmp_path)


def test_only_the_step_with_the_bad_document_is_refused(
    live: Live, documents: Documents, phase: MakePhase, tmp_path: Path
) -> None:
    model = live(tie_word_embeddings=False)
    trainer = Trainer(model, documents, phase(epochs=1), "fp32", tmp_path)
    bad, poisoned = trainer.plan[1][0], 511
    for index, ids in enumerate(documents.ids):
        ids[ids == poisoned] = 3
        ids[0] = poisoned if index == bad else ids[0]
    with torch.no_grad():
        model.get_input_embeddings().weight[poisoned] = float("inf")
    running = trainer.run(Stop())
    assert math.isfinite(next(running).loss)
    before = weights_of(trainer)
    with pytest.raises(TrainingError, match="step 2: loss nan"):
        next(running)
    assert equal(weights_of(trainer), before), "nothing was learnt from it"
    saved = json.loads((tmp_path / "bad-step-2.json").read_text())["documents"]
    assert documents.ids[bad].tolist() in saved


# --- metrics --------------------------------------------------------------------------------------------------------


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_each_step_is_in_the_metrics_once_wherever_training_was_killed(
    live: Live, documents: Documents, phase: MakePhase, tmp_path: Path
) -> None:
    chosen = phase(epochs=3, checkpoint_every_steps=2)
    for killed in range(1, 6):
        for after_its_checkpoint in (False, True):
            work = tmp_path / f"{killed}-{after_its_checkpoint}"
            work.mkdir()
            metrics = work / "metrics.jsonl"
            trainer = Trainer(live(), documents, chosen, "fp32", work)
            append = write_metrics(metrics, trainer.resumed_from)
            running = trainer.run(Stop())
            for _ in range(killed):
                append(next(running)._asdict())
            if after_its_checkpoint:
                next(running, None)  # the checkpoint of the last step, and a step that nobody reported
            with metrics.open("a") as out:
                out.write('{"step": 99, "lo')  # a line torn by the kill
            again = Trainer(live(), documents, chosen, "fp32", work)
            append = write_metrics(metrics, again.resumed_from)
            for report in again.run(Stop()):
                append(report._asdict())
            assert steps_in(metrics) == list(range(1, len(again.plan) + 1))


def test_metrics_are_never_cut_in_place(tmp_path: Path) -> None:
    """A kill while old lines are dropped must not lose the ones before them."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 6)))
    before = path.stat().st_ino
    with path.open() as held:
        write_metrics(path, 3)
        assert len(held.read().splitlines()) == 5, "the old file was replaced as a whole"
    assert path.stat().st_ino != before and steps_in(path) == [1, 2, 3]
