"""The prune stage: what is measured, what is cut, and that the result is a plain checkpoint of its family."""

import copy
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distill.config import Prune, Recipe, recipe_from
from distill.engines.transformers import end_ids
from distill.errors import ModelError, TrainingError
from distill.models import find_model, load_model, load_tokenizer
from distill.records import Example, Message, Prompt, digest_json, write_records
from distill.runs import RunOptions, SealedRun, Step, file_digest, open_run, open_sealed
from distill.students import prune

Live = Callable[..., Any]
TinyModel = Callable[[str], Path]
FAMILIES = ("llama", "qwen2", "qwen3")
LAYERS = 5


@pytest.fixture
def deep(live: Live) -> Live:
    """A function that makes a live float64 model of five layers with plain causal attention."""

    def make(family: str = "llama", dtype: str = "float64", **changes: Any) -> Any:
        shape = {"num_hidden_layers": LAYERS} | ({} if family == "llama" else {"layer_types": None})
        return live(family, dtype, attention="sdpa", **(shape | changes))

    return make


@pytest.fixture(scope="module")
def documents() -> list[prune.Ids]:
    """Random documents of unlike lengths, one longer than a chunk of logits."""
    rng = np.random.default_rng(3)
    return [rng.integers(0, 400, size=length).astype(np.int32) for length in (7, 2, 19, prune.CHUNK_ROWS + 30)]


@torch.no_grad()
def logits(model: Any, ids: Sequence[int] | prune.Ids) -> Tensor:
    """Logits [1, T, V] by the model's own forward, as anyone calls it."""
    return model(input_ids=torch.as_tensor(ids, dtype=torch.long)[None]).logits


def rebuilt(model: Any, state: Mapping[str, Tensor], **changes: Any) -> Any:
    """A new model of a changed configuration, filled with `state`: made by transformers, not by us."""
    config = type(model.config)(**(model.config.to_dict() | changes))
    config._attn_implementation = "sdpa"
    new = type(model)(config).to(model.dtype).eval()
    new.load_state_dict(dict(state), strict=True)
    return new


def with_layers(model: Any, keep: Sequence[int]) -> Any:
    """A new model that has only these layers, by renaming the weights."""
    state = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith("model.layers."):
            state[name] = tensor
            continue
        number, rest = name.removeprefix("model.layers.").split(".", 1)
        if int(number) in keep:
            state[f"model.layers.{keep.index(int(number))}.{rest}"] = tensor
    types = {"layer_types": ["full_attention"] * len(keep)} if hasattr(model.config, "layer_types") else {}
    return rebuilt(model, state, num_hidden_layers=len(keep), **types)


@torch.no_grad()
def make_idle(layer: Any) -> None:
    """Let a layer add nothing."""
    layer.self_attn.o_proj.weight.zero_()
    layer.mlp.down_proj.weight.zero_()


# --- measuring ------------------------------------------------------------------------------------------------------


