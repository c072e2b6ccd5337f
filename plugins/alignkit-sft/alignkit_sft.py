"""Supervised fine-tuning: maximise the log-probability of the completions.

    loss = -log p(token), averaged over all completion tokens of the step

Of a row with several turns only the assistant's tokens count; of pairs, the chosen answers.
"""

from __future__ import annotations

from alignkit import Batch, Method, MethodConfig, Models, Term, hookimpl


class SFT(Method["SFT.Config"]):
    """Next-token cross-entropy on the completions; prompts are read, never learned."""

    name = "sft"
    data = "text"
    learning_rate = 2e-5
    lora_learning_rate = 2e-4

    class Config(MethodConfig):
        """SFT has no settings of its own."""

    def loss(self, batch: Batch, models: Models) -> dict[str, Term]:
        """Return the negative log-likelihood in nats a token."""
        return {"nll": Term(-models.policy(batch).logps, over="tokens")}


@hookimpl
def register_methods() -> list[type[Method]]:
    """Bring "sft"."""
    return [SFT]
