"""Model, data, precision, devices and adapters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from alignkit.insight.convert.work import Work
from alignkit.trl_names import adapters, table

LORA = (
    "r", "lora_r", "lora_alpha", "target_modules", "lora_target_modules", "target_parameters", "lora_target_parameters",
    "exclude_modules", "modules_to_save", "lora_modules_to_save", "layers_to_transform", "rank_pattern",
    "alpha_pattern", "bias", "use_rslora", "use_dora",
)  # fmt: skip


def model(work: Work) -> None:
    """Set the model and its precision."""
    work.same(["model_name_or_path"])
    inner = work.get("model_init_kwargs") or {}
    for name in inner.keys() - {"dtype", "torch_dtype", "attn_implementation"}:
        work.left.append((f"model_init_kwargs.{name}", "give a folder or a loaded model"))
    dtype = str(work.get("dtype") or work.get("torch_dtype") or inner.get("dtype") or inner.get("torch_dtype") or "")
    if dtype in ("float32", "bfloat16"):
        work.put("dtype", dtype)
    elif dtype:
        work.lose("dtype", f"{dtype} is not offered: float32 or bfloat16")
    attention = work.get("attn_implementation") or inner.get("attn_implementation")
    if attention in ("sdpa", "eager", "flex_attention"):
        work.put("attention", attention)
    elif attention:
        work.lose("attn_implementation")
    half, bf16 = work.get("fp16"), work.get("bf16")
    if half:
        work.lose("fp16")
    elif bf16 is not None:
        work.put("precision", "bf16" if bf16 else "fp32")
    if work.get("gradient_checkpointing"):
        work.put("gradient_checkpointing", True)
    if work.get("use_cpu") or work.get("no_cuda"):
        work.put("device", "cpu")
    if work.get("fsdp"):
        work.put("fsdp", True)
    if seconds := work.get("ddp_timeout"):
        work.put("timeout_minutes", seconds / 60)


def data(work: Work) -> None:
    """Set rows, held-out rows and the reward."""
    name, test = work.get("dataset_name"), work.get("dataset_test_split")
    splits = {"name": work.get("dataset_config"), "split": work.get("dataset_train_split")}
    rows = work.get("train_dataset") or ({"path": name, **splits} if name else None)
    held_out = work.get("eval_dataset") or ({"path": name, **splits, "split": test or "test"} if name else None)
    if rows:
        work.put("data", _source(rows))
    strategy = work.given.get("eval_strategy") or work.given.get("evaluation_strategy") or "no"
    if held_out and strategy != "no":
        work.put("eval_data", _source(held_out))
    elif work.has("eval_dataset"):
        work.lose("eval_dataset", "eval_strategy is no, so TRL does not use it; set eval_data to evaluate")
    if work.get("dataset_streaming"):
        work.put("streaming", True)
    field = work.get("dataset_text_field")
    if field and field != "text":
        work.put("columns", {"completion": field})
    reward = work.get("reward_model_name_or_path") or work.get("reward_funcs")
    if work.samples and isinstance(reward, str) and "." not in reward:
        work.put("reward", reward)
    elif work.samples:
        work.lose("reward_funcs", "give `reward`: functions have other arguments here, see docs/rewards.md")


def _source(rows: Mapping[str, Any]) -> Any:
    kept = {k: v for k, v in rows.items() if v is not None and (k, v) != ("split", "train")}
    return kept["path"] if set(kept) == {"path"} else kept


def names(work: Work) -> None:
    """Set the folder and the name of the run."""
    work.same(["output_dir"])
    name = work.get("run_name")
    if name and re.fullmatch(r"[\w.+=-]{1,200}", str(name), re.ASCII):
        work.put("name", str(name))
    elif name:
        work.lose("run_name", "a name has only letters, digits and . _ + = -; set `name`")
    if work.get("trust_remote_code"):
        work.lose("trust_remote_code", "add --trust-remote-code to `alignkit run`; a file cannot set it")


def lora(work: Work, kind: str, allows_dropout: bool) -> None:
    """Set adapters, with the defaults of the class that describes them."""
    four = work.get("load_in_4bit")
    if not work.get("use_peft"):
        if four:
            work.lose("load_in_4bit", "4 bits need adapters: set `lora` and quantize: nf4")
        return
    defaults = adapters()[kind]
    given = {**defaults, **{k: v for k, v in work.given.items() if v is not None}}
    for name in LORA:
        work.done.add(name)
        if name in given:
            work.put(table()[name].to[()], given[name])
    if not {"target_modules", "lora_target_modules"} & given.keys():
        work.left.append(("target_modules", "peft chooses by the model, often q_proj and v_proj; here all-linear"))
    if given["lora_dropout"] and allows_dropout:
        work.put("lora.dropout", given["lora_dropout"])
    elif given["lora_dropout"]:
        why = f"{given['lora_dropout']}, but the method compares two models, which dropout would make differ; it is 0"
        work.lose("lora_dropout", why)
    start = work.get("init_lora_weights")
    if isinstance(start, str):
        work.put("lora.init", start)
    elif start is False:
        work.lose("init_lora_weights", "adapters always start without effect; true is the default")
    if four and work.get("bnb_4bit_quant_type") in (None, "nf4"):
        work.put("quantize", "nf4")
    elif four:
        work.lose("bnb_4bit_quant_type")
    work.done |= {"lora_dropout", "task_type", "lora_task_type", "use_bnb_nested_quant"}
