#!/usr/bin/env bash
# transformers 5.23.0: giving a multimodal model the attention that it says it has changes the attention of its parts.
#
# set_attn_implementation(name) applies the one name to every part. A Llava whose vision tower is "eager" and whose
# language model is "sdpa" says "sdpa" of itself; set_attn_implementation(model.config._attn_implementation), which reads
# like a no-op, makes the tower "sdpa" too. So replacing a model's attention for a while and setting it back loses it.
# Expected: what is read and set again changes nothing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6" "transformers==5.23.0"
"$folder/env/bin/python" - <<'PYTHON'
import transformers
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def llava() -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(**SIZES, image_size=8, patch_size=4)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=LlamaConfig(**SIZES, vocab_size=32), image_token_index=30)
    )


def parts(model: LlavaForConditionalGeneration) -> dict[str, str]:
    named = {"vision": model.model.vision_tower, "text": model.model.language_model}
    return {name: part.config._attn_implementation for name, part in named.items()}


assert transformers.__version__ == "5.23.0"
model = llava()
model.set_attn_implementation({"vision_config": "eager", "text_config": "sdpa"})
before, said = parts(model), model.config._attn_implementation
model.set_attn_implementation(said)
after = parts(model)
print(f"transformers {transformers.__version__}: the model says {said}; set again: {before} -> {after}")
assert (before, said) == ({"vision": "eager", "text": "sdpa"}, "sdpa"), "the behaviour has changed"
assert after == {"vision": "sdpa", "text": "sdpa"}, "the behaviour has changed"
PYTHON
