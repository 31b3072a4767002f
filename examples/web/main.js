// The page: it sends questions to a worker, which runs the model, and shows the text as it grows, reasoning folded.
// ?dtype=q8 takes another graph than the default one, ?max_new_tokens=64 a shorter text.

import { opensReasoning, split } from "./reasoning.mjs";

const at = (id) => document.getElementById(id);
const given = new URLSearchParams(location.search);
const worker = new Worker("worker.js", { type: "module" });
worker.postMessage({ load: { dtype: given.get("dtype") ?? undefined } });

worker.onmessage = ({ data }) => {
  if (data.status) at("status").textContent = data.status;
  if (data.ready) at("ask").disabled = false;
  if (data.text === undefined) return;
  const { reasoning, answer } = split(data.text, opensReasoning(data.prompt));
  at("reasoning").hidden = reasoning === "";
  at("reasoning").querySelector("pre").textContent = reasoning;
  at("answer").textContent = answer;
};

at("form").onsubmit = (event) => {
  event.preventDefault();
  at("ask").disabled = true;
  at("answer").textContent = "";
  worker.postMessage({ ask: { question: at("question").value, max_new_tokens: Number(given.get("max_new_tokens") ?? 512) } });
};
