// Lay out a static site that runs an exported model in the browser.
//
//   npm install --ignore-scripts --prefix ../node
//   node build.mjs ARTIFACT SITE [MODULES]
//   python -m http.server --directory SITE          and open http://127.0.0.1:8000/
//
// SITE gets the page, transformers.js with its WebAssembly, and the model: nothing is fetched from anywhere else. MODULES
// is the folder node_modules, by default that of ../node. To take the library from a content delivery network instead,
// leave vendor/ out and import "https://cdn.jsdelivr.net/npm/@huggingface/transformers@4" in worker.js, without wasmPaths.

import { cpSync, mkdirSync } from "node:fs";
import { dirname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";

const here = dirname(fileURLToPath(import.meta.url));
const [artifact, site, modules = join(here, "..", "node", "node_modules")] = process.argv.slice(2).map((path) => resolve(path));
if (!site) throw new Error("usage: node build.mjs ARTIFACT SITE [MODULES]");

const FILES = {
  "index.html": join(here, "index.html"),
  "main.js": join(here, "main.js"),
  "worker.js": join(here, "worker.js"),
  "reasoning.mjs": join(here, "..", "node", "reasoning.mjs"),
  "vendor/transformers.js": join(modules, "@huggingface/transformers/dist/transformers.min.js"),
  "vendor/ort.mjs": join(modules, "onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.mjs"),
  "vendor/ort.wasm": join(modules, "onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.wasm"),
};

mkdirSync(join(site, "vendor"), { recursive: true });
for (const [name, source] of Object.entries(FILES)) cpSync(source, join(site, name));
cpSync(artifact, join(site, "model"), { recursive: true });
