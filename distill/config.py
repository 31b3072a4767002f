"""The recipe: one YAML file that describes one experiment, as frozen, typed, documented sections.

Every section is optional and every option is a typed field: unknown keys are refused with the nearest valid one.
Each field is either part of a stage's identity or marked `unhashed` (where it runs, what it may cost, what it is
called). `load_recipe` reads a file with its overrides; `hashed_fields` is what identities are made of.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator
from pydantic.fields import FieldInfo

from distill.errors import RecipeError

VERIFIERS = ("number", "math", "exact", "reasoning_gym", "choice", "regex", "code")
GOLD_RULES = ("as_is", "after_hashes", "boxed", "last_number")
ENGINE_NAMES = ("openai", "openai_batch", "vllm", "transformers", "onnx", "solver", "recorded")
VARIANTS = ("fp32", "fp16", "int8", "int4", "q4f16")

GoldRule = Literal["as_is", "after_hashes", "boxed", "last_number"]
EngineName = Literal["openai", "openai_batch", "vllm", "transformers", "onnx", "solver", "recorded"]
Variant = Literal["fp32", "fp16", "int8", "int4", "q4f16"]
Runtime = Literal["genai", "node", "browser", "optimum"]
Scalar = str | int | float | bool | None


def unhashed(default: Any = ..., **constraints: Any) -> Any:
    """A field that never enters an identity: it says where, how fast or at what price, not what."""
    return Field(default, json_schema_extra={"hashed": False}, **constraints)


class Section(BaseModel):
    """Base of every part of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


SectionT = TypeVar("SectionT", bound=Section)


# --- prompts --------------------------------------------------------------------------------------------------------


class ReasoningGymSource(Section):
    """Problems made by a task of the reasoning-gym package."""

    task: str
    """Name of the task, such as `chain_sum`."""
    size: int = Field(gt=0)
    """How many problems to draw; duplicates after normalisation are dropped and counted."""
    seed: int = 0
    """Seed of the task's own generator."""
    params: dict[str, Scalar | list[Scalar]] = Field(default_factory=dict)
    """Parameters of the task, checked against the task's own configuration class."""


class HubSource(Section):
    """A data set of the Hugging Face hub (or a local `datasets` folder)."""

    id: str
    """Data set id, such as `openai/gsm8k`, or a local path that `datasets.load_dataset` takes."""
    config: str | None = None
    """Configuration name, such as `main`."""
    split: str = "train"
    """Split to read."""
    revision: str = "main"
    """Commit, tag or branch; the resolved commit enters the identity."""


class FileVerifier(Section):
    """A verifier of your own: a Python file with a function `verify(prompt, trace) -> Verdict`."""

    file: Path
    """The file; its content hash is the verifier's version."""
    timeout_s: float = unhashed(10.0, gt=0)
    """Longest time one verdict may take before it counts as `timeout`."""


class PromptSource(Section):
    """One source of prompts: exactly one of `reasoning_gym`, `file`, `hub`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Name used in records, reports and evaluation sets."""
    reasoning_gym: ReasoningGymSource | None = None
    """Generated problems."""
    file: Path | None = None
    """A `.jsonl`, `.json`, `.csv` or `.parquet` file of rows."""
    hub: HubSource | None = None
    """A data set of the hub."""
    template: str = "{question}"
    """Text of the user turn; `{column}` takes a column of the row, `{instruction}` the field below."""
    instruction: str = ""
    """Text for `{instruction}` in the template."""
    question_column: str = "question"
    """Column that holds the bare problem."""
    gold_column: str | None = "answer"
    """Column that holds the reference answer; null where there is none."""
    gold: GoldRule = "as_is"
    """How the reference answer is taken from its column: `after_hashes` reads GSM8K's `#### 72`."""
    verifier: "Verifier" = "number"
    """A built-in verifier, the name of an installed one (entry point group `distill.verifiers`), `{file: ...}`, or one
    with options such as `{code: {tests_column: tests}}`."""
    licence: str | None = None
    """Licence of the source, carried into every record."""
    limit: int | None = Field(default=None, gt=0)
    """Take only the first rows."""
    weight: float | None = Field(default=None, gt=0)
    """Relative share in the mixture; sources with weights are subsampled to these shares. Null takes every prompt."""
    heldout: int = Field(default=0, ge=0)
    """How many prompts to set aside for the evaluation set `heldout`; they never reach a teacher or a student."""
    split_by: Literal["prompt", "numbers"] = "prompt"
    """What must not be on both sides of the split: the prompt itself, or any prompt with the same set of numbers."""
    split_seed: int = 0
    """Seed of the split and of subsampling."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        given = [kind for kind in ("reasoning_gym", "file", "hub") if getattr(self, kind) is not None]
        if len(given) != 1:
            what = ", ".join(given) or "none"
            raise ValueError(f"a prompt source takes exactly one of reasoning_gym, file, hub (given: {what})")
        return self


# --- teacher --------------------------------------------------------------------------------------------------------


class Sampling(Section):
    """How text is drawn from a model."""

    n: int = Field(default=1, gt=0)
    """Samples a prompt."""
    temperature: float = Field(default=0.0, ge=0)
    """0 is greedy. DeepSeek advises 0.6 for R1."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling; 1 keeps every token."""
    max_new_tokens: int = Field(default=2048, gt=0)
    """Limit of generated tokens, reasoning included."""
    seed: int = 0
    """Seed; sample i of a prompt uses a seed derived from it, the prompt and i."""


class RecordedTraces(Section):
    """Existing traces and the columns they lie in."""

    files: list[Path] = Field(default_factory=list)
    """`.jsonl`, `.json` or `.parquet` files, read in order."""
    hub: HubSource | None = None
    """A data set of the hub, instead of files."""
    question_column: str = "question"
    """Column that is matched with the prompt's own question."""
    response_column: str | None = "response"
    """Column with the whole answer, reasoning included, in any dialect."""
    reasoning_column: str | None = None
    """Column with the reasoning alone; then `response_column` holds the answer."""
    records_path: str | None = None
    """Key of the list of rows in a `.json` document that is an object, such as `results`."""
    strip_prompt: bool = False
    """The response column repeats the prompt before the reasoning: drop what precedes the opening marker."""


class Prices(Section):
    """What a teacher charges."""

    input_usd_per_mtok: float = Field(ge=0)
    """Dollars for a million input tokens."""
    output_usd_per_mtok: float = Field(ge=0)
    """Dollars for a million output tokens, reasoning included."""


class Budget(Section):
    """Limits at which generation stops cleanly (exit 3); raising them continues."""

    usd: float | None = unhashed(None, gt=0)
    """Dollars, by `prices`."""
    output_tokens: int | None = unhashed(None, gt=0)
    """Generated tokens."""
    hours: float | None = unhashed(None, gt=0)
    """Wall time of this process."""


class Endpoint(Section):
    """An OpenAI-compatible server."""

    base_url: str = unhashed("https://api.openai.com/v1")
    """Address up to and including `/v1`."""
    api_key_env: str = unhashed("OPENAI_API_KEY")
    """Name of the environment variable that holds the key; the key itself is never written anywhere."""
    model: str | None = unhashed(None)
    """What this server calls the model, where it is not `teacher.model`."""
    weight: float = unhashed(1.0, gt=0)
    """Share of the requests that goes here while all endpoints are healthy; of equal weights, each is kept full."""
    concurrency: int | Literal["auto"] = unhashed("auto")
    """Requests in flight at once; `auto` finds what the server takes, up to `max_concurrency`."""
    max_concurrency: int = unhashed(1024, gt=0)
    """Most requests in flight that `auto` tries."""
    rpm: float | None = unhashed(None, gt=0)
    """Most requests a minute."""
    tpm: float | None = unhashed(None, gt=0)
    """Most tokens a minute, input and output."""
    stream: bool = unhashed(False)
    """Let answers come in pieces; for gateways that cut long silent connections."""
    timeout_s: float = unhashed(600.0, gt=0)
    """Longest silence (no byte at all, keep-alive lines included) before a request is tried again."""
    max_retries: int = unhashed(6, ge=0)
    """Tries after the first for 429, 5xx, time-outs and connection resets."""
    prices: Prices | None = unhashed(None)
    """What this server charges, where it is not `teacher.prices`."""

    @model_validator(mode="after")
    def _some_concurrency(self) -> Self:
        if isinstance(self.concurrency, int) and self.concurrency < 1:
            raise ValueError(f"concurrency is {self.concurrency}; give a number above 0, or auto")
        return self


# --- verifiers ------------------------------------------------------------------------------------------------------


class ChoiceVerifier(Section):
    """The letter of a multiple-choice answer."""

    letters: str = Field(default="ABCDEFGHIJ", pattern=r"^[A-J]{2,10}$")
    """Letters that are options; any other one is text. What an option says is read from the row's `options` or
    `choices`."""


class RegexVerifier(Section):
    """A regular expression that the answer must match."""

    pattern: str | None = None
    """The expression, in Python's syntax; null takes each prompt's reference answer as one."""
    full: bool = True
    """Match the whole of the boxed content, or else the answer or its last line; false searches anywhere."""

    @model_validator(mode="after")
    def _compiles(self) -> Self:
        try:
            re.compile(self.pattern or "")
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"pattern {self.pattern!r} is no regular expression: {error}") from error
        return self


