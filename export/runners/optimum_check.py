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
        document = torch.tensor([case["document"]])
        with torch.inference_mode():
            text = model.generate(**inputs, max_new_tokens=request["max_new_tokens"])[0]
            logits = model(input_ids=document, attention_mask=torch.ones_like(document)).logits[0]
        answers.append(
            {
                "prompt": tokenizer.apply_chat_template(**rendered, tokenize=False),
                "prompt_ids": inputs["input_ids"][0].tolist(),
                "top1": logits.argmax(-1).tolist(),
                "written": text[length:].tolist(),
            }
        )
    return answers


def session_options(request: dict[str, Any]) -> Any:
    """Threads, and errors only."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = request["threads"]
    options.log_severity_level = 3
    return options


if __name__ == "__main__":
    main()
