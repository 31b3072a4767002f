"""The prune stage: a smaller student cut out of a larger model, before any training.

Layers are dropped, by index or the least important ones by measurement, and feed-forwards are narrowed to the units
that carry most. What stays keeps its weights bit for bit, and the configuration is made to fit, so that the result is
a normal checkpoint of its family. Layers are cut first; units are then ranked in the model that is left. Nothing here
trains: a cut model writes worse until the phases after it have healed it.
"""

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.config import FormatConfig, Prune, Recipe, StudentConfig
from distill.engines.transformers import end_ids
from distill.errors import ModelError, TrainingError
from distill.format import encode_document, set_template
from distill.models import (
    ModelSource,
    choose_device,
    find_model,
    load_config,
    load_model,
    load_tokenizer,
    set_threads,
)
from distill.progress import progress
from distill.records import Example, read_records, write_json
from distill.runs import RunOptions, Step, file_digest, open_run

Ids = np.ndarray[Any, np.dtype[np.int32]]
"""Token ids of one document."""
Advance = Callable[[int], None]
"""Told how many tokens a forward pass has just read."""
Importance = Literal["block_influence", "perplexity"]

CANDIDATES = 1024
"""Traces from which the calibration documents are taken, at least; see `calibration_documents`."""
CHUNK_ROWS = 256
"""Rows whose logits exist at the same time; 256 x 151,936 logits take 156 MB in fp32."""


def preflight(recipe: Recipe, step: Step, options: RunOptions) -> None:
    """Refuse, before any work, a cut that the model does not allow or that leaves it as it is."""
    student = _student(recipe)
    check_cut(_prune(student), load_config(find_model(student.init, student.revision)), student.init)


def run(recipe: Recipe, step: Step, options: RunOptions) -> None:
    """Cut the student out of its base, save it as a plain checkpoint and seal the run."""
    from .train import save_student

    student = _student(recipe)
    prune = _prune(student)
    source = find_model(student.init, student.revision)
    config = load_config(source)
    check_cut(prune, config, student.init)
    documents = _calibration(recipe, step, source, config) if prune.measured else []
    with open_run(step, options) as run:
        set_threads(options)
        model = load_model(source, "float32", choose_device(options))
        passes = forward_passes(prune, config.num_hidden_layers, config.intermediate_size)
        total = passes * sum(map(len, documents))
        with progress(f"prune {step.name}", total, options, unit="tok") as bar:
            counts, importance = cut(model, documents, prune, student.init, bar.advance)
        write_json(run.path("importance.json"), importance)
        as_stored(model, config.dtype)
        save_student(model, load_tokenizer(source), run.path("model"))
        run.seal(digest=file_digest(run.path("model/model.safetensors")), counts=counts)


def check_cut(prune: Prune, config: Any, name: str) -> None:
    """Raise ModelError for layers or a width that the model of this configuration does not have, or for no cut."""
    layers, width = int(config.num_hidden_layers), int(config.intermediate_size)
    kept = prune.layers if prune.layers is not None else layers
    if isinstance(kept, list) and max(kept) >= layers:
        raise ModelError(
            f"student.prune.layers names layer {max(kept)}, but {name} has {layers} layers;"
            f" give indices from 0 to {layers - 1}"
        )
    count = len(kept) if isinstance(kept, list) else kept
    if count > layers:
        raise ModelError(f"student.prune.layers is {count}, but {name} has {layers} layers; keep fewer")
    if prune.mlp_width is not None and prune.mlp_width > width:
        raise ModelError(
            f"student.prune.mlp_width is {prune.mlp_width:,}, but {name}'s feed-forwards have {width:,} units;"
            f" keep fewer than {width:,}"
        )
    if count == layers and prune.mlp_width in (None, width):
        raise ModelError(
            f"student.prune: nothing to cut: it keeps all {layers} layers and all {width:,} feed-forward units of"
            f" {name}; give fewer layers or a smaller mlp_width, or leave student.prune out"
        )


# --- calibration ----------------------------------------------------------------------------------------------------


