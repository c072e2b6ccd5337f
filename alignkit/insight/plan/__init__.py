"""A plan of a run: steps, tokens, what packing saves, cache hits, and memory by part.

run_plan.py        plan(): everything about one run
memory.py          memory by part and phase
dry_run.py         one step with tensors that have no data
experts.py         the weights of mixtures of experts
meta_models.py     models from their configurations alone
ledger.py          bytes of live tensors, by label
sharded_memory.py  what several processes change
rollout_memory.py  sampling in the process that trains
server_memory.py   vLLM servers
remedies.py        settings that need less memory
plan_output.py     terminal
"""

from alignkit.insight.plan.memory import Memory
from alignkit.insight.plan.plan_output import print_plan
from alignkit.insight.plan.remedies import Remedy
from alignkit.insight.plan.run_plan import Plan, plan

__all__ = ["Memory", "Plan", "Remedy", "plan", "print_plan"]
