"""GRPO and RLOO on real prompts: alignkit and TRL's trainers, phase by phase, in one run.

    python benchmarks/online.py --data gsm8k_train.jsonl --trl-python path/to/its/python --json online.json
    python benchmarks/online.py --tiny               made-up prompts and a tiny model, in seconds: does everything run?

Every contender has its own process, the same prompts in the same order, and the 28 M-parameter Llama of engine.py in
float32 on the CPU: a step has 2 prompts, 8 completions of exactly 64 tokens each, one update, and a reference. Sampling
is from prompts to text, scoring is the reward function, learning is the rest of a step: passes of policy and reference,
advantages, backward, optimiser. "...-bf16" is the same in bfloat16, compared with TRL in bf16; "alignkit-transformers"
samples by transformers' `generate`. The floor of sampling is the matrix products of its decode steps alone, in the same
process. Figures are medians over the steps after the first, which warms up; peak memory is the largest resident set of
the process. TRL takes part with --trl-python: with gradient checkpointing, its default, and
without, which is faster; the bars compare with the latter. A contender that fails is reported with its error, and the
exit code is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import contest

METHODS = ("grpo", "rloo")
CONTENDERS = ("trl", "alignkit", "trl-checkpointing", "alignkit-transformers", "trl-bf16", "alignkit-bf16")
PHASES = ("sampling", "scoring", "learning", "step")
PROMPTS, BETA, RATE = 2, 0.04, 1e-6
GROUP, TOKENS = 8, 64  # completions of a prompt, tokens of a completion
TINY_GROUP, TINY_TOKENS = 2, 8
BARS = {"learning": 3.0, "step": 1.8, "peak_mib": 0.6}


def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Score the answer's format and its brevity; the untrained model gets no two alike."""
    return [bool(re.search(r"#### -?\d", text)) - len(text) / 1000 for text in completions]


def run_alignkit(method: str, work: Path, steps: int, group: int, tokens: int, kind: str) -> dict[str, Any]:
    """Train as a user would, and read the phases from the run's metrics."""
    import alignkit

    result = alignkit.run(
        method, model=str(work / "start"), data=str(work / "rows.jsonl"), reward=reward, output=work / "runs",
        batch_size=PROMPTS, group_size=group, beta=BETA, max_steps=steps, learning_rate=RATE, schedule="constant",
        warmup_fraction=0.0, eval_fraction=0.0, max_prompt_tokens=None, device="cpu", seed=0, log_every=1,
        sampling={"max_new_tokens": tokens, "min_new_tokens": tokens}, precision="bf16" if kind == "bf16" else "fp32",
        rollout={"backend": "transformers" if kind == "transformers" else "generate"},
        **({"kl": "k3"} if method == "grpo" else {}),
    )  # fmt: skip
    lines = [line for line in common.read_jsonl(result.folder / "metrics.jsonl") if "seconds/sampling" in line]
    seconds = [{phase: line[f"seconds/{phase}"] for phase in PHASES[:-1]} for line in lines]
    return {
        "seconds": [{**s, "step": sum(s.values())} for s in seconds],
        "floor": common.products_alone(work / "start", PROMPTS * group, tokens, kind == "bf16"),
        "length": [line["completion/length"] for line in lines],
        "reward": [line["reward/mean"] for line in lines],
    }


def run_trl(method: str, work: Path, steps: int, group: int, tokens: int, kind: str) -> dict[str, Any]:
    """Train with TRL's trainer on the same prompts, unshuffled, all completions of a step in one pass."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    clock = Clock()
    trainer, settings = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}[method]
    args = settings(
        output_dir=str(work / "trl"), per_device_train_batch_size=PROMPTS * group, num_generations=group,
        steps_per_generation=1, max_completion_length=tokens, generation_kwargs={"min_new_tokens": tokens},
        beta=BETA, learning_rate=RATE, lr_scheduler_type="constant", max_steps=steps, shuffle_dataset=False,
        gradient_checkpointing=kind == "checkpointing", use_cpu=True, bf16=kind == "bf16", save_strategy="no",
        report_to=[], logging_steps=1, disable_tqdm=True, seed=0, **({"loss_type": "grpo"} if method == "grpo" else {}),
    )  # fmt: skip
    trained = clock.around(trainer)(
        model=AutoModelForCausalLM.from_pretrained(work / "start", dtype=torch.float32),
        reward_funcs=reward, args=args, train_dataset=Dataset.from_list(common.read_jsonl(work / "in-order.jsonl")),
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
        from transformers import TrainerCallback

        clock = self

        class Steps(TrainerCallback):  # type: ignore[misc]
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                clock.seconds.append({"sampling": 0.0, "scoring": 0.0, "step": -time.perf_counter()})

            def on_step_end(self, *_: Any, **__: Any) -> None:
                clock.seconds[-1]["step"] += time.perf_counter()

        return Steps()


def prepare(args: argparse.Namespace, work: Path) -> None:
    """Write the start model, the prompts, and the prompts in the order in which alignkit's seed 0 visits them."""
    rows = common.made_up_questions(8) if args.data is None else common.read_jsonl(args.data)
    prompts: list[Any] = [{"prompt": row["question"]} for row in rows]
    common.write_jsonl(work / "rows.jsonl", prompts)
    order = common.visited(len(prompts), PROMPTS, args.steps)
    common.write_jsonl(work / "in-order.jsonl", (prompts[i] for i in order))
    common.write_start(work / "start", [f"{row['question']}\n{row['answer']}" for row in rows], args.tiny)


