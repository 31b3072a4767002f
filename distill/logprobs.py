"""The cache of teachers' distributions: how it is written, found by document, and refused where it does not fit.

A cache is a folder of safetensors shards and a manifest that is written last; docs/logprobs.md has the format for other
programs. A document is found by a hash of its token ids, never by its place in a file or its step in a training, and
row i of a document is about its i-th supervised token, given everything before it. Shards are read through memory maps.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from distill.config import Logprobs
from distill.documents import Array
from distill.errors import DataError
from distill.records import write_json
from distill.runs import PARTIAL, file_digest

SCHEMA = 1
MANIFEST = "manifest.json"
ALIGNMENT = "row i: the i-th token of the document that is not of its prompt, given all tokens before it"
"""What a row is about; a cache that says something else is refused."""
SPANS = (
    "row i: the i-th token of the document that is not of its prompt, given all text before it; seen where a token of"
    " the teacher's begins at the same character, over the tokens that both spell alike"
)
"""The same for a teacher with another tokenizer."""
KEY_BYTES = 16

Form = Literal["topk", "sampled", "hybrid"]


def document_key(ids: Sequence[int] | Array) -> bytes:
    """What a document is found by: the first 16 bytes of the sha256 of its token ids as little-endian int32."""
    return hashlib.sha256(np.ascontiguousarray(ids, dtype="<i4").tobytes()).digest()[:KEY_BYTES]


class Rows(NamedTuple):
    """What is known of a teacher's distribution at some rows; parts that a form does not have are empty.

    head_ids [R, K] int64, the likeliest tokens first; head_log_p [R, K] and tail_log_p [R] float32: log-probabilities
    of the head and of the mass of all other tokens, together 1. sizes [R] int64: how many drawn tokens each row has, of
    which ids [E] int64 and counts [E] int64 follow one another, row by row; a row's counts add up to the draws. seen
    [R] bool: whether the teacher has a say at all (false where another tokenizer could not be aligned).
    """

    head_ids: Array
    head_log_p: Array
    tail_log_p: Array
    sizes: Array
    ids: Array
    counts: Array
    seen: Array

    @property
    def number(self) -> int:
        """How many rows they are."""
        return len(self.seen)


def joined_rows(parts: Sequence[Rows]) -> Rows:
    """The rows of several documents, one after the other."""
    return Rows(*(np.concatenate(values) for values in zip(*parts, strict=True)))


class Facts(NamedTuple):
    """What decides whether a cache fits: everything but its size."""

    form: Form
    k: int
    draws: int
    temperature: float
    seed: int
    vocabulary: int
    """Tokens that ids may name."""
    tokenizer: str
    """sha256 (hex) of the tokenizer that made the documents, its template included."""
    alignment: str = ALIGNMENT

    @classmethod
    def of(cls, config: Logprobs, vocabulary: int, tokenizer: str) -> "Facts":
        """Of a recipe's section, for documents of a tokenizer."""
        k = config.k if config.form != "sampled" else 0
        draws = config.draws if config.form != "topk" else 0
        seed = config.seed if draws else 0
        return cls(config.form, min(k, vocabulary), draws, config.temperature, seed, vocabulary, tokenizer)


REMEDIES = {
    "tokenizer": "the documents were tokenized or rendered by another tokenizer or chat template; score them again",
    "temperature": "log-probabilities at one temperature say nothing exact about another; score again",
    "alignment": "its rows are about other tokens; score again with this version",
}


def require_fit(facts: Facts, wanted: Facts, where: Path) -> None:
    """Refuse a cache that was made for something else.

    Raises DataError naming what differs and what to do.
    """
    for name in Facts._fields:
        given, expected = getattr(facts, name), getattr(wanted, name)
        if given != expected:
            remedy = REMEDIES.get(name, "score the traces again, or set logprobs as it was")
            raise DataError(f"{where}: the cache's {name} is {_short(given)}, needed is {_short(expected)}: {remedy}")


def _short(value: Any) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 40 else repr(value)


