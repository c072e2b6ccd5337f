"""What a run will do and take: steps, tokens, what packing saves, cache hits, and memory by part."""

from alignkit.insight.plan.memory import Memory
from alignkit.insight.plan.planned import Plan, plan
from alignkit.insight.plan.remedies import Remedy
from alignkit.insight.plan.shown import print_plan

__all__ = ["Memory", "Plan", "Remedy", "plan", "print_plan"]
