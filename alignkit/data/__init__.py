"""Files, hub names and Python rows -> checked rows of the kind that a method reads -> tokens, step by step.

sources.py    reading rows from files, `datasets`, lists and the hub
rows.py       rows as they were read, faults, the report of dropped rows
forms.py      which columns make which form (pairs, ranked, conversations, ...)
cells.py      checks of a single cell
dataset.py    load(): rows of any form -> rows of a kind
chat/         chat templates: messages -> text, where each turn begins and ends
encoder.py    text -> token ids, control tokens kept apart from text that spells them
tokenise.py   rows -> examples of token ids, cut to the budgets
stream.py     which examples a step reads; held-out rows; seeds
"""

from alignkit.data.dataset import Dataset, load
from alignkit.data.rows import Content, Fault, FaultyRowsError, Message, RawRows, Report, Row
from alignkit.data.sources import read_rows

__all__ = [
    "Content", "Dataset", "Fault", "FaultyRowsError", "Message", "RawRows", "Report", "Row", "load", "read_rows",
]  # fmt: skip
