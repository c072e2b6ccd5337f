#!/usr/bin/env bash
# accelerate 1.15.0: FSDP2 that is asked for on a CPU is not set up, and nothing says so.
#
# Accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2)) in two gloo processes prepares a plain
# DistributedDataParallel. Seen: distributed type MULTI_CPU, every parameter whole on each rank, no warning. Called
# directly, torch's fully_shard shards in the same processes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "torch==2.13.0" "accelerate==1.15.0" "numpy==2.4.6"
cat > "$folder/ask.py" <<'PYTHON'
import warnings

import accelerate
import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    accelerator = Accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2))
    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    prepared, _ = accelerator.prepare(model, optimizer)
    told = [str(w.message) for w in caught if "fsdp" in str(w.message).lower()]
direct = torch.nn.Linear(8, 8)
fully_shard(direct)
sharded = [any(isinstance(p, DTensor) for p in m.parameters()) for m in (prepared, direct)]
if accelerator.is_main_process:
    kind = f"{accelerator.distributed_type}, {type(prepared).__name__}"
    print(f"accelerate {accelerate.__version__}: {kind}; sharded: {sharded[0]}; warnings about FSDP: {told}")
    print(f"torch's fully_shard, called directly: sharded: {sharded[1]}")
assert accelerate.__version__ == "1.15.0"
assert sharded == [False, True], "the behaviour has changed"
assert not told, "the behaviour has changed: there is a warning"
accelerator.end_training()
PYTHON
OMP_NUM_THREADS=1 "$folder/env/bin/torchrun" --standalone --nproc_per_node=2 "$folder/ask.py"
