"""Comparison of methods on one task, each trained and evaluated in its own process.

jobs.py            which methods the data can serve, and the settings of each run
worker.py          one method: trained, then evaluated on held-out prompts; `python -m alignkit.compare JOB.json`
comparison.py      compare(): all methods, one after the other
results_table.py   the table and the JSON
win_rate_plot.py   the plot of win rate against KL
"""

from alignkit.compare.comparison import Comparison, compare
from alignkit.compare.results_table import notes, table, write_json
from alignkit.compare.win_rate_plot import check_matplotlib, draw

__all__ = ["Comparison", "check_matplotlib", "compare", "draw", "notes", "table", "write_json"]
