"""Where targets come from: every document meets its own rows, whatever the order, the packing, or a resume."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill.config import KdPhase, LossWeights, OnPolicyPhase
from distill.documents import Documents
from distill.errors import DataError, TrainingError
from distill.format import PROMPT
from distill.interrupts import Stop
from distill.logprobs import Facts, LogprobCache, Rows, document_key, empty_rows, write_manifest, write_shard
from distill.students.distillation import Drawn, Head
from distill.students.distributed import World
from distill.students.loop import Trainer, cut
from distill.students.objective import Lesson, PackTensors, mix_of
from distill.students.on_policy import Guard, Rollouts, document_of, prompt_of
from distill.students.taid import TeacherShare
from distill.students.tutors import CachedTutor, TutorInMemory, chosen_rows
from distill.students.writers import writer_of

Live = Callable[..., Any]
MakeDocuments = Callable[..., Documents]
VOCABULARY = 512


def kd(**changes: Any) -> KdPhase:
    return KdPhase(**({"kind": "kd", "lr": 1e-3, "step_tokens": 64, "micro_batch_tokens": 32} | changes))


def rollouts_of(phase: OnPolicyPhase, vocabulary: int = VOCABULARY) -> Rollouts:
    """As the train stage makes them, for models of 512 tokens and places."""
    return Rollouts(phase, writer_of(phase, 0, vocabulary, 512), Guard.of(phase), 512)


def telling(documents: Documents, index: int, facts: Facts) -> Rows:
    """Rows that say which document and token they are about: all mass on the token that stands there."""
    targets = documents.ids(index)[documents.segments(index) != PROMPT].astype(np.int64)
    rows = empty_rows(len(targets), facts.k)
    if facts.k:
        return rows._replace(
            head_ids=targets[:, None], head_log_p=np.full((len(targets), 1), -1e-4, np.float32),
            tail_log_p=np.full(len(targets), np.log(1e-4), np.float32),
        )  # fmt: skip
    ones = np.ones(len(targets), np.int64)
    return rows._replace(sizes=ones, ids=targets, counts=facts.draws * ones)


def telling_cache(folder: Path, documents: Documents, form: Any = "topk") -> LogprobCache:
    facts = Facts(form, 1 if form == "topk" else 0, 0 if form == "topk" else 5, 1.0, 0, VOCABULARY, "t" * 64)
    folder.mkdir()
    order = np.random.default_rng(3).permutation(len(documents))
    paths = []
    for number, some in enumerate(np.array_split(order, 3)):
        paths.append(folder / f"shard-{number:05d}.safetensors")
        write_shard(paths[-1], [(document_key(documents.ids(i)), telling(documents, i, facts)) for i in some], facts)
    write_manifest(folder, facts, paths, {"name": "telling"})
    return LogprobCache(folder)


class Watched:
    """A tutor that compares what it gives with the tokens it is about."""

    def __init__(self, tutor: CachedTutor) -> None:
        self.tutor = tutor
        self.rows = 0

    def lesson(self, documents: Documents, pack: Any, tensors: PackTensors) -> Lesson:
        lesson = self.tutor.lesson(documents, pack, tensors)
        known = lesson.targets.chunk(0, len(tensors.targets_N)).at(0, len(tensors.targets_N))
        named = known.ids_NK[:, 0] if isinstance(known, Head) else known.id_E  # type: ignore[union-attr]
        assert isinstance(known, Head | Drawn) and torch.equal(named, tensors.targets_N)
        self.rows += len(named)
        return lesson


@pytest.mark.parametrize("form", ["topk", "sampled"])
@pytest.mark.parametrize("batching", ["packed", "bucketed"])
@pytest.mark.parametrize("weights", [{}, {"think": 0.0}, {"answer": 0.0, "eos": 2.0}], ids=str)
def test_shuffled_packed_accumulated_and_resumed_every_document_meets_its_own_rows(
    form: str, batching: str, weights: dict[str, float], live: Live, make_documents: MakeDocuments, tmp_path: Path
) -> None:
    documents = make_documents([9, 13, 5, 6, 14, 8, 11, 7, 10, 12], [3, 1, 2, 2, 6, 4, 5, 3, 1, 6])
    watched = Watched(CachedTutor([telling_cache(tmp_path / "cache", documents, form)], [1.0]))
    phase = kd(epochs=2, batching=batching, loss_weights=LossWeights(**weights), checkpoint_every_steps=1)
    (tmp_path / "work").mkdir()
    trainer = Trainer(live(), documents, phase, "fp32", tmp_path / "work", tutor=watched)
    assert len(trainer.plan) > 3
    steps = trainer.run(Stop())
    for _ in range(2):
        next(steps)
    steps.close()
    resumed = Trainer(live(), documents, phase, "fp32", tmp_path / "work", tutor=watched)
    assert 0 < resumed.resumed_from < len(resumed.plan)
    list(resumed.run(Stop()))
    assert watched.rows > 0


def test_rows_shifted_by_one_would_be_noticed(live: Live, make_documents: MakeDocuments, tmp_path: Path) -> None:
    """A negative control: the loss of a model on its own distribution jumps when rows are shifted."""
    documents, model = make_documents([30, 25], [5, 4]), live()
    phase = kd(step_tokens=200, micro_batch_tokens=200)
    tutor = TutorInMemory([live()], [1.0], VOCABULARY, 1.0)
    trainer = Trainer(model, documents, phase, "fp32", tmp_path, tutor=tutor)
    pack = cut([0, 1], documents, phase)[0]
    tensors = PackTensors.of(pack, "cpu")
    lesson = tutor.lesson(documents, pack, tensors)
    trainer.objective.mix = mix_of(phase, 1.0)
    own = float(trainer.objective(tensors, lesson).total.detach())
    hidden = lesson.targets.hidden_NH.roll(1, 0)  # type: ignore[attr-defined]
    shifted = Lesson(lesson.targets._replace(hidden_NH=hidden))  # type: ignore[attr-defined]
    assert abs(own) < 1e-3 < 1 < float(trainer.objective(tensors, shifted).total.detach())
    warmer = Lesson(lesson.targets._replace(temperature=2.0))  # type: ignore[attr-defined]
    assert float(trainer.objective(tensors, warmer).total.detach()) > 1


def test_some_rows_of_a_ragged_set_keep_their_draws() -> None:
    sizes = np.array([2, 0, 3, 1])
    rows = empty_rows(4)._replace(sizes=sizes, ids=np.arange(6), counts=np.arange(6) + 1)
    some = chosen_rows(rows, np.array([0, 3]))
    assert some.sizes.tolist() == [2, 1] and some.ids.tolist() == [0, 1, 5] and some.counts.tolist() == [1, 2, 6]
    assert chosen_rows(rows, np.arange(4)) is rows


@pytest.mark.parametrize(("form", "draws"), [("sampled", 1), ("sampled", 50), ("hybrid", 1), ("hybrid", 50)])
def test_the_noise_of_drawn_gradients_shrinks_as_their_number_grows(
    form: Any, draws: int, live: Live, make_documents: MakeDocuments
) -> None:
    """On its own distribution the mean gradient over 64 independent caches is an eighth of one cache's."""
    from distill.students.distillation import Mix, distillation_loss
    from distill.students.divergences import forward_kl
    from distill.students.tutors import cached_targets
    from distill.teachers.distributions import kept, uniforms

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(16, 8, generator=generator).requires_grad_()
    head = torch.randn(40, 8, generator=generator)
    log_p = (hidden.detach() @ head.T).log_softmax(-1)
    facts = Facts(form, 4 if form == "hybrid" else 0, draws, 1.0, 0, 40, "t" * 64)
    cache: Any = type("Cache", (), {"facts": facts})
    gradients = []
    for number in range(64 * 8):
        rows = kept(log_p, uniforms(number, b"d" * 16, 16, draws), facts)
        targets = cached_targets(rows, cache, "bucket", "cpu")
        zeros = torch.zeros(16, dtype=torch.int64)
        loss = distillation_loss(hidden, head, zeros, torch.ones(16), targets, Mix(forward_kl)).total
        gradients.append(torch.autograd.grad(loss, hidden)[0])
    each = torch.stack(gradients)
    alone = float(each.flatten(1).norm(dim=1).square().mean().sqrt())
    of_64 = float(each.view(8, 64, -1).mean(1).norm(dim=1).square().mean().sqrt())
    assert of_64 / alone == pytest.approx(1 / 8, rel=0.2)


