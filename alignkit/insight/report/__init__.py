"""What runs did, as one HTML file: curves, alarms, completions before and after, data, settings, environment, cost.

run_files.py       what is in the folders of runs
curves.py     which metrics are drawn, in which units
charts.py     a chart; inline.py its SVG in the page
numbers.py    which numbers are drawn, and how they are written
samples.py    completions before and after
settings.py   what differs from the defaults, and between runs
facts.py      reference, environment, cost
audits.py     the data
written.py    report(): all of it into a file
"""

from alignkit.insight.report.html_report import report

__all__ = ["report"]
