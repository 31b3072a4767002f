"""What Optimum makes of an artifact, in its own environment: python optimum_check.py < request.json > answer.json.

The same question and answer as check.mjs. It runs under transformers 4, so it knows nothing of distill.
"""

import json
import sys
from importlib.metadata import version
from typing import Any


def main() -> None:
    """Answer one request."""
    request = json.load(sys.stdin)
    json.dump({"version": version("optimum-onnx"), "answers": check(request)}, sys.stdout)


def check(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Prompts, their ids, preferred tokens and greedy text of every case."""
    import torch
    from optimum.onnxruntime import ORTModelForCausalLM
    from transformers import AutoTokenizer

    torch.set_num_threads(request["threads"])
    tokenizer = AutoTokenizer.from_pretrained(request["folder"])
    model = ORTModelForCausalLM.from_pretrained(
        request["folder"], file_name=request["file"], session_options=session_options(request)
    )
    answers = []
    for case in request["cases"]:
        rendered = {"conversation": case["messages"], "add_generation_prompt": True}
        inputs = tokenizer.apply_chat_template(**rendered, return_dict=True, return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        with torch.inference_mode():
            text = model.generate(**inputs, max_new_tokens=request["max_new_tokens"])[0]
            top1 = preferred(model, case["document"], case["first"], case["count"])
        answers.append(
            {
                "prompt": tokenizer.apply_chat_template(**rendered, tokenize=False),
                "prompt_ids": inputs["input_ids"][0].tolist(),
                "top1": top1,
                "written": text[length:].tolist(),
            }
        )
    return answers


def preferred(model: Any, document: list[int], first: int, count: int) -> list[int]:
    """The preferred token after each of `count` places from `first` on, which are fed one by one.

    A graph gives logits after the last token that it was fed alone.
    """
    import torch

    found: list[int] = []
    past, start = None, 0
    for end in range(first + 1, first + count + 1):
        ids, mask = torch.tensor([document[start:end]]), torch.ones(1, end, dtype=torch.long)
        outputs = model(input_ids=ids, attention_mask=mask, past_key_values=past)
        found.append(int(outputs.logits[0, -1].argmax()))
        past, start = outputs.past_key_values, end
    return found


def session_options(request: dict[str, Any]) -> Any:
    """Threads, and errors only."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = request["threads"]
    options.log_severity_level = 3
    return options


if __name__ == "__main__":
    main()