def loss_by_transformers(model: Any, documents: Iterable[prune.Ids]) -> float:
    """Mean loss a token as transformers' own `labels` give it."""
    total, tokens = 0.0, 0
    for ids in documents:
        ids_1T = torch.as_tensor(ids, dtype=torch.long)[None]
        with torch.no_grad():
            total += float(model(input_ids=ids_1T, labels=ids_1T).loss) * (len(ids) - 1)
        tokens += len(ids) - 1
    return total / tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_transformers(deep: Live, documents: list[prune.Ids], family: str) -> None:
    model = deep(family, num_hidden_layers=2)
    # transformers takes its loss in float32, whatever the model
    assert prune.mean_loss(model, documents) == pytest.approx(loss_by_transformers(model, documents), rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_block_influence_is_one_minus_the_cosine_of_what_transformers_records(
    deep: Live, documents: list[prune.Ids], family: str
) -> None:
    model = deep(family)
    expected = np.zeros(LAYERS)
    bare = copy.deepcopy(model)
    bare.model.norm = nn.Identity()  # transformers records the last layer's output after the norm
    for ids in documents:
        with torch.no_grad():
            said = bare.model(torch.as_tensor(ids, dtype=torch.long)[None], output_hidden_states=True)
        states = [state[0].numpy() for state in said.hidden_states]
        for layer, (before, after) in enumerate(zip(states, states[1:])):
            lengths = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
            expected[layer] += (1 - (before * after).sum(axis=1) / lengths).sum()
    expected /= sum(len(ids) for ids in documents)
    ranking = prune.layer_importance(model, documents, "block_influence")
    np.testing.assert_allclose(ranking.scores, expected, rtol=1e-10)
    assert ranking.order == np.argsort(expected).tolist()
    assert len(set(ranking.order)) == LAYERS and min(expected) > 0.01


def test_removal_by_perplexity_is_greedy_and_measured_anew_each_time(deep: Live, documents: list[prune.Ids]) -> None:
    model, left, losses = deep("qwen3", "float32"), list(range(LAYERS)), []
    first: list[float] = []
    for _ in range(2):
        rests = {one: with_layers(model, [other for other in left if other != one]) for one in left}
        tried = {one: loss_by_transformers(rest, documents) for one, rest in rests.items()}
        first = first or list(tried.values())
        left.remove(min(tried, key=tried.__getitem__))
        losses.append(min(tried.values()))
    base = loss_by_transformers(model, documents)
    ranking = prune.layer_importance(model, documents, "perplexity", 2)
    assert ranking.order == [one for one in ranking.order if one not in left] and len(ranking.order) == 2
    assert ranking.losses == pytest.approx([base, *losses], rel=1e-5)
    assert ranking.scores == pytest.approx([loss - base for loss in first], abs=1e-5)


def test_without_a_number_all_layers_but_one_are_ranked(deep: Live, documents: list[prune.Ids]) -> None:
    ranking = prune.layer_importance(deep("llama", num_hidden_layers=3), documents, "perplexity")
    assert len(set(ranking.order)) == 2 and len(ranking.losses) == 3


@pytest.mark.parametrize("how", ["block_influence", "perplexity"])
def test_measuring_leaves_the_model_as_it_was(deep: Live, documents: list[prune.Ids], how: prune.Importance) -> None:
    model = deep("qwen2")
    before, layers = logits(model, documents[2]), list(model.model.layers)
    prune.layer_importance(model, documents, how, 2)
    prune.unit_importance(model, documents)
    assert list(model.model.layers) == layers
    assert logits(model, documents[2]).equal(before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_layer_stands_in_for_itself_again_after_an_error(deep: Live) -> None:
    model = deep()
    layers = list(model.model.layers)
    with pytest.raises(RuntimeError, match="in the middle"), prune.bypassed(model, [0, 3]):
        assert [a is b for a, b in zip(layers, model.model.layers, strict=True)] == [False, True, True, False, True]
        raise RuntimeError("in the middle")
    assert list(model.model.layers) == layers


@pytest.mark.parametrize("how", ["block_influence", "perplexity"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_that_does_nothing_goes_first_and_is_not_missed(deep: Live, family: str, how: prune.Importance) -> None:
    model = deep(family)
    make_idle(model.model.layers[3])
    own_text = [written(model, [5, 6, 7]), written(model, [300])]  # so that the loss is lowest with all layers
    ranking = prune.layer_importance(model, own_text, how, 1)
    assert ranking.order[0] == 3 and abs(ranking.scores[3]) < 1e-12
    assert all(score > 1e-3 for layer, score in enumerate(ranking.scores) if layer != 3)
    before = logits(model, own_text[0])
    prune.drop_layers(model, [0, 1, 2, 4])
    assert logits(model, own_text[0]).equal(before)
    prune.drop_layers(model, [0, 1, 2])
    assert not logits(model, own_text[0]).allclose(before)


# --- dropping layers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [[0, 2, 3], [4], [4, 1]])
@pytest.mark.parametrize("family", FAMILIES)
def test_dropping_layers_leaves_a_model_of_the_others_in_their_order(deep: Live, family: str, keep: list[int]) -> None:
    model = deep(family)
    expected = with_layers(model, sorted(keep))
    model(torch.tensor([[1, 2]]), output_hidden_states=True)  # transformers installs its recorders on the layers
    prune.drop_layers(model, keep)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        got, wanted = (one(ids, output_hidden_states=True) for one in (model, expected))
    assert got.logits.equal(wanted.logits)
    assert len(got.hidden_states) == len(keep) + 1
    assert model.config.num_hidden_layers == len(keep)
    assert getattr(model.config, "layer_types", None) == getattr(expected.config, "layer_types", None)
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == list(range(len(keep)))
    assert written(model, [3, 4, 5]).tolist() == written(expected, [3, 4, 5]).tolist()


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_layers_with_a_sliding_window_keep_it(deep: Live, family: str, tmp_path: Path) -> None:
    window = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 3, "num_hidden_layers": 6}
    model, ids = deep(family, "float32", **window), np.arange(3, 40, dtype=np.int32)
    with prune.bypassed(model, [1, 3]):
        expected = logits(model, ids)
    prune.drop_layers(model, [0, 2, 4, 5])
    assert model.config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    assert model.config.max_window_layers == 2
    assert logits(model, ids).equal(expected)
    assert logits(reloaded(model, tmp_path / "mixed"), ids).equal(expected)
    prune.drop_layers(model, [0, 1])
    assert not model.model.has_sliding_layers and model.config.max_window_layers == 2
    assert logits(reloaded(model, tmp_path / "full"), ids).equal(logits(model, ids))


# --- narrowing feed-forwards ----------------------------------------------------------------------------------------


def mlp_outputs(model: Any, layer: int, documents: Iterable[prune.Ids]) -> np.ndarray[Any, Any]:
    """What a layer's feed-forward gives, all tokens of all documents under one another."""
    seen: list[Tensor] = []
    hook = model.model.layers[layer].mlp.register_forward_hook(lambda mlp, inputs, output: seen.append(output[0]))
    for ids in documents:
        logits(model, ids)
    hook.remove()
    return torch.cat(seen).numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_units_score_is_the_error_of_dropping_it_alone(deep: Live, documents: list[prune.Ids], family: str) -> None:
    model, documents = deep(family, num_hidden_layers=2), documents[:3]
    scores = prune.unit_importance(model, documents)
    assert [one.shape for one in scores] == [(128,)] * 2
    for layer, unit in ((0, 0), (0, 77), (1, 127)):
        whole = mlp_outputs(model, layer, documents)
        cut = copy.deepcopy(model)
        with torch.no_grad():
            cut.model.layers[layer].mlp.down_proj.weight[:, unit] = 0
        error = np.linalg.norm(whole - mlp_outputs(cut, layer, documents))
        assert float(scores[layer][unit]) == pytest.approx(error, rel=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_dead_units_go_first_and_are_not_missed(deep: Live, documents: list[prune.Ids], family: str) -> None:
    model = deep(family, num_hidden_layers=2)
    dead = {0: [3, 50, 127], 1: [0, 1, 64]}
    with torch.no_grad():
        for layer, units in dead.items():
            mlp = model.model.layers[layer].mlp
            mlp.down_proj.weight[:, units[0]] = 0  # nobody reads it
            mlp.up_proj.weight[units[1]] = 0  # it never says anything
            mlp.gate_proj.weight[units[2]] = 0  # its gate is shut: silu(0) = 0
    expected = logits(model, documents[3])
    narrowed = prune.narrow_mlps(model, 125, documents[:3])
    assert [sorted(set(range(128)) - set(one.kept)) for one in narrowed] == list(dead.values())
    assert [one.mass for one in narrowed] == pytest.approx([1, 1], abs=1e-12)
    torch.testing.assert_close(logits(model, documents[3]), expected, rtol=0, atol=1e-12)
    prune.narrow_mlps(model, 124, documents[:3])
    assert (logits(model, documents[3]) - expected).abs().max() > 1e-6


@pytest.mark.parametrize(("family", "more"), [("llama", {"mlp_bias": True}), ("qwen2", {}), ("qwen3", {})])
def test_narrowing_keeps_the_highest_scores_and_slices_by_hand_alike(
    deep: Live, documents: list[prune.Ids], family: str, more: dict[str, Any]
) -> None:
    model, width = deep(family, num_hidden_layers=2, **more), 40
    scores = [one.numpy() for one in prune.unit_importance(model, documents)]
    state = dict(model.state_dict())
    chosen = [sorted(np.argsort(one)[-width:].tolist()) for one in scores]
    for layer, units in enumerate(chosen):
        at = f"model.layers.{layer}.mlp"
        for name in (f"{at}.gate_proj.weight", f"{at}.up_proj.weight", f"{at}.gate_proj.bias", f"{at}.up_proj.bias"):
            if name in state:
                state[name] = state[name][units]
        state[f"{at}.down_proj.weight"] = state[f"{at}.down_proj.weight"][:, units]
    expected = rebuilt(model, state, intermediate_size=width)
    narrowed = prune.narrow_mlps(model, width, documents)
    assert [one.kept for one in narrowed] == chosen
    shares = [one[units].sum() / one.sum() for one, units in zip(scores, chosen, strict=True)]
    assert [one.mass for one in narrowed] == pytest.approx(shares, rel=1e-12)
    assert all(0.3 < share < 0.9 for share in shares)
    assert logits(model, documents[3]).equal(logits(expected, documents[3]))
    assert model.config.intermediate_size == width
    mlp = model.model.layers[1].mlp
    assert (mlp.up_proj.out_features, mlp.down_proj.in_features, mlp.intermediate_size) == (width, width, width)
    assert str(mlp) == str(expected.model.layers[1].mlp)


def test_of_equal_units_the_first_stay(deep: Live, documents: list[prune.Ids]) -> None:
    model = deep(num_hidden_layers=1)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.zero_()
    assert prune.narrow_mlps(model, 3, documents[:1]) == [prune.Narrowed([0, 1, 2], 1.0)]


# --- a plain checkpoint ---------------------------------------------------------------------------------------------


def reloaded(model: Any, folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()


def written(model: Any, prompt: Sequence[int], use_cache: bool = True, tokens: int = 12) -> prune.Ids:
    """The prompt and what the model writes after it, greedily."""
    said = model.generate(
        torch.tensor([prompt]), do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens, use_cache=use_cache
    )
    return np.asarray(said[0], dtype=np.int32)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_model_loads_as_a_plain_checkpoint_bit_for_bit(
    deep: Live, documents: list[prune.Ids], tmp_path: Path, family: str, tied: bool
) -> None:
    model = deep(family, "float32", tie_word_embeddings=tied)
    prune.cut(model, documents[:3], Prune(layers=3, mlp_width=56))
    again = reloaded(model, tmp_path / "model")
    assert type(again) is type(model) and again.config.num_hidden_layers == 3 and again.config.intermediate_size == 56
    assert again.state_dict().keys() == model.state_dict().keys()
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert logits(again, documents[3]).equal(logits(model, documents[3]))
    answer = written(again, [3, 4, 5]).tolist()
    assert answer == written(model, [3, 4, 5]).tolist() == written(again, [3, 4, 5], use_cache=False).tolist()


def test_a_cut_model_can_be_trained(deep: Live, documents: list[prune.Ids]) -> None:
    model = deep("qwen2", "float32")
    prune.cut(model, documents[:3], Prune(layers=3, mlp_width=56))
    ids = torch.as_tensor(documents[2], dtype=torch.long)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None and parameter.requires_grad for parameter in model.parameters())


# --- the stage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [{"layers": 3}, {"layers": 2, "importance": "perplexity"}, {"mlp_width": 50}, {"layers": 5, "mlp_width": 50},
     {"layers": [0, 4], "mlp_width": 50}, {"layers": 4, "mlp_width": 128}],
)  # fmt: skip
def test_progress_knows_how_much_will_be_read(deep: Live, documents: list[prune.Ids], given: dict[str, Any]) -> None:
    seen: list[int] = []
    prune.cut(deep(dtype="float32"), documents[:3], Prune(**given), advance=seen.append)
    assert sum(seen) == prune.forward_passes(Prune(**given), LAYERS, 128) * sum(len(ids) for ids in documents[:3])


def test_layers_are_cut_before_units_are_ranked(deep: Live, documents: list[prune.Ids]) -> None:
    model = deep("qwen3")
    apart = with_layers(model, [1, 2, 4])
    _, importance = prune.cut(model, documents[:3], Prune(layers=[4, 2, 1], mlp_width=30))
    narrowed = prune.narrow_mlps(apart, 30, documents[:3])
    assert logits(model, documents[3]).equal(logits(apart, documents[3]))
    assert importance["layers"] == {"how": "given", "kept": [1, 2, 4], "dropped": [0, 3]}
    assert importance["mlp"]["layers"] == [
        {"layer": layer, "kept_units": 30, "mass": one.mass} for layer, one in zip([1, 2, 4], narrowed, strict=True)
    ]


def test_a_damaged_base_is_refused(deep: Live, documents: list[prune.Ids]) -> None:
    model = deep()
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(ModelError, match=r"^base: its loss on the traces is nan; are its weights whole\?"):
        prune.cut(model, documents[:1], Prune(layers=2), "base")


def example(a: int, b: int) -> Example:
    prompt = Prompt.of([Message(role="user", content=f"{a} + {b}?")], gold=str(a + b))
    return Example(
        prompt=prompt, trace_id=prompt.prompt_id, reasoning=f"{a} + {b} = {a + b}", answer=f"\\boxed{{{a + b}}}"
    )


EXAMPLES = [example(a, b) for a in (1, 20, 33) for b in (4, 17, 58, 70)]


class Lab:
    """A run store, its options, and the prune step of a recipe in it."""

    def __init__(self, runs: Path) -> None:
        self.options = RunOptions(runs=runs, device="cpu", threads=1, quiet=True)

    def step(self, recipe: Recipe, examples: list[Example] = EXAMPLES) -> Step:
        """The step, after a sealed select run where something is measured."""
        assert recipe.student and recipe.student.prune
        fields = recipe.student.prune.model_dump(mode="json")
        upstream = {"examples": self.examples(examples)} if recipe.student.prune.measured else {}
        identity = digest_json([fields, *(one.identity for one in upstream.values())])[:16]
        return Step("prune", "prune", "r", identity, fields, upstream, self.options.runs)

    def examples(self, examples: list[Example]) -> Step:
        digest = digest_json([one.model_dump(mode="json") for one in examples])
        step = Step("select", "select", "r", digest[:16], {}, {}, self.options.runs)
        if not step.sealed:
            with open_run(step, self.options) as run:
                write_records(run.path("examples.jsonl"), examples)
                run.seal(digest, {})
        return step

    def prune(self, recipe: Recipe, examples: list[Example] = EXAMPLES) -> SealedRun:
        step = self.step(recipe, examples)
        prune.preflight(recipe, step, self.options)
        prune.run(recipe, step, self.options)
        return open_sealed(step.folder)


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path / "runs")


@pytest.fixture(scope="module")
def base(live: Live, tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of five layers, stored in bf16, whose advice on sampling transformers refuses to save."""
    folder = tmp_path_factory.mktemp("base")
    model = live("qwen3", attention="sdpa", num_hidden_layers=LAYERS, layer_types=None).to(torch.bfloat16)
    model.generation_config.eos_token_id = [2, 0]
    model.save_pretrained(folder)
    load_tokenizer(find_model(str(tiny_model("qwen3")))).save_pretrained(folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.6, "do_sample": False}))
    return folder


def recipe(init: Path, format: Mapping[str, Any] | None = None, **given: Any) -> Recipe:
    return recipe_from(
        {
            "name": "r",
            "prompts": [{"name": "sums", "file": "sums.jsonl"}],
            "teacher": {"engine": "solver"},
            "format": {"max_tokens": 256} | dict(format or {}),
            "student": {"init": str(init), "prune": given},
        }
    )


def ids_of(tokenizer: Any, one: Example) -> list[int]:
    """A document by hand, as the tiny models' template has it."""
    asked = f"<|im_start|>user\n{one.prompt.text}<|im_end|>\n<|im_start|>assistant\n"
    said = f"<think>\n{one.reasoning}\n</think>\n\n{one.answer}"
    return [*tokenizer(asked)["input_ids"], *tokenizer(said)["input_ids"], tokenizer.eos_token_id]


def test_the_stage_leaves_a_plain_checkpoint_and_says_what_it_measured(lab: Lab, base: Path) -> None:
    chosen = recipe(base, layers=3, mlp_width=56)
    result = lab.prune(chosen)
    folder = result.path("model")
    assert result.digest == file_digest(folder / "model.safetensors")
    assert result.document["files"].keys() >= {
        f"model/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja")
    } | {"importance.json"}  # fmt: skip

    source = find_model(str(base))
    whole, small, tokenizer = load_model(source), load_model(find_model(str(folder))), load_tokenizer(source)
    documents = [np.asarray(ids_of(tokenizer, one), dtype=np.int32) for one in EXAMPLES]
    counts = result.counts
    assert (counts["layers_before"], counts["layers_after"]) == (5, 3)
    assert (counts["mlp_width_before"], counts["mlp_width_after"]) == (128, 56)
    # of each dropped layer: q, k, v and o, norms of two heads and of the layer, feed-forward; of each kept one, units
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 2 * 16 + 2 * 64 + 3 * 64 * 128
    assert counts["parameters_before"] - counts["parameters_after"] == 2 * layer + 3 * 3 * 64 * (128 - 56)
    assert counts["parameters_after"] == sum(parameter.numel() for parameter in small.parameters())
    assert counts["calibration_tokens"] == sum(map(len, documents))
    for key, model in (("perplexity_before", whole), ("perplexity_after", small)):
        assert counts[key] == pytest.approx(math.exp(loss_by_transformers(model, documents)), rel=1e-4)

    importance = json.loads(result.path("importance.json").read_text())
    ranking = prune.layer_importance(whole, documents, "block_influence")
    assert importance["layers"]["how"] == "block_influence"
    assert importance["layers"]["scores"] == pytest.approx(ranking.scores, rel=1e-6)
    assert importance["layers"]["dropped"] == sorted(ranking.order[:2])
    assert importance["layers"]["kept"] == [one["layer"] for one in importance["mlp"]["layers"]]
    assert all(one["kept_units"] == 56 and 0.4 < one["mass"] < 1 for one in importance["mlp"]["layers"])

    # what stays has the base's own bits, in the base's own precision
    from safetensors.torch import load_file

    before, after = load_file(base / "model.safetensors"), load_file(folder / "model.safetensors")
    kept = importance["layers"]["kept"][-1]
    for name in ("self_attn.q_proj.weight", "input_layernorm.weight"):
        assert after[f"model.layers.2.{name}"].equal(before[f"model.layers.{kept}.{name}"])
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert end_ids(small) == [2, 0] and "temperature" not in (folder / "generation_config.json").read_text()
    assert str(base) not in "".join(path.read_text() for path in folder.glob("*.json"))


def test_weights_that_their_stored_precision_cannot_hold_stay_in_float32(deep: Live) -> None:
    model = deep(dtype="float32", num_hidden_layers=1)
    prune.as_stored(model, "bfloat16")
    assert model.dtype == torch.float32
    model.to(torch.bfloat16).to(torch.float32)
    prune.as_stored(model, torch.bfloat16)
    assert model.dtype == torch.bfloat16


def test_equal_recipes_give_equal_students_whatever_the_order_of_the_traces_or_a_kill(
    lab: Lab, base: Path, tmp_path: Path
) -> None:
    chosen = recipe(base, layers=4, importance="perplexity", mlp_width=100, calibration_tokens=150)
    one = lab.prune(chosen)
    other = Lab(tmp_path / "elsewhere")
    leftover = other.step(chosen, EXAMPLES[::-1]).folder / "model.unfinished"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(b"half")
    two = other.prune(chosen, EXAMPLES[::-1])
    assert (two.digest, two.counts) == (one.digest, one.counts)
    assert two.path("importance.json").read_bytes() == one.path("importance.json").read_bytes()
    assert one.counts["calibration_tokens"] == 150
    assert not leftover.exists()


def test_given_indices_need_no_traces(lab: Lab, base: Path) -> None:
    result = lab.prune(recipe(base, layers=[0, 4]))
    assert result.counts["layers_after"] == 2 and result.counts["calibration_tokens"] == 0
    assert result.counts["perplexity_before"] is result.counts["perplexity_after"] is None
    importance = json.loads(result.path("importance.json").read_text())
    assert importance == {"layers": {"how": "given", "kept": [0, 4], "dropped": [1, 2, 3]}, "mlp": None}
    ids = np.arange(3, 30, dtype=np.int32)
    expected = with_layers(load_model(find_model(str(base))), [0, 4])
    assert logits(load_model(find_model(str(result.path("model")))), ids).equal(logits(expected, ids))


def test_the_base_keeps_its_own_template(lab: Lab, base: Path) -> None:
    result = lab.prune(recipe(base, {"template": "r1"}, layers=4))
    assert (result.path("model") / "chat_template.jinja").read_bytes() == (base / "chat_template.jinja").read_bytes()


# --- calibration ----------------------------------------------------------------------------------------------------


def test_calibration_takes_documents_by_the_hash_of_their_prompts_and_cuts_the_last(tokenizer: Any, base: Path) -> None:
    chosen = recipe(base, layers=4)
    by_hash = sorted(EXAMPLES, key=lambda one: one.prompt.prompt_id)
    whole = [ids_of(tokenizer, one) for one in by_hash]
    first = len(whole[0])

    def taken(tokens: int, longest: int = 256) -> list[list[int]]:
        found = prune.calibration_documents(EXAMPLES, tokenizer, chosen.format, tokens, longest)
        return [ids.tolist() for ids in found]

    assert taken(10**6) == whole
    assert taken(first + 5) == [whole[0], whole[1][:5]]
    assert taken(first + 1) == taken(first) == [whole[0]], "a single token predicts nothing"
    assert taken(first - 1) == [whole[0][:-1]]
    shortest = min(map(len, whole))
    assert taken(10**6, shortest) == [ids for ids in whole if len(ids) == shortest] != whole


def test_traces_on_which_nothing_can_be_measured_are_refused_and_nothing_is_written(lab: Lab, base: Path) -> None:
    for chosen, examples in ((recipe(base, {"max_tokens": 20}, layers=4), EXAMPLES), (recipe(base, layers=4), [])):
        step = lab.step(chosen, examples)
        with pytest.raises(TrainingError, match=r"no trace .* has at most (20|256) tokens; raise format"):
            prune.run(chosen, step, lab.options)
        assert not step.folder.exists()


def test_a_tokenizer_of_another_model_is_refused(lab: Lab, base: Path, live: Live, tmp_path: Path) -> None:
    live("qwen3", vocab_size=300).save_pretrained(tmp_path / "small")
    load_tokenizer(find_model(str(base))).save_pretrained(tmp_path / "small")
    chosen = recipe(tmp_path / "small", mlp_width=8)
    with pytest.raises(TrainingError, match="the model has embeddings for 300 tokens only; give the model's own"):
        prune.run(chosen, lab.step(chosen), lab.options)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layers": 6}, r"layers is 6, but .* has 5 layers; keep fewer$"),
        ({"layers": [0, 5]}, r"names layer 5, but .* has 5 layers; give indices from 0 to 4"),
        ({"mlp_width": 129}, r"mlp_width is 129, but .*'s feed-forwards have 128 units; keep fewer than 128"),
        ({"layers": 3, "mlp_width": 129}, r"mlp_width is 129, but .* keep fewer than 128"),
        ({"layers": 5}, r"nothing to cut: it keeps all 5 layers and all 128 feed-forward units of .* leave"),
        ({"layers": [4, 3, 2, 1, 0]}, r"nothing to cut"),
        ({"mlp_width": 128}, r"nothing to cut"),
        ({"layers": 5, "mlp_width": 128}, r"nothing to cut"),
    ],
)
def test_what_the_model_cannot_give_is_refused_before_any_work(
    lab: Lab, base: Path, given: dict[str, Any], message: str
) -> None:
    chosen = recipe(base, **given)
    step = lab.step(chosen)
    for refusing in (prune.preflight, prune.run):
        with pytest.raises(ModelError, match=r"^student\.prune.*" + message):
            refusing(chosen, step, lab.options)
    assert not step.folder.exists()


@pytest.mark.parametrize(
    "given",
    [
        {"layers": 4},
        {"layers": [0]},
        {"mlp_width": 127},
        {"layers": 5, "mlp_width": 1},
        {"layers": 4, "mlp_width": 128},
    ],
)
def test_what_the_model_can_give_is_taken(lab: Lab, base: Path, given: dict[str, Any]) -> None:
    chosen = recipe(base, **given)
    prune.preflight(chosen, lab.step(chosen), lab.options)


def test_a_base_that_is_not_there_is_refused(lab: Lab, tmp_path: Path) -> None:
    chosen = recipe(tmp_path / "nowhere", layers=1)
    with pytest.raises(ModelError, match="no such model file or folder"):
        prune.preflight(chosen, lab.step(chosen), lab.options)
