"""Supervised fine-tuning: maximise the log-probability of the completions.

    loss = -log p(token), averaged over all completion tokens of the step

In a row with several turns only the assistant's tokens count; in pairs, only the chosen answers.
"""

from __future__ import annotations

from alignkit import Advice, Batch, DataFacts, Method, MethodConfig, Models, Term, hookimpl


class SFT(Method["SFT.Config"]):
    """Next-token cross-entropy on the completions; prompts are read, never learned."""

    name = "sft"
    data = "text"
    learning_rate = 2e-5
    lora_learning_rate = 2e-4
    demo_base = {"learning_rate": 3e-3, "epochs": 24, "batch_size": 32, "warmup_fraction": 0.05}

    class Config(MethodConfig):
        """SFT has no settings of its own."""

    @classmethod
    def advice(cls, facts: DataFacts) -> Advice:
        """Advise it where no row shows a bad answer."""
        if "pairs" in facts.rows or (facts.labels is not None and all(facts.labels)):
            reason = "imitates the good answers and learns nothing from the others; on a base model, run it first"
            return Advice(20, reason)
        if facts.labels is not None:
            return Advice(95, "imitates the answers: all are good, and no row shows a bad answer")
        return Advice(95, "imitates the answers; without preferences or a reward, rows serve no other method")

    def loss(self, batch: Batch, models: Models) -> dict[str, Term]:
        """Return the negative log-likelihood in nats per token."""
        return {"nll": Term(-models.policy(batch).logps, over="tokens")}


@hookimpl
def register_methods() -> list[type[Method]]:
    """Register "sft"."""
    return [SFT]
