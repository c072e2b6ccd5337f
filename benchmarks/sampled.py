"""GRPO and RLOO contenders of online.py, online_gpu.py and scaling.py: alignkit, and TRL's trainers, phase by phase."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common

PROMPTS, BETA, RATE = 2, 0.04, 1e-6
PHASES = ("sampling", "scoring", "learning", "step")


def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Score the answer's format and its brevity; the untrained model gets no two alike."""
    return [bool(re.search(r"#### -?\d", text)) - len(text) / 1000 for text in completions]


def settings_of(method: str, work: Path, steps: int, group: int, tokens: int, **changes: Any) -> dict[str, Any]:
    """Return alignkit's settings: completions of exactly so many tokens. changes: settings that differ."""
    return {
        "model": str(work / "start"), "data": str(work / "rows.jsonl"), "reward": reward, "output": work / "runs",
        "batch_size": PROMPTS, "group_size": group, "beta": BETA, "max_steps": steps, "learning_rate": RATE,
        "schedule": "constant", "warmup_fraction": 0.0, "eval_fraction": 0.0, "max_prompt_tokens": None, "seed": 0,
        "sampling": {"max_new_tokens": tokens, "min_new_tokens": tokens}, "device": "cpu", "precision": "fp32",
        **({"kl": "k3"} if method == "grpo" else {}), **changes,
    }  # fmt: skip


def run_alignkit(method: str, *sizes: Any, **changes: Any) -> dict[str, Any]:
    """Train as a user would, and read the phases from the run's metrics. sizes, changes: of `settings_of`."""
    import alignkit

    result = alignkit.run(method, **settings_of(method, *sizes, **{"log_every": 1, **changes}))
    lines = [line for line in common.read_jsonl(result.folder / "metrics.jsonl") if "seconds/sampling" in line]
    seconds = [{phase: line[f"seconds/{phase}"] for phase in PHASES[:-1]} for line in lines]
    return {
        "seconds": [{**s, "step": sum(s.values())} for s in seconds],
        "length": [line["completion/length"] for line in lines],
        "reward": [line["reward/mean"] for line in lines],
    }


def run_trl(
    method: str, work: Path, steps: int, group: int, tokens: int, dtype: str = "float32", **changes: Any
) -> dict[str, Any]:
    """Train with TRL's trainer on the same prompts, unshuffled, all completions of a step in one pass.

    dtype: of the weights. changes: arguments of its configuration that differ.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    clock = Clock()
    trainer, settings = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}[method]
    given = {
        "output_dir": str(work / "trl"), "per_device_train_batch_size": PROMPTS * group, "num_generations": group,
        "steps_per_generation": 1, "max_completion_length": tokens, "generation_kwargs": {"min_new_tokens": tokens},
        "beta": BETA, "learning_rate": RATE, "lr_scheduler_type": "constant", "max_steps": steps, "seed": 0,
        "shuffle_dataset": False, "gradient_checkpointing": False, "use_cpu": True, "bf16": False,
        "save_strategy": "no", "report_to": [], "logging_steps": 1, "disable_tqdm": True,
        **({"loss_type": "grpo"} if method == "grpo" else {}), **changes,
    }  # fmt: skip
    trained = clock.around(trainer)(
        model=AutoModelForCausalLM.from_pretrained(work / "start", dtype=getattr(torch, dtype)),
        reward_funcs=reward, args=settings(**given),
        train_dataset=Dataset.from_list(common.read_jsonl(work / "in-order.jsonl")),
        processing_class=AutoTokenizer.from_pretrained(work / "start", padding_side="left"),
        callbacks=[clock.callback()],
    )  # fmt: skip
    trained.train()
    lines = [line for line in trained.state.log_history if "reward" in line]
    return {
        "seconds": [{**s, "learning": s["step"] - s["sampling"] - s["scoring"]} for s in clock.seconds],
        "length": [line["completions/mean_length"] for line in lines],
        "reward": [line["reward"] for line in lines],
    }


class Clock:
    """Seconds of each step of a TRL trainer: `step`, and in it `sampling` and `scoring`."""

    def __init__(self) -> None:
        self.seconds: list[dict[str, float]] = []

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time of the block to a phase of the step."""
        started = time.perf_counter()
        yield
        self.seconds[-1][phase] += time.perf_counter() - started

    def around(self, trainer: Any) -> Any:
        """Return a subclass of the trainer that times its two phases before learning."""
        clock = self

        class Timed(trainer):  # type: ignore[misc]
            _name = trainer.__name__

            def _generate(self, *args: Any, **kwargs: Any) -> Any:
                with clock.timed("sampling"):
                    return super()._generate(*args, **kwargs)

            def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
                with clock.timed("scoring"):
                    return super()._calculate_rewards(*args, **kwargs)

        return Timed

    def callback(self) -> Any:
        """Return the callback that starts and stops the clock of a step: around the update, without logging."""
        import torch
        from transformers import TrainerCallback

        clock = self

        class Steps(TrainerCallback):  # type: ignore[misc]
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                clock.seconds.append({"sampling": 0.0, "scoring": 0.0, "step": -time.perf_counter()})

            def on_step_end(self, *_: Any, **__: Any) -> None:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                clock.seconds[-1]["step"] += time.perf_counter()

        return Steps()
