"""Vision-language checkpoints: text rows train their language model, and all other weights stay bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from zoo import BASE, CPU, GEMMA, LAYOUTS, config, drop_dropout, examples, one_at_a_time

from alignkit.demo.base import tokenizer_from
from helpers import WORDS

VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL = {**VISION, "image_size": 16, "patch_size": 4}
QWEN = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 48, "patch_size": 4,
}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
MOE = {"intermediate_size_mlp": 64, "num_local_experts": 2, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1}
FAMILIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "qwen 2.5 vl": lambda text: tf.Qwen2_5_VLConfig(
        text_config={**BASE, "rope_parameters": MROPE, **text}, vision_config={**QWEN, "window_size": 16}
    ),
    "qwen 3 vl": lambda text: tf.Qwen3VLConfig(
        text_config={**BASE, "head_dim": 12, "rope_parameters": MROPE, **text},
        vision_config={**QWEN, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    ),
    "gemma 3": lambda text: tf.Gemma3Config(text_config={**GEMMA, **text}, vision_config=SMALL, mm_tokens_per_image=4),
    "mistral 3": lambda text: tf.Mistral3Config(
        text_config={**BASE, "model_type": "mistral", **text},
        vision_config={**SMALL, "model_type": "pixtral", "head_dim": 8},
    ),
    "llama 4": lambda text: tf.Llama4Config(
        text_config={**BASE, "head_dim": 12, **MOE, **text},
        vision_config={**SMALL, "projector_input_dim": 16, "projector_output_dim": 16, "vision_output_dim": 16},
    ),
    "llava": lambda text: tf.LlavaConfig(
        text_config={**BASE, "model_type": "llama", **text}, vision_config={**SMALL, "model_type": "clip_vision_model"}
    ),
}


def fresh(name: str, **text: Any) -> Any:
    """A tiny model of that family, with weights large enough that a wrong mask changes its output."""
    torch.manual_seed(0)
    model = tf.AutoModelForImageTextToText.from_config(FAMILIES[name](text)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(parameter.dim() == 1).add_(torch.randn_like(parameter) * 0.2)
    drop_dropout(model)
    return model.train()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that writes a family's checkpoint, with a tokenizer and the settings of its images."""

    @cache
    def written(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
        tokenizer = tokenizer_from([" ".join(WORDS), "0 1 2 3 4 5 6 7 8 9 yes no :"], 300)
        ends = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
        fresh(name, vocab_size=len(tokenizer), **ends).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for file, size in (("preprocessor_config.json", 16), ("processor_config.json", 8)):
            (folder / file).write_text(json.dumps({"size": size}))
        return folder

    return written
