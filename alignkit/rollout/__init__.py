"""Sampling completions from a model.

sampler.py       the contract of samplers: a request, what was sampled, versions of weights
sampling.py      sample(): checks, and the choice of a backend of this process
backends.py      the sampler of a run, by the name of its backend
draws.py         a call of `ctx.rollouts`, checked
batched.py       padded batches by transformers' `generate`, each prompt computed once
mixture.py       the geometric mixture of a policy and its reference
noise.py         the random numbers of a sequence, independent of its batch
continuous.py    transformers' continuous batching
completions.py   sampled tokens as a batch of trees, and as text for rewards
tool_calls.py    tool calls in sampled text
checks.py        whether rewards, judge and sampling settings fit a method
"""

from alignkit.rollout.draws import Draw
from alignkit.rollout.mixture import Mixture
from alignkit.rollout.sampler import Request, Sampled, Sampler, Setup
from alignkit.rollout.sampling import sample

__all__ = ["Draw", "Mixture", "Request", "Sampled", "Sampler", "Setup", "sample"]
