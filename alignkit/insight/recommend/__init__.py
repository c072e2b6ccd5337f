"""The installed methods that a data set can serve, which to start with and why, and the settings to start from.

data_facts.py            facts about the rows, the model, and the given reward and judge
verifiable_rewards.py    which rewards call a language model, and which could check the column `answer`
cautions.py              problems that no setting solves
run_settings.py          the run's own settings
fit.py                   settings that make a run fit into a GPU's memory, by `plan`
recommendation.py        recommend(): each method advises for itself (`alignkit.advice`)
recommendation_text.py   text for the terminal
config_file.py           the YAML file to start from
"""

from alignkit.insight.recommend.config_file import write_config
from alignkit.insight.recommend.recommendation import Option, Recommendation, recommend
from alignkit.insight.recommend.recommendation_text import print_recommendation

__all__ = ["Option", "Recommendation", "print_recommendation", "recommend", "write_config"]
