"""Settings of sampling, and of rollouts: what samples, how weights get there, and how the mismatch is corrected."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator

from alignkit.errors import ConfigError

Correction = Literal["none", "token_truncate", "sequence_truncate", "token_mask", "sequence_mask"]
LOCAL = ("generate", "transformers", "continuous")  # they sample in the process that trains
HOTTEST = 2.0  # of vLLM 0.32
# of a run that samples by servers; they do not change what is sampled, so that a resumed run may change them
FREE = (
    "urls",
    "servers",
    "server_options",
    "program",
    "key_env",
    "timeout",
    "retries",
    "backoff",
    "concurrency",
    "sync",
    "sync_folder",
    "sync_timeout",
    "tolerance",
)


class Sampling(BaseModel):
    """Settings of sampling completions."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    max_new_tokens: int = Field(256, ge=1, description="longest completion, including its end-of-sequence token")
    min_new_tokens: int = Field(
        0, ge=0, description="number of tokens before which no end-of-sequence token is sampled"
    )
    temperature: float = Field(1.0, gt=0, description="divides the logits, when sampling and when scoring")
    top_p: float = Field(
        1.0, gt=0, le=1, description="sample from the most likely tokens with this total probability; 1 is off"
    )
    top_k: int = Field(0, ge=0, description="sample from this number of most likely tokens; 0 is off")
    stop: list[str] = Field([], description="texts that end a completion")
    batch_size: int = Field(64, ge=1, description="sequences sampled at once")

    @model_validator(mode="after")
    def _can_be_done(self) -> Sampling:
        if "" in self.stop:
            raise ValueError("stop: an empty text would end every completion at once; remove it")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens is {self.min_new_tokens} and max_new_tokens {self.max_new_tokens}; lower "
                "min_new_tokens"
            )
        return self


