#!/usr/bin/env bash
# torch 2.13.0: reading the state of an AdamW that has made no step changes that AdamW.
#
# torch.distributed.checkpoint.state_dict.get_optimizer_state_dict() fills in missing state by a step on zero gradients.
# Afterwards every parameter's step count is 1, and no longer absent: the next real step is bias-corrected as the second.
# Seen: the first update after the call is 0.744 times as large as without it (a gradient of 1, lr 0.1).
# Expected: a function named "get" leaves the optimiser as it is.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6"
"$folder/env/bin/python" - <<'PYTHON'
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict


def first_update(read_before: bool) -> tuple[float, float]:
    """The step count that the first step starts from, and the size of its update."""
    layer = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.0)
    if read_before:
        get_optimizer_state_dict(layer, optimizer)
    start = float(optimizer.state[layer.weight]["step"]) if optimizer.state else 0.0
    before = layer.weight.item()
    layer.weight.grad = torch.ones_like(layer.weight)
    optimizer.step()
    return start, before - layer.weight.item()


(untouched, plain), (read, changed) = first_update(False), first_update(True)
print(f"torch {torch.__version__}: step count {untouched:g} -> {read:g}, update {plain:.4f} -> {changed:.4f}")
assert torch.__version__.startswith("2.13.0")
assert (untouched, read) == (0.0, 1.0), "the behaviour has changed"
assert abs(plain - 0.1) < 1e-4, "the behaviour has changed"
assert abs(changed / plain - 0.744) < 0.001, "the behaviour has changed"
PYTHON
