"""The interface of listeners: the view of a run that they get, the alarms that they return, the limits of health."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from alignkit.hints import hint


@dataclass(frozen=True)
class Alarm:
    """A fault of a run.

    name: the cause, reported once per run. value, limit: what was measured, and the limit that it passed, in the
    same unit. message: what happened, with step, value and limit. remedy: what to change, by the names of settings.
    """

    name: str
    value: float
    limit: float
    message: str
    remedy: str


@dataclass(frozen=True, eq=False)
class RunView:
    """A run as a listener gets it. settings: of the run and of the method, as in config.yaml."""

    folder: Path
    settings: Mapping[str, Any]
    total_steps: int


Limit = float | None
HEALTHY_KL = (0.5, 10.0)  # nats a sequence to the reference


class Health(BaseModel):
    """Limits of the alarms of `alignkit.insight.health`; null switches one off. "Start" is the first `window` lines."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    enabled: bool = Field(True, description="watch the run")
    window: int = Field(
        8, ge=1, le=1000, description="logged steps that are averaged, and compared with the first ones"
    )
    reward_rise: float = Field(0.25, gt=0, description="standard deviations that a reward must have risen by")

    kl_high: Limit = Field(15.0, gt=0, description="nats a sequence: too far from the reference")
    kl_low: Limit = Field(
        0.01, gt=0, description="nats a sequence, 20 steps after the warm-up: the policy does not learn"
    )
    reward_kl: Limit = Field(10.0, gt=0, description="nats a sequence, growing, while the reward has risen")
    reward_length: Limit = Field(1.5, gt=1, description="times the length at the start, while the reward has risen")
    reward_held_out: Limit = Field(
        0.35, gt=0, description="standard deviations that a reward of weight 0 fell, while the reward has risen"
    )
    distinct: Limit = Field(0.5, gt=0, lt=1, description="fraction of the start's distinct-2 that remains")
    entropy: Limit = Field(0.03, gt=0, description="nats a token, and less than half of the start")
    repetition: Limit = Field(
        0.2, gt=0, lt=1, description="fraction of a completion's 4-grams that repeat earlier ones"
    )
    opening: Limit = Field(0.8, gt=0, le=1, description="fraction of the prompts answered with the same first words")
    displacement: Limit = Field(0.2, gt=0, description="nats a token that chosen answers lost; rejected ones lost more")
    same_reward: Limit = Field(
        1, gt=0, description="logged steps, from the first on, in which all completions have the same reward"
    )
    zero_variance: Limit = Field(
        0.8, gt=0, le=1, description="fraction of the prompts whose completions all have the same score"
    )
    clip_fraction: Limit = Field(0.3, gt=0, le=1, description="fraction of the tokens whose gradient was clipped")
    value_loss: Limit = Field(10.0, gt=1, description="times its running median")
    explained_variance: Limit = Field(-0.02, lt=1, description="value below which the critic does harm")
    grad_spike: Limit = Field(8.0, gt=1, description="times the running median of the gradient's norm")
    truncation: Limit = Field(0.1, gt=0, le=1, description="fraction of the completions that max_new_tokens cut")
    mismatch: Limit = Field(0.05, gt=0, description="nats a token, of the sampler to the trainer")

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given  # pydantic reports the type
        if unknown := next((k for k in given if k not in cls.model_fields), None):
            raise ValueError(f"no limit '{unknown}'.{hint(str(unknown), cls.model_fields)} See docs/health.md")
        on = next((k for k, v in given.items() if isinstance(v, bool) and k != "enabled"), None)
        if on is not None:
            raise ValueError(f"{on} is {str(given[on]).lower()}; give its limit as a number, or null to switch it off")
        return given

    @model_validator(mode="after")
    def _check_order(self) -> Health:
        if self.kl_low is not None and self.kl_high is not None and self.kl_low >= self.kl_high:
            raise ValueError(f"kl_low {self.kl_low:g} is not below kl_high {self.kl_high:g}")
        return self


ALARMS = tuple(name for name, field in Health.model_fields.items() if field.annotation == Limit)