class JsonSchemaVerifier(Section):
    """A JSON Schema (Draft 2020-12) that the answer's JSON must satisfy."""

    file: Path
    """The schema; its content hash is part of the verifier's version, and it may refer to no other file or address."""


class CodeVerifier(Section):
    """Tests that the answer's Python code must pass, in a sandbox (bubblewrap) without network, files or secrets."""

    entry: Literal["asserts", "stdin"] = "asserts"
    """`asserts`: tests are Python statements that call the answer. `stdin`: tests are inputs of a program, and what it
    must print: a list of `{input: ..., output: ...}`, or `{inputs: [...], outputs: [...]}`."""
    tests_column: str = "test_list"
    """Column of the tests: a text, or a list of them; for `stdin` also as JSON text."""
    setup_column: str | None = None
    """Column of code that runs before the answer and before the tests, such as imports (MBPP's `test_imports`)."""
    entry_point_column: str | None = None
    """Column with the name of the function under test, for tests that define `check(candidate)` (HumanEval)."""
    timeout_s: float = unhashed(30.0, gt=0)
    """Longest time that all tests of an answer may take together; generous, since the machine may be busy."""
    cpu_s: int = Field(default=10, gt=0)
    """CPU seconds that a process of the answer may use."""
    memory_mb: int = Field(default=512, ge=64)
    """Memory of the answer's processes together."""
    file_mb: int = Field(default=16, gt=0)
    """Largest file that it may write, and the size of its private folder."""
    output_kb: int = Field(default=1024, gt=0)
    """Most that a program may print, for `stdin`; what `asserts` print is thrown away."""
    processes: int = Field(default=32, gt=0)
    """Processes and threads that it may have at once."""
    allow_unsandboxed: bool = unhashed(False)
    """Where there is no sandbox, run answers with the rights of this process, say so, and mark every verdict. Off, such
    a machine is refused before the run starts."""


RUBRIC = """Compare the answer with the reference answer to the question. Judge the final result only, not the way to
it or its wording. It is CORRECT if it means the same as the reference, WRONG if it does not or if there is no final
result, and UNSURE if the question and the reference do not let you tell.

Question:
{question}

Reference answer:
{gold}

Answer to judge:
{answer}"""
"""What a judge is asked where the recipe does not say otherwise."""


class JudgeVerifier(Section):
    """A language model, behind an OpenAI-compatible server, that judges answers by a rubric."""

    model: str
    """Model id as the server knows it."""
    endpoint: Endpoint = unhashed(Endpoint())
    """The server."""
    rubric: str = RUBRIC
    """What the judge is asked; `{question}`, `{gold}` and `{answer}` are filled in, the answer fenced off as data. How
    to end (`VERDICT: CORRECT`, `WRONG` or `UNSURE`) is added by us."""
    system: str | None = None
    """System prompt of the judge; null sends none."""
    temperature: float = Field(default=0.0, ge=0)
    """0 is greedy."""
    max_new_tokens: int = Field(default=2048, gt=0)
    """Limit of the judge's tokens, its reasoning included."""
    prices: Prices | None = unhashed(None)
    """What the judge charges; it counts against the budget."""

    @model_validator(mode="after")
    def _shows_the_answer(self) -> Self:
        if "{answer}" not in self.rubric:
            raise ValueError("rubric has no {answer}: the judge would not see what to judge")
        return self


class VerifierSection(Section):
    """A verifier with options, or several of them combined: exactly one of these keys."""

    choice: ChoiceVerifier | None = None
    """Multiple choice, A to J."""
    regex: RegexVerifier | None = None
    """A regular expression."""
    json_schema: JsonSchemaVerifier | None = None
    """A JSON Schema."""
    code: CodeVerifier | None = None
    """Tests of program code."""
    judge: JudgeVerifier | None = None
    """A language model with a rubric."""
    any_of: list["Verifier"] | None = Field(default=None, min_length=1)
    """Correct if any of these says correct, wrong if all say wrong."""
    all_of: list["Verifier"] | None = Field(default=None, min_length=1)
    """Correct if all of these say correct, wrong if any says wrong."""

    @model_validator(mode="after")
    def _one_key(self) -> Self:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            allowed = ", ".join([*type(self).model_fields, "file"])
            raise ValueError(f"a verifier is one of {allowed} (given: {', '.join(given) or 'none'})")
        return self


def _verifier_kind(value: Any) -> str:
    if isinstance(value, str):
        return "verifier:name"
    own_file = isinstance(value, FileVerifier) or (isinstance(value, Mapping) and "file" in value)
    return "verifier:file" if own_file else "verifier:section"


Verifier = Annotated[
    Annotated[str, Tag("verifier:name")]
    | Annotated[FileVerifier, Tag("verifier:file")]
    | Annotated[VerifierSection, Tag("verifier:section")],
    Discriminator(_verifier_kind),
]
"""What a recipe may say of a verifier: a name, a file of the user's own, or a section with options."""

VerifierSection.model_rebuild()
PromptSource.model_rebuild()


class Until(Section):
    """Adaptive sampling: a prompt gets samples until enough of them verify."""

    correct: int = Field(default=1, gt=0)
    """Stop a prompt once so many of its traces are judged correct."""
    tries: int = Field(default=4, gt=0, le=100)
    """Most samples a prompt."""

    @model_validator(mode="after")
    def _can_be_reached(self) -> Self:
        if self.tries < self.correct:
            raise ValueError(f"tries ({self.tries}) must be at least correct ({self.correct})")
        return self


class VllmOptions(Section):
    """vLLM in this process, under vLLM's own names; what only decides speed and memory is no part of the identity."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type to compute in; `auto` takes the checkpoint's, with float32 rounded to bfloat16 or float16."""
    quantization: str | None = None
    """How weights are quantized, such as `fp8`; null reads it from the checkpoint."""
    kv_cache_dtype: str = "auto"
    """Type of the key/value cache, such as `fp8`."""
    max_model_len: int | None = Field(default=None, gt=0)
    """Longest prompt and answer together, in tokens; null takes what the model allows. Less takes less memory."""
    tensor_parallel_size: int = unhashed(1, gt=0)
    """Devices that share each layer."""
    pipeline_parallel_size: int = unhashed(1, gt=0)
    """Groups of devices that each hold a part of the layers."""
    data_parallel_size: int = unhashed(1, gt=0)
    """Copies of the model that share the requests."""
    gpu_memory_utilization: float = unhashed(0.9, gt=0, le=1)
    """Share of each device's memory that vLLM may take."""
    kv_cache_gb: float | None = unhashed(None, gt=0)
    """Memory of the key/value cache of each device instead of what its share leaves; give it where there is no GPU."""
    max_num_seqs: int = unhashed(256, gt=0)
    """Most requests that a copy of the model answers at once."""
    enable_prefix_caching: bool = unhashed(True)
    """Keep the keys and values of common starts of prompts, such as a system prompt."""
    enforce_eager: bool = unhashed(False)
    """Do not compile the model: starts sooner, runs slower."""


class BatchOptions(Section):
    """A server's batch interface: answers within hours, at a lower price."""

    completion_window: str = unhashed("24h")
    """Time within which the server promises to be done; most offer `24h` only."""
    poll_s: float = unhashed(60.0, gt=0)
    """Longest pause between two looks at a batch; the first ones come sooner."""
    max_requests: int = unhashed(50_000, gt=0)
    """Most requests in a batch."""
    max_mb: float = unhashed(100.0, gt=0)
    """Largest batch that is uploaded, in megabytes."""
    max_open: int = unhashed(8, gt=0)
    """Most batches that the server holds at once."""
    price_ratio: float = unhashed(0.5, gt=0)
    """What a batch costs, as a share of `prices`."""