def contend(name: str, args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Run one contender, METHOD:CONTENDER, in this process and return its figures."""
    method, contender = name.split(":")
    group, tokens = (TINY_GROUP, TINY_TOKENS) if args.tiny else (GROUP, TOKENS)
    which, _, kind = contender.partition("-")
    figures = (run_trl if which == "trl" else run_alignkit)(method, work, args.steps, group, tokens, kind)
    if set(figures["length"]) != {tokens}:
        raise RuntimeError(f"learned from completions of {figures['length']} tokens; all must have {tokens}")
    return figures


def summary(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Return the medians of one contender's rounds; each round's first step is left out."""
    steps = [step for figures in rounds for step in figures["seconds"][1:]]
    medians = {phase: statistics.median(step[phase] for step in steps) for phase in PHASES}
    if "floor" in rounds[0]:
        medians["floor"] = statistics.median(figures["floor"] for figures in rounds)
    return {**medians, "peak_mib": statistics.median(figures["peak_mib"] for figures in rounds)}


def is_missed(name: str, value: float | None, bar: float) -> bool:
    """Return whether a ratio misses its bar: memory must be at most the bar, speed at least."""
    return value is None or (value > bar if name == "peak_mib" else value < bar)


def report(rows: dict[str, dict[str, float]], bars: bool) -> list[str]:
    """Lay out the table, with ratios to TRL without gradient checkpointing, and the verdict on alignkit's bars."""
    head = [
        "method",
        "contender",
        *PHASES[:-1],
        "step s",
        "peak MiB",
        "x learning",
        "x step",
        "memory/trl",
        "sampling/floor",
    ]
    cells, verdicts = [], []
    for name, row in rows.items():
        method, contender = name.split(":")
        trl = rows.get(f"{method}:trl{'-bf16' * contender.endswith('-bf16')}", {})
        to = {phase: common.ratio(trl.get(phase), row[phase]) for phase in ("learning", "step")}
        to["peak_mib"] = common.ratio(row["peak_mib"], trl.get("peak_mib"))
        figures = [f"{row[phase]:.{3 if phase == 'scoring' else 2}f}" for phase in PHASES]
        ratios = [
            common.shown(value, ".2f") for value in (*to.values(), common.ratio(row["sampling"], row.get("floor")))
        ]
        cells.append([method, contender, *figures, f"{row['peak_mib']:.0f}", *ratios])
        if contender == "alignkit" and trl:
            missed = [name for name, bar in BARS.items() if is_missed(name, to[name], bar)]
            verdicts.append(f"{method}: {'missed: ' + ', '.join(missed) if missed else 'all bars met'}")
    lines = [common.table(head, cells, names=2)]
    if bars and verdicts:
        form = (
            "bars: learning {learning:g} times as fast as TRL, step {step:g} times, at most {peak_mib:g} of its memory"
        )
        lines += [form.format(**BARS), *verdicts]
    return lines


def main() -> int:
    """Parse arguments, run the contenders in turn, print and write."""
    parser = common.parser_of(__doc__, trl=True)
    parser.add_argument("--data", type=Path, help="JSONL with the columns question and answer (tiny: made-up rows)")
    parser.add_argument("--steps", type=int, help="steps of a round, the first not counted (default 6, tiny 2)")
    parser.add_argument("--repeat", type=int, default=1, help="rounds; medians are over the steps of all (default 1)")
    parser.add_argument("--methods", help=f"comma-separated, of {', '.join(METHODS)}")
    parser.add_argument("--only", help=f"contenders, comma-separated, of {', '.join(CONTENDERS)}")
    args = common.parsed(parser)
    args.steps = args.steps or (2 if args.tiny else 6)
    if args.child:
        return contest.answer(args, prepare, contend)
    if args.steps < 2 or (args.data is None and not args.tiny):
        parser.error("--data is needed, a JSONL file with the columns question and answer, and at least 2 --steps")
    methods = common.chosen(parser, "--methods", args.methods, METHODS)
    names = common.contenders(parser, args, CONTENDERS)
    with tempfile.TemporaryDirectory() as folder:
        ran = contest.Contest(__file__, args, Path(folder))
        for i in range(args.repeat):
            ran.run([f"{method}:{name}" for method in methods for name in names], i)
    rows = {name: summary(rounds) for name, rounds in ran.runs.items()}
    found = {"steps": args.steps, "rounds": args.repeat, "table": rows, "runs": ran.runs}
    return common.finish(args, report(rows, bars=not args.tiny), ran.failed, found)


if __name__ == "__main__":
    sys.exit(main())
