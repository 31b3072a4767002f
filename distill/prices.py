"""List prices of a few widely used teachers, each with the day and the page they are from.

They spare a recipe the look-up, no more: prices move every few months, and what a recipe gives always comes first.
Where a host charges by the hour of the day the dearer price stands here, so that a budget stops early rather than
late. Discounts for cached input and surcharges for very long input are left out. Names that a host has retired are not
listed. To correct an entry, change its price and its date together.
"""

from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import urlsplit

from distill.config import Prices


class ListedPrices(NamedTuple):
    """What a host says a model costs."""

    prices: Prices
    as_of: str
    """Day (ISO) on which the source said so; where it gives no day of its own, the earliest it can be."""
    source: str
    """The page, in words."""


def listed_prices(base_url: str, model: str) -> ListedPrices | None:
    """The list price of a model at an address, by its exact host and the exact name; None where none is known."""
    try:
        host = urlsplit(base_url).hostname
    except ValueError:  # no address at all
        return None
    return LISTED.get(host or "", {}).get(model)


def _usd(input_usd_per_mtok: float, output_usd_per_mtok: float, as_of: str, source: str) -> ListedPrices:
    prices = Prices(input_usd_per_mtok=input_usd_per_mtok, output_usd_per_mtok=output_usd_per_mtok)
    return ListedPrices(prices, as_of, source)


DEEPSEEK = "Models & Pricing of the DeepSeek API docs, peak hours (off-peak is half)"
OPENAI = "Pricing of the OpenAI API docs, standard tier"
OPENAI_SEEN = "Pricing of the OpenAI API docs, standard tier, as surveys of that month quote it"
OPENROUTER = "the model's page at OpenRouter (the host that answers may charge more)"

LISTED: Mapping[str, Mapping[str, ListedPrices]] = {
    "api.deepseek.com": {
        "deepseek-flash": _usd(0.30, 1.20, "2026-10-17", DEEPSEEK),
        "deepseek-v4-flash": _usd(0.30, 1.20, "2026-10-17", DEEPSEEK),  # an old name, answered and billed as Flash
        "deepseek-v4-pro": _usd(1.32, 3.96, "2026-10-17", DEEPSEEK),
    },
    "api.openai.com": {
        "gpt-6-sol": _usd(2.00, 10.00, "2026-09-22", OPENAI),
        "gpt-6-luna": _usd(0.10, 0.50, "2026-09-22", OPENAI),
        "gpt-5.6-terra": _usd(2.00, 12.00, "2026-07-30", OPENAI),
        "gpt-5.6-luna": _usd(0.20, 1.20, "2026-07-30", OPENAI),
        "gpt-4.1": _usd(2.00, 8.00, "2026-03-21", OPENAI_SEEN),
        "gpt-4.1-mini": _usd(0.40, 1.60, "2026-03-21", OPENAI_SEEN),
        "gpt-4o-mini": _usd(0.15, 0.60, "2026-03-21", OPENAI_SEEN),
        "o3": _usd(2.00, 8.00, "2026-03-21", OPENAI_SEEN),
        "o4-mini": _usd(1.10, 4.40, "2026-03-21", OPENAI_SEEN),
    },
    "openrouter.ai": {
        "deepseek/deepseek-r1": _usd(0.70, 2.50, "2026-01-01", OPENROUTER),
        "deepseek/deepseek-r1-0528": _usd(0.50, 2.15, "2026-01-01", OPENROUTER),
    },
}
"""By host, then by the name of the model there."""
