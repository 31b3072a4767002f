// Ask an exported model a question with transformers.js in Node.
//
//   npm install --ignore-scripts        the CPU runtime is in the package; its script would only fetch a CUDA one
//   node app.mjs ARTIFACT "What is 7 + 8?"
//   node app.mjs ARTIFACT "What is 7 + 8?" --dtype fp32 --show-reasoning
//
// ARTIFACT is the folder that `distill export` wrote. Its config.json says which graph is loaded; --dtype takes another:
// fp32, q8 or q4. The answer is streamed; the reasoning before it is folded into its length unless it is asked for.

import { parseArgs } from "node:util";
import { resolve } from "node:path";
import { AutoModelForCausalLM, AutoTokenizer, TextStreamer, env } from "@huggingface/transformers";
import { opensReasoning, split } from "./reasoning.mjs";

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    dtype: { type: "string" },
    "max-new-tokens": { type: "string", default: "512" },
    "show-reasoning": { type: "boolean", default: false },
  },
});
if (positionals.length !== 2) throw new Error("usage: node app.mjs ARTIFACT QUESTION [--dtype q4] [--show-reasoning]");

env.allowRemoteModels = false;
const folder = resolve(positionals[0]);
const tokenizer = await AutoTokenizer.from_pretrained(folder);
const model = await AutoModelForCausalLM.from_pretrained(folder, values.dtype ? { dtype: values.dtype } : {});

const messages = [{ role: "user", content: positionals[1] }];
const prompt = tokenizer.apply_chat_template(messages, { tokenize: false, add_generation_prompt: true });
const inputs = tokenizer.apply_chat_template(messages, { add_generation_prompt: true, return_dict: true });

let text = "";
let shown = 0;
const streamer = new TextStreamer(tokenizer, {
  skip_prompt: true,
  skip_special_tokens: true,
  callback_function(piece) {
    text += piece;
    const answer = values["show-reasoning"] ? text : split(text, opensReasoning(prompt)).answer;
    process.stdout.write(answer.slice(shown));
    shown = answer.length;
  },
});
await model.generate({ ...inputs, max_new_tokens: Number(values["max-new-tokens"]), streamer });
process.stdout.write("\n");

const { reasoning } = split(text, opensReasoning(prompt));
if (reasoning && !values["show-reasoning"])
  process.stderr.write(`[${reasoning.length} characters of reasoning; --show-reasoning shows them]\n`);
