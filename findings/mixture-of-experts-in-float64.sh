#!/usr/bin/env bash
# transformers 5.23.0 with torch 2.13.0: a Mixtral in float64 cannot make a forward pass, while dense models can.
#
# The default implementation of experts is "grouped_mm", whose product takes float32, bfloat16 and float16 only; there is
# no fallback. Seen: RuntimeError "Expected mat_a to be Float32, BFloat16 or Float16 matrix, got Double".
# set_experts_implementation("eager") works. This matters where float64 is the reference of a float32 computation.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "torch==2.13.0" "transformers==5.23.0" "numpy==2.4.6"
"$folder/env/bin/python" - <<'PYTHON'
import torch
import transformers

sizes = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
ids = torch.tensor([[1, 2, 3]])
dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).double()
print("Llama in float64:", dense(input_ids=ids).logits.dtype)
sparse = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, num_local_experts=2)).double()
try:
    sparse(input_ids=ids)
    raise SystemExit("the behaviour has changed: Mixtral runs in float64 by default")
except RuntimeError as error:
    print(f"Mixtral in float64, transformers {transformers.__version__}: RuntimeError: {error}")
    assert "got Double" in str(error), "the behaviour has changed"
sparse.set_experts_implementation("eager")
print("Mixtral in float64, eager experts:", sparse(input_ids=ids).logits.dtype)
assert transformers.__version__ == "5.23.0"
PYTHON
