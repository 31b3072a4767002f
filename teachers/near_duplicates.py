"""Near-duplicates: has an earlier text said nearly the same?

Texts are equal if their tokens are: case, white space, Unicode forms, the layout of LaTeX and the punctuation of
sentences make no difference. They are near-duplicates if the same numbers stand in them and their sets of token n-grams
overlap enough (Jaccard similarity, estimated by MinHash; Broder 1997): a problem asked with other numbers is another
problem, however alike the words.
"""

import hashlib
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.errors import RecipeError

from .decontamination import tokenize

FOUND = 0.99
"""Chance to look at a text whose similarity is just the threshold; nearer ones are looked at more surely."""


class NearDuplicates:
    """Remembers texts and finds the first that a later one is like.

    Usage: call `first_like` with every text in a fixed order. The answers depend on that order, on the texts and on the
    parameters alone, on every platform.

    The signature of a text is cut into bands, and texts that agree in a band are compared (locality-sensitive hashing).
    A band remembers only the first text with its value and numbers: so a text takes 4 KB at 128 permutations, whatever
    its length, and is compared with no more texts than there are bands, also where thousands share a template.

    `threshold`: the least similarity, above 0; at 1 only equal texts are found. `ngram`: tokens in an n-gram.
    `permutations`: values in a signature; the estimate's standard error is at most 0.5 / sqrt(permutations), 0.035 at
    a similarity of 0.8 and 128 permutations. Raises RecipeError for values out of range.
    """

    version = "1"
    """Changes when the same texts give other answers."""

    def __init__(self, threshold: float = 0.8, ngram: int = 5, permutations: int = 128, seed: int = 0) -> None:
        if not 0 < threshold <= 1:
            raise RecipeError(f"the threshold of near-duplicates is {threshold}; give a similarity above 0, at most 1")
        if ngram < 1 or permutations < 16:
            raise RecipeError(
                f"near-duplicates with n-grams of {ngram} tokens and {permutations} permutations;"
                " give at least 1 token and 16 permutations"
            )
        from datasketch import MinHash  # imports scipy, which a selection without near-duplicates does not wait for

        self._threshold = threshold
        self._ngram = ngram
        self._empty = MinHash(permutations, seed=seed, hashfunc=zlib.crc32, scheme="affine32")
        self._rows = band_rows(threshold, permutations)
        self._bands: list[dict[bytes, int]] = [{} for _ in range(permutations // self._rows)]
        self._equal: dict[bytes, int] = {}
        self._keys: list[str] = []
        self._signatures: list[NDArray[np.uint32]] = []

    def first_like(self, key: str, text: str) -> tuple[str, float] | None:
        """The key of the first remembered text that this one is like, and their similarity.

        1.0 means equal after normalisation; near-duplicates stay below. None if there is none: then the text is
        remembered under `key`.
        """
        tokens = sentence_tokens(text)
        digest = _digest(tokens)
        if (equal := self._equal.get(digest)) is not None:
            return self._keys[equal], 1.0
        signature = self._signature(tokens)
        numbers = _digest(sorted({token for token in tokens if token.isdigit()}))
        starts = range(0, self._rows * len(self._bands), self._rows)
        values = [numbers + signature[at : at + self._rows].tobytes() for at in starts]
        met = {band[value] for band, value in zip(self._bands, values) if value in band}
        for earlier in sorted(met):
            similarity = min(float(np.mean(self._signatures[earlier] == signature)), 1 - 1 / len(signature))
            if similarity >= self._threshold:
                return self._keys[earlier], similarity
        self._equal[digest] = len(self._keys)
        for band, value in zip(self._bands, values):
            band.setdefault(value, len(self._keys))
        self._keys.append(key)
        self._signatures.append(signature)
        return None

    def _signature(self, tokens: list[str]) -> NDArray[np.uint32]:
        sketch: Any = self._empty.copy()
        last = max(len(tokens) - self._ngram, 0)
        sketch.update_batch({_bytes(tokens[at : at + self._ngram]) for at in range(last + 1)})
        return np.asarray(sketch.hashvalues, dtype=np.uint32)


def sentence_tokens(text: str) -> list[str]:
    """The tokens by which texts are compared: without `.`, `,`, `;` and `?`, unless a letter or digit follows them."""
    tokens = tokenize(text)
    return [
        token
        for token, end in zip(tokens.texts, tokens.ends)
        if token not in {".", ",", ";", "?"} or text[end : end + 1].isalnum()
    ]


def band_rows(threshold: float, permutations: int) -> int:
    """How many values make a band: the most with which a text just at the threshold is still looked at (`FOUND`)."""

    def found(rows: int) -> float:
        return float(1 - (1 - threshold**rows) ** (permutations // rows))

    return max((rows for rows in range(1, permutations // 2 + 1) if found(rows) >= FOUND), default=1)


def _digest(tokens: list[str]) -> bytes:
    return hashlib.blake2b(_bytes(tokens), digest_size=12).digest()


def _bytes(tokens: list[str]) -> bytes:
    return " ".join(tokens).encode("utf-8", "surrogatepass")
