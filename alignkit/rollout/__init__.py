"""Sampling completions from a model.

sampling.py      sample(): checks, and the two ways to sample
batched.py       padded batches through transformers' `generate`, each prompt computed once
mixture.py       the geometric mixture of a policy and its reference
noise.py         the randomness of a sequence, which nothing beside it changes
continuous.py    transformers' continuous batching
"""

from alignkit.rollout.batched import Sampled
from alignkit.rollout.mixture import Mixture
from alignkit.rollout.sampling import sample

__all__ = ["Mixture", "Sampled", "sample"]
