"""Keys of the reference's cached log-probabilities, and filling the cache.

A value is one reference's log-probabilities of one completion of one prompt: float32 [c] in nats, c its trained tokens.
Its key hashes the reference's weights, adapter, quantisation, compute dtype and logit transforms, and the token ids;
not the method, learning rate, row order, data set or folder. So sweeps, resumed runs and shuffled data all hit.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from alignkit.data.views import Selected, raws
from alignkit.models.compiled import is_compiled
from alignkit.models.loading import causal_lm
from alignkit.models.ranks import SINGLE, Ranks
from alignkit.models.rope import switch_of
from alignkit.models.sharding import identity, whole
from alignkit.reference.cache import LogpCache, default_path
from alignkit.reference.run_cache import RunCache
from alignkit.types import Example

__all__ = ["LogpCache", "cached_logps", "default_path", "fill", "fingerprint", "key", "weights_digest"]

Score = Callable[[list[Example]], Tensor]
"""Examples -> log-probabilities of their trained tokens, float32 [C], examples x completions x tokens in order."""

Cache = LogpCache | RunCache

_CHUNK = 512  # examples looked up at a time, so that a fill never holds all values in memory
_WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod|base_model\.model)\.)+")
# settings that do not change the log-probabilities of a model in evaluation mode
_UNRELATED = re.compile(
    r"_.*|transformers_version|(torch_)?dtype|architectures|quantization_config|use_cache|output_.*|return_dict"
    r"|id2label|label2id|problem_type|task_specific_params|(pad|bos|eos)_token_id|initializer_.*|.*_?dropout"
)


def fingerprint(
    model: nn.Module,
    *,
    quantisation: str = "none",
    dtype: torch.dtype,
    transforms: Mapping[str, object] | None = None,
    adapters: bool = True,
) -> str:
    """Return the sha256 (64 hex digits) of everything that a reference's log-probabilities depend on.

    Hashed: every parameter, buffer and quantisation statistic, the configuration, `quantisation`, the compute dtype,
    and `transforms`, the logit transforms (temperature, soft caps) as JSON values.
    adapters=False, or a model inside peft's `disable_adapter()`, gives the fingerprint of the base model.
    """
    adapters = adapters and not any(getattr(m, "disable_adapters", None) is True for m in model.modules())
    about = {
        "quantisation": quantisation,
        "dtype": str(dtype),
        "transforms": dict(transforms or {}),
        "config": _config(model),
        "adapters": _adapter_settings(model) if adapters else [],
    }
    if switch_of(causal_lm(model)) is not None:  # values of other rows' frequencies must not be found again
        about["rotary"] = "of each sequence alone"
    if is_compiled(causal_lm(model)):  # values round differently, which in 16 bits is more than ties allow
        about["compiled"] = True
    whole = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    digests: dict[object, bytes] = {}  # tied weights are hashed once
    for name, t in sorted(_named_tensors(model, adapters).items()):
        same = (identity(t), t.device, t.dtype, t.shape, t.stride()) if t.numel() else name
        if same not in digests:
            digests[same] = _digest(t)
        whole.update(json.dumps([name, str(t.dtype), list(t.shape)]).encode() + digests[same])
    return whole.hexdigest()


def weights_digest(model: nn.Module) -> str:
    """Return the sha256 (64 hex digits) of a model's weights; without adapters where they are new ones."""
    whole = hashlib.sha256()
    for name, t in sorted(_named_tensors(model, adapters=hasattr(model, "peft_config")).items()):
        whole.update(json.dumps([name, str(t.dtype), list(t.shape)]).encode() + _digest(t))
    return whole.hexdigest()


def key(fingerprint: str, prompt: Tensor, completion: Tensor, trained_at: Tensor) -> bytes:
    """Return the cache key (32 bytes) of one completion: its prompt's and its own tokens, and which are trained."""
    digest = hashlib.sha256(fingerprint.encode())
    for part, kind in ((prompt, "<i4"), (completion, "<i4"), (trained_at, "<i8")):
        raw = part.cpu().numpy().astype(kind).tobytes()
        digest.update(len(raw).to_bytes(8, "little") + raw)  # the length separates the parts
    return digest.digest()


def cached_logps(
    examples: Sequence[Example], cache: Cache, fingerprint: str, score: Score, ranks: Ranks = SINGLE
) -> Tensor:
    """Return the reference's log-probabilities of all trained tokens, float32 [C]; `score` computes missing ones.

    ranks: those that must call `score` together.
    """
    keys = [_keys(e, fingerprint) for e in examples]
    found = cache.get([k for ks in keys for k in ks])
    missing = [(e, ks) for e, ks in zip(examples, keys, strict=True) if any(k not in found for k in ks)]
    busy = ranks.most(len(missing))
    if missing:
        # a stored value wins over a value that was just computed, so that every reader sees the same
        scored = _compute([e for e, _ in missing], [ks for _, ks in missing], cache, fingerprint, score)
        found = scored | found
    elif busy:
        score([examples[0]])
    return torch.cat([torch.empty(0), *(found[k] for ks in keys for k in ks)])