class TeacherConfig(Section):
    """Who writes the reasoning traces."""

    engine: EngineName
    """`openai`, `openai_batch`, `vllm`, `transformers`, `onnx`, `solver` (built-in worked solutions) or `recorded`
    (existing traces)."""
    model: str = ""
    """Model id as the engine knows it: a served name, a hub id, a folder or a GGUF file."""
    revision: str | None = None
    """Commit of the model where the engine takes one."""
    licence: str | None = unhashed(None)
    """Licence of the teacher's output, carried into every trace and card."""
    system: str | None = None
    """System prompt; null sends none, as DeepSeek advises for R1."""
    sampling: Sampling = Sampling()
    """How answers are drawn."""
    until: Until | None = None
    """Adaptive number of samples instead of `sampling.n`: stop a prompt once enough traces verify."""
    escalate: list[int] = []
    """Token limits with which a truncated sample is asked again, in turn, each above the one before; what was cut off
    is kept too. Empty asks no second time."""
    recorded: RecordedTraces | None = None
    """Where existing traces lie, for `engine: recorded`."""
    endpoint: Endpoint = unhashed(Endpoint())
    """The server, for `engine: openai` and `openai_batch`."""
    endpoints: list[Endpoint] = unhashed([])
    """A pool of servers instead of `endpoint`, by weight, with failover; all must serve the same model."""
    batch: BatchOptions = unhashed(BatchOptions())
    """How requests are handed in, for `engine: openai_batch`."""
    vllm: VllmOptions = VllmOptions()
    """How the model is run, for `engine: vllm`."""
    probe: bool = unhashed(True)
    """Send each endpoint one cheap request before the work, to check model, reasoning, parameters and context."""
    prices: Prices | None = unhashed(None)
    """What the teacher charges, for budgets and reports."""
    budget: Budget = unhashed(Budget())
    """When to stop."""
    batch_size: int = Field(default=16, gt=0)
    """Prompts generated together by local engines; part of the identity, since padding changes low bits."""
    continuous_batching: bool = False
    """Let `engine: transformers` put a new text in the place of one that has ended, `batch_size` at once: faster where
    texts differ much in length, slower where they are long, and sampled text does not come out the same again."""

    @model_validator(mode="after")
    def _has_what_its_engine_needs(self) -> Self:
        if self.engine == "recorded" and (
            self.recorded is None or bool(self.recorded.files) == (self.recorded.hub is not None)
        ):
            raise ValueError("engine: recorded takes recorded.files or recorded.hub, one of the two")
        if self.engine not in ("solver", "recorded") and not self.model:
            raise ValueError(f"engine: {self.engine} takes a model")
        if self.endpoints and self.endpoint != Endpoint():
            raise ValueError("give endpoint or endpoints, one of the two")
        if self.continuous_batching and self.engine != "transformers":
            raise ValueError(f"continuous_batching is for engine: transformers, not {self.engine}")
        if self.endpoints and self.engine == "openai_batch":
            raise ValueError("engine: openai_batch takes endpoint: a batch lies at one server")
        if self.until is not None:
            self._until_makes_sense(self.until)
        limits = [self.sampling.max_new_tokens, *self.escalate]
        if any(limit <= before for before, limit in zip(limits, self.escalate)):
            raise ValueError(f"escalate: limits must rise from sampling.max_new_tokens, given: {limits}")
        if self.budget.usd is not None and not all(self.prices_at(endpoint) for endpoint in self.servers):
            raise ValueError("budget.usd takes prices: what the teacher charges is in no list that we have")
        return self

    @property
    def servers(self) -> list[Endpoint]:
        """The pool, or the one server."""
        return self.endpoints or [self.endpoint]

    def prices_at(self, endpoint: Endpoint) -> Prices | None:
        """What a server charges: its own prices, the teacher's, or those of the dated list; None where unknown."""
        from distill.prices import listed_prices

        if endpoint.prices or self.prices:
            return endpoint.prices or self.prices
        listed = listed_prices(endpoint.base_url, endpoint.model or self.model)
        return listed.prices if listed and self.engine in ("openai", "openai_batch") else None

    def _until_makes_sense(self, until: Until) -> None:
        if self.sampling.n != 1:
            raise ValueError("until and sampling.n: give one of the two; until.tries limits the samples of a prompt")
        if until.tries > 1 and self.sampling.temperature == 0 and self.engine not in ("solver", "recorded"):
            raise ValueError("until.tries above 1 takes sampling.temperature above 0: greedy samples are all the same")


# --- select, format -------------------------------------------------------------------------------------------------


Action = Literal["drop", "flag", "ignore"]
"""What becomes of a trace in which something is found: `flag` counts it and lets it train, `ignore` does not look."""


class Loops(Section):
    """Text that goes in circles."""

    action: Action = "drop"
    """`drop`, `flag` (count only) or `ignore`."""
    repeats: int = Field(default=4, gt=1)
    """A phrase of 20 words counts as repeated when it stands so often in the text, word for word."""
    max_share: float = Field(default=0.6, gt=0, le=1)
    """Largest share of any 300 words in a row that may be repeated phrases."""
    min_compression: float = Field(default=0.08, ge=0, lt=1)
    """Smallest part of its size to which any 3,000 characters in a row may shrink when compressed."""


class LanguageMix(Section):
    """Letters of a script that the prompt does not have, such as Chinese in an English solution."""

    action: Action = "drop"
    """`drop`, `flag` (count only) or `ignore`."""
    max_letters: int = Field(default=4, ge=0)
    """Most such letters; Latin and Greek ones and those in quotation marks do not count."""


class Refusals(Section):
    """Answers such as "I'm sorry, but I can't help with that"."""

    action: Action = "drop"
    """`drop`, `flag` (count only) or `ignore`."""
    max_chars: int = Field(default=600, gt=0)
    """Longest answer, in characters, that is looked at."""


class NearDuplicateRules(Section):
    """Texts that nearly repeat an earlier one that trains.

    Texts with other numbers are never alike, nor are prompts with another reference or those of `reasoning_gym`.
    """

    prompts: Action = "drop"
    """Prompts nearly alike: the first one with a fit trace stays."""
    traces: Action = "drop"
    """Traces nearly alike; within one prompt they are looked for only where `per_prompt` is `all`."""
    across: Literal["prompt", "source"] = "prompt"
    """Compare the traces of one prompt, or all traces of a prompt source."""
    threshold: float = Field(default=0.9, gt=0, le=1)
    """Smallest similarity (of the sets of word n-grams) that counts as nearly alike."""


class Decontamination(Section):
    """Training prompts whose text overlaps a prompt of an evaluation set; equal prompts never train in any case.

    Problems of `reasoning_gym` are all worded alike, so evaluation sets of them are kept apart as whole prompts only.
    """

    action: Action = "drop"
    """`drop`, `flag` (count only) or `ignore`."""
    ngrams: list[Annotated[int, Field(gt=3)]] = [8, 13]
    """Lengths, in tokens, of the overlaps that are looked for; none of them finds whole problems only."""


class Select(Section):
    """Which traces train; everything else is kept and counted."""

    outcomes: list[Literal["correct", "wrong", "unverifiable", "timeout", "error"]] = ["correct"]
    """Verdicts that may train."""
    reasoning: Literal["required", "optional", "none"] = "required"
    """`required`: closed, non-empty reasoning. `optional`: closed or absent. `none`: reasoning is dropped."""
    min_chars: int | None = Field(default=None, gt=0)
    """Shortest reasoning plus answer, in characters."""
    max_chars: int | None = Field(default=None, gt=0)
    """Longest reasoning plus answer, in characters."""
    loops: Loops = Loops()
    """Repetition."""
    language_mix: LanguageMix = LanguageMix()
    """Languages that do not belong there."""
    refusals: Refusals = Refusals()
    """Refusals to answer."""
    secrets: Action = "drop"
    """API keys, tokens and private keys in what would train: `drop`, `flag` (count only) or `ignore`."""
    personal_data: Action = "drop"
    """E-mail addresses, telephone, bank account and card numbers: `drop`, `flag` (count only) or `ignore`."""
    decontamination: Decontamination = Decontamination()
    """Overlap with the evaluation sets of the recipe, the held-out prompts among them."""
    near_duplicates: NearDuplicateRules = NearDuplicateRules()
    """Texts nearly alike; traces of one prompt that are exactly alike train once in any case."""
    per_prompt: Literal["all", "first", "shortest", "random"] = "first"
    """Which of a prompt's remaining traces to keep."""
    max_per_source: int | float | dict[str, int | float] | None = None
    """Most examples of one prompt source: a number, or (below 1) a share of all examples; or such by source name."""
    limit: int | None = Field(default=None, gt=0)
    """Keep only so many examples, in prompt order."""
    seed: int = 0
    """Seed of `per_prompt: random` and of which examples stay under `max_per_source`."""

    @model_validator(mode="after")
    def _bounds_make_sense(self) -> Self:
        if self.min_chars is not None and self.max_chars is not None and self.min_chars > self.max_chars:
            raise ValueError(f"min_chars ({self.min_chars}) is above max_chars ({self.max_chars})")
        caps = self.max_per_source
        for cap in caps.values() if isinstance(caps, dict) else [caps]:
            if cap is not None and (cap <= 0 or (isinstance(cap, float) and cap >= 1)):
                raise ValueError(f"max_per_source: {cap} is neither a number of examples nor a share between 0 and 1")
        return self

    def cap(self, source: str) -> int | float | None:
        """Most examples of a prompt source: a number, a share below 1, or None for no limit."""
        return self.max_per_source.get(source) if isinstance(self.max_per_source, dict) else self.max_per_source


class FormatConfig(Section):
    """How prompts and traces become text: the same at training, evaluation and deployment."""

    template: str = "keep"
    """`keep` uses the tokenizer's own chat template, `r1` a plain one that opens the reasoning, else a Jinja file."""
    system: str | None = None
    """System prompt for the student; null leaves it to the template."""
    open_marker: str = "<think>"
    """Text that opens the reasoning."""
    close_marker: str = "</think>"
    """Text that closes the reasoning."""
    max_tokens: int = Field(default=4096, gt=0)
    """Longest training document in tokens; longer ones are dropped and counted, never cut."""


# --- logprobs -------------------------------------------------------------------------------------------------------


