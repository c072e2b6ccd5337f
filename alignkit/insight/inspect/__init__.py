"""Models and rows token by token.

prefixes.py        a reward at every prefix of an answer
ratios.py          policy against reference on the tokens of a pair
row_view.py        what one row becomes: which tokens are learned, and which are cut
token_texts.py     tokens as text
inspect_output.py  models: terminal, JSON, HTML
row_output.py      rows: terminal, JSON, HTML
"""

from alignkit.insight.inspect.inspect_output import print_pair, print_prefixes, write_html, write_json
from alignkit.insight.inspect.prefixes import Prefixes, reward_prefixes
from alignkit.insight.inspect.ratios import PairRatios, pair_of, pair_ratios
from alignkit.insight.inspect.row_output import print_row, write_row_html, write_row_json
from alignkit.insight.inspect.row_view import RowView, row_view

__all__ = [
    "PairRatios", "Prefixes", "RowView", "pair_of", "pair_ratios", "print_pair", "print_prefixes", "print_row",
    "reward_prefixes", "row_view", "write_html", "write_json", "write_row_html", "write_row_json",
]  # fmt: skip
