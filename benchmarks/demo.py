"""What `alignkit demo` shows: style, facts and KL before and after each method, by seed.

    python benchmarks/demo.py --threads 1 --json demo.json
    python benchmarks/demo.py --methods dpo,grpo --seeds 0,1
    python benchmarks/demo.py --tiny              few questions and steps: does everything run?

Each line is a demo: `alignkit demo METHOD --seed S`, with the base of a seed trained once. The
last lines are the largest loss of facts and the smallest gain in style of each method. Exit code 1 where a demo failed.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import common


def shrink() -> None:
    """Make the demo small."""
    from alignkit import registry
    from alignkit.demo import recipes, world

    registry.get("sft").demo_base = {**(registry.get("sft").demo_base or {}), "epochs": 1}
    recipes.SHARED["epochs"] = 1
    world.CREATURES = world.CREATURES[:4]


def measured(method: str, seed: int, folder: Path) -> dict[str, Any]:
    """Run a demo; return its rates in per cent, its KL, and its seconds of CPU."""
    from alignkit.demo import policy_metrics
    from alignkit.demo.before_after import outcome

    started = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        found = outcome(method, folder, seed)
    before, after = found.before, found.after
    win = policy_metrics.win_rate(after.scores, found.opponent)
    rates = {
        "style": before.rate(2),
        "style_after": after.rate(2),
        "facts": before.rate(1),
        "facts_after": after.rate(1),
    }
    shown = {name: round(100 * rate, 1) for name, rate in {**rates, "win": win}.items()}
    return {**shown, "kl": round(after.kl, 2), "cpu_s": round(time.process_time() - started, 1)}


def main() -> int:
    """Measure, print and write the figures."""
    parser = common.parser_of(__doc__)
    parser.add_argument("--methods", help="comma-separated (default: all)")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="comma-separated")
    args = common.parsed(parser)
    common.hide_scripts()
    import torch

    from alignkit.demo import recipes

    methods = common.chosen(parser, "--methods", args.methods or ("dpo" if args.tiny else None), recipes.offered())
    seeds = [0] if args.tiny else [*map(int, args.seeds.split(","))]
    if args.tiny:
        shrink()
    torch.set_num_threads(args.threads)
    lines, failed = [], 0
    with tempfile.TemporaryDirectory() as work:
        os.environ["ALIGNKIT_DEMO"] = str(Path(work) / "bases")
        for seed in seeds:
            for method in methods:
                try:
                    figures = measured(method, seed, Path(work) / str(seed))
                except Exception:
                    traceback.print_exc()
                    failed += 1
                    continue
                lines.append({"method": method, "seed": seed, **figures})
                print("  ".join(f"{k} {v}" for k, v in lines[-1].items()), flush=True)
    for method in methods:
        of = [line for line in lines if line["method"] == method]
        if of:
            gain = min(line["style_after"] - line["style"] for line in of)
            lost = max(line["facts"] - line["facts_after"] for line in of)
            print(f"{method}: smallest gain in style {gain:+.1f}, largest loss of facts {lost:+.1f} points")
    common.save(args, {"demos": lines})
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
