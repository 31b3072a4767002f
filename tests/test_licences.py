"""Licences by their names: known ids, what is missing or forbids something, and what cannot go together."""

from typing import Any

import pytest

from distill.licences import (
    FOR_ITS_OWN_KIND,
    HUB_IDS,
    MODEL,
    NAMED_LLAMA,
    PERMISSIVE,
    Stated,
    hub_fields,
    hub_id,
    model_fields,
    model_terms,
    problems,
)


@pytest.mark.parametrize(
    ("given", "known"),
    [
        ("MIT", "mit"), ("MIT License", "mit"), ("Apache 2.0", "apache-2.0"), ("apache license v2", None),
        ("Apache-2.0", "apache-2.0"), ("CC BY 4.0", "cc-by-4.0"), ("CC-BY-SA-4.0", "cc-by-sa-4.0"), ("CC0", "cc0-1.0"),
        ("Llama3.1", "llama3.1"), ("ask Bob", None), ("", None),
    ],
)  # fmt: skip
def test_licences_are_known_by_the_hubs_ids(given: str, known: str | None) -> None:
    assert hub_id(given) == known


def test_licences_that_contradict_one_another_are_named() -> None:
    def said(*licences: str | None) -> str:
        return "\n".join(problems([Stated(f"source {n}", licence, "x") for n, licence in enumerate(licences)]))

    assert said("MIT", "Apache-2.0", "CC BY 4.0") == ""
    assert "forbids changed versions" in said("CC BY-ND 4.0")
    assert "forbids commercial use" in said("CC BY-NC-SA 4.0")
    assert "contradict one another: `cc-by-sa-4.0` (source 0), `gpl-3.0` (source 1)" in said("CC BY-SA 4.0", "GPL-3.0")
    assert "contradict" not in said("CC BY-SA 4.0", "cc-by-sa-4.0", "MIT")


def test_the_header_has_one_licence_several_or_says_that_ids_do_not_tell() -> None:
    def fields(*licences: str | None) -> Any:
        return hub_fields([Stated("x", licence, "y") for licence in licences])["license"]

    assert fields("MIT", "mit") == "mit" and fields("MIT", "CC0") == ["cc0-1.0", "mit"]
    assert fields("MIT", None) == "unknown" and fields("MIT", "ask Bob") == "other"


def test_a_licence_text_is_only_ever_shown_as_text() -> None:
    hostile = "x` <script>alert(1)</script> [y](http://z)\n# big"
    told = "\n".join(problems([Stated(f"teacher {hostile}", hostile, "x"), Stated(f"teacher {hostile}", "MIT", "x")]))
    assert not {"<script", "[y]", "\n#", "x`"} & {part for part in ("<script", "[y]", "\n#", "x`") if part in told}


# --- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "others", "expected"),
    [
        ("Apache-2.0", ["MIT", "CC BY 4.0"], "apache-2.0"),
        ("MIT", [], "mit"),
        ("llama3.2", ["MIT"], "llama3.2"),
        ("llama3.2", ["llama3.2", "mit"], "llama3.2"),
        ("Apache-2.0", ["CC BY-SA 4.0"], "other"),
        ("Apache-2.0", ["llama3.1"], "other"),
        ("ask Bob", ["MIT"], "other"),
        ("MIT", ["ask Bob"], "other"),
        (None, ["MIT"], "unknown"),
        ("MIT", [None], "unknown"),
    ],
)
def test_a_model_stands_under_its_bases_licence_unless_others_ask_for_more(
    base: str | None, others: list[str | None], expected: str
) -> None:
    fields = model_fields(base, [Stated("x", licence, "y") for licence in others])
    assert fields["license"] == expected
    assert ("license_name" in fields) == (expected == "other")


def test_what_is_asked_of_a_model_is_said_in_words_for_models() -> None:
    said = "\n".join(
        problems([Stated("base b", None, "student.licence"), Stated("prompt source s", "CC BY-ND 4.0", "x")], MODEL)
    )
    assert (
        "base b: no licence is stated; once it is known, say it where this model is published, and set student.licence"
        in said
    )
    assert "a model made from it may be one" in said and "data set" not in said


def terms(base: str | None, *teachers: str | None) -> str:
    return "\n".join(model_terms(Stated("base b", base, ""), [Stated("teacher t", one, "") for one in teachers]))


def test_terms_that_reach_into_a_student_are_named() -> None:
    assert terms("Apache-2.0", "MIT") == terms(None, None) == ""
    assert terms("llama3.2", "MIT") == "base b: `llama3.2` asks that this model's name begin with `Llama`."
    assert "teacher t: `llama3.1` asks that this model's name begin with `Llama`." in terms("Apache-2.0", "Llama3.1")
    assert "outside its own family" in terms("Apache-2.0", "llama3") and "outside" not in terms("llama3", "llama3")
    assert "outside" not in terms("Apache-2.0", "llama3.3"), "these licences took that clause back"
    assert "derivative" in terms("Apache-2.0", "gemma")


def test_every_licence_that_is_treated_apart_is_one_of_the_hubs() -> None:
    assert PERMISSIVE | NAMED_LLAMA.keys() | {*FOR_ITS_OWN_KIND} <= HUB_IDS
    assert not [one for one in PERMISSIVE if "-nc" in one or "-nd" in one or "-sa" in one or "gpl" in one]
