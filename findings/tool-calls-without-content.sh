#!/usr/bin/env bash
# transformers 5.23.0: apply_chat_template removes fields that are None, so a template that asks whether the content of a
# tool call `is none` never sees it.
#
# The template of the DeepSeek-R1 distilled models (as the package trl 1.16.0 ships it) writes a tool call where the
# content is none, the form of OpenAI's messages: {"content": null, "tool_calls": [...]}. Through apply_chat_template the
# message has no content at all, and the template raises. Rendered with the field kept, the call is in the text.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "transformers==5.23.0" "tokenizers==0.23.3" "jinja2==3.1.6"
"$folder/env/bin/pip" install -q --no-deps "trl==1.16.0"
cat > "$folder/call.py" <<'PYTHON'
import sysconfig
from pathlib import Path

import transformers
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

template = Path(sysconfig.get_path("purelib"), "trl/chat_templates/deepseek_r1_distill.jinja").read_text()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", eos_token="</s>")
tokenizer.chat_template = template
call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
messages = [{"role": "user", "content": "The weather?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
(kept,), _ = render_jinja_template(conversations=[messages], chat_template=template, bos_token="<s>")
try:
    said = tokenizer.apply_chat_template(messages, tokenize=False)
except Exception as error:
    said = f"{type(error).__name__}: {error}"
print(f"transformers {transformers.__version__}, apply_chat_template: {said}")
print(f"with the field kept: {kept[-90:]!r}")
assert transformers.__version__ == "5.23.0"
assert "weather" in kept
assert "weather" not in said, "the behaviour has changed"
PYTHON
"$folder/env/bin/python" "$folder/call.py"
