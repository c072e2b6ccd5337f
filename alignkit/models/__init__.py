"""Models: loading them, packing rows for them, and computing log-probabilities and scalar values with them.

loading.py     tokenizer, model
unread.py      models that are sharded before their weights are read
dropout.py     no dropout
places.py      where a model is looked up, and what is said where it is not there
refusals.py    what is said where a model cannot be loaded safely
adapters/      low-rank adapters, and the model before they were trained; what they leave out
quantised.py   a frozen base in 4 bits
towers.py      the language model of a multimodal one, and the rest of it, which is frozen
embedding_noise.py  NEFTune's noise
scoring.py     trunk, the positions that predict, head: log-probabilities of the targets
truncation.py  what sampling leaves out of a distribution
earlier_weights.py  the trained weights before an update
values.py      models with a scalar output: reward models, critics
critic.py      where PPO's critic comes from
packing.py     how prompt trees share rows
attention.py   the mask of a packed row
rope.py        rotary positions that depend on a sequence's length
router.py      the routing of mixtures of experts
branches.py    attention branch by branch on a CPU
compiled.py    norms and feed-forward layers by torch.compile
layouts.py     forest or padded rows, decided by a probe
passes.py      batches of any size in parts that fit into memory
ranks.py       communication between the processes of a run
heartbeat.py   which of them does not answer
sharding.py    FSDP2
"""
