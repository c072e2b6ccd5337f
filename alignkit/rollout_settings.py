"""Settings of samplers that are not the trainer itself: how their mismatch is corrected, and how far ahead they are."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Correction = Literal["none", "token_truncate", "sequence_truncate", "token_mask", "sequence_mask"]


class Rollout(BaseModel):
    """Settings of rollouts, besides those of `sampling`; see docs/off-policy.md."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    ahead: int = Field(
        0,
        ge=0,
        le=1,
        description="steps that sampling is ahead of learning; 1: the next step's completions are "
        "sampled while this one's are learned",
    )
    correction: Literal["auto", Correction] = Field(
        "auto",
        description="weights against the mismatch of sampler and trainer, see docs/off-policy.md; auto: token_truncate "
        "where the sampler is not exact",
    )
    correction_threshold: float = Field(
        2.0, ge=1, description="largest weight; beyond it a weight is lowered to it, or with a mask set to 0"
    )
    correction_floor: float = Field(
        0.0, ge=0, le=1, description="with a mask, weights below it are 0 too; IcePop: 0.5, with a threshold of 5"
    )

    @model_validator(mode="after")
    def _floor_is_of_a_mask(self) -> Rollout:
        if self.correction_floor and not self.correction.endswith("mask"):
            raise ValueError(
                "correction_floor has an effect with correction: token_mask or sequence_mask only; remove it"
            )
        if (
            self.correction == "none"
            and self.correction_threshold != type(self).model_fields["correction_threshold"].get_default()
        ):
            raise ValueError("correction_threshold has no effect with correction: none; remove it")
        return self

    @property
    def corrects(self) -> Correction:
        """What is done where the sampler is not exact."""
        return "token_truncate" if self.correction == "auto" else self.correction
