"""Sampling completions from a model.

sampling.py      sample(): checks, and the choice of a backend
draws.py         a call of `ctx.rollouts`, checked
batched.py       padded batches by transformers' `generate`, each prompt computed once
mixture.py       the geometric mixture of a policy and its reference
noise.py         the random numbers of a sequence, independent of its batch
continuous.py    transformers' continuous batching
completions.py   sampled tokens as a batch of trees, and as text for rewards
tool_calls.py    tool calls in sampled text
elsewhere.py     samplers that do not use the training process's model
correction.py    the mismatch of sampler and trainer: metrics and weights
checks.py        whether rewards, judge and sampling settings fit a method
"""

from alignkit.rollout.batched import Sampled
from alignkit.rollout.draws import Draw
from alignkit.rollout.mixture import Mixture
from alignkit.rollout.sampling import sample

__all__ = ["Draw", "Mixture", "Sampled", "sample"]
