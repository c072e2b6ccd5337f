"""Environments: what answers the turns of a policy, so that whole trajectories are learned.

contract.py   an environment and its step
tools.py      Python functions as tools
calling.py    calling them and environments, so that they can be given up
build.py      from the setting to environments
turns.py      what an environment says, as the tokens that follow a sampled turn
episodes.py   a sampler of trajectories, by a sampler of turns
"""

from alignkit.environments.contract import Environment, Step
from alignkit.environments.tools import Tools

__all__ = ["Environment", "Step", "Tools"]