# --- packing --------------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """How many bytes ids and drawn tokens take."""

    id_bytes: int
    id_bits: int
    entry_bytes: int
    """A drawn token: its id in the low `id_bits` bits, its count less one above them."""

    @classmethod
    def of(cls, facts: Facts) -> "Layout":
        """The smallest that holds every id and every count."""
        id_bits = max(1, (facts.vocabulary - 1).bit_length())
        count_bits = max(0, (facts.draws - 1).bit_length()) if facts.draws else 0
        return cls(-(-id_bits // 8), id_bits, -(-(id_bits + count_bits) // 8))


def to_bytes(values: Array, width: int) -> Array:
    """Whole numbers as `width` little-endian bytes each: uint8 [..., width]."""
    wide = np.ascontiguousarray(values, dtype="<u8")
    return wide.view(np.uint8).reshape(*values.shape, 8)[..., :width].copy()


def from_bytes(packed: Array) -> Array:
    """The way back of `to_bytes`; int64 [...]."""
    wide = np.zeros((*packed.shape[:-1], 8), np.uint8)
    wide[..., : packed.shape[-1]] = packed
    return wide.view("<i8")[..., 0]


def to_tensors(documents: Sequence[tuple[bytes, Rows]], facts: Facts) -> dict[str, Array]:
    """The tensors of a shard: documents by key with their rows."""
    layout = Layout.of(facts)
    rows = joined_rows([rows for _, rows in documents])
    lengths = [one.number for _, one in documents]
    tensors = {
        "keys": np.frombuffer(b"".join(key for key, _ in documents), np.uint8).reshape(-1, KEY_BYTES),
        "row_bounds": np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
    }
    if not rows.seen.all():
        tensors["seen"] = rows.seen.astype(np.uint8)
    if facts.k:
        tensors["head_ids"] = to_bytes(rows.head_ids, layout.id_bytes)
        tensors["head_logprobs"] = rows.head_log_p.astype(np.float16)
        tensors["tail_logprob"] = rows.tail_log_p.astype(np.float32)
    if facts.draws:
        entries = [int(one.sizes.sum()) for _, one in documents]
        tensors["entry_bounds"] = np.concatenate([[0], np.cumsum(entries, dtype=np.int64)])
        tensors["row_entries"] = rows.sizes.astype(np.uint8 if facts.draws < 256 else np.uint16)
        packed = rows.ids.astype(np.uint64) | ((rows.counts - 1).astype(np.uint64) << np.uint64(layout.id_bits))
        tensors["entries"] = to_bytes(packed, layout.entry_bytes)
    return tensors


def write_shard(path: Path, documents: Sequence[tuple[bytes, Rows]], facts: Facts) -> None:
    """Write one shard aside and move it into place."""
    part = path.with_name(path.name + PARTIAL)
    with part.open("wb") as out:
        out.write(save(to_tensors(documents, facts), metadata={"format": f"distill-logprobs {SCHEMA}"}))
        out.flush()
        os.fsync(out.fileno())
    os.replace(part, path)


def write_manifest(folder: Path, facts: Facts, shards: Sequence[Path], teacher: Mapping[str, Any], **more: Any) -> None:
    """Write the manifest, last: what the cache is, who made it, and every shard with its sha256."""
    listed = []
    for path in shards:
        with safe_open(path, "numpy") as tensors:
            documents = tensors.get_slice("keys").get_shape()[0]
            rows = int(tensors.get_slice("row_bounds")[documents : documents + 1][0])
        size = path.stat().st_size
        listed.append(
            {"file": path.name, "sha256": file_digest(path), "bytes": size, "documents": documents, "rows": rows}
        )
    layout = Layout.of(facts)
    write_json(
        folder / MANIFEST,
        {
            "schema": SCHEMA,
            **facts._asdict(),
            "layout": layout._asdict(),
            "teacher": dict(teacher),
            "rows": sum(one["rows"] for one in listed),
            "documents": sum(one["documents"] for one in listed),
            "shards": listed,
            **more,
        },
    )


# --- reading --------------------------------------------------------------------------------------------------------


class LogprobCache:
    """A cache that is open for reading; `rows` finds a document by its token ids."""

    def __init__(self, folder: Path) -> None:
        """Raises DataError for a folder without a readable manifest or with missing or cut shards."""
        self.folder = folder
        try:
            self.manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            if self.manifest["schema"] != SCHEMA:
                raise ValueError(f"schema {self.manifest['schema']}, this version reads {SCHEMA}")
            self.facts = Facts(**{name: self.manifest[name] for name in Facts._fields})
            self._layout = Layout(**self.manifest["layout"])
            self._shards: list[Any] = [safe_open(folder / one["file"], "numpy") for one in self.manifest["shards"]]
            self._masked = ["seen" in set(shard.keys()) for shard in self._shards]
            keys = [shard.get_tensor("keys") for shard in self._shards]
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise DataError(f"{folder}: no readable cache of log-probabilities ({error}); score the traces") from error
        except Exception as error:  # safetensors raises its own, which has no base class to name
            raise DataError(f"{folder}: a shard is damaged ({error}); score the traces again") from error
        self._index(keys)

    def _index(self, keys: Sequence[Array]) -> None:
        """Sort all keys by their first half, a number; the whole key is compared when a document is looked up."""
        flat = np.concatenate(keys) if keys else np.zeros((0, KEY_BYTES), np.uint8)
        self._keys = np.ascontiguousarray(flat)
        heads = self._keys.view("<u8")[:, 0]
        self._order = np.argsort(heads, kind="stable")
        self._heads = heads[self._order]
        self._first = np.cumsum([0, *(len(one) for one in keys)])

    def __len__(self) -> int:
        return len(self._keys)

    def check_bytes(self) -> None:
        """Compare every shard with the manifest's sha256. Raises DataError naming the one that differs."""
        for one in self.manifest["shards"]:
            if file_digest(self.folder / one["file"]) != one["sha256"]:
                raise DataError(f"{self.folder / one['file']}: holds other bytes than {MANIFEST} says; score again")

    def require(self, documents: Iterable[Sequence[int] | Array]) -> None:
        """Look every document up, so that none is missing later. Raises DataError for one that was never scored."""
        for ids in documents:
            self._find(document_key(ids))

    def rows(self, ids: Sequence[int] | Array, count: int) -> Rows:
        """The rows of the document with these token ids, `count` of them.

        Raises DataError for a document that was never scored, or that has another number of supervised tokens.
        """
        shard, place = self._find(document_key(ids))
        bounds = self._shards[shard].get_slice("row_bounds")[place : place + 2]
        start, end = int(bounds[0]), int(bounds[1])
        if end - start != count:
            raise DataError(
                f"{self.folder}: a document has {count} supervised tokens, but {end - start} were scored;"
                " its segments differ: score the traces again"
            )
        return self._read(shard, place, start, end)

    def _find(self, key: bytes) -> tuple[int, int]:
        """The shard that holds a document, and its place there."""
        head = np.frombuffer(key, "<u8")[0]
        at = int(np.searchsorted(self._heads, head))
        while at < len(self._heads) and self._heads[at] == head:
            number = int(self._order[at])
            if self._keys[number].tobytes() == key:
                shard = int(np.searchsorted(self._first, number, side="right")) - 1
                return shard, number - int(self._first[shard])
            at += 1
        raise DataError(
            f"{self.folder}: a training document is not in the cache ({len(self):,} are); score the traces it trains on"
        )

    def _read(self, number: int, place: int, start: int, end: int) -> Rows:
        shard, count = self._shards[number], end - start
        rows = empty_rows(count, self.facts.k)
        if self._masked[number]:
            rows = rows._replace(seen=shard.get_slice("seen")[start:end].astype(bool))
        if self.facts.k:
            head = from_bytes(shard.get_slice("head_ids")[start:end])
            head_log_p = shard.get_slice("head_logprobs")[start:end].astype(np.float32)
            tail = shard.get_slice("tail_logprob")[start:end]
            # stored in fp16, they add up to 1 only about; scaled, what rounding is left is of second order in a KL
            whole = np.logaddexp(_log_sum(head_log_p), tail)
            rows = rows._replace(head_ids=head, head_log_p=head_log_p - whole[:, None], tail_log_p=tail - whole)
        if self.facts.draws:
            first, last = (int(at) for at in shard.get_slice("entry_bounds")[place : place + 2])
            entries = from_bytes(shard.get_slice("entries")[first:last])
            mask = (1 << self._layout.id_bits) - 1
            sizes = shard.get_slice("row_entries")[start:end].astype(np.int64)
            rows = rows._replace(sizes=sizes, ids=entries & mask, counts=(entries >> self._layout.id_bits) + 1)
        return rows


def _log_sum(values: Array) -> Array:
    most = values.max(-1, keepdims=True)
    total: Array = np.log(np.exp(values - most).sum(-1)) + most[:, 0]
    return total


def empty_rows(count: int, k: int = 0) -> Rows:
    """So many rows without anything known but that they are seen."""
    return Rows(
        np.zeros((count, k), np.int64),
        np.zeros((count, k), np.float32),
        np.zeros(count, np.float32),
        np.zeros(count, np.int64),
        np.zeros(0, np.int64),
        np.zeros(0, np.int64),
        np.ones(count, bool),
    )


@functools.lru_cache(maxsize=16)
def open_cache(folder: Path) -> LogprobCache:
    """A cache, opened once."""
    return LogprobCache(folder)
