"""`alignkit demo`: a small question-answering task, a small model that answers in two styles, and its alignment.

world.py            the task: questions, facts, answers in two styles
base.py             the small model and its tokenizer
verdict.py          the reward and the judge
recipes.py          methods and settings
policy_metrics.py   metrics of a policy against its base
before_after.py     run_demo()
"""

from alignkit.demo.before_after import run_demo
from alignkit.demo.recipes import best

__all__ = ["best", "run_demo"]