# --- on-policy ------------------------------------------------------------------------------------------------------


def test_guards_look_at_windows_of_answers() -> None:
    guard = Guard(window=4, min_stop_rate=0.5, max_growth=2.0)
    guard.take([10, 10], [True, False])
    assert guard.last == {}, "the window is not full"
    guard.take([10, 10], [True, True])
    assert guard.last == {"stop_rate": 0.75, "mean_tokens": 10.0} and guard.first_mean == 10
    copy = Guard(4, 0.5, 2.0)
    copy.load(guard.state())
    assert copy == guard
    guard.take([19] * 4, [True] * 4)
    with pytest.raises(TrainingError, match="have grown from 10 to 21 tokens"):
        guard.take([21] * 4, [True] * 4)
    with pytest.raises(TrainingError, match="training has made it so"):
        copy.take([9] * 4, [False] * 4)
    with pytest.raises(TrainingError, match="needs an sft phase"):
        Guard(2, 0.9, 2.0).take([9, 9], [True, False])


def test_a_written_answer_is_supervised_up_to_its_own_end() -> None:
    ended, cut_off = document_of([1, 2], [5, 6, 7], True), document_of([1, 2], [5, 6, 7], False)
    assert ended.ids == cut_off.ids == [1, 2, 5, 6, 7]
    assert list(ended.segments) == [0, 0, 2, 2, 3] and list(cut_off.segments) == [0, 0, 2, 2, 2]


