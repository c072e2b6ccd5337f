"""What a data set is like before anything is trained on it, and what a reward makes of it.

audited.py     audit(), and all that it finds
repeats.py     duplicates, contradictions, prompts on both sides of a split
lengths.py     lengths, and what budgets cut
features.py    what an answer has besides content; how to add it and take it away
bias.py        whether the preferred answer has more of it
scored.py      the same of a reward's scores, and of the same answer changed
findings.py    what is beyond chance, in words
shown.py       terminal, JSON, HTML
"""

from alignkit.insight.audit.audit_output import print_audit, write_html, write_json
from alignkit.insight.audit.data_audit import Audit, audit

__all__ = ["Audit", "audit", "print_audit", "write_html", "write_json"]
