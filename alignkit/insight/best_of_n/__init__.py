"""The best of n samples: as answers, as training data, and as a curve that shows the effect of optimising a reward.

selection.py         best_of_n(): samples, scores, and which of them are best and worst
curve.py             the expected best of k, for every k up to n, against its KL
best_of_n_output.py  table, files, picture
"""

from alignkit.insight.best_of_n.best_of_n_output import draw, table, write_best, write_json, write_pairs
from alignkit.insight.best_of_n.selection import BestOfN, best_of_n

__all__ = ["BestOfN", "best_of_n", "draw", "table", "write_best", "write_json", "write_pairs"]
