#!/usr/bin/env bash
# transformers 5.23.0: with rope_type "dynamic", a sequence is computed with the rotary frequencies of a longer one that
# came before it.
#
# A Llama with max_position_embeddings 16 scores a sequence of 20 tokens, then one of 40, then the 20 tokens again. Seen:
# the logits of the 20 tokens differ before and after, though neither weights nor input changed. They are the first ones
# again once a sequence of fewer than 16 tokens was scored.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "torch==2.13.0" "transformers==5.23.0" "numpy==2.4.6"
cat > "$folder/twice.py" <<'PYTHON'
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=16, initializer_range=0.2,
    rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
)
model = LlamaForCausalLM(config).eval()
short, middle, long = (torch.arange(n)[None] % 64 for n in (8, 20, 40))
with torch.no_grad():
    first = model(middle).logits
    model(long)
    after = model(middle).logits
    model(short)
    again = model(middle).logits
gap = float((first - after).abs().max())
print(f"transformers {transformers.__version__}: the logits of 20 tokens differ by {gap:.3f} after 40 tokens were scored")
print(f"after 8 tokens were scored: {float((first - again).abs().max()):.1e}")
assert transformers.__version__ == "5.23.0"
assert gap > 0.01, "the behaviour has changed"
assert torch.equal(first, again), "the behaviour has changed"
PYTHON
"$folder/env/bin/python" "$folder/twice.py"
