"""Environment variables that change what alignkit does, and whether the terminal can show what it prints."""

from __future__ import annotations

import locale
import os
import sys
from collections.abc import Iterator

from alignkit.insight.doctor import machine
from alignkit.insight.doctor.parts import Asked, Fact, Trouble

# those whose value may be shown; of any other only that it is set
SHOWN = (
    "ALIGNKIT_CACHE", "ALIGNKIT_JUDGEMENTS", "ALIGNKIT_KERNELS", "CUDA_LAUNCH_BLOCKING", "CUDA_VISIBLE_DEVICES",
    "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "LOCAL_RANK", "MKL_NUM_THREADS", "OMP_NUM_THREADS",
    "PYTHONIOENCODING", "PYTHONUTF8", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "RANK",
    "TOKENIZERS_PARALLELISM", "TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE", "TRANSFORMERS_OFFLINE",
    "TRITON_CACHE_DIR", "TRITON_INTERPRET", "WORLD_SIZE",
)  # fmt: skip
_FAMILIES = ("ALIGNKIT_", "HF_", "HUGGING", "MALLOC_", "NCCL_", "TRITON_", "WANDB_", "OPENAI_")
_ALLOCATOR = "MALLOC_"  # numbers all of them
_TRUE = ("1", "true", "yes", "on", "y")
_TEXT = "é σ 中 😀"


def environment(asked: Asked) -> Iterator[Fact | Trouble]:
    """Yield the variables that matter and are set, and those that do harm."""
    for name, value in sorted(os.environ.items()):
        if name in SHOWN or (name.startswith(_ALLOCATOR) and value.isdigit()):
            yield Fact(name, value or "(empty)")
        elif name.startswith(_FAMILIES):
            yield Fact(name, "set")
    given = os.environ.get
    if given("TRITON_INTERPRET", "").lower() in _TRUE:
        what = "TRITON_INTERPRET is set: Triton's kernels, those of other programs too, run hundreds of times slower"
        yield Trouble("warn", what, "unset TRITON_INTERPRET; it is for tests of kernels")
    if machine.hidden() and machine.has_gpu():
        yield Trouble("warn", "CUDA_VISIBLE_DEVICES hides every GPU", "unset CUDA_VISIBLE_DEVICES, or name GPUs")
    if given("CUDA_LAUNCH_BLOCKING") == "1" and machine.has_gpu():
        yield Trouble("warn", "CUDA_LAUNCH_BLOCKING makes every kernel wait", "unset CUDA_LAUNCH_BLOCKING")
    if given("HF_HUB_OFFLINE", "").lower() in _TRUE:
        yield Fact("hub", "offline, by HF_HUB_OFFLINE: names are looked up among what was downloaded")
    yield from _processes()


def _processes() -> Iterator[Trouble]:
    """Yield where what torchrun sets is set, and a run takes it for true."""
    remedy = "unset RANK WORLD_SIZE LOCAL_RANK, unless torchrun has set them"
    numbers = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": -1}
    for name in numbers:
        value = os.environ.get(name, str(numbers[name]))
        try:
            numbers[name] = int(value)
        except ValueError:
            yield Trouble("problem", f"{name} is '{value}', which is no number: a run ends there", f"unset {name}")
    if (n := numbers["WORLD_SIZE"]) > 1:
        what = f"WORLD_SIZE is {n}: a run takes itself for one of {n} processes, and waits for the others"
        yield Trouble("warn", what, remedy)
    elif numbers["LOCAL_RANK"] != -1 and not os.environ.get("MASTER_ADDR"):
        what = "LOCAL_RANK is set: a run takes itself for one of several processes, and ends without MASTER_ADDR"
        yield Trouble("warn", what, remedy)
    elif numbers["RANK"]:
        what = f"RANK is {numbers['RANK']}: a run takes itself for another than the first process, and prints nothing"
        yield Trouble("warn", what, remedy)


def terminal(asked: Asked) -> Iterator[Fact | Trouble]:
    """Yield how text is written here, and whether any text can be."""
    encoding = getattr(sys.stdout, "encoding", None) or locale.getpreferredencoding()
    yield Fact("encoding", encoding)
    try:
        _TEXT.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        what = f"the terminal's encoding {encoding} cannot show what models write"
        yield Trouble("warn", what, "export PYTHONUTF8=1")
