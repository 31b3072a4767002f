// node node.mjs MODULES < request.json > answer.json: transformers.js from the folder MODULES, nothing from a network.

import { createRequire } from "node:module";
import { join } from "node:path";
import { readFileSync } from "node:fs";
import { check } from "./check.mjs";

const transformers = createRequire(join(process.argv[2], "here.cjs"))("@huggingface/transformers");
transformers.env.allowRemoteModels = false;
transformers.env.localModelPath = "/";
const answer = await check(transformers, JSON.parse(readFileSync(0, "utf8")));
process.stdout.write(JSON.stringify(answer));
