"""An audit of a data set before training, and of a reward on it.

data_audit.py    audit(), and everything that it finds
repeats.py       duplicates, contradictions, prompts on both sides of a split
lengths.py       lengths, and what budgets cut
features.py      features of an answer other than content; how to add and remove them
bias.py          whether the preferred answer has more of a feature
reward_audit.py  the same for a reward's scores, and the effect of changing an answer
findings.py      effects beyond chance, as sentences
audit_output.py  terminal, JSON, HTML
"""

from alignkit.insight.audit.audit_output import print_audit, write_html, write_json
from alignkit.insight.audit.data_audit import Audit, audit

__all__ = ["Audit", "audit", "print_audit", "write_html", "write_json"]
