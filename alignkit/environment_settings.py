"""Settings of environments."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator


class EnvironmentSettings(BaseModel):
    """What answers the turns of the policy, and how far a trajectory may go."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)

    use: Any = Field(None, description="an environment's class or factory, module:name, file.py:name, or an object")
    tools: list[Any] = Field([], description="functions that the policy may call, module:name, instead of `use`")
    max_turns: int = Field(8, ge=1, description="turns of the assistant in a trajectory")
    max_tokens: int = Field(2048, ge=1, description="tokens of a trajectory after its prompt, read and sampled")
    timeout: float = Field(60.0, gt=0, description="seconds for one answer of the environment, or one call of a tool")

    @model_validator(mode="before")
    @classmethod
    def _short(cls, given: Any) -> Any:
        """Take `module:name` alone as `use`."""
        return given if isinstance(given, dict | BaseModel) else {"use": given}

    @model_validator(mode="after")
    def _one_of_them(self) -> EnvironmentSettings:
        if (self.use is None) == (not self.tools):
            raise ValueError("environment needs one of `use` and `tools`")
        return self
