"""Methods side by side on one task, each trained and measured in a process of its own.

jobs.py      which methods the data can serve, and what each is run with
one.py       one method: trained, then measured on held-out prompts; `python -m alignkit.compare JOB.json`
together.py  all of them, one after the other
shown.py     the table, the JSON and the picture
"""

from alignkit.compare.shown import check_picture, draw, table, write_json
from alignkit.compare.together import Comparison, compare

__all__ = ["Comparison", "check_picture", "compare", "draw", "table", "write_json"]
