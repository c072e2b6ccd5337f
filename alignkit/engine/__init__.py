"""The engine: THE loop, and everything it needs.

engine.py      Engine, run(), resume(): from settings to a Result
phases.py      Run: the phases of a run, one after the other
loop.py        THE loop: steps, updates, checkpoints
ending.py      a run that ends before its last step
state.py       the state of a run, as plain data
reading.py     settings -> examples, to train on and held out
assemble.py    settings and examples -> models, reference
references.py  the reference of a run; the sharding of its models
optimizers.py  the optimiser and its groups of parameters
step.py        a step as a method sees it (alignkit.method.Context)
roles.py       the models that a method may call
rollouts.py    prompts -> sampled and scored completions
ahead.py       a sampler with weights of its own, one step ahead of the learning
ahead_state.py  what was sampled ahead, in a checkpoint
scorers.py     the rewards and the judge of a run
sampled.py     the metrics of sampled completions
evaluation.py  held-out rows; early stopping
averages.py    terms -> a loss, a gradient's share, means
balance.py     the load-balancing loss of mixtures of experts
padding.py     the padding of a saved reward model
saving.py      checkpoints and resumption
model_folder.py  the saved model
gathering.py   the weights of a sharded model, for the saved model
"""

from alignkit.engine.engine import Engine, Result, resume, run

__all__ = ["Engine", "Result", "resume", "run"]
