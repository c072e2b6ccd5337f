"""Loading models, and the one way alignkit scores tokens with them: trunk, the C positions that count, head.

Nothing above this room knows an architecture; nothing in it knows a method.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from alignkit.attention import BLOCK, attention_mask
from alignkit.config import LoraSettings, RunConfig
from alignkit.errors import ModelError
from alignkit.packing import batch_of
from alignkit.types import Batch, Example, Layout, Rows
from alignkit_kernels import linear_logps, selective_logps

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DIFFERS = "log-probabilities differ"
BLOCK_LOGITS = 1 << 26  # logits at a time of a head that has to be called
DENSE_ROW_TOKENS = 2048  # a dense mask takes row^2 bytes a row


def load_tokenizer(config: RunConfig) -> Any:
    """Return the tokenizer of the run. Raises ModelError naming the folder when there is none."""
    given = config.tokenizer if config.tokenizer is not None else config.model
    if not isinstance(given, str | Path):
        if config.tokenizer is None:
            raise ModelError("a model object was given without its tokenizer; pass tokenizer=")
        return given
    from transformers import AutoTokenizer

    _look(given)
    try:
        return AutoTokenizer.from_pretrained(str(given), trust_remote_code=config.trust_remote_code)
    except Exception as error:  # transformers raises a dozen kinds here
        raise ModelError(f"cannot load a tokenizer from '{given}'{_where(given)}: {_first_line(error)}") from error


def load_model(config: RunConfig, device: torch.device) -> tuple[nn.Module, bool]:
    """Return the policy before training on `device`, adapters attached, and whether it came with a trained adapter.

    Dropout is switched off for good. Raises ModelError: nothing to load, or LoRA on top of an adapter.
    """
    model = config.model
    if isinstance(model, str | Path):
        model = _from_pretrained(str(model), config)
    came_with_adapter = hasattr(model, "peft_config")
    if config.lora and came_with_adapter:
        raise ModelError("the model already carries an adapter: it is trained on; leave out `lora`")
    if config.lora:
        model = add_lora(model, config.lora)
    drop_dropout(model)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    lm = causal_lm(model)
    lm.config.use_cache = False
    if config.attention != "auto":
        lm.set_attn_implementation(config.attention)
    elif device.type == "cuda" and config.layout != "padded" and getattr(lm, "_supports_flex_attn", False):
        lm.set_attn_implementation("flex_attention")
    return model.to(device), came_with_adapter


def _from_pretrained(name: str, config: RunConfig) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    _look(name)
    options = {"dtype": DTYPES[config.dtype], "trust_remote_code": config.trust_remote_code}
    options["output_loading_info"] = True
    adapter = Path(name) / "adapter_config.json"
    try:
        if adapter.is_file():
            from peft import PeftModel

            base = json.loads(adapter.read_text())["base_model_name_or_path"]
            model = _whole(base, *AutoModelForCausalLM.from_pretrained(base, **options))
            return PeftModel.from_pretrained(model, name, is_trainable=True)  # type: ignore[no-any-return]
        about = AutoConfig.from_pretrained(name, trust_remote_code=config.trust_remote_code)
        if getattr(about, "is_encoder_decoder", False):  # its decoder alone would load, with weights missing
            raise ModelError(f"'{name}' is an encoder and a decoder ({about.model_type}); give a causal language model")
        return _whole(name, *AutoModelForCausalLM.from_pretrained(name, **options))
    except ModelError:
        raise
    except Exception as error:  # transformers raises a dozen kinds here
        raise ModelError(
            f"cannot load a causal language model from '{name}'{_where(name)}: {_first_line(error)}"
        ) from error


def _whole(name: str, model: nn.Module, loading: Mapping[str, Any]) -> nn.Module:
    # transformers draws what a checkpoint lacks at random and only warns, a classifier's missing lm_head for one
    if missing := sorted(loading["missing_keys"]):
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise ModelError(
            f"the checkpoint in '{name}' lacks {len(missing)} weight{'s' * (len(missing) > 1)} of "
            f"{type(model).__name__}: {', '.join(missing[:4])}{more}"
        )
    return model


def _look(name: str | Path) -> None:
    # what can only be a path is not asked of the hub
    text = str(name)
    if (text.count("/") != 1 or text.startswith((".", "/", "~"))) and "/" in text and not Path(text).exists():
        raise ModelError(f"there is no folder '{text}'; give one that holds a model, or a hub name such as org/name")


def _where(name: str | Path) -> str:
    return "" if Path(name).exists() else " (no such folder here, so it was looked up on the hub)"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]


def add_lora(model: nn.Module, settings: LoraSettings) -> nn.Module:
    """Wrap the model with fresh adapters (peft). Raises ModelError when no module matches."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules=settings.target_modules,
        modules_to_save=settings.modules_to_save,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, lora)  # type: ignore[no-any-return]
    except ValueError as error:
        names = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise ModelError(f"LoRA: {_first_line(error)} The linear modules are {', '.join(names)}") from error


def drop_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0, so that policy, reference and old policy compute the same function.

    Goes by names too: residual_dropout, activation_dropout, layerdrop, router_jitter_noise, ... are plain numbers.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(module, name, 0.0)


