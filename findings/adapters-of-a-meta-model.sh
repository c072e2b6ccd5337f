#!/usr/bin/env bash
# peft 0.21.2: adapters that are added to a model on the meta device are on the meta device too, without initial values.
#
# Their values come from no file, so that reading the base's weights afterwards cannot bring them back:
# model.to_empty(device) leaves them with whatever the memory held, and nothing says so. Seen: after
# get_peft_model(base on meta, LoraConfig), every lora_A and lora_B is on meta; low_cpu_mem_usage=False, the default,
# does not change that. On a base in memory lora_A is drawn and lora_B is zero.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "torch==2.13.0" "peft==0.21.2" "transformers==5.23.0" "accelerate==1.15.0" "numpy==2.4.6"
cat > "$folder/ask.py" <<'PYTHON'
import warnings

import peft
import torch
from accelerate import init_empty_weights
from torch import nn


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def added(base: nn.Module) -> dict[str, torch.Tensor]:
    config = peft.LoraConfig(r=4, target_modules=["inner"])
    model = peft.get_peft_model(base, config, low_cpu_mem_usage=False)
    return {n.split(".")[-3]: p for n, p in model.named_parameters() if "lora_" in n}


with init_empty_weights():
    empty = Base()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    of_meta = added(empty)
in_memory = added(Base())
devices = {name: p.device.type for name, p in of_meta.items()}
print(f"peft {peft.__version__}: adapters of a base on meta: {devices}; warnings: {[str(w.message) for w in caught]}")
zero = {name: not bool(p.any()) for name, p in in_memory.items()}
print(f"adapters of a base in memory: {({n: p.device.type for n, p in in_memory.items()})}; all zero: {zero}")
assert peft.__version__ == "0.21.2"
assert zero == {"lora_A": False, "lora_B": True}
assert devices == {"lora_A": "meta", "lora_B": "meta"}, "the behaviour has changed"
assert not caught, "the behaviour has changed: there is a warning"
PYTHON
"$folder/env/bin/python" "$folder/ask.py"
