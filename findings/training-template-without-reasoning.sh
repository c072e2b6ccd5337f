#!/usr/bin/env bash
# trl 1.16.0: some of the training variants of chat templates leave out the reasoning of every turn but the last, as the
# original templates do, and nothing says so.
#
# With assistant_only_loss, trl swaps the chat template for a variant with {% generation %} marks. Those of Qwen3 keep the
# reasoning of all turns; those of gpt-oss, GLM-4.5 and Nemotron 3 do not: of two answers with reasoning, the first is
# learned without it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "transformers==5.23.0" "tokenizers==0.23.3" "jinja2==3.1.6"
"$folder/env/bin/pip" install -q --no-deps "trl==1.16.0"
cat > "$folder/learned.py" <<'PYTHON'
import sysconfig
from importlib.metadata import version
from pathlib import Path

from transformers.utils.chat_template_utils import render_jinja_template

folder = Path(sysconfig.get_path("purelib"), "trl/chat_templates")


def learned(name, messages):
    template = (folder / f"{name}_training.jinja").read_text()
    (text,), (spans,) = render_jinja_template(
        conversations=[messages], chat_template=template, return_assistant_tokens_mask=True, bos_token="", eos_token="</s>"
    )
    return "".join(text[begin:end] for begin, end in spans)


conversation = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4", "reasoning_content": "Two and two are four."},
    {"role": "user", "content": "3 + 3?"},
    {"role": "assistant", "content": "6", "reasoning_content": "Three and three are six."},
]
print(f"trl {version('trl')}")
found = {}
for name in ("qwen3", "gptoss", "glm4moe", "nemotron_3_nano"):
    text = learned(name, conversation)
    found[name] = ["Two and two" in text, "Three and three" in text]
    print(f"{name}: reasoning of the first answer learned: {found[name][0]}, of the last: {found[name][1]}")
assert version("trl") == "1.16.0"
assert found.pop("qwen3") == [True, True], "the behaviour has changed"
assert all(both == [False, True] for both in found.values()), "the behaviour has changed"
PYTHON
"$folder/env/bin/python" "$folder/learned.py"
