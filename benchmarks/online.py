"""GRPO and RLOO on real prompts: alignkit and TRL's trainers, phase by phase, in one run.

    python benchmarks/online.py --data gsm8k_train.jsonl --trl-python path/to/its/python --json online.json

Every contender runs in a process of its own, on the same prompts in the same order, with the 28 M-parameter Llama of
engine.py in float32: a step is 2 prompts, 8 completions of exactly 64 tokens each, one update, with a reference.
Sampling is from prompts to text, scoring the reward function, learning all else in a step: passes of policy and
reference, advantages, backward, optimiser. Figures are medians over the steps after the first, which warms up; peak
memory is the process's largest resident set. TRL runs with gradient checkpointing, its default, and without, which is
faster and which the bars are held to. Without TRL alignkit is measured alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engine
import engine_gpu

METHODS = ("grpo", "rloo")
CONTENDERS = ("trl", "alignkit", "trl-checkpointing")
PHASES = ("sampling", "scoring", "learning", "step")
PROMPTS, GROUP, TOKENS, BETA, RATE = 2, 8, 64, 0.04, 1e-6
BARS = {"learning": 3.0, "step": 1.8, "peak_mib": 0.6}


def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Score the answer's format and its brevity; the untrained model gets no two alike."""
    return [bool(re.search(r"#### -?\d", text)) - len(text) / 1000 for text in completions]


def run_alignkit(method: str, work: Path, steps: int) -> dict[str, Any]:
    """Train as a user would, and read the phases from the run's metrics."""
    import alignkit

    result = alignkit.run(
        method, model=str(work / "start"), data=str(work / "rows.jsonl"), reward=reward, output=work / "runs",
        batch_size=PROMPTS, group_size=GROUP, beta=BETA, max_steps=steps, learning_rate=RATE, schedule="constant",
        warmup_fraction=0.0, eval_fraction=0.0, max_prompt_tokens=None, device="cpu",
        sampling={"max_new_tokens": TOKENS, "min_new_tokens": TOKENS}, **({"kl": "k3"} if method == "grpo" else {}),
    )  # fmt: skip
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "seconds/sampling" in line]
    seconds = [{phase: line[f"seconds/{phase}"] for phase in PHASES[:-1]} for line in lines]
    return {
        "seconds": [{**s, "step": sum(s.values())} for s in seconds],
        "length": [line["completion/length"] for line in lines],
        "reward": [line["reward/mean"] for line in lines],
    }


def run_trl(method: str, work: Path, steps: int, checkpointing: bool) -> dict[str, Any]:
    """Train with TRL's trainer on the same prompts, unshuffled, all completions of a step in one pass."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    clock = Clock()
    trainer, settings = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}[method]
    args = settings(
        output_dir=str(work / "trl"), per_device_train_batch_size=PROMPTS * GROUP, num_generations=GROUP,
        steps_per_generation=1, max_completion_length=TOKENS, generation_kwargs={"min_new_tokens": TOKENS},
        beta=BETA, learning_rate=RATE, lr_scheduler_type="constant", max_steps=steps, shuffle_dataset=False,
        gradient_checkpointing=checkpointing, use_cpu=True, bf16=False, save_strategy="no", report_to=[],
        logging_steps=1, disable_tqdm=True, seed=0, **({"loss_type": "grpo"} if method == "grpo" else {}),
    )  # fmt: skip
    rows = [json.loads(line) for line in (work / "in-order.jsonl").read_text().splitlines()]
    trained = clock.around(trainer)(
        model=AutoModelForCausalLM.from_pretrained(work / "start", dtype=torch.float32),
        reward_funcs=reward, args=args, train_dataset=Dataset.from_list(rows),
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
        """Add the time of what runs inside to the step's phase."""
        started = time.perf_counter()
        yield
        self.seconds[-1][phase] += time.perf_counter() - started

    def around(self, trainer: Any) -> Any:
        """Return the trainer's class with its two phases before learning timed."""
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
        """Return the callback that begins and ends the steps; the update lies between, logging does not."""
        from transformers import TrainerCallback

        clock = self

        class Steps(TrainerCallback):  # type: ignore[misc]
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                clock.seconds.append({"sampling": 0.0, "scoring": 0.0, "step": -time.perf_counter()})

            def on_step_end(self, *_: Any, **__: Any) -> None:
                clock.seconds[-1]["step"] += time.perf_counter()

        return Steps()


