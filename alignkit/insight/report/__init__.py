"""A report on runs as one HTML file: curves, alarms, completions before and after, data, settings, environment, cost.

run_files.py       what the folders of runs contain
curves.py          which metrics are drawn, in which units
charts.py          a chart; inline_svg.py embeds it in the page
numbers.py         which numbers are drawn, and their text form
completions.py     completions before and after
setting_tables.py  what differs from the defaults, and between runs
run_facts.py       reference, environment, cost
run_tables.py      the facts of several runs side by side
data_audits.py     the data
html_report.py     report(): everything in one file
"""

from alignkit.insight.report.html_report import report

__all__ = ["report"]
