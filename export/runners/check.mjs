// What transformers.js makes of an artifact, in Node and in a browser: rendered prompts and their ids, the preferred
// tokens along an answer, and greedy text. The same file runs in both.

export async function check(transformers, { folder, dtype, cases, max_new_tokens, session_options = {} }) {
  const tokenizer = await transformers.AutoTokenizer.from_pretrained(folder);
  const model = await transformers.AutoModelForCausalLM.from_pretrained(folder, { dtype, session_options });
  const answers = [];
  for (const { messages, ...forced } of cases) {
    const prompt = tokenizer.apply_chat_template(messages, { tokenize: false, add_generation_prompt: true });
    const inputs = tokenizer.apply_chat_template(messages, { add_generation_prompt: true, return_dict: true });
    const prompt_ids = numbers(inputs.input_ids.data);
    const text = numbers((await model.generate({ ...inputs, max_new_tokens })).data);
    const top1 = await preferred(transformers, model, forced);
    answers.push({ prompt, prompt_ids, top1, written: text.slice(prompt_ids.length) });
  }
  return { version: transformers.env.version, answers };
}

// The answer is fed token by token: a graph gives logits after the last token that it was fed alone.
async function preferred(transformers, model, { document, first, count }) {
  const found = [];
  let past_key_values = null;
  for (let start = 0, end = first + 1; end <= first + count; start = end++) {
    const input_ids = tensor(transformers, document.slice(start, end));
    const attention_mask = tensor(transformers, new Array(end).fill(1));
    const outputs = await model.forward({ input_ids, attention_mask, past_key_values });
    const [, rows, vocabulary] = outputs.logits.dims;
    found.push(highest(outputs.logits.to("float32").data.subarray((rows - 1) * vocabulary)));
    const present = Object.entries(outputs).filter(([name]) => name.startsWith("present."));
    past_key_values = Object.fromEntries(present.map(([name, value]) => [name.replace("present", "past_key_values"), value]));
  }
  return found;
}

const tensor = (transformers, ids) => new transformers.Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]);

const numbers = (ids) => Array.from(ids, Number);

function highest(logits) {
  let best = 0;
  for (let token = 1; token < logits.length; ++token) if (logits[token] > logits[best]) best = token;
  return best;
}
