"""Models token by token.

prefixes.py        a reward at every prefix of an answer
ratios.py          policy against reference on the tokens of a pair
token_texts.py     tokens as text
inspect_output.py  terminal, JSON, HTML
"""

from alignkit.insight.inspect.inspect_output import print_pair, print_prefixes, write_html, write_json
from alignkit.insight.inspect.prefixes import Prefixes, reward_prefixes
from alignkit.insight.inspect.ratios import PairRatios, pair_of, pair_ratios

__all__ = [
    "PairRatios", "Prefixes", "pair_of", "pair_ratios", "print_pair", "print_prefixes", "reward_prefixes",
    "write_html", "write_json",
]  # fmt: skip
