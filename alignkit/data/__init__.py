"""Files, hub names and Python rows -> checked rows of the kind that a method reads -> tokens, step by step.

sources.py    the rows of a source: files, folders, globs, several of these, `datasets`, lists
files.py      reading one file
hub.py        data sets on the hub, local copies of them, and those saved to disk
rows.py       rows as they were read, faults, the report of dropped rows
forms.py      which columns make which form (pairs, ranked, conversations, ...)
published.py  ShareGPT's, Alpaca's and similar rows, rewritten to our forms
scored.py     UltraFeedback's, HelpSteer's and similar rows, rewritten to our forms
cells.py      checks of a single cell
columns.py    columns that a method reads besides those of a form
convert.py    parsed rows -> rows of a kind
detection.py  which form rows have, and what to type where they have none
dataset.py    load(): rows of any form -> rows of a kind
chat/         chat templates: messages -> text, where each turn begins and ends
encoder.py    text -> token ids, control tokens kept apart from text that spells them
tokenise.py   rows -> examples of token ids, cut to the budgets
order.py      the places of rows in a curriculum
blocks.py     the rows of a source -> examples, block by block
plain.py      examples as lists and as bytes
views.py      examples that are chosen or joined when they are asked for
store.py      examples in flat arrays
origin.py     what identifies the rows of a source
kept.py       examples in a folder
shelf.py      tokenised rows on disk, for other ranks and runs
streaming.py  rows that are read while the run goes on
stream.py     which examples a step reads; held-out rows; seeds
"""

from alignkit.data.dataset import Dataset, load
from alignkit.data.rows import Content, Fault, FaultyRowsError, Message, RawRows, Report, Row
from alignkit.data.sources import read_rows

__all__ = [
    "Content", "Dataset", "Fault", "FaultyRowsError", "Message", "RawRows", "Report", "Row", "load", "read_rows",
]  # fmt: skip
