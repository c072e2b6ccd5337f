"""Per-token log-probabilities, segment sums and preference losses; useful without the rest of alignkit.

Shape letters: N tokens, V vocabulary, H hidden size, C completion tokens, S completions, E examples.
Log-probabilities are in nats and float32 (float64 for float64 inputs).
"""

from alignkit_kernels.gae import gae
from alignkit_kernels.linear_logps import linear_logps
from alignkit_kernels.policy_loss import PolicyLoss, policy_loss
from alignkit_kernels.preference_loss import PreferenceLoss, preference_loss
from alignkit_kernels.selective_logps import selective_logps
from alignkit_kernels.sequence_sum import sequence_sum

__all__ = [
    "PolicyLoss",
    "PreferenceLoss",
    "gae",
    "linear_logps",
    "policy_loss",
    "preference_loss",
    "selective_logps",
    "sequence_sum",
]
