"""List prices: every entry is dated and plausible, and only the very host and model get them."""

from datetime import date

import pytest

from distill.prices import LISTED, ListedPrices, listed_prices

ENTRIES = [(host, model, listed) for host, models in LISTED.items() for model, listed in models.items()]


@pytest.mark.parametrize(("host", "model", "listed"), ENTRIES, ids=[f"{host} {model}" for host, model, _ in ENTRIES])
def test_every_entry_has_a_day_a_source_and_prices_that_can_be(host: str, model: str, listed: ListedPrices) -> None:
    assert date(2026, 1, 1) <= date.fromisoformat(listed.as_of)
    assert len(listed.source) > 20
    assert 0 < listed.prices.input_usd_per_mtok <= listed.prices.output_usd_per_mtok < 200
    assert listed_prices(f"https://{host}/v1", model) == listed
    assert host == host.lower() and ":" not in host and "/" not in host


def test_a_price_is_found_at_the_address_however_it_is_written() -> None:
    found = listed_prices("https://api.deepseek.com/v1", "deepseek-flash")
    assert found is not None and found.prices.output_usd_per_mtok == 1.2
    for address in ("https://api.deepseek.com", "https://API.DeepSeek.com/v1/", "https://api.deepseek.com:443/v1"):
        assert listed_prices(address, "deepseek-flash") == found


@pytest.mark.parametrize(
    ("address", "model"),
    [
        ("https://api.deepseek.com/v1", "deepseek-flash-2"),
        ("https://api.deepseek.com/v1", "Deepseek-Flash"),
        ("https://api.deepseek.com/v1", "gpt-6-luna"),
        ("https://api.deepseek.com/v1", ""),
        ("https://api.deepseek.com.evil.example/v1", "deepseek-flash"),
        ("https://evil.example/api.deepseek.com/v1", "deepseek-flash"),
        ("https://api.deepseek.com@evil.example/v1", "deepseek-flash"),
        ("https://xapi.deepseek.com/v1", "deepseek-flash"),
        ("https://deepseek.com/v1", "deepseek-flash"),
        ("http://127.0.0.1:8000/v1", "deepseek-flash"),
        ("api.deepseek.com/v1", "deepseek-flash"),
        ("https://[", "deepseek-flash"),
        ("", "deepseek-flash"),
    ],
)
def test_another_host_or_model_has_no_price(address: str, model: str) -> None:
    assert listed_prices(address, model) is None


def test_names_that_a_host_has_retired_have_no_price() -> None:
    # retired in July 2026; what answers to them now, if anything, costs something else
    assert listed_prices("https://api.deepseek.com/v1", "deepseek-reasoner") is None
    assert listed_prices("https://api.deepseek.com/v1", "deepseek-chat") is None
