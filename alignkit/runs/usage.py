"""Code that loads and calls a saved model, for its model card."""

from __future__ import annotations

from typing import Literal

Output = Literal["text", "chat", "score", "preference"]
"""A model's output: a continuation, an answer to messages, a score of an answer, or a preference between two."""


def text(output: Output, adapter_of: str | None, in_4_bits: bool = False, multimodal: bool = False) -> str:
    """Return Markdown with code that runs in the model's folder. adapter_of: the base model of an adapter.

    in_4_bits: the adapter was trained on its base in 4 bits. multimodal: the language model has towers beside it.
    """
    scores = output in ("score", "preference")
    task = "SequenceClassification" if scores else "MultimodalLM" if multimodal else "CausalLM"
    kind = f"AutoModelFor{task}"
    imports, options, note, pad = f"from transformers import {kind}, AutoTokenizer", "", "", ""
    if adapter_of is not None:
        kind = "AutoPeftModel" if task == "MultimodalLM" else f"AutoPeftModelFor{task}"
        imports = f"from peft import {kind}\nfrom transformers import AutoTokenizer"
        if scores:
            # the base's configuration may pad with the end-of-sequence token, which would then not be read
            options, pad = ", num_labels=1", "model.config.pad_token_id = tokenizer.pad_token_id\n"
        note = f"This folder holds an adapter only; its base model is `{adapter_of}`.\n\n"
        if in_4_bits:
            imports = imports.replace("AutoTokenizer", "AutoTokenizer, BitsAndBytesConfig")
            options += f", quantization_config={_NF4}"
            note = note[:-2] + " It was trained on that base in 4 bits, which needs bitsandbytes.\n\n"
    code = (
        f'import torch\n{imports}\n\nfolder = "."  # of this file\n'
        f"tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        f"model = {kind}.from_pretrained(folder{options}).eval()\n{pad}{_ASK[output]}"
    )
    words = _WORDS.get(output, "")
    if adapter_of is not None:  # a reward or judge of a run is a whole model
        words = words.replace("In alignkit the folder can be used", "Merged into its base, it can be used in alignkit")
    return f"{note}```python\n{code}```{words}"


_NF4 = 'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)'
_TEXT = """\
inputs = tokenizer("Your prompt", return_tensors="pt")
with torch.no_grad():
    output = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""
_CHAT = """\
messages = [{"role": "user", "content": "Your prompt"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
with torch.no_grad():
    output = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""
_SCORE = """\
prompt, answer = "Your prompt", " An answer."
ids = tokenizer(prompt + answer)["input_ids"] + [tokenizer.eos_token_id]
with torch.no_grad():
    print(model(torch.tensor([ids])).logits.item())
"""
_PAIRWISE = """\
prompt, answers = "Your prompt", [" An answer.", " Another one."]
eos = [tokenizer.eos_token_id]


def score(first, second):
    start = tokenizer(prompt)["input_ids"]
    ends = [tokenizer(answer, add_special_tokens=False)["input_ids"] + eos for answer in (first, second)]
    with torch.no_grad():
        return model(torch.tensor([start + ends[0] + ends[1]])).logits[0, 0]


print(torch.sigmoid(score(*answers) - score(*reversed(answers))).item())
"""
_OF_SCORES = """

The score is that of the whole answer, including its end-of-sequence token. The better of two answers to one prompt has
the higher score, and σ of the difference is the probability that it is preferred. The tokenizer's padding token never
ends an answer, so rows of a padded batch get the scores that they get alone. Apply the tokenizer's chat template
to messages first. In alignkit the folder can be used as a `reward`."""
_OF_PAIRS = """

It prints the probability that the first answer is preferred. Both orders are scored, so that the position does not
matter. In alignkit the folder can be used as a `judge`."""
_ASK: dict[Output, str] = {"text": _TEXT, "chat": _CHAT, "score": _SCORE, "preference": _PAIRWISE}
_WORDS: dict[Output, str] = {"score": _OF_SCORES, "preference": _OF_PAIRS}
