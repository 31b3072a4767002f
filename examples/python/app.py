"""Ask an exported model a question with onnxruntime-genai alone; neither torch, transformers nor distill is needed.

    pip install onnxruntime-genai
    python app.py ARTIFACT "What is 7 + 8?"
    python app.py ARTIFACT "What is 7 + 8?" --graph onnx/model.onnx --show-reasoning

ARTIFACT is the folder that `distill export` wrote. Its own genai_config.json says which graph is loaded; --graph takes
another one. The answer is streamed; the reasoning before it is folded into its length unless it is asked for.
"""

import argparse
import json
import os
import sys

# Telemetry is on by default in these wheels and is decided at import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime_genai as og

OPEN, CLOSE = "<think>", "</think>"


def main() -> None:
    """Answer one question."""
    options = parse_options()
    config = og.Config(options.artifact)
    if options.graph:
        config.overlay(json.dumps({"model": {"decoder": {"filename": options.graph}}}))
    model = og.Model(config)
    tokenizer = og.Tokenizer(model)
    messages = [{"role": "user", "content": options.question}]
    prompt = tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True)
    stream(model, tokenizer, prompt, options)


def stream(model: og.Model, tokenizer: og.Tokenizer, prompt: str, options: argparse.Namespace) -> None:
    """Write the answer to stdout as it comes, and a word on the reasoning to stderr."""
    ids = tokenizer.encode(prompt)
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + options.max_new_tokens)
    generator = og.Generator(model, params)
    generator.append_tokens(ids)
    decode = tokenizer.create_stream().decode
    text, shown, opened = "", 0, prompt.rstrip().endswith(OPEN)
    while not generator.is_done():
        generator.generate_next_token()
        token = generator.get_next_tokens()[0]
        text += "" if token in tokenizer.eos_token_ids else decode(token)
        reasoning, answer = split(text, opened)
        answer = text if options.show_reasoning else answer
        print(answer[shown:], end="", flush=True)
        shown = len(answer)
    print()
    if reasoning and not options.show_reasoning:
        print(f"[{len(reasoning):,} characters of reasoning; --show-reasoning shows them]", file=sys.stderr)


def split(text: str, opened: bool) -> tuple[str, str]:
    """Reasoning and answer of a text that may still be growing; `opened`: the prompt held the opening marker."""
    head, close, tail = text.rpartition(CLOSE)
    if close:
        return head.replace(OPEN, "", 1).strip(), tail.lstrip()
    start = text.lstrip()
    if opened or start.startswith(OPEN):
        return start.removeprefix(OPEN).lstrip(), ""
    return "", "" if OPEN.startswith(start) else text


def parse_options() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description="Ask an exported model a question.")
    parser.add_argument("artifact", help="folder that `distill export` wrote")
    parser.add_argument("question")
    parser.add_argument("--graph", help="another graph than the default one, such as onnx/model_quantized.onnx")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--show-reasoning", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