class TeacherModel(Section):
    """A model whose distribution is learned."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Name in runs and reports."""
    model: str
    """A hub id, a folder, a `.gguf` file, or `package:NAME/FILE.gguf`."""
    revision: str = "main"
    """Commit, tag or branch of a hub id; the resolved commit enters the identity."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """Who computes a cache: `transformers` exactly and in every form, `vllm` top-k only."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Precision of its matrix products; probabilities are always fp32."""
    vllm: VllmOptions = VllmOptions()
    """How the model is run, for `engine: vllm`; its `dtype` follows `precision` unless it is given."""
    licence: str | None = unhashed(None)
    """Licence of the model, carried into the student's card."""
    weight: float = Field(default=1.0, gt=0)
    """Share in the loss where there are several; the shares are scaled to 1."""


class Logprobs(Section):
    """The teachers' distributions over the supervised tokens of the traces, and how they are stored."""

    teachers: list[TeacherModel] = Field(min_length=1)
    """One teacher, or a mixture."""
    form: Literal["topk", "sampled", "hybrid"] = "sampled"
    """`topk`: the `k` likeliest tokens with their log-probabilities, and the mass of all others. `sampled`: `draws`
    tokens drawn from the distribution, as counts; unbiased, a tenth of the bytes (Anshumann et al. 2025). `hybrid`: the
    `k` likeliest exactly, and `draws` drawn from the others."""
    k: int = Field(default=64, gt=0)
    """Tokens of the exact head."""
    draws: int = Field(default=50, gt=0, le=65536)
    """Tokens drawn for each position."""
    temperature: float = Field(default=1.0, gt=0)
    """The distribution is softmax(logits / T)."""
    seed: int = 0
    """Seed of the draws."""
    alignment: Literal["same_tokenizer", "spans"] = "same_tokenizer"
    """`spans` lets a teacher with another tokenizer score its own tokens of the same text; positions are compared where
    both have a token that begins at the same character, over the tokens that both vocabularies spell alike."""
    min_coverage: float = unhashed(0.5, ge=0, le=1)
    """Least share of the supervised tokens that `spans` must align; below, scoring is refused."""
    micro_batch_tokens: int = unhashed(4096, gt=0)
    """Tokens a forward pass of the teacher."""

    @model_validator(mode="after")
    def _forms_fit(self) -> Self:
        names = [one.name for one in self.teachers]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"teachers: two are called {twice.pop()!r}; names must differ")
        if self.form != "topk" and self.alignment == "spans":
            raise ValueError(f"form is {self.form}, but alignment spans stores top-k only; set form: topk")
        served = next((one.name for one in self.teachers if one.engine == "vllm"), None)
        if served and (self.form != "topk" or self.temperature != 1 or self.alignment == "spans"):
            raise ValueError(
                f"teachers: {served} is scored by vllm, which gives the likeliest tokens at temperature 1 only; set"
                " form: topk, temperature: 1 and alignment: same_tokenizer, or engine: transformers"
            )
        return self

    def key(self, name: str) -> str:
        """Where a teacher stands in the recipe, as an override would write it: `logprobs.teachers.0`."""
        return f"logprobs.teachers.{[one.name for one in self.teachers].index(name)}"

    def weights(self) -> dict[str, float]:
        """Each teacher's share in the loss; they add up to 1."""
        total = sum(one.weight for one in self.teachers)
        return {one.name: one.weight / total for one in self.teachers}


# --- student --------------------------------------------------------------------------------------------------------


class LossWeights(Section):
    """How much each part of an answer counts in the loss; a part with weight 0 is not supervised."""

    think: float = Field(default=1.0, ge=0)
    """Reasoning, its markers included."""
    answer: float = Field(default=1.0, ge=0)
    """Text after the reasoning."""
    eos: float = Field(default=1.0, gt=0)
    """End token; without it a student never learns to stop."""


class Replay(Section):
    """Another set of chats that is mixed into the training, so that a student keeps what it knew."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Name in counts and reports."""
    file: Path | None = None
    """A `.jsonl`, `.json`, `.csv` or `.parquet` file of rows."""
    hub: HubSource | None = None
    """A data set of the hub."""
    messages_column: str = "messages"
    """Column with the chat: a list of `{role, content}`; every assistant turn is supervised."""
    prompt_column: str | None = None
    """Column with the user's text, for sets of one turn; then `response_column` holds the assistant's."""
    response_column: str = "response"
    """Column with the assistant's text, where `prompt_column` is given; reasoning markers in it are read."""
    weight: float = Field(default=0.1, gt=0)
    """Tokens of this set for each token of the traces, in every epoch; epochs go on where the one before ended."""
    limit: int | None = Field(default=None, gt=0)
    """Take only the first rows."""
    licence: str | None = unhashed(None)
    """Licence of the set, carried into the model card."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.file is None) == (self.hub is None):
            raise ValueError("a replay set takes file or hub, one of the two")
        return self


class Lora(Section):
    """Low-rank adapters instead of all weights (Hu et al. 2021), merged into a plain checkpoint at the phase's end."""

    rank: int = Field(default=16, gt=0)
    """Rank of each adapter."""
    alpha: int = Field(default=32, gt=0)
    """Scale: the adapter's product is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the adapters."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Modules by the end of their name (`q_proj`, …); `all-linear` is every projection of every layer."""
    modules_to_save: list[str] = []
    """Modules trained whole beside the adapters: `lm_head`, `embed_tokens` of a model whose head is untied."""
    quantize: Literal["none", "nf4"] = "none"
    """`nf4` keeps the base's weights in four bits while training (QLoRA, Dettmers et al. 2023); needs a CUDA GPU."""

    @model_validator(mode="after")
    def _leaves_the_vocabulary_alone(self) -> Self:
        named = [] if self.targets == "all-linear" else list(self.targets)
        if wrong := [name for name in named if name.rpartition(".")[2] in ("lm_head", "embed_tokens")]:
            raise ValueError(
                f"targets: {wrong[0]} is refused: an adapter on it cannot be merged where head and embedding share"
                " their weights; name it in modules_to_save (untied heads only), or leave it out"
            )
        return self


class EarlyStopping(Section):
    """Stop when the monitor's figure no longer improves; the phase then ends with its best weights."""

    metric: Literal["heldout_loss", "accuracy"] = "heldout_loss"
    """`heldout_loss` (falling) or `accuracy` on the monitor's first set (rising)."""
    patience: int = Field(default=3, gt=0)
    """Looks in a row without an improvement before it stops."""
    min_delta: float = Field(default=0.0, ge=0)
    """Smallest change that counts as an improvement."""


class Monitor(Section):
    """What is measured while training, at chosen steps; it changes nothing unless `early_stopping` reads it."""

    every_steps: int = Field(default=100, gt=0)
    """Steps between two looks; there is always one before the first step and one after the last."""
    sets: list[str] = []
    """Evaluation sets on which the student writes answers: the task, and one it is not trained on, so that forgetting
    shows."""
    problems: int = Field(default=32, gt=0)
    """Problems of each set."""
    max_new_tokens: int = Field(default=512, gt=0)
    """Limit of an answer's tokens."""
    batch_size: int = Field(default=32, gt=0)
    """Prompts generated together."""
    kl: bool = False
    """Also measure how far the student is from the phase's teachers on the held-out traces: `heldout_kl`, the mean
    KL(teacher || student) in nats a token. From drawn tokens it has the teacher's entropy in it, a constant."""
    lm_eval: list[str] = []
    """Tasks of lm-evaluation-harness, where it is installed."""
    lm_eval_limit: int | None = Field(default=64, gt=0)
    """Items of each such task."""