def causal_lm(model: Any) -> Any:
    """Return the transformers model inside a peft wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


class Scorer(nn.Module):
    """A causal language model as a function from rows to log-probabilities; this is what gets wrapped for training.

    kept_logits: bytes of logits that wait for the backward where the head is trained (None: the kernels' default).
    """

    def __init__(self, model: nn.Module, kept_logits: int | None = None) -> None:
        super().__init__()
        self.model, self.kept_logits = model, kept_logits

    def forward(
        self, rows: Rows, targets: Tensor, temperature: float = 1.0, entropy: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return logps [C] float32 of `targets` (and entropy [C]), see `Outputs`."""
        hidden_CH = trunk(self.model, rows)
        return head(self.model, hidden_CH, targets, temperature, entropy, self.kept_logits)


def trunk(model: nn.Module, rows: Rows) -> Tensor:
    """Return the last hidden states at the positions that predict, [C, H]."""
    lm = causal_lm(model)
    mask = attention_mask(rows, lm.config.get_text_config(), next(lm.parameters()).dtype)
    out = lm.base_model(input_ids=rows.input_ids, attention_mask=mask, position_ids=rows.position_ids, use_cache=False)
    hidden_RTH = out.last_hidden_state
    return hidden_RTH.reshape(-1, hidden_RTH.shape[-1]).index_select(0, rows.predict_at)  # type: ignore[no-any-return]


def head(
    model: nn.Module,
    hidden_CH: Tensor,
    targets: Tensor,
    temperature: float,
    entropy: bool,
    kept_logits: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return logps of the targets (and entropies); the architecture's logit transforms are applied."""
    lm = causal_lm(model)
    config = lm.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    # a configuration may hold None for "no scale"
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    layer = _inside_adapter(lm.get_output_embeddings())
    if layer is None:
        raise ModelError(f"{type(lm).__name__} names no head (get_output_embeddings() is None) to score tokens with")
    if type(layer) is nn.Linear:
        return linear_logps(
            hidden_CH, layer.weight, targets, layer.bias, softcap, scale, temperature, entropy, kept_logits
        )
    # never written over: what the head's own backward needs may be its output
    options = (temperature, entropy, False, softcap, scale)
    scored: Tensor | tuple[Tensor, Tensor] = _by_rows(layer, hidden_CH, targets, options, config.vocab_size)
    return scored


def _inside_adapter(layer: Any) -> Any:
    # peft: a head trained in full is a copy beside the original; one with low-rank updates holds it as base_layer
    if hasattr(layer, "modules_to_save"):
        active = [] if layer.disable_adapters else layer.active_adapters
        layer = layer.modules_to_save[active[0]] if active else layer.original_module
    if hasattr(layer, "base_layer") and layer.disable_adapters and not layer.merged:
        layer = layer.base_layer
    return layer


def _by_rows(layer: Any, hidden_CH: Tensor, targets: Tensor, options: tuple[Any, ...], vocabulary: int) -> Any:
    # a head with low-rank updates or in 8 bits knows how to multiply, and only its own forward does; so it is asked a
    # block of rows at a time, and again in the backward
    def scored(hidden: Tensor, targets: Tensor) -> Any:
        return selective_logps(layer(hidden), targets, *options)

    n_rows = max(1, BLOCK_LOGITS // vocabulary)
    parts = [
        checkpoint(scored, h, t, use_reentrant=False)
        for h, t in zip(hidden_CH.split(n_rows), targets.split(n_rows), strict=True)
    ]
    return tuple(torch.cat(p) for p in zip(*parts, strict=True)) if options[1] else torch.cat(parts)


def plain_logps(model: nn.Module, sequence: Tensor, n_prompt: int) -> Tensor:
    """Return the log-probabilities of one sequence's tokens after the first `n_prompt`, by the model's own forward."""
    lm = causal_lm(model)
    with _without_flex(lm):
        logits = lm(input_ids=sequence[None].long(), use_cache=False).logits[0].float()
    logps = logits[:-1].log_softmax(-1).gather(1, sequence[1:, None].long()).squeeze(1)
    return logps[n_prompt - 1 :]  # type: ignore[no-any-return]


@contextmanager
def _without_flex(lm: Any) -> Iterator[None]:
    # every other length would be compiled anew, and another implementation is the better witness
    flex = lm.config._attn_implementation == "flex_attention"
    if flex:
        lm.set_attn_implementation(_dense_attention(lm))
    try:
        yield
    finally:
        if flex:
            lm.set_attn_implementation("flex_attention")


def _dense_attention(lm: Any) -> str:
    return "sdpa" if getattr(lm, "_supports_sdpa", False) else "eager"


def probe(scorer: Scorer, batch: Batch) -> str | None:
    """Compare a batch's packed rows with one sequence at a time by the model itself; return what differs, or None.

    In float32 1e-4 nats a token are allowed, in lower precision 0.25: rounding, but no wrong mask or position.
    """
    device = batch.device
    try:
        with torch.no_grad():
            got = scorer(batch.rows, batch.targets)
            want = [
                plain_logps(scorer.model, torch.cat([e.prompt, c.tokens]).to(device), len(e.prompt))[c.trained_at]
                for e in batch.examples
                for c in e.completions
            ]
    except Exception as error:  # an architecture may refuse a mask in any way it likes
        return _first_line(error)
    worst = float((got - torch.cat(want)).abs().max())
    allowed = 1e-4 if _is_exact(scorer, device) else 0.25
    return None if worst <= allowed else f"{DIFFERS} by {worst:.2g} nats a token"


def _is_exact(model: nn.Module, device: torch.device) -> bool:
    return next(model.parameters()).dtype == torch.float32 and not torch.is_autocast_enabled(device.type)


def check_causal(model: nn.Module, example: Example, device: torch.device) -> None:
    """Raise ModelError where a token's log-probability depends on later tokens, as in a masked language model."""
    sequence = torch.cat([example.prompt, example.completions[0].tokens]).to(device)
    other = torch.cat([sequence[:-1], (sequence[-1:] == 0).to(sequence.dtype)])  # its last token is another one
    try:
        with torch.no_grad():
            change = plain_logps(model, sequence, 1)[:-1] - plain_logps(model, other, 1)[:-1]
    except Exception:  # the probe will say why this model cannot be asked
        return
    if change.numel() and float(change.abs().max()) > (1e-4 if _is_exact(model, device) else 0.02):
        raise ModelError(
            f"{type(causal_lm(model)).__name__} reads the tokens that it has to predict, as masked language models "
            f"such as BERT do; give a causal language model"
        )


def check_fit(model: nn.Module, examples: Sequence[Example], mixes: bool = False) -> None:
    """Raise ModelError where the examples hold tokens or positions that the model has no weights for.

    mixes: any completion may meet any prompt (KTO's baseline), so the longest of both counts.
    Rotary positions go on for ever, so of those that were never trained a warning tells.
    """
    lm = causal_lm(model)
    known = lm.get_input_embeddings().weight.shape[0]
    sequences = [(e, c) for e in examples for c in e.completions]
    for example, completion in sequences:
        if (token := max(int(example.prompt.max()), int(completion.tokens.max()))) >= known:
            raise ModelError(
                f"row {example.row} holds the token {token}, and the model embeds {known} (0 to {known - 1}): "
                f"the tokenizer is another model's, or the embeddings were not resized"
            )
    config = lm.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    longest_prompt = max(len(e.prompt) for e in examples) if mixes else 0
    lengths = [(max(len(e.prompt), longest_prompt) + len(c.tokens), e.row) for e, c in sequences]
    beyond = [(n, row) for n, row in lengths if limit and n > limit]
    if not beyond:
        return
    longest, row = max(beyond)
    what = (
        f"{len(beyond)} of {len(lengths)} sequences are longer than the model's {limit} positions, the longest "
        f"{longest} tokens (row {row}); let max_prompt_tokens and max_completion_tokens add up to {limit} at most"
    )
    if getattr(config, "rope_parameters", None) is None:
        raise ModelError(what)
    logger.warning("%s", what)


def choose_layout(scorer: Scorer, examples: Sequence[Example], config: RunConfig, device: torch.device) -> Layout:
    """Return the layout of the run: the forest where the probe finds it exact, padded rows (said once) where not.

    Raises ModelError when even padded rows differ from the model's own forward, or `layout: forest` cannot be had.
    """
    check_causal(scorer.model, max(examples, key=lambda e: e.n_tokens), device)
    lm = causal_lm(scorer.model)
    flex = lm.config._attn_implementation == "flex_attention"
    if flex:
        forest = Layout("forest", config.row_tokens or config.max_tokens, attention_cost=0.0, multiple_of=BLOCK)
    else:
        forest = Layout("forest", config.row_tokens or min(config.max_tokens, DENSE_ROW_TOKENS))
    rows = sorted(examples, key=lambda e: e.n_tokens)[:: max(1, len(examples) // 4)][:4]
    problem = None
    if config.layout != "padded":
        problem = probe(scorer, batch_of(rows, forest, device))
        if problem is None:
            return forest
        if flex and config.attention == "auto" and not problem.startswith(DIFFERS):
            dense = _dense_attention(lm)  # FlexAttention refuses heads of fewer than 16 dimensions, for one
            logger.warning("FlexAttention cannot be used with this model (%s); using %s", problem, dense)
            lm.set_attn_implementation(dense)
            return choose_layout(scorer, examples, config, device)
        if config.layout == "forest":
            raise ModelError(f"this model cannot read the packed forest ({problem}); use layout: auto or padded")
        logger.warning("this model cannot read the packed forest (%s); using padded rows: exact, but slower", problem)
    padded = Layout("padded")
    if problem := probe(scorer, batch_of(rows, padded, device)):
        name = type(lm).__name__
        if not problem.startswith(DIFFERS):
            raise ModelError(f"alignkit cannot score tokens with {name}: {problem}")
        raise ModelError(
            f"alignkit computes other log-probabilities than {name} itself ({problem}); its head may transform the "
            f"logits in a way that is not known here"
        )
    return padded