@pytest.mark.parametrize("fraction", [0.25, 1.0])
def test_answers_do_not_depend_on_how_many_processes_write_them(
    fraction: float, live: Live, make_documents: MakeDocuments
) -> None:
    documents, model = make_documents([20, 15, 18, 12], [6, 4, 5, 3]), live(attention="sdpa")
    given = {"kind": "on_policy", "on_policy_fraction": fraction, "max_new_tokens": 6, "batch_size": 2}
    phase = OnPolicyPhase(**given)

    class Several:
        """A world whose processes are called one after the other."""

        def __init__(self, size: int) -> None:
            self.size = size

        def share(self, cuts: Any) -> Any:
            return cuts

        def gathered(self, mine: Any) -> Any:
            return [{k: v for k, v in mine.items() if k % self.size == rank} for rank in range(self.size)]

    found = []
    for size in (1, 2):
        rollouts = rollouts_of(phase)
        made, chosen = rollouts.documents(model, documents, [0, 1, 2, 3], 7, Several(size))  # type: ignore[arg-type]
        assert chosen == [0, 1, 2, 3]
        found.append([made.ids(index).tolist() for index in chosen])
    assert found[0] == found[1]
    prompts = {tuple(prompt_of(documents, index)) for index in range(4)}
    assert {next(tuple(ids[:n]) for n in range(9) if tuple(ids[:n]) in prompts) for ids in found[0]} == prompts
    kept = [ids for ids in found[0] if ids in [documents.ids(index).tolist() for index in range(4)]]
    assert len(kept) == 4 - round(4 * fraction)


def test_the_share_of_own_answers_holds_on_average_in_steps_of_one_document(make_documents: MakeDocuments) -> None:
    documents = make_documents([20], [6])
    phase = OnPolicyPhase(kind="on_policy", on_policy_fraction=0.3)
    rollouts = rollouts_of(phase)
    own = sum(len(rollouts._own(documents, [0], step)) for step in range(1000))
    assert 250 < own < 350
    assert rollouts._own(documents, [0, 0, 0], 5) == rollouts._own(documents, [0, 0, 0], 5)