def fill(
    examples: Sequence[Example],
    cache: Cache,
    fingerprint: str,
    score: Score,
    batch_tokens: int,
    progress: Callable[[int, int], object] | None = None,
    *,
    rank: int = 0,
    world: int = 1,
    ranks: Ranks = SINGLE,
) -> None:
    """Compute the missing values, longest examples first, in batches of about `batch_tokens` tokens.

    Each batch is stored before the next one starts: a killed fill loses one batch and continues where it stopped.
    progress: called with (examples done, examples missing) after each batch.
    rank, world: each rank takes its share of the examples, whatever the cache holds.
    ranks: those that must call `score` together; where one is done, it scores an example again. Others do not wait.
    """
    cache.use(fingerprint)
    lengths = [raw.n_tokens for raw in raws(examples)]
    own = Selected(examples, sorted(range(len(examples)), key=lambda i: -lengths[i])[rank::world])
    missing = dict(_missing(own, cache, fingerprint))
    keys, done = iter(missing.values()), 0
    batches = _cut(Selected(own, [*missing]), batch_tokens)
    while ranks.most((batch := next(batches, None)) is not None):
        if batch is None:
            score([examples[0]])
            continue
        _compute(batch, list(itertools.islice(keys, len(batch))), cache, fingerprint, score)
        done += len(batch)
        if progress:
            progress(done, len(missing))


def _keys(example: Example, fingerprint: str) -> list[bytes]:
    return [key(fingerprint, example.prompt, c.tokens, c.trained_at) for c in example.completions]


def _missing(examples: Sequence[Example], cache: Cache, fingerprint: str) -> Iterator[tuple[int, list[bytes]]]:
    """Yield the indices and keys of examples with missing values; only the first of several with the same tokens."""
    claimed: set[bytes] = set()
    for start in range(0, len(examples), _CHUNK):
        chunk = examples[start : start + _CHUNK]
        keys = [_keys(e, fingerprint) for e in chunk]
        claimed |= set(cache.get([k for ks in keys for k in ks]))
        for i, ks in enumerate(keys, start):
            if not claimed.issuperset(ks):
                claimed.update(ks)
                yield i, ks


def _cut(examples: Sequence[Example], batch_tokens: int) -> Iterator[list[Example]]:
    batch: list[Example] = []
    size = 0
    for example in examples:
        if batch and size + example.n_tokens > batch_tokens:
            yield batch
            batch, size = [], 0
        batch.append(example)
        size += example.n_tokens
    if batch:
        yield batch


def _compute(
    examples: list[Example], keys: list[list[bytes]], cache: Cache, fingerprint: str, score: Score
) -> dict[bytes, Tensor]:
    """Score the examples and store the values in one transaction; values that are not finite are never stored."""
    logps_C = score(examples).detach().to("cpu", torch.float32)
    parts = logps_C.split([n for e in examples for n in e.n_trained])
    values = dict(zip((k for ks in keys for k in ks), parts, strict=True))
    cache.put({k: v for k, v in values.items() if bool(v.isfinite().all())}, fingerprint)
    return values


def _named_tensors(model: nn.Module, adapters: bool) -> dict[str, Tensor]:
    """Return a model's tensors by their names without wrappers; with adapters=False, those of the base model only."""
    tensors: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    # quantised layers have their scales in the state dict only
    tensors |= {n: t for n, t in model.state_dict().items() if isinstance(t, Tensor) and n not in tensors}
    bases = {} if adapters else _bases(model)
    return {_plain(name): t for name, t in tensors.items() if _is_base(name, bases)}


def _bases(model: nn.Module) -> dict[str, str]:
    """Return the wrapped child's name for each peft wrapper."""
    bases = {}
    for name, module in model.named_modules():
        children = dict(module.named_children())
        for child in ("base_layer", "original_module", "base_model"):
            if child in children and (child != "base_model" or hasattr(module, "peft_config")):
                bases[name] = child
    return bases


def _is_base(name: str, bases: Mapping[str, str]) -> bool:
    parts = name.split(".")
    return all(bases.get(".".join(parts[:i]), part) == part for i, part in enumerate(parts))


def _plain(name: str) -> str:
    return _WRAPPERS.sub("", name).replace(".base_layer.", ".").replace(".original_module.", ".")


def _adapter_settings(model: nn.Module) -> list[Any]:
    """Return the settings of adapters that their weights do not show: scale, and which are active or merged."""
    return [
        [_plain(name), {k: str(v) for k, v in m.scaling.items()}, list(m.active_adapters), list(m.merged_adapters)]
        for name, m in model.named_modules()
        if isinstance(getattr(m, "scaling", None), dict) and hasattr(m, "merged_adapters")
    ]


def _config(model: nn.Module) -> Any:
    """Return the model's configuration without the settings that do not change its output."""

    def related(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(k): related(v) for k, v in value.items() if not _UNRELATED.fullmatch(str(k))}
        return sorted(map(str, value)) if isinstance(value, set) else value

    configs: Iterator[Any] = (getattr(m, "config", None) for m in model.modules())
    return next((related(c.to_dict()) for c in configs if hasattr(c, "to_dict")), None)


def _digest(t: Tensor) -> bytes:
    # as bytes, because numpy has no bfloat16; one tensor at a time, so a GPU's weights are never copied as a whole
    raw: np.ndarray[Any, Any] = whole(t.detach()).cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(raw.data).digest()