class TrainingPhase(Section):
    """What every kind of phase has: how long, in which steps, with which optimizer, watched how."""

    lr: float = Field(default=1e-5, gt=0)
    """Peak learning rate."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the examples; a fraction takes that share of the last pass."""
    max_steps: int | None = Field(default=None, gt=0)
    """Stop after so many optimizer steps."""
    step_tokens: int = Field(default=16384, gt=0)
    """Tokens (prompts included) an optimizer step."""
    micro_batch_tokens: int = Field(default=4096, gt=0)
    """Tokens a forward pass: documents are packed up to this many and never see one another."""
    batching: Literal["packed", "bucketed"] = "packed"
    """`packed` lays documents end to end; `bucketed` pads documents of like length to one another."""
    loss_weights: LossWeights = LossWeights()
    """Weights of the parts of an answer."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target that is spread over the vocabulary."""
    z_loss: float = Field(default=0.0, ge=0)
    """Weight of the squared log of the softmax's normaliser, which keeps logits small (PaLM, Chowdhery et al. 2022)."""
    neftune_alpha: float | None = Field(default=None, gt=0)
    """Uniform noise on the embeddings, of size alpha / sqrt(tokens x width) (NEFTune, Jain et al. 2023)."""
    optimizer: Literal["adamw", "adafactor", "adamw_8bit"] = "adamw"
    """`adamw`, `adafactor` (Shazeer and Stern 2018), or `adamw_8bit` of bitsandbytes."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Learning-rate schedule after the warm-up; `wsd` stays at the peak and falls as 1 - sqrt at the end."""
    warmup_ratio: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps in which the rate rises from 0."""
    decay_ratio: float = Field(default=0.2, gt=0, le=1)
    """Share of the steps in which the rate of `wsd` falls."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Rate at the end as a share of the peak, for cosine, linear and wsd."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay, on matrices only."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's first-moment decay."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """AdamW's second-moment decay."""
    grad_clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """End with a running mean of the weights, this much of it kept at each step, instead of the last ones."""
    lora: Lora | None = None
    """Train adapters instead of all weights."""
    replay: list[Replay] = []
    """Other sets that are mixed in."""
    heldout_traces: int = Field(default=0, ge=0)
    """Traces set aside for the monitor's held-out loss; they do not train."""
    monitor: Monitor | None = unhashed(None)
    """What is measured while training."""
    early_stopping: EarlyStopping | None = None
    """When to stop before the last step."""
    seed: int = 0
    """Seed of the order of examples."""
    gradient_checkpointing: bool = unhashed(False)
    """Recompute activations in the backward pass to save memory."""
    compile: bool = unhashed(False)
    """Let torch.compile generate code for the layers; takes a compiler and a minute or more at the start."""
    fused: bool = unhashed(True)
    """Lean forms of norm, rotation and feed-forward where the architecture allows; off runs transformers' own code."""
    loss_kernel: Literal["chunked", "liger", "cut_cross_entropy"] = unhashed("chunked")
    """Who computes the loss: our chunked one, or a CUDA library that is first held against it."""
    checkpoint_every_steps: int = unhashed(50, gt=0)
    """Steps between checkpoints from which a killed run goes on."""
    keep_checkpoints: int = unhashed(2, ge=1)
    """Newest checkpoints to keep; the best one by `early_stopping` is kept beside them."""

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        names = [one.name for one in self.replay]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"replay: two sets are called {twice.pop()!r}; names must differ")
        if self.loss_weights.think == 0 and self.loss_weights.answer == 0:
            raise ValueError("loss_weights: think and answer are both 0; nothing but the end token would be learned")
        if self.loss_kernel != "chunked" and (
            self.label_smoothing or self.z_loss or self.loss_weights != LossWeights()
        ):
            raise ValueError(
                f"loss_kernel: {self.loss_kernel} has no weights, smoothing or z-loss; take loss_kernel: chunked"
            )
        if self.early_stopping is not None:
            self._stopping_has_figures(self.early_stopping)
        if self.monitor and self.monitor.kl and not self.heldout_traces:
            raise ValueError("monitor.kl is measured on held-out traces: set heldout_traces above 0")
        return self

    def _stopping_has_figures(self, stopping: EarlyStopping) -> None:
        if self.monitor is None:
            raise ValueError("early_stopping takes a monitor: add monitor with every_steps")
        if stopping.metric == "heldout_loss" and not self.heldout_traces:
            raise ValueError("early_stopping.metric heldout_loss takes heldout_traces above 0")
        if stopping.metric == "accuracy" and not self.monitor.sets:
            raise ValueError("early_stopping.metric accuracy takes monitor.sets: name an evaluation set")


class SftPhase(TrainingPhase):
    """Supervised fine-tuning on the selected traces."""

    kind: Literal["sft"]
    """Cross-entropy on reasoning, answer and end token."""

    @model_validator(mode="after")
    def _has_no_teachers(self) -> Self:
        if self.monitor and self.monitor.kl:
            raise ValueError("monitor.kl: an sft phase has no teachers to be near to; leave it out")
        return self


Divergence = Literal["forward_kl", "reverse_kl", "jsd", "skewed_kl", "skewed_reverse_kl", "taid"]


class HiddenStates(Section):
    """The student's hidden states drawn to those of a teacher in memory, through learned projections."""

    weight: float = Field(default=1.0, gt=0)
    """Weight of this loss beside the divergence."""
    layers: list[tuple[int, int]] = []
    """Pairs of a student's layer and the teacher's whose output it should give, from 1; none pairs all layers of the
    student evenly with the teacher's."""
    attention: float = Field(default=0.0, ge=0)
    """Weight of the same loss on what attention gives in these layers, before it joins the residual stream."""
    seed: int = 0
    """Seed of the projections' first values where the widths differ; equal widths start at the identity."""


class KdPhase(TrainingPhase):
    """Logit distillation: the student learns the teacher's distribution at every supervised token of the traces."""

    kind: Literal["kd"]
    """A divergence between the teachers of `logprobs` and the student."""
    teacher: Literal["cache", "memory"] = "cache"
    """`cache` reads the distributions that the score stage has stored, `memory` keeps the teachers beside the student
    and lets them score each pass: exact, and as slow as they are."""
    divergence: Divergence = "forward_kl"
    """`forward_kl` KL(teacher || student), `reverse_kl` KL(student || teacher), `jsd` the generalised Jensen-Shannon
    divergence of GKD (Agarwal et al. 2024), `skewed_kl` and `skewed_reverse_kl` (DistiLLM, Ko et al. 2024), `taid`
    forward KL to a target that moves from the student to the teacher (Shing et al. 2025)."""
    temperature: float = Field(default=1.0, gt=0)
    """Both distributions are softmax(logits / T), and the loss is multiplied by T**2; a cache must hold the same T."""
    jsd_beta: float = Field(default=0.5, gt=0, lt=1)
    """Share of the teacher in the mixture of `jsd`."""
    skew: float = Field(default=0.1, gt=0, lt=1)
    """Share of the other distribution that the skewed divergences mix in."""
    taid_start: float = Field(default=0.4, ge=0, lt=1)
    """Share of the teacher's logits in the target of `taid` at the first step."""
    taid_end: float = Field(default=1.0, gt=0, le=1)
    """The same at the last step; the share never falls between."""
    taid_schedule: Literal["linear", "adaptive"] = "linear"
    """How the share rises: evenly, or `adaptive`: at least evenly, and faster while the loss falls."""
    taid_rate: float = Field(default=5e-4, gt=0, le=1)
    """Size of the adaptive steps (alpha of Shing et al. 2025)."""
    taid_momentum: float = Field(default=0.99, ge=0, lt=1)
    """How much of the running mean of the loss's relative change is kept at each step (their beta)."""
    tail: Literal["bucket", "renormalised_biased", "truncated_biased"] = "bucket"
    """What becomes of the mass outside a `topk` cache: one more outcome (exact on that partition); or, biased, the head
    scaled up to 1, or the tail left out."""
    kd_weight: float = Field(default=1.0, gt=0)
    """Weight of the divergence."""
    ce_weight: float = Field(default=0.0, ge=0)
    """Weight of the cross-entropy on the traces' own tokens."""
    hidden: HiddenStates | None = None
    """Also learn from the hidden states of a teacher in memory."""

    @model_validator(mode="after")
    def _distils(self) -> Self:
        if self.label_smoothing or self.z_loss or self.loss_kernel != "chunked":
            raise ValueError(
                f"{self.kind}: label_smoothing, z_loss and loss_kernel belong to sft phases; leave them out"
            )
        if self.hidden and self.teacher == "cache":
            raise ValueError("hidden: a cache holds no hidden states; set teacher: memory")
        if self.replay and self.teacher == "cache":
            raise ValueError("replay: its chats are in no cache; set teacher: memory, or replay in an sft phase")
        if self.hidden and (self.lora or self.gradient_checkpointing):
            raise ValueError("hidden: goes with neither lora nor gradient_checkpointing; leave them out")
        if self.taid_end <= self.taid_start:
            raise ValueError(f"taid_end is {self.taid_end:g}; it must be above taid_start ({self.taid_start:g})")
        return self


class WriterOptions(VllmOptions):
    """vLLM beside the student that it writes for, in the same process and on the same device."""

    gpu_memory_utilization: float = unhashed(0.3, gt=0, le=1)
    """Share of the device's memory that vLLM may take; the training needs the rest."""

    @model_validator(mode="after")
    def _beside_the_student(self) -> Self:
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
            if getattr(self, name) != 1:
                raise ValueError(f"{name}: vLLM writes on the student's own device; leave it out")
        if self.quantization is not None:
            raise ValueError("quantization: the student's weights are handed over as they are; leave it out")
        return self


