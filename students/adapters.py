"""Low-rank adapters through peft: put on a base, trained, and merged into a plain checkpoint at the end of a phase."""

from collections.abc import Iterator
from typing import Any

from distill.config import Lora
from distill.errors import MissingExtraError, ModelError
from distill.models import ModelSource

VOCABULARY = ("lm_head", "embed_tokens")


def require_peft(lora: Lora | None) -> None:
    """Refuse adapters where peft is missing, and four-bit bases where bitsandbytes or CUDA is.

    Raises MissingExtraError or ModelError.
    """
    import importlib.util

    if lora is None:
        return
    if importlib.util.find_spec("peft") is None:
        raise MissingExtraError("peft", "train")
    if lora.quantize == "nf4":
        import torch

        if not torch.cuda.is_available():
            raise ModelError("lora.quantize nf4 needs a CUDA GPU; set lora.quantize=none")
        if importlib.util.find_spec("bitsandbytes") is None:
            raise MissingExtraError("bitsandbytes", "gpu")


def check_adapters(config: Any, lora: Lora | None) -> None:
    """Refuse modules trained whole that share their weights: a merge would have to split or guess them.

    Raises ModelError.
    """
    if lora is None:
        return
    shared = [name for name in lora.modules_to_save if name.rpartition(".")[2] in VOCABULARY]
    if shared and getattr(config, "tie_word_embeddings", False):
        raise ModelError(
            f"lora.modules_to_save: {shared[0]} shares its weights with the other end of this model (tied), so one"
            " trained copy would not fit the other; leave it out, or train all weights (remove lora)"
        )


def with_adapters(model: Any, lora: Lora, seed: int) -> Any:
    """The model wrapped by peft, its adapters drawn from `seed`; only they and `modules_to_save` train.

    Raises ModelError for a name that fits no module, or one that adapters cannot be put on.
    """
    import warnings

    from peft import LoraConfig, get_peft_model

    from distill.models import seeded

    check_names(model, lora)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        modules_to_save=list(lora.modules_to_save) or None,
    )
    with seeded(seed, str(model.device)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # peft asks by the old name
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            raise ModelError(f"lora.targets {lora.targets!r}: {error}") from error


def check_names(model: Any, lora: Lora) -> None:
    """Refuse names that fit no module, which peft passes over as long as another one fits.

    Raises ModelError.
    """
    modules = [name for name, _ in model.named_modules()]
    targets = [] if isinstance(lora.targets, str) else lora.targets
    for field, names in (("targets", targets), ("modules_to_save", lora.modules_to_save)):
        for name in names:
            if not any(f".{module}".endswith(f".{name}") for module in modules):
                ends = sorted({module.rpartition(".")[2] for module in modules if ".layers." in module} - {""})
                known = ", ".join(end for end in ends if not end.isdigit())
                raise ModelError(f"lora.{field}: no module of this model is called {name!r}; its layers have {known}")


def load_in_four_bits(source: ModelSource, device: str, attention: str) -> Any:
    """A frozen base whose projections are kept in four bits (NF4, double quantization) by bitsandbytes, on CUDA.

    Only what trains beside it is fp32; the merge at the end of the phase is into the full weights. Raises ModelError
    for a GGUF file, which is quantized already.
    """
    if source.gguf:
        raise ModelError(f"lora.quantize nf4 takes a transformers checkpoint, not {source.gguf}; set it to none")
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from distill.attention import register_attention

    register_attention()
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(
        source.where,
        revision=source.revision,
        quantization_config=four_bits,
        device_map={"": device},
        attn_implementation=attention,
    )


def merged(base: Any, lora: Lora, state: dict[str, Any], seed: int) -> Any:
    """A fresh fp32 base with trained adapters merged into its weights: a plain model.

    Merged in fp32, so that only the saved weights are rounded. `state` holds whole weights by the wrapped model's
    parameter names.
    """
    import torch

    wrapped = with_adapters(base, lora, seed)
    own = dict(wrapped.named_parameters())
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)
    return wrapped.merge_and_unload()


def merged_weights(model: Any) -> Iterator[tuple[str, Any]]:
    """The weights of a wrapped model as its base would have them with the adapters merged, which they are not.

    What is yielded are sums of their own: merging and taking apart again would leave rounding in the weights.
    """
    base = model.get_base_model()
    for name, weight in base.named_parameters():
        if ".lora_" in name or ".original_module." in name:
            continue
        if name.endswith(".base_layer.weight"):
            layer = base.get_submodule(name.removesuffix(".base_layer.weight"))
            weight = weight.detach() + layer.get_delta_weight("default").to(weight.dtype)
        yield name.replace(".base_layer.", ".").replace(".modules_to_save.default.", "."), weight