def test_the_student_draws_no_token_that_the_teachers_do_not_know(live: Live, make_documents: MakeDocuments) -> None:
    """Padding rows of a head are ordinary columns to generation; here they would win every draw."""
    documents = make_documents([20, 15], [6, 4], vocabulary=400)
    model = live(attention="sdpa", tie_word_embeddings=False)
    with torch.no_grad():
        model.get_output_embeddings().weight[400:] *= 50
    phase = OnPolicyPhase(kind="on_policy", max_new_tokens=8)
    drawn = []
    for vocabulary in (400, 512):
        rollouts = rollouts_of(phase.model_copy(update={"guard_window": 99}), vocabulary)
        made, chosen = rollouts.documents(model, documents, [0, 1], 0, World())
        drawn.append(max(int(made.ids(index).max()) for index in chosen))
    assert drawn[0] < 400 <= drawn[1]


def test_unknown_tokens_are_refused(make_documents: MakeDocuments) -> None:
    from distill.students.tutors import require_known

    with pytest.raises(DataError, match="mean the same to student"):
        require_known(make_documents([9], [3]), 2)


# --- resume ---------------------------------------------------------------------------------------------------------


def made_trainer(kind: str, live: Live, documents: Documents, work: Path) -> Trainer:
    """A trainer of each kind of distillation, always the same."""
    work.mkdir(exist_ok=True)
    student, teacher = live(), live(seed=3)
    common = {"lr": 1e-3, "step_tokens": 64, "micro_batch_tokens": 32, "epochs": 2, "checkpoint_every_steps": 1}
    match = None
    phase: KdPhase
    if kind == "on_policy":
        phase = OnPolicyPhase(
            kind="on_policy", max_new_tokens=5, batch_size=2, min_stop_rate=0, on_policy_fraction=0.5, **common
        )
        rollouts = rollouts_of(phase)
    else:
        adaptive = {"taid_schedule": "adaptive", "taid_rate": 0.5, "taid_momentum": 0.5}
        given = {
            "taid": {"divergence": "taid"},
            "adaptive": {"divergence": "taid", **adaptive},
            "hidden": {"hidden": {"weight": 0.5}},
        }[kind]
        phase, rollouts = KdPhase(kind="kd", teacher="memory", **common, **given), None  # type: ignore[arg-type]
    if phase.hidden:
        from distill.students.hidden import attach

        match = attach(phase.hidden, student, teacher)
    tutor = TutorInMemory([teacher], [1.0], VOCABULARY, 1.0, match=match)
    return Trainer(student, documents, phase, "fp32", work, tutor=tutor, rollouts=rollouts)


@pytest.mark.parametrize("kind", ["on_policy", "taid", "adaptive", "hidden"])
def test_a_stopped_distillation_goes_on_bit_for_bit(
    kind: str, live: Live, make_documents: MakeDocuments, tmp_path: Path
) -> None:
    documents = make_documents([20, 15, 18, 12, 9, 16], [6, 4, 5, 3, 2, 6])
    whole = made_trainer(kind, live, documents, tmp_path / "whole")
    losses = [report.loss for report in whole.run(Stop())]  # type: ignore[union-attr]
    part = made_trainer(kind, live, documents, tmp_path / "part")
    steps = part.run(Stop())
    first = [next(steps).loss for _ in range(2)]  # type: ignore[union-attr]
    steps.close()
    rest = made_trainer(kind, live, documents, tmp_path / "part")
    assert 0 < rest.resumed_from < len(rest.plan)
    second = [report.loss for report in rest.run(Stop())]  # type: ignore[union-attr]
    assert first[: rest.resumed_from] + second == losses
    ours, theirs = (dict(one.model.state_dict()) for one in (rest, whole))
    assert ours.keys() == theirs.keys() and not any("hidden_match" in name for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert rest.share == whole.share


def test_the_target_of_taid_moves_from_the_student_to_the_teacher() -> None:
    phase = kd(divergence="taid", taid_start=0.2)
    share = TeacherShare(phase, 5)
    assert [share.at(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    log_p, log_q = torch.randn(1, 9).log_softmax(-1), torch.randn(1, 9).log_softmax(-1)
    at = [float(mix_of(phase, share.at(step)).measure(log_p, log_q).value_N[0]) for step in (0, 2, 4)]
    assert at[0] < at[1] < at[2] == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum()), rel=1e-5)