class OnPolicyPhase(KdPhase):
    """On-policy distillation: the student answers the prompts itself, and the teacher scores what it wrote."""

    kind: Literal["on_policy"]  # type: ignore[assignment]
    """A divergence at the tokens that the student has drawn."""
    teacher: Literal["memory"] = "memory"
    """The teachers of `logprobs` are kept beside the student."""
    divergence: Divergence | Literal["sampled_reverse_kl"] = "reverse_kl"  # type: ignore[assignment]
    """As in a kd phase; `sampled_reverse_kl` looks at the drawn tokens alone, log student - log teacher being the cost
    of each (the gradient of reverse KL in expectation, with more noise)."""
    on_policy_fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of each step's prompts that the student answers; the rest keep their traces (GKD's lambda)."""
    max_new_tokens: int = Field(default=512, gt=0)
    """Limit of an answer's tokens; those that reach it are learned from without an end token."""
    sampling_temperature: float = Field(default=1.0, gt=0)
    """Temperature at which the student draws."""
    batch_size: int = Field(default=32, gt=0)
    """Prompts answered together (vLLM batches by itself)."""
    writer: Literal["transformers", "vllm"] = "transformers"
    """Who computes what the student writes: the model that trains, by transformers' generation; or a vLLM beside it,
    which is given the weights anew."""
    sync_every_steps: int = Field(default=1, gt=0)
    """Optimizer steps after which vLLM is given the weights again; above 1, answers are of an older student."""
    vllm: WriterOptions = WriterOptions()
    """How vLLM runs, for `writer: vllm`; its `dtype` is the student's precision unless it is given."""
    min_stop_rate: float = Field(default=0.5, ge=0, le=1)
    """Least share of answers that must end by themselves, at the start and over each of the later windows; below, it
    stops: such a student needs supervised training first."""
    guard_window: int = Field(default=64, gt=0)
    """Answers over which the stop rate is taken."""
    max_length_growth: float = Field(default=4.0, gt=1)
    """Largest mean length of a window of answers, as a multiple of the first one's."""

    @model_validator(mode="after")
    def _learns_from_itself(self) -> Self:
        if self.ce_weight:
            raise ValueError("ce_weight: the tokens are the student's own; leave it out, or put an sft phase before")
        if self.loss_weights != LossWeights():
            raise ValueError("loss_weights: what the student writes is not split into parts; leave them out")
        if self.sync_every_steps != 1 and self.writer != "vllm":
            raise ValueError("sync_every_steps: transformers writes with the weights as they are; set writer: vllm")
        if self.writer == "vllm" and self.lora and self.lora.quantize != "none":
            raise ValueError("writer vllm takes whole weights: set writer: transformers, or lora.quantize: none")
        if self.divergence == "sampled_reverse_kl" and (
            self.on_policy_fraction != 1 or self.temperature != self.sampling_temperature
        ):
            raise ValueError(
                "divergence sampled_reverse_kl takes the student's own draws alone: set on_policy_fraction: 1 and"
                " sampling_temperature equal to temperature"
            )
        return self


def _phase_kind(value: Any) -> str | None:
    return value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)


Phase = Annotated[
    Annotated[SftPhase, Tag("sft")] | Annotated[KdPhase, Tag("kd")] | Annotated[OnPolicyPhase, Tag("on_policy")],
    Discriminator(_phase_kind),
]


class Prune(Section):
    """A smaller student cut out of `init`: fewer layers, narrower feed-forwards, or both."""

    layers: int | list[int] | None = None
    """How many layers to keep, the least important ones dropped (measured on the traces), or the indices of those to
    keep."""
    mlp_width: int | None = Field(default=None, gt=0)
    """Units of each feed-forward to keep, those with the largest activations on the traces."""
    importance: Literal["block_influence", "perplexity"] = "block_influence"
    """How layers are ranked: `block_influence` is 1 - cosine between a layer's input and output (Men et al. 2024),
    `perplexity` the loss without it, one removed after the other."""
    calibration_tokens: int = Field(default=32768, gt=0)
    """Tokens of traces on which importance is measured."""

    @model_validator(mode="after")
    def _cuts_something(self) -> Self:
        if self.layers is None and self.mlp_width is None:
            raise ValueError("prune: give layers, mlp_width or both")
        if isinstance(self.layers, list) and (
            not self.layers or len(set(self.layers)) != len(self.layers) or min(self.layers) < 0
        ):
            raise ValueError(f"layers: {self.layers} must be different indices from 0 on, at least one")
        if isinstance(self.layers, int) and self.layers < 1:
            raise ValueError(f"layers is {self.layers}; at least one must stay")
        return self

    @property
    def measured(self) -> bool:
        """Whether something has to be measured on traces."""
        return isinstance(self.layers, int) or self.mlp_width is not None


class StudentConfig(Section):
    """The model that learns."""

    init: str
    """A hub id, a folder, a `.gguf` file, or `package:NAME/FILE.gguf` for one that a Python package ships."""
    revision: str = "main"
    """Commit, tag or branch of a hub id; the resolved commit enters the identity."""
    licence: str | None = unhashed(None)
    """Licence of the base, carried into the artifact's manifest and card."""
    prune: Prune | None = None
    """Cut a smaller student out of `init` first; the base of evaluations is then the pruned one."""
    new_tokens: list[str] = []
    """Tokens to add to the vocabulary where it lacks them, such as `<think>`; their rows start as the mean of the
    pieces they were spelled with, and train."""
    phases: list[Phase] = []
    """Training phases, each starting from the one before; none evaluates and exports the model as it is."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Compute precision; master weights and optimizer state are always fp32."""
    attention: Literal["auto", "per_document", "flash_attention_2", "sdpa", "eager"] = unhashed("auto")
    """Attention for packed documents: flash-attention on CUDA, our per-document one elsewhere. `sdpa` and `eager` take
    a mask of the whole pack: slow, for checks."""
    parallel: Literal["auto", "ddp", "fsdp", "zero1", "zero2", "zero3"] = unhashed("auto")
    """With several processes (torchrun): `ddp` keeps a whole model in each, `fsdp` shards weights and optimizer over
    them, `zero1`, `zero2` and `zero3` let DeepSpeed shard optimizer, gradients and weights; `auto` is ddp, or what
    accelerate was told of DeepSpeed."""
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = unhashed([])
    """Where metrics are also sent, beside metrics.jsonl."""

    @model_validator(mode="after")
    def _new_tokens_are_trained(self) -> Self:
        if self.new_tokens and any(
            phase.lora and "embed_tokens" not in phase.lora.modules_to_save for phase in self.phases
        ):
            raise ValueError(
                "new_tokens: their rows would not train under lora; name embed_tokens (and lm_head) in"
                " lora.modules_to_save, or train all weights in the first phase"
            )
        return self


# --- evaluate, export -----------------------------------------------------------------------------------------------


class EvalSet(Section):
    """A named evaluation set: the held-out prompts, or a source of its own."""

    source: PromptSource | None = None
    """Prompts of this set; null takes the held-out prompts of the recipe."""
    limit: int | None = Field(default=None, gt=0)
    """Evaluate only the first problems."""


class Evaluate(Section):
    """Verified accuracy of teacher, base, student and artifact on named sets."""

    sets: dict[str, EvalSet] = {"heldout": EvalSet()}
    """Sets by name; none of their prompts ever trains."""
    models: list[Literal["teacher", "base", "student"]] = ["teacher", "base", "student"]
    """Which models to evaluate beside the exported variants."""
    sampling: Sampling = Sampling(max_new_tokens=1024)
    """Greedy by default; n above 1 needs a temperature."""
    batch_size: int = Field(default=64, gt=0)
    """Prompts generated together."""
    token_budgets: list[int] = unhashed([32, 64, 128, 256, 512, 1024, 2048, 4096])
    """Budgets at which accuracy is reported as if generation had stopped there."""

    @model_validator(mode="after")
    def _samples_differ(self) -> Self:
        if self.sampling.n > 1 and self.sampling.temperature == 0:
            raise ValueError("sampling.n above 1 takes a temperature above 0: greedy samples are all the same")
        return self


class Gates(Section):
    """Limits an exported variant must keep; a failed one stops the run with exit 3."""

    parity_tokens: int = Field(default=2048, gt=0)
    """Held-out tokens on which logits are compared with the torch student: those of its answers, where it has any."""
    decode_steps: int = Field(default=64, gt=0)
    """Tokens fed one by one through the cache, on which logits are compared too."""
    greedy_prompts: int = Field(default=32, gt=0)
    """Prompts whose greedy continuation in fp32 must equal torch's; begun answers stand in where there are fewer."""
    greedy_tokens: int = Field(default=64, gt=0)
    """New tokens compared for each of them."""
    max_kl: dict[Variant, float] = {"fp32": 1e-4, "fp16": 1e-3, "int8": 0.01, "int4": 0.05, "q4f16": 0.05}
    """Largest mean KL(torch || variant) in nats a token, over whole texts and over cached steps."""
    min_top1: dict[Variant, float] = {"fp32": 0.999, "fp16": 0.995, "int8": 0.97, "int4": 0.93, "q4f16": 0.93}
    """Smallest share of positions where both prefer the same token; another runtime, asked about few, fails where it is
    surely below."""
    max_perplexity: dict[Variant, float] = {"fp32": 1.001, "fp16": 1.005, "int8": 1.02, "int4": 1.05, "q4f16": 1.05}
    """Largest ratio of the variant's perplexity on the held-out tokens to the torch student's."""
    max_accuracy_drop: float = Field(default=0.05, ge=0)
    """The task gate fails when accuracy surely falls by more than this: lower 95% bound of the paired drop."""
    min_gain_retained: float = Field(default=0.9, ge=0, le=1)
    """Share of the student's gain over its base that a variant must keep: fails when the upper 95% bound is below."""

    def of(self, name: Literal["max_kl", "min_top1", "max_perplexity"], variant: str) -> float:
        """A variant's limit: the recipe's, else the default one."""
        limits: dict[str, float] = {**type(self).model_fields[name].default, **getattr(self, name)}
        return limits[variant]


