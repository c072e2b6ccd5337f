import math

import torch

from alignkit.testing import *
from alignkit.testing.byhand import log_sigmoid
from alignkit_reward import Reward


def by_hand(model, ids):
    """The score of one sequence by the classifier's own parts, in float64."""
    with torch.no_grad():
        hidden = model.base_model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1]
        return float(model.score(hidden))


class TestReward(Conformance):
    method = Reward
    configs = ({}, {"centring": 0.01}, {"pairwise": True})

    def expected_step(self, config, rows, bench):
        """-log s(r_chosen - r_rejected) + c (r_chosen + r_rejected)^2."""
        losses = []
        for row in rows:
            prompt = row.example.prompt.tolist()
            chosen, rejected = (c.tokens.tolist() for c in row.example.completions)
            if config.pairwise:
                chosen, rejected = chosen + rejected, rejected + chosen
            a, b = (by_hand(bench.models.trained.model, prompt + ids) for ids in (chosen, rejected))
            losses.append(-log_sigmoid(a - b) + config.centring * (a + b) ** 2)
        return math.fsum(losses) / len(losses)
