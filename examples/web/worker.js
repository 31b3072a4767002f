// The model, in a thread of its own so that the page stays awake. Everything is read from the folder of this file.

import { AutoModelForCausalLM, AutoTokenizer, TextStreamer, env } from "./vendor/transformers.js";

env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = new URL(".", import.meta.url).pathname; // a path: what looks like an address counts as remote
env.backends.onnx.wasm.wasmPaths = {
  mjs: new URL("vendor/ort.mjs", import.meta.url).href,
  wasm: new URL("vendor/ort.wasm", import.meta.url).href,
};

let tokenizer;
let model;

async function load({ dtype }) {
  tokenizer = await AutoTokenizer.from_pretrained("model");
  model = await AutoModelForCausalLM.from_pretrained("model", { dtype, device: "wasm" });
  postMessage({ status: "Ready.", ready: true });
}

async function ask({ question, max_new_tokens }) {
  const messages = [{ role: "user", content: question }];
  const prompt = tokenizer.apply_chat_template(messages, { tokenize: false, add_generation_prompt: true });
  const inputs = tokenizer.apply_chat_template(messages, { add_generation_prompt: true, return_dict: true });
  let text = "";
  let tokens = 0;
  const started = performance.now();
  const streamer = new TextStreamer(tokenizer, {
    skip_prompt: true,
    skip_special_tokens: true,
    callback_function: (piece) => postMessage({ prompt, text: (text += piece) }),
    token_callback_function: (ids) => (tokens += ids.length),
  });
  await model.generate({ ...inputs, max_new_tokens, streamer });
  const rate = (1000 * tokens) / (performance.now() - started);
  postMessage({ status: `Done: ${tokens} tokens, ${rate.toFixed(1)} a second.`, ready: true });
}

onmessage = async ({ data }) => {
  try {
    await (data.load ? load(data.load) : ask(data.ask));
  } catch (error) {
    postMessage({ status: `Failed: ${error}` });
  }
};