def _calibration(recipe: Recipe, step: Step, source: ModelSource, config: Any) -> list[Ids]:
    """Documents of the selected traces, as training will render them."""
    tokenizer = load_tokenizer(source)
    set_template(tokenizer, recipe.format)  # on a copy of its own: what is saved keeps the base's template
    examples = read_records(step.result("examples").path("examples.jsonl"), Example)
    longest = min(recipe.format.max_tokens, int(config.max_position_embeddings))
    tokens = _prune(_student(recipe)).calibration_tokens
    documents = calibration_documents(examples, tokenizer, recipe.format, tokens, longest)
    if not documents:
        raise TrainingError(
            f"student.prune: no trace to measure on that has at most {longest:,} tokens; raise format.max_tokens"
            " (within the model's context), or look at what selection dropped: distill inspect"
        )
    if (highest := max(int(ids.max()) for ids in documents)) >= config.vocab_size:
        raise TrainingError(
            f"the tokenizer writes token {highest}, but the model has embeddings for {config.vocab_size:,} tokens only;"
            " give the model's own tokenizer"
        )
    return documents


def calibration_documents(
    examples: Iterable[Example], tokenizer: Any, config: FormatConfig, tokens: int, longest: int
) -> list[Ids]:
    """Documents of `tokens` tokens together (fewer if there are no more), the last one cut to fit.

    Examples are taken in the order of their prompts' ids, which are hashes: a sample over all sources, whatever the
    order of the file. Documents of more than `longest` tokens are passed over. Of a long file only so many examples
    are held as can be needed, a document having 16 tokens or more: its template alone has about that.
    """
    chosen: list[Ids] = []
    left, candidates = tokens, max(CANDIDATES, tokens // 16)
    for example in heapq.nsmallest(candidates, examples, key=lambda one: (one.prompt.prompt_id, one.trace_id)):
        ids = encode_document(tokenizer, example.prompt.messages, example.reasoning, example.answer, config).ids
        if len(ids) > longest:
            continue
        if left < 2:  # a single token predicts nothing
            break
        chosen.append(np.asarray(ids[:left], dtype=np.int32))
        left -= len(chosen[-1])
    return chosen


# --- the cut --------------------------------------------------------------------------------------------------------


def forward_passes(prune: Prune, layers: int, width: int) -> int:
    """How often `cut` reads all calibration documents."""
    passes = 2  # perplexity before and after
    if isinstance(prune.layers, int) and prune.layers < layers:
        drop = layers - prune.layers
        passes += 1 if prune.importance == "block_influence" else 1 + sum(layers - gone for gone in range(drop))
    return passes + (prune.mlp_width is not None and prune.mlp_width < width)


def _silent(tokens: int) -> None:
    """Progress that nobody looks at."""


def cut(
    model: Any, documents: Sequence[Ids], prune: Prune, name: str = "the model", advance: Advance = _silent
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Cut a live model in place as `prune` says; returns counts and what was measured.

    Without documents, perplexities are None. Raises ModelError for a base whose loss is not finite.
    """
    counts: dict[str, Any] = {f"{key}_before": value for key, value in _sizes(model).items()}
    counts["calibration_tokens"] = sum(map(len, documents))
    counts["perplexity_before"] = _perplexity(model, documents, name, advance)
    kept, layers = _cut_layers(model, documents, prune, advance)
    mlp = _cut_mlps(model, documents, prune, kept, advance)
    counts |= {f"{key}_after": value for key, value in _sizes(model).items()}
    counts["perplexity_after"] = _perplexity(model, documents, name, advance)
    return counts, {"layers": layers, "mlp": mlp}


def _cut_layers(
    model: Any, documents: Sequence[Ids], prune: Prune, advance: Advance
) -> tuple[list[int], dict[str, Any] | None]:
    """Drop what `prune.layers` says; gives the kept layers and what importance.json says of them."""
    layers = len(model.base_model.layers)
    kept, measured = list(range(layers)), None
    if isinstance(prune.layers, list):
        kept, measured = sorted(prune.layers), {"how": "given"}
    elif prune.layers is not None and prune.layers < layers:
        ranking = layer_importance(model, documents, prune.importance, layers - prune.layers, advance)
        kept = sorted(set(kept) - set(ranking.order[: layers - prune.layers]))
        measured = {"how": prune.importance, **ranking._asdict()}
    if len(kept) == layers:
        return kept, None
    drop_layers(model, kept)
    dropped = [index for index in range(layers) if index not in kept]
    return kept, {**(measured or {}), "kept": kept, "dropped": dropped}


def _cut_mlps(
    model: Any, documents: Sequence[Ids], prune: Prune, layers: Sequence[int], advance: Advance
) -> dict[str, Any] | None:
    """Narrow to `prune.mlp_width`; gives what importance.json says, layers numbered as in the base."""
    before = int(model.config.intermediate_size)
    if prune.mlp_width is None or prune.mlp_width >= before:
        return None
    narrowed = narrow_mlps(model, prune.mlp_width, documents, advance)
    return {
        "how": "activation_norm x down_proj_column_norm",
        "units_before": before,
        "layers": [
            {"layer": layer, "kept_units": len(one.kept), "mass": one.mass}
            for layer, one in zip(layers, narrowed, strict=True)
        ],
    }


def _sizes(model: Any) -> dict[str, int]:
    return {
        "layers": len(model.base_model.layers),
        "mlp_width": int(model.config.intermediate_size),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def _perplexity(model: Any, documents: Sequence[Ids], name: str, advance: Advance) -> float | None:
    if not documents:
        return None
    loss = mean_loss(model, documents, advance)
    if not math.isfinite(loss):
        raise ModelError(f"{name}: its loss on the traces is {loss}; are its weights whole? copy or download it again")
    return round(math.exp(loss), 4)


def as_stored(model: Any, dtype: Any) -> None:
    """Make a cut model ready to be saved, in place.

    Weights go back to the base's own `dtype` where that loses nothing (it was loaded in float32, and cutting changes
    no value). Of its generation_config the ids stay; what else it advised was for another model, and may be such that
    transformers refuses to save it.
    """
    from transformers import GenerationConfig

    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if wanted is not None and all(torch.equal(p.to(wanted).to(p.dtype), p) for p in model.parameters()):
        model.to(wanted)
    ends = end_ids(model)
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=ends[0] if len(ends) == 1 else ends or None,
        pad_token_id=model.generation_config.pad_token_id,
    )


# --- measuring ------------------------------------------------------------------------------------------------------


class Ranking(NamedTuple):
    """How much each layer matters."""

    scores: list[float]
    """Of each layer; the lower, the less it does. 1 - cosine, or the rise of the loss (nats a token) without it."""
    order: list[int]
    """Layers in the order in which they go, the first the least important; for `perplexity` as many as asked for."""
    losses: list[float]
    """Of `perplexity`: nats a token with all layers, then after each removal."""


def layer_importance(
    model: Any, documents: Sequence[Ids], how: Importance, drop: int | None = None, advance: Advance = _silent
) -> Ranking:
    """Rank a model's layers on documents, each read alone with plain causal attention.

    `block_influence` ranks once, by the mean over all tokens of 1 - cos(input, output) of each layer (Men et al. 2024,
    ShortGPT). `perplexity` removes `drop` layers (all but one if None) one after the other, each time that without
    which the loss is lowest: the ranking of Kim et al. 2024 (Shortened LLaMA), made anew after each removal. Its
    scores are those of the first round. Of equals, the first layer goes first. The model is left as it was.
    """
    if how == "perplexity":
        return _by_loss(model, documents, len(model.base_model.layers) - 1 if drop is None else drop, advance)
    scores = block_influence(model, documents, advance)
    return Ranking(scores, sorted(range(len(scores)), key=scores.__getitem__), [])


@torch.inference_mode()
def block_influence(model: Any, documents: Sequence[Ids], advance: Advance = _silent) -> list[float]:
    """Mean over all tokens of 1 - cos(input, output) of each layer."""
    layers = model.base_model.layers
    sums = [0.0] * len(layers)

    def watch(index: int) -> Callable[[Any, tuple[Any, ...], Any], None]:
        def hook(layer: Any, inputs: tuple[Any, ...], output_1TH: Any) -> None:
            sums[index] += float((1 - F.cosine_similarity(_wide(inputs[0]), _wide(output_1TH), dim=-1)).sum())

        return hook

    with ExitStack() as hooks:
        for index, layer in enumerate(layers):
            hooks.enter_context(layer.register_forward_hook(watch(index)))
        for ids in documents:
            _hidden(model, ids)
            advance(len(ids))
    tokens = sum(map(len, documents))
    return [total / tokens for total in sums]


def _by_loss(model: Any, documents: Sequence[Ids], drop: int, advance: Advance) -> Ranking:
    """Greedy removal by the loss of what is left."""
    left = list(range(len(model.base_model.layers)))
    scores, order, losses = [0.0] * len(left), list[int](), [mean_loss(model, documents, advance)]
    for removal in range(drop):
        without: dict[int, float] = {}
        for index in left:
            with bypassed(model, [*order, index]):
                without[index] = mean_loss(model, documents, advance)
        if removal == 0:
            scores = [without[index] - losses[0] for index in left]
        least = min(left, key=without.__getitem__)
        left.remove(least)
        order.append(least)
        losses.append(without[least])
    return Ranking(scores, order, losses)


class _Through(nn.Module):
    """Stands in for a layer and changes nothing."""

    def forward(self, hidden: Tensor, **_: Any) -> Tensor:
        return hidden


@contextmanager
def bypassed(model: Any, indices: Iterable[int]) -> Iterator[None]:
    """Let these layers change nothing inside the block."""
    layers = model.base_model.layers
    own = {index: layers[index] for index in indices}
    try:
        for index in own:
            layers[index] = _Through()
        yield
    finally:
        for index, layer in own.items():
            layers[index] = layer


@torch.inference_mode()
def mean_loss(model: Any, documents: Sequence[Ids], advance: Advance = _silent) -> float:
    """Mean negative log-likelihood, in nats, of every token but the first of each document, prompts included."""
    head = model.get_output_embeddings()
    total, predicted = 0.0, 0
    for ids in documents:
        hidden_TH = _hidden(model, ids)
        targets = torch.as_tensor(ids[1:], dtype=torch.long, device=hidden_TH.device)
        for rows_NH, targets_N in zip(hidden_TH[:-1].split(CHUNK_ROWS), targets.split(CHUNK_ROWS), strict=True):
            logits_NV = head(rows_NH)
            at_least_fp32 = torch.promote_types(logits_NV.dtype, torch.float32)
            total += float(F.cross_entropy(logits_NV.to(at_least_fp32), targets_N, reduction="sum"))
        predicted += len(targets)
        advance(len(ids))
    return total / predicted


@torch.no_grad()
def unit_importance(model: Any, documents: Sequence[Ids], advance: Advance = _silent) -> list[Tensor]:
    """Of each layer, how much each of its feed-forward units adds to the output: [intermediate_size], float64.

    Unit j adds a_tj * down_proj[:, j] at token t, a = act(gate) * up; its score is the norm of that over all tokens and
    outputs, ||a_j|| * ||down_proj[:, j]||. That is activation rank as in Minitron (Muralidharan et al. 2024), times the
    weight that reads the unit, as in Wanda (Sun et al. 2023, |W_ij| * ||X_j||, its norm over i): the squared score is
    exactly the squared error of dropping that unit alone, and does not change when up_proj's row is scaled against
    down_proj's column, which changes nothing in the model.
    """
    mlps = [layer.mlp for layer in model.base_model.layers]
    squares = [torch.zeros(mlp.down_proj.in_features, dtype=torch.float64) for mlp in mlps]

    def watch(sums_I: Tensor) -> Callable[[Any, tuple[Any, ...]], None]:
        def hook(down_proj: Any, inputs: tuple[Any, ...]) -> None:
            sums_I.add_(_norms(inputs[0].flatten(0, -2)).square())

        return hook

    with ExitStack() as hooks:
        hooks.enter_context(torch.inference_mode())
        for mlp, sums_I in zip(mlps, squares, strict=True):
            hooks.enter_context(mlp.down_proj.register_forward_pre_hook(watch(sums_I)))
        for ids in documents:
            _hidden(model, ids)
            advance(len(ids))
    return [sums_I.sqrt() * _norms(mlp.down_proj.weight) for mlp, sums_I in zip(mlps, squares, strict=True)]


def _norms(matrix_NI: Tensor) -> Tensor:
    """Norm of each column, on the CPU in float64."""
    return torch.linalg.vector_norm(matrix_NI, dim=0, dtype=_wide_dtype(matrix_NI)).cpu().double()


def _hidden(model: Any, ids: Ids) -> Tensor:
    """Final hidden states [T, H] of one document, without a cache."""
    ids_1T = torch.as_tensor(ids, dtype=torch.long, device=model.device)[None]
    return model.base_model(input_ids=ids_1T, use_cache=False).last_hidden_state[0]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(_wide_dtype(tensor))


def _wide_dtype(tensor: Tensor) -> torch.dtype:
    """What sums over tokens are made in; Apple's MPS has no float64."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


# --- cutting --------------------------------------------------------------------------------------------------------


def drop_layers(model: Any, keep: Iterable[int]) -> None:
    """Keep only these layers, in their own order, in place; the configuration and the layers' numbers follow.

    `layer_types` keeps its entries of the kept layers, and `max_window_layers` counts those below it, so that layers
    with a sliding window stay those that had one, for readers of either field.
    """
    base, config, kept = model.base_model, model.config, sorted(set(keep))
    base.layers = nn.ModuleList([base.layers[index] for index in kept])
    for number, layer in enumerate(base.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # a layer's place in the cache
                module.layer_idx = number
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[index] for index in kept]
    if getattr(config, "max_window_layers", None) is not None:
        config.max_window_layers = sum(index < config.max_window_layers for index in kept)
    if hasattr(base, "has_sliding_layers"):
        base.has_sliding_layers = "sliding_attention" in config.layer_types


class Narrowed(NamedTuple):
    """What is left of one layer's feed-forward."""

    kept: list[int]
    """Units, by their former index, rising."""
    mass: float
    """Their share of the sum of all units' scores."""


def narrow_mlps(model: Any, width: int, documents: Sequence[Ids], advance: Advance = _silent) -> list[Narrowed]:
    """Keep the `width` most important units of each feed-forward (see `unit_importance`), in place.

    Of equals, the first unit stays. Returns one record a layer.
    """
    narrowed = []
    for layer, scores_I in zip(model.base_model.layers, unit_importance(model, documents, advance), strict=True):
        units = scores_I.argsort(descending=True, stable=True)[:width].sort().values
        keep_units(layer.mlp, units)
        whole = float(scores_I.sum())
        narrowed.append(Narrowed(units.tolist(), float(scores_I[units].sum()) / whole if whole else 1.0))
    model.config.intermediate_size = width
    return narrowed


@torch.no_grad()
def keep_units(mlp: Any, units: Tensor) -> None:
    """Slice a gated feed-forward to these units, in place: rows of gate_proj and up_proj, columns of down_proj."""
    for linear, dim in ((mlp.gate_proj, 0), (mlp.up_proj, 0), (mlp.down_proj, 1)):
        index = units.to(linear.weight.device)
        linear.weight = nn.Parameter(linear.weight.index_select(dim, index), linear.weight.requires_grad)
        if dim == 0 and linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias.index_select(0, index), linear.bias.requires_grad)
        linear.out_features, linear.in_features = linear.weight.shape
    mlp.intermediate_size = len(units)


def _student(recipe: Recipe) -> StudentConfig:
    assert recipe.student is not None  # the plan has no prune step without it
    return recipe.student


def _prune(student: StudentConfig) -> Prune:
    assert student.prune is not None
    return student.prune