class FourBits(Section):
    """Which of the schemes with four bits may be tried; what is not given is for the gates to decide."""

    method: Literal["rtn", "k_quant", "gptq"] | None = None
    """How weights are rounded."""
    head_bits: Literal[4, 8] | None = None
    """Bits of the output head and a tied embedding."""
    calibration_tokens: int = Field(default=12288, gt=0)
    """Tokens of the training set (of the student's own writing where there is none) that GPTQ is calibrated on."""


class ExportConfig(Section):
    """Conversion of the student to ONNX, its gates and its packaging."""

    variants: list[Variant] = Field(default=["fp32", "int8", "int4"], min_length=1)
    """Graphs to make; the last one is what onnxruntime-genai loads by itself."""
    model: str | None = None
    """Checkpoint to export where the recipe trains none: a folder or hub id."""
    licence: str | None = unhashed(None)
    """Licence of `model`, carried into the artifact's manifest and card."""
    set: str = "heldout"
    """Evaluation set of the task gate."""
    gates: Gates = Gates()
    """Limits."""
    ladder: bool = True
    """Whether a variant that misses a gate is made again by the next better scheme; else the first one must pass."""
    max_mb: dict[Variant, float] = {}
    """Most megabytes (10**6 bytes) of a variant's weights: decides which schemes of its ladder there are."""
    four_bits: FourBits = FourBits()
    """Schemes of `int4` and `q4f16`."""
    golden_prompts: int = Field(default=4, ge=0)
    """Prompts kept in the artifact with their expected tokens, for `distill verify`."""
    gguf: Literal["f16", "bf16", "q8_0"] | None = None
    """Also a GGUF of this type for llama.cpp, made by its own converter where that is on this machine."""
    bench: bool = unhashed(False)
    """Whether `distill bench` runs for every variant, to stand in the manifest and on the card."""
    runtimes: list[Runtime] = ["genai", "node", "browser", "optimum"]
    """Libraries that are asked the same questions as torch was; the gates of those that are not here are not run."""
    runtime_prompts: int = Field(default=4, gt=0)
    """Held-out prompts and texts that each of them is asked."""

    @model_validator(mode="after")
    def _variants_differ(self) -> Self:
        if twice := {variant for variant in self.variants if self.variants.count(variant) > 1}:
            raise ValueError(f"export.variants: {twice.pop()} is there twice")
        if unknown := sorted(set(self.max_mb) - set(self.variants)):
            raise ValueError(f"export.max_mb: {unknown[0]} is not among export.variants ({', '.join(self.variants)})")
        return self


class Recipe(Section):
    """One experiment. Every section is optional."""

    name: str = unhashed("recipe", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Name of runs and reports; the file's stem where it is not given."""
    prompts: list[PromptSource] = []
    """Where the problems come from."""
    teacher: TeacherConfig | None = None
    """Who answers them."""
    select: Select = Select()
    """Which answers train."""
    format: FormatConfig = FormatConfig()
    """How they become text."""
    logprobs: Logprobs | None = None
    """Whose distributions are learned, beside the traces."""
    student: StudentConfig | None = None
    """Who learns."""
    evaluate: Evaluate | None = None
    """What is measured."""
    export: ExportConfig | None = None
    """What ships."""

    @model_validator(mode="after")
    def _sections_fit_together(self) -> Self:
        names = [source.name for source in self.prompts]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"prompts: two sources are called {twice.pop()!r}; names must differ")
        if self.teacher and not self.prompts:
            raise ValueError("teacher: there is nothing to answer; add prompts")
        self._caps_fit_the_sources(names)
        if self.student and self.student.phases and not self.teacher:
            raise ValueError("student.phases: there is nothing to train on; add prompts and a teacher")
        if self.student:
            self._monitors_have_sets(self.student)
            self._teachers_are_there(self.student)
        if self.evaluate:
            self._evaluation_has_prompts(self.evaluate)
        if self.export and not self.student and not self.export.model:
            raise ValueError("export: there is no model to export; add student or export.model")
        return self

    def _caps_fit_the_sources(self, names: Sequence[str]) -> None:
        caps = self.select.max_per_source
        if isinstance(caps, dict) and (unknown := next((name for name in caps if name not in names), None)):
            near = difflib.get_close_matches(unknown, names, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"select.max_per_source: no prompt source is called {unknown!r}{hint}; {', '.join(names)}")
        shares = [cap for name in names if isinstance(cap := self.select.cap(name), float)]
        if names and len(shares) == len(names) and sum(shares) < 1:
            raise ValueError(
                f"select.max_per_source: the shares of all sources add up to {sum(shares):g}; they must reach 1, or no"
                " data set can have them"
            )

    def _monitors_have_sets(self, student: StudentConfig) -> None:
        known = list(self.evaluate.sets) if self.evaluate else []
        for index, phase in enumerate(student.phases):
            for name in phase.monitor.sets if phase.monitor else ():
                if name not in known:
                    choice = f"choose of {', '.join(known)}" if known else "add an evaluate section"
                    raise ValueError(
                        f"student.phases.{index}.monitor.sets: no evaluation set is called {name!r}; {choice}"
                    )
        if student.prune and student.prune.measured and not self.teacher:
            raise ValueError(
                "student.prune: importance is measured on traces; add prompts and a teacher, or give indices"
            )

    def _teachers_are_there(self, student: StudentConfig) -> None:
        for index, phase in enumerate(student.phases):
            if not isinstance(phase, KdPhase):
                continue
            where, stored = f"student.phases.{index}", self.logprobs
            if stored is None:
                raise ValueError(f"{where} is a {phase.kind} phase; add a logprobs section with its teachers")
            if phase.teacher == "memory":
                if stored.alignment == "spans":
                    raise ValueError(
                        f"{where}: a teacher in memory must have the student's tokenizer; set teacher: cache"
                    )
                continue
            if phase.temperature != stored.temperature:
                raise ValueError(
                    f"{where}.temperature is {phase.temperature:g}, but logprobs.temperature is {stored.temperature:g};"
                    " a cache serves the temperature that it was made at"
                )
            if stored.form != "topk" and phase.divergence != "forward_kl":
                raise ValueError(
                    f"{where}.divergence is {phase.divergence}, but drawn tokens (logprobs.form: {stored.form}) give"
                    " forward_kl only; set logprobs.form: topk, or teacher: memory"
                )

    def _evaluation_has_prompts(self, evaluate: Evaluate) -> None:
        heldout = sum(source.heldout for source in self.prompts)
        for name, chosen in evaluate.sets.items():
            if chosen.source is None and heldout == 0:
                raise ValueError(f"evaluate.sets.{name}: no prompts are held out; set prompts.0.heldout or a source")
        if self.export and self.export.set not in evaluate.sets:
            raise ValueError(f"export.set is {self.export.set!r}; choose one of {', '.join(evaluate.sets)}")


# --- reading --------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML 1.1 that refuses duplicate keys and reads `1e-4` as a number."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)?|\.inf|\.nan)$"),
    list("-+0123456789."),
)

Keys = tuple[str | int, ...]


class Located(NamedTuple):
    """Plain values of a YAML document and the line (from 1) of every key in it."""

    value: Any
    lines: dict[Keys, int]


def parse_yaml(text: str, where: str) -> Located:
    """Read one YAML document.

    Raises RecipeError with file and line for broken YAML and for duplicate keys.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        lines: dict[Keys, int] = {}
        if node is not None:
            _check_node(node, (), lines, where)
        return Located(loader.construct_document(node) if node is not None else {}, lines)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"{where}:{line}: not valid YAML: {error.problem}") from error
    finally:
        loader.dispose()


def _check_node(node: yaml.Node, path: Keys, lines: dict[Keys, int], where: str) -> None:
    """Record where each key stands and refuse one that stands twice."""
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            _check_node(child, (*path, index), lines, where)
    if isinstance(node, yaml.MappingNode):
        for key, child in node.value:
            at, line = (*path, key.value), key.start_mark.line + 1
            if at in lines:
                raise RecipeError(
                    f"{where}:{line}: {key.value!r} is given twice (first on line {lines[at]}); keep one of the two"
                )
            lines[at] = line
            _check_node(child, at, lines, where)


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `section.key=value` overrides (default < file < override).

    Relative paths in the recipe are taken from the recipe's folder. Raises RecipeError naming file, line, key, value,
    what is allowed and the nearest valid key.
    """
    path = Path(path)
    located = read_values(path)
    for override in overrides:
        apply_override(located.value, override)
    return recipe_of(located, path)


def read_values(path: Path, what: str = "recipe") -> Located:
    """The plain values of a file of sections, with its stem as their name where they have none.

    Raises RecipeError for a file that is not there, is not YAML, or is no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(
            f"{path}: no such {what}; `distill init NAME` writes one of the shipped recipes to start from"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from error
    located = parse_yaml(text, str(path))
    if not isinstance(located.value, dict):
        raise RecipeError(f"{path}:1: a {what} is a mapping of sections; given: {type(located.value).__name__}")
    return Located({"name": path.stem, **located.value}, located.lines)


def recipe_of(located: Located, path: Path) -> Recipe:
    """The recipe that plain values of a file make, its relative paths taken from the file's folder."""
    return with_paths_from(path.parent, validate(Recipe, located.value, str(path), located.lines))


