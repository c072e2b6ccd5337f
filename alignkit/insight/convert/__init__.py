"""A configuration or a script of TRL as settings of a run, and what of it cannot be carried over.

source.py        what a file sets, by TRL's names; reads YAML
script.py        reads a Python script by its syntax tree, never runs it
conversion.py    convert(): the rules in their order, and what is left
work.py          the state that the rules share
steps.py         batches, steps, rates, evaluation, checkpoints
learning.py      losses, lengths, sampling, policy gradients
model.py         model, data, precision, adapters
"""

from alignkit.insight.convert.conversion import Converted, convert

__all__ = ["Converted", "convert"]