def contend(name: str, work: Path) -> dict[str, Any]:
    """Run one contender, METHOD:CONTENDER, in this process and return its figures."""
    import resource

    engine.hide_scripts()
    method, contender = name.split(":")
    steps = json.loads((work / "steps.json").read_text())
    if contender == "alignkit":
        figures = run_alignkit(method, work, steps)
    else:
        figures = run_trl(method, work, steps, contender == "trl-checkpointing")
    if set(figures["length"]) != {TOKENS}:
        raise SystemExit(f"completions of {figures['length']} tokens were learned from, not of {TOKENS}")
    return {**figures, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def prepare(data: Path, steps: int, work: Path) -> None:
    """Write the start model, the prompts, and the prompts in the order in which alignkit's seed 0 visits them."""
    from alignkit.data.stream import Stream

    rows = [json.loads(line) for line in data.read_text().splitlines()]
    prompts: list[Any] = [{"prompt": row["question"]} for row in rows]
    stream = Stream(prompts, PROMPTS, seed=0)
    in_order = [row for step in range(steps) for row in stream[step]]
    for name, lines in (("rows", prompts), ("in-order", in_order)):
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    (work / "steps.json").write_text(json.dumps(steps))
    engine.write_start(work / "start", [f"{row['question']}\n{row['answer']}" for row in rows])


def summary(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Return the medians of one contender's rounds; each round's first step is left out."""
    steps = [step for figures in rounds for step in figures["seconds"][1:]]
    medians = {phase: statistics.median(step[phase] for step in steps) for phase in PHASES}
    return {**medians, "peak_mib": statistics.median(figures["peak_mib"] for figures in rounds)}


def report(table: dict[str, dict[str, float]], left_out: dict[str, str]) -> str:
    """Lay out the table, with ratios of TRL without gradient checkpointing to each, and alignkit's bars."""
    lines = ["method contender          sampling scoring learning   step s  peak MiB  x learning  x step  memory/trl"]
    verdicts = []
    for name, row in table.items():
        method, contender = name.split(":")
        seconds = f"{row['sampling']:8.2f} {row['scoring']:7.3f} {row['learning']:8.2f} {row['step']:8.2f}"
        line = f"{method:6} {contender:18} {seconds}  {row['peak_mib']:8.0f}"
        if rival := table.get(f"{method}:trl"):
            to = {"learning": rival["learning"] / row["learning"], "step": rival["step"] / row["step"]}
            to["peak_mib"] = row["peak_mib"] / rival["peak_mib"]
            line += f"  {to['learning']:10.2f}  {to['step']:6.2f}  {to['peak_mib']:10.2f}"
            if contender == "alignkit":
                missed = [k for k, bar in BARS.items() if (to[k] > bar if k == "peak_mib" else to[k] < bar)]
                verdicts.append(f"{method}: {'missed: ' + ', '.join(missed) if missed else 'all bars met'}")
        lines.append(line)
    bars = "bars: learning {learning:g} times as fast as TRL, step {step:g} times, peak memory at most {peak_mib:g}"
    lines += [bars.format(**BARS), *verdicts] if verdicts else ["no bars without both TRL and alignkit"]
    return "\n".join([*lines, *(f"{name} left out: {why}" for name, why in left_out.items())])


def main() -> int:
    """Parse arguments, run the contenders in turn, print and write; 1 where one has no figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="JSONL with the columns question and answer")
    parser.add_argument("--steps", type=int, default=6, help="steps of a round, the first not counted (default 6)")
    parser.add_argument("--repeat", type=int, default=1, help="rounds; steps of all count alike (default 1)")
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--only", default=",".join(CONTENDERS), help="contenders (default: %(default)s)")
    engine.add_process_arguments(parser)
    args = parser.parse_args()
    if args.child:
        Path(args.out).write_text(json.dumps(contend(args.child, Path(args.work))))
        return 0
    if args.data is None or args.steps < 2:
        parser.error("--data is needed, a JSONL file with a column question, and at least 2 --steps")
    methods = engine_gpu.chosen(parser, "--methods", args.methods, METHODS)
    contenders = engine_gpu.chosen(parser, "--only", args.only, CONTENDERS)
    runs: dict[str, list[dict[str, Any]]] = {}
    left_out: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prepare(args.data, args.steps, work)
        for name in [f"{m}:{c}" for m in methods for _ in range(args.repeat) for c in contenders]:
            python = args.trl_python if ":trl" in name else sys.executable
            figures = engine.child(name, python, work, work, args.threads, __file__)
            if isinstance(figures, str):
                left_out[name] = figures
            else:
                runs.setdefault(name, []).append(figures)
            print(f"{name}: {figures if isinstance(figures, str) else summary([figures])}", file=sys.stderr)
    table = {name: summary(rounds) for name, rounds in runs.items()}
    print(report(table, left_out))
    if args.json:
        about = {**engine_gpu.machine(args.threads), "steps": args.steps, "rounds": args.repeat}
        found = {"machine": about, "table": table, "left_out": left_out, "runs": runs}
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(bool(left_out))


if __name__ == "__main__":
    sys.exit(main())