def with_paths_from(folder: Path, section: SectionT) -> SectionT:
    """The same section with every relative path in it taken from `folder`."""
    resolved: SectionT = _resolve_paths(section, folder)
    return resolved


def recipe_from(values: Mapping[str, Any]) -> Recipe:
    """A recipe from plain values, as a notebook would write it; same checks and messages as a file."""
    return validate(Recipe, values, "recipe", {})


def traces_recipe(traces: Path, teacher: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe that only scores the traces of a file, all of them, with one model; overrides as in `load_recipe`."""
    values: dict[str, Any] = {
        "name": re.sub(r"[^A-Za-z0-9_.-]", "-", traces.stem).strip("-.") or "traces",
        "prompts": [{"name": "traces", "file": str(traces), "gold_column": None}],
        "teacher": {"engine": "recorded", "recorded": {"files": [str(traces)]}},
        "select": {
            "outcomes": ["correct", "wrong", "unverifiable", "timeout", "error"], "reasoning": "optional",
            "per_prompt": "all", "loops": {"action": "ignore"}, "language_mix": {"action": "ignore"},
            "refusals": {"action": "ignore"}, "near_duplicates": {"prompts": "ignore", "traces": "ignore"},
        },
        "logprobs": {"teachers": [{"name": "teacher", "model": teacher}]},
    }  # fmt: skip
    for override in overrides:
        apply_override(values, override)
    return validate(Recipe, values, str(traces), {})


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one `section.key=value` in place; lists take an index (`student.phases.0.lr=1e-5`)."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise RecipeError(f"override {override!r}: write it as section.key=value")
    value = parse_yaml(text, f"override {override!r}").value if text else None
    values.update(with_value(values, key, value, f"override {override!r}"))


def with_value(values: dict[str, Any], key: str, value: Any, what: str) -> dict[str, Any]:
    """The same values with another one at a dotted key; what is not on the way to it is shared, not copied.

    Raises RecipeError, which begins with `what`, where the key leads through something that is no section.
    """
    changed: dict[str, Any] = _with_value(values, key.split("."), 0, value, what)
    return changed


def _with_value(target: Any, parts: Sequence[str], depth: int, value: Any, what: str) -> Any:
    if depth == len(parts):
        return value
    if target is None:
        target = {}
    if not isinstance(target, dict | list):
        raise RecipeError(f"{what}: {'.'.join(parts[:depth])} is {target!r}, not a section")
    part = parts[depth]
    if isinstance(target, list):
        index = _index(target, part, what)
        return [*target[:index], _with_value(target[index], parts, depth + 1, value, what), *target[index + 1 :]]
    return {**target, part: _with_value(target.get(part), parts, depth + 1, value, what)}


def _index(target: list[Any], part: str, what: str) -> int:
    if not part.isdigit() or int(part) >= len(target):
        raise RecipeError(f"{what}: {part!r} is not an index of a list of {len(target)}")
    return int(part)


def check_key(key: str, place: str, root: type[Section] = Recipe) -> None:
    """Refuse a dotted key that no recipe has, naming the nearest ones; whether a list is long enough is not asked.

    Raises RecipeError that begins with `place`.
    """
    kinds: list[Any] = [root]
    parts = key.split(".")
    for depth, part in enumerate(parts):
        forms = [kind for kind in kinds if _is_section(kind)]
        allowed = list(dict.fromkeys(name for form in forms for name in form.model_fields))
        if part in allowed:
            kinds = [
                inner
                for form in forms
                if part in form.model_fields
                for inner in _types(form.model_fields[part].annotation)
            ]
        elif not _takes_any(part, kinds):
            near = difflib.get_close_matches(part, allowed, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            there = f"; allowed here: {', '.join(allowed)}" if allowed else ""
            raise RecipeError(f"{place}: a recipe has no key {'.'.join(parts[: depth + 1])!r}{hint}{there}")


def _takes_any(part: str, kinds: Sequence[Any]) -> bool:
    """Whether a part of a key may be an index of a list or a key of a dictionary."""
    origins: list[Any] = [get_origin(kind) for kind in kinds]
    return dict in origins or (part.isdigit() and list in origins)


def validate(kind: type[SectionT], values: Any, where: str, lines: Mapping[Keys, int]) -> SectionT:
    """Check plain values against a section; the first problem becomes a one-line RecipeError."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        at = tuple(part for part in problem["loc"] if part not in TAGS)
        line = next((lines[at[:size]] for size in range(len(at), -1, -1) if at[:size] in lines), None)
        place = f"{where}:{line}" if line else where
        raise RecipeError(f"{place}: {_explain(kind, at, problem)}") from error


TAGS: Mapping[Any, type[Section] | None] = {
    "sft": SftPhase,
    "kd": KdPhase,
    "on_policy": OnPolicyPhase,
    "verifier:name": None,
    "verifier:file": FileVerifier,
    "verifier:section": VerifierSection,
}
"""What pydantic puts into the place of a problem where a section has several forms, and the form."""


def _explain(kind: type[Section], at: Keys, problem: Mapping[str, Any]) -> str:
    key, given = ".".join(map(str, at)), problem["input"]
    if problem["type"] == "extra_forbidden":
        allowed = _fields_at(kind, problem["loc"][:-1])
        near = difflib.get_close_matches(str(at[-1]), allowed, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        return f"unknown key {key!r}{hint}; allowed here: {', '.join(allowed)}"
    if problem["type"] == "missing":
        return f"{key} is missing; it must be given"
    if problem["type"] == "literal_error":
        near = difflib.get_close_matches(str(given), re.findall(r"'([^']*)'", problem["ctx"]["expected"]), n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        return f"{key} is {given!r}; choose {problem['ctx']['expected']}{hint}"
    if problem["type"] == "union_tag_invalid":
        return f"{key}.kind is {problem['ctx']['tag']!r}; choose one of {problem['ctx']['expected_tags']}"
    if problem["type"] == "union_tag_not_found":
        near = difflib.get_close_matches("kind", map(str, given) if isinstance(given, Mapping) else (), n=1)
        hint = f" (is {near[0]!r} meant to be it?)" if near else ""
        return f"{key}.kind is missing{hint}; choose one of {', '.join(repr(tag) for tag in TAGS if ':' not in tag)}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{key}: {message}" if key else message
    shown = repr(given) if len(repr(given)) < 80 else type(given).__name__
    return f"{key} is {shown}: {message[0].lower()}{message[1:]}"


def _fields_at(kind: type[BaseModel], path: Keys) -> list[str]:
    """Names of the fields that a section at `path` takes."""
    for part in path:
        if form := TAGS.get(part):
            kind = form
        elif isinstance(part, str) and part in kind.model_fields:
            inner = [t for t in _types(kind.model_fields[part].annotation) if _is_section(t)]
            if not inner:
                return []
            kind = inner[0]
    names = [field.alias or name for name, field in kind.model_fields.items()]
    return [*names, *(["file"] if kind is VerifierSection else [])]


def _types(annotation: Any) -> list[Any]:
    """Every type that an annotation mentions."""
    inner = get_args(annotation)
    return [annotation] + [t for part in inner for t in _types(part)]


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def _resolve_paths(section: Any, base: Path) -> Any:
    """The same section with every relative Path taken from `base`."""
    if isinstance(section, Path):
        return section if section.is_absolute() else base / section
    if isinstance(section, BaseModel):
        changed = {name: _resolve_paths(getattr(section, name), base) for name in section.model_fields_set}
        return section.model_copy(update=changed)
    if isinstance(section, list):
        return [_resolve_paths(part, base) for part in section]
    if isinstance(section, dict):
        return {key: _resolve_paths(part, base) for key, part in section.items()}
    return section


# --- identity -------------------------------------------------------------------------------------------------------


def is_hashed(field: FieldInfo) -> bool:
    """Whether a field is part of identities."""
    extra = field.json_schema_extra
    return not (isinstance(extra, dict) and extra.get("hashed") is False)


def hashed_fields(value: Any) -> Any:
    """Plain JSON of what identities are made of: hashed fields that differ from their defaults.

    A new field with a default therefore changes no identity. Paths are left out: files enter by their content.
    """
    if isinstance(value, BaseModel):
        plain = {
            name: (hashed_fields(getattr(value, name)), hashed_fields(field.get_default(call_default_factory=True)))
            for name, field in type(value).model_fields.items()
            if is_hashed(field)
        }
        return {name: given for name, (given, default) in plain.items() if given != default}
    if isinstance(value, Path):
        return "<by content>"
    if isinstance(value, list | tuple):
        return [hashed_fields(part) for part in value]
    if isinstance(value, dict):
        return {key: hashed_fields(part) for key, part in value.items()}
    return value


def model_path(name: str, base: Path) -> str:
    """A model name with a relative folder or file taken from `base`; hub ids and packages stay as they are."""
    local = name.startswith((".", "~", "/")) or name.endswith(".gguf")
    return str((base / Path(name).expanduser()).resolve()) if local and not name.startswith("package:") else name
