"""Sampling completions from a model.

sampler.py       the contract of samplers: a request, what was sampled, versions of weights
sampling.py      sample(): checks, and the choice of a backend of this process
backends.py      the sampler of a run, by the name of its backend
draws.py         a call of `ctx.rollouts`, checked
batched.py       batches by the engine's own loop, or by transformers' `generate`
token_loop.py    the loop over the tokens of a batch, which ended rows leave
decoder.py       a model that continues prompts, and whether it computes what its own forward does
shared_keys.py   keys and values, a prompt's held once for its completions
fast_layers.py   layers that are faster for a few tokens on a CPU
processors.py    from logits to a token, and where a completion ends
mixture.py       the geometric mixture of a policy and its reference
noise.py         the random numbers of a sequence, independent of its batch
continuous.py    transformers' continuous batching
vllm.py          vLLM servers as a sampler
vllm_requests.py a request as vLLM takes it, and its reply, checked
spread.py        prompts spread over servers; those that failed are asked again
serving.py       starting vLLM servers for a run, and ending them; own_servers.py those that a run starts itself
servers.py       HTTP with a server, and which failures may pass
sync.py          how weights get to servers
transfer.py      vLLM's own transfer of weights between GPUs
published.py     weights as a folder: whole or absent, adapters alone or merged
known_prompt.py  which weights a server has in force, by a prompt that the trainer scores too
completions.py   sampled tokens as a batch of trees, and as text for rewards
tool_calls.py    tool calls in sampled text
correction.py    the mismatch of sampler and trainer: metrics and weights
checks.py        whether rewards, judge and sampling settings fit a method
"""

from alignkit.rollout.draws import Draw
from alignkit.rollout.mixture import Mixture
from alignkit.rollout.sampler import Request, Sampled, Sampler, Setup
from alignkit.rollout.sampling import sample

__all__ = ["Draw", "Mixture", "Request", "Sampled", "Sampler", "Setup", "sample"]
