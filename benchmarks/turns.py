"""Trajectories of several turns: learned as branches of one tree, and turn by turn as padded rows of their own.

    python benchmarks/turns.py --json turns.json      6 turns, 8 trajectories of a prompt
    python benchmarks/turns.py --tiny                 a tiny model, in seconds: does everything run?

The 28 M-parameter Llama of engine.py in float32 on the CPU. A trajectory has turns that are sampled and what an
environment says between them, which is read only. "tree" is a prompt with its trajectories as alignkit learns them:
each token once. "rows" has a row for each turn, with all that came before it as its prompt. Learning is a pass of the
reference, one of the policy and the gradient of the same loss; both take turns, and figures are medians. The exit code
is 1 where log-probabilities differ by more than 1e-3 nats, or the gain is below 3 (not with --tiny).
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import common

BAR = 3.0


class Size(NamedTuple):
    """Turns, trajectories of a prompt, and tokens of the prompt, of a turn, and of what is read after it."""

    turns: int = 6
    trajectories: int = 8
    prompt: int = 64
    sampled: int = 32
    read: int = 32


def examples(size: Size, vocabulary: int) -> tuple[list[Any], list[Any]]:
    """Return the same trajectories as one tree, and as rows of a turn each, in the order of the tree's turns."""
    import torch

    from alignkit.types import Completion, Example

    torch.manual_seed(0)
    length = size.turns * (size.sampled + size.read) - size.read
    drawn = torch.randint(1, vocabulary, (size.trajectories, length), dtype=torch.int32)
    prompt = torch.randint(1, vocabulary, (size.prompt,), dtype=torch.int32)
    at = torch.arange(length) % (size.sampled + size.read)
    tree = Example(prompt, tuple(Completion(tokens, at < size.sampled) for tokens in drawn))
    rows = []
    for tokens in drawn:
        for turn in range(size.turns):
            start = turn * (size.sampled + size.read)
            told = torch.cat([prompt, tokens[:start]])
            rows.append(Example(told, (Completion(tokens[start : start + size.sampled]),)))
    return [tree], rows


def learned(policy: Any, reference: Any, batch: Any) -> Any:
    """Return the policy's log-probabilities after a pass of each and the gradient; the weights stay as they are."""
    import torch

    with torch.no_grad():
        known = reference(batch.rows, batch.targets).logps
    logps = policy(batch.rows, batch.targets).logps
    policy.zero_grad()
    (logps - known).square().mean().backward()
    return logps.detach()


def measure(folder: Path, size: Size, rounds: int) -> dict[str, Any]:
    """Return seconds, tokens and the largest difference of a log-probability."""
    import torch

    from alignkit.config import RunConfig
    from alignkit.models.loading import load_model
    from alignkit.models.packing import batch_of
    from alignkit.models.scoring import Scorer
    from alignkit.types import Layout

    config = RunConfig(method="grpo", model=str(folder), data="-", device="cpu")
    policy, reference = (Scorer(load_model(config, torch.device("cpu"))[0]) for _ in range(2))
    vocabulary = policy.model.config.vocab_size
    made = zip(("tree", "rows"), examples(size, vocabulary), (Layout("forest", 4096), Layout("padded")), strict=True)
    batches = {name: batch_of(some, layout, torch.device("cpu")) for name, some, layout in made}
    seconds: dict[str, list[float]] = {name: [] for name in batches}
    logps = {}
    for _ in range(rounds + 1):
        for name, batch in batches.items():
            started = time.perf_counter()
            logps[name] = learned(policy, reference, batch)
            seconds[name].append(time.perf_counter() - started)
    return {
        "seconds": {name: statistics.median(taken[1:]) for name, taken in seconds.items()},
        "tokens": {name: int(batch.rows.input_ids.numel()) for name, batch in batches.items()},
        "learned": len(logps["tree"]),
        "difference": float((logps["tree"] - logps["rows"]).abs().max()),
    }


def main() -> int:
    """Parse arguments, measure, print and write."""
    parser = common.parser_of(__doc__)
    parser.add_argument("--rounds", type=int, help="rounds that count (default 5, tiny 1)")
    args = common.parsed(parser)
    common.hide_scripts()
    import torch

    torch.set_num_threads(args.threads)
    size = Size(turns=2, trajectories=2, prompt=8, sampled=4, read=4) if args.tiny else Size()
    with tempfile.TemporaryDirectory() as folder:
        common.write_start(Path(folder), ["a b c d"], args.tiny)
        found = measure(Path(folder), size, args.rounds or (1 if args.tiny else 5))
    gain = found["seconds"]["rows"] / found["seconds"]["tree"]
    cells = [[name, f"{found['tokens'][name]}", f"{found['seconds'][name]:.3f}"] for name in ("tree", "rows")]
    lines = [common.table(["learned as", "tokens", "seconds"], cells), f"the tree is {gain:.2f} times as fast"]
    lines.append(f"largest difference of a log-probability: {found['difference']:.1e} nats")
    failed = {}
    if found["difference"] > 1e-3:
        failed["logps"] = f"they differ by {found['difference']:.1e} nats"
    if gain < BAR and not args.tiny:
        failed["gain"] = f"{gain:.2f}, below {BAR:g}"
    return common.finish(args, lines, failed, {"size": size._asdict(), "gain": gain, **found})


if __name__ == "__main__":
    sys.exit(main())
