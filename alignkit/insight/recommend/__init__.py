"""Which installed methods a data set can serve, which to start with and why, and the settings to begin from.

facts.py         what the rows, the model and what was given say
scoring.py       what scores samples: what it asks of the rows, and what their column `answer` could check
advice.py        what is known of the methods that are known: a rank, a reason, settings
cautions.py      what no setting mends
settings.py      the run's own settings
fit.py           what makes a run fit into a GPU's memory, by `plan`
recommended.py   recommend(): methods that are not known here are served too
shown.py         terminal and JSON
written.py       the YAML to begin from
"""

from alignkit.insight.recommend.recommended import Option, Recommendation, recommend
from alignkit.insight.recommend.shown import print_recommendation
from alignkit.insight.recommend.written import write_config

__all__ = ["Option", "Recommendation", "print_recommendation", "recommend", "write_config"]