class Rollout(BaseModel):
    """What samples completions: this process, servers, or a plugin."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    backend: str = Field(
        "generate",
        description="generate, transformers (its `generate`), continuous (its batching), vllm, or a plugin's",
    )
    urls: list[str] = Field([], description="addresses of vLLM servers, such as http://127.0.0.1:8000")
    servers: int = Field(0, ge=0, description="vLLM servers that the run starts itself and ends with it, not `urls`")
    server_options: list[str] = Field([], description="further options of `vllm serve` for `servers`")
    program: Path | None = Field(
        None, description="the program `vllm` for `servers`; default: that of ALIGNKIT_VLLM, or the installed one"
    )
    key_env: str | None = Field(None, description="NAME of the environment variable that holds the servers' key")
    timeout: float = Field(600.0, gt=0, description="seconds for the completions of one prompt")
    retries: int = Field(5, ge=0, le=100, description="after time-outs, lost connections, statuses 429 and 5xx, ...")
    backoff: float = Field(1.0, ge=0, description="seconds before the first retry at the same server; doubles")
    concurrency: int = Field(64, ge=1, description="prompts sent to a server at once, by each process")
    sync: Literal["auto", "folder", "adapter", "nccl", "ipc"] = Field(
        "auto", description="how weights get to the servers; adapter: of `lora` alone"
    )
    sync_folder: Path | None = Field(None, description="where weights are left for the servers; default: in the run's")
    sync_timeout: float = Field(600.0, gt=0, description="seconds in which a server loads weights")
    tolerance: float = Field(
        0.3, gt=0, description="nats by which a server's log-probabilities of a known prompt may differ from ours"
    )
    options: dict[str, Any] = Field({}, description="options of a plugin's sampler")
    ahead: int = Field(
        0, ge=0, le=1, description="1: the next step's completions are sampled while this one's are learned"
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
    def _holds_together(self) -> Rollout:
        for i, url in enumerate(self.urls, 1):
            if "@" in url:
                raise ValueError(
                    f"urls: number {i} contains a user or a password (@); put the key in an environment variable, and "
                    "set key_env to the variable's name"
                )
            if not _is_base(url):
                raise ValueError(
                    f"urls: number {i} must be http:// or https://, a host and a port, without ?, # and /v1, such as "
                    "http://127.0.0.1:8000"
                )
        if len({url.rstrip("/") for url in self.urls}) < len(self.urls):
            raise ValueError("urls: an address is given twice; remove one of them")
        others = {"urls", "servers", "key_env", "sync", "sync_folder"} & self.model_fields_set
        given = sorted(name for name in others if getattr(self, name) != type(self).model_fields[name].default)
        if given and self.backend in LOCAL:
            raise ValueError(f"{given[0]} has an effect with backend: vllm only; remove it")
        if self.servers and self.urls:
            raise ValueError("servers are started by the run, and urls are of others; give one of both")
        if not self.servers and (self.server_options or self.program):
            raise ValueError("server_options and program are for servers that the run starts: set `servers`, such as 1")
        if self.options and self.backend in (*LOCAL, "vllm"):
            raise ValueError(f"options are for a plugin's sampler, not for {self.backend}; remove them")
        self._check_correction()
        return self

    def _check_correction(self) -> None:
        if self.correction_floor and not self.correction.endswith("mask"):
            raise ValueError(
                "correction_floor has an effect with correction: token_mask or sequence_mask only; remove it"
            )
        unchanged = type(self).model_fields["correction_threshold"].default
        if self.correction == "none" and self.correction_threshold != unchanged:
            raise ValueError("correction_threshold has no effect with correction: none; remove it")
        if self.local and self.correction not in ("auto", "none"):
            raise ValueError(
                f"correction: {self.correction} corrects a sampler that computes other probabilities than the trainer, "
                f"but backend: {self.backend} samples with the trained model itself; remove rollout.correction"
            )
        if self.local and self.ahead:
            raise ValueError(
                f"ahead samples while the model is trained, but backend: {self.backend} samples with that model; "
                "remove rollout.ahead, or use a sampler with weights of its own"
            )

    @property
    def corrects(self) -> Correction:
        """What is done where the sampler is not exact."""
        return "token_truncate" if self.correction == "auto" else self.correction

    @property
    def local(self) -> str | None:
        """The backend that samples in this process, None where another one does."""
        return self.backend if self.backend in LOCAL else None

    def check_fit(self, sampling: Any) -> None:
        """Raise ValueError where the backend cannot do what `sampling` asks for."""
        if self.backend == "continuous" and (why := continuous_lacks(sampling)):
            raise ValueError(why)
        if self.backend == "vllm" and sampling.temperature > HOTTEST:
            raise ValueError(f"vLLM samples at temperatures up to {HOTTEST:g}; lower sampling.temperature")


def local_backend(rollout: Rollout, who: str) -> str:
    """Return the backend of a command that samples in its own process. Raises ConfigError where it is another one."""
    if rollout.local is None:
        raise ConfigError(
            f"{who} samples in its own process, which rollout.backend: {rollout.backend} does not; use generate or "
            "continuous"
        )
    return rollout.local


def continuous_lacks(sampling: Any) -> str | None:
    """Return why transformers' continuous batching cannot sample with these settings, None where it can."""
    for name in ("stop", "min_new_tokens"):
        if getattr(sampling, name):
            return f"backend: continuous does not support `{name}`; remove it, or use backend: generate"
    return None


def moved_backend(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings with `sampling.backend`, its name in earlier versions, as `rollout.backend`.

    Raises ConfigError where both are given and differ.
    """
    sampling, rollout = settings.get("sampling"), settings.get("rollout")
    if not isinstance(sampling, Mapping) or "backend" not in sampling:
        return settings
    rollout = rollout.model_dump(exclude_unset=True) if isinstance(rollout, Rollout) else (rollout or {})
    backend = sampling["backend"]
    if not isinstance(rollout, Mapping) or rollout.get("backend", backend) != backend:
        raise ConfigError(
            f"sampling.backend: {backend} is the earlier name of rollout.backend, and `rollout` says something else; "
            "remove sampling.backend"
        )
    kept = {k: v for k, v in sampling.items() if k != "backend"}
    return {**settings, "sampling": kept, "rollout": {**rollout, "backend": backend}}


def _is_base(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return bool(
            parts.scheme in ("http", "https")
            and parts.hostname
            and not (parts.query or parts.fragment)
            and (parts.port is None or parts.port > 0)
            and parts.path.rstrip("/") != "/v1"
        )
    except ValueError:
        return False
