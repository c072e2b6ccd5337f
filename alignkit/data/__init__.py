"""Files, hub names and Python rows -> checked rows of the kind that a method reads -> tokens, step by step.

rows.py       reading any source: rows as they are, faults, what was dropped
forms.py      which columns make which form (pairs, ranked, conversations, ...)
cells.py      checks of a single cell
dataset.py    load(): rows of any form -> rows of a kind
chat.py       chat templates: messages -> text, where each turn begins and ends
tokenise.py   rows -> examples of token ids, cut to the budgets
stream.py     which examples a step reads; held-out rows; seeds
"""

from alignkit.data.dataset import Dataset, load
from alignkit.data.rows import Content, Fault, FaultyRowsError, Message, RawRows, Report, Row, read_rows

__all__ = [
    "Content", "Dataset", "Fault", "FaultyRowsError", "Message", "RawRows", "Report", "Row", "load", "read_rows",
]  # fmt: skip
