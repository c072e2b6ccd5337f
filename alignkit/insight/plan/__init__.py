"""What a run will do and take: steps, tokens, what packing saves, cache hits, and memory by part."""

from alignkit.insight.plan.memory import Memory
from alignkit.insight.plan.plan_output import print_plan
from alignkit.insight.plan.remedies import Remedy
from alignkit.insight.plan.run_plan import Plan, plan

__all__ = ["Memory", "Plan", "Remedy", "plan", "print_plan"]
