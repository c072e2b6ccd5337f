#!/usr/bin/env bash
# trl 1.16.0: DPOConfig(label_smoothing=0.4) changes nothing with the default loss_type, sigmoid, and nothing says so.
#
# The setting is only read by the losses robust and exo_pair. So a run that is meant to be conservative DPO is plain DPO:
# the losses of its steps are the same to the last bit. With loss_type robust they differ.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "torch==2.13.0" "numpy>=2" "transformers==5.23.0" "accelerate>=1.10" "datasets>=4" "trl==1.16.0"
cat > "$folder/smoothing.py" <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

WORDS = ["<end>", "red", "blue", "fox", "owl", "is", "the"]
words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="the"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")
rows = [{"prompt": "the fox is", "chosen": " red", "rejected": " blue"}, {"prompt": "the owl is", "chosen": " blue", "rejected": " red"}]


def losses(loss_type, smoothing):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = f"{sys.argv[1]}/model"
    LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), eos_token_id=0, pad_token_id=0, **sizes)).save_pretrained(model)
    settings = DPOConfig(
        f"{sys.argv[1]}/{loss_type}-{smoothing}", loss_type=loss_type, label_smoothing=smoothing, max_steps=4,
        learning_rate=1e-2, logging_steps=1, use_cpu=True, report_to="none", per_device_train_batch_size=2, bf16=False,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = DPOTrainer(model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


print(f"trl {version('trl')}")
found = {name: [losses(name, smoothing) for smoothing in (0.0, 0.4)] for name in ("sigmoid", "robust")}
for name, (without, smoothed) in found.items():
    print(f"{name}: {without} without, {smoothed} with label_smoothing 0.4")
assert version("trl") == "1.16.0"
assert found["sigmoid"][0] == found["sigmoid"][1], "the behaviour has changed"
assert found["robust"][0] != found["robust"][1], "the behaviour has changed"
PYTHON
"$folder/env/bin/python" "$folder/smoothing.py" "$folder" 2> /dev/null
