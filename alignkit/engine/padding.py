"""The padding of a saved reward model, so that plain transformers scores a batch as it scores each row alone.

transformers' classifiers read the last token that is not the padding token. So that token must never end an answer: not
the end-of-sequence token, and not the one that closes a turn of a chat.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from alignkit.data.chat import turn_end
from alignkit.models.critic import PADDING_ROW
from alignkit.models.loading import causal_lm

PAD = "<|pad|>"
_OF_MEDIA = ("image", "video", "vision", "audio")


def padding_tokenizer(tokenizer: Any) -> Any:
    """Return a copy of a tokenizer that pads on the right, with a token that never ends an answer.

    It is the tokenizer's own, else a special token that is kept for such uses, else a new one.
    """
    made = copy.deepcopy(tokenizer)
    made.padding_side = "right"  # so that a row's tokens have the positions that they have alone
    ends = {tokenizer.eos_token_id, turn_end(tokenizer)}
    if made.pad_token_id is None or made.pad_token_id in ends:
        made.add_special_tokens({"pad_token": _reserved(made, ends) or PAD})
    return made


def _reserved(tokenizer: Any, ends: set[int | None]) -> str | None:
    template = str(getattr(tokenizer, "chat_template", None) or "")
    free = [
        token.content for i, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special and i not in ends and token.content not in template
        and not any(word in token.content.lower() for word in _OF_MEDIA)
    ]  # fmt: skip
    kept_for_it = [t for word in ("pad", "reserved", "unused") for t in free if word in t.lower()]
    return next(iter(kept_for_it), None)


def pad_with(model: Any, tokenizer: Any, only_adapter: bool, weights: dict[str, Tensor] | None) -> None:
    """Let a classifier ignore the padding of `padding_tokenizer`; a new token gets a row of zeros in the embeddings.

    weights: of a sharded model, gathered on the main rank: the row is added there. An adapter is loaded into its base,
    whose configuration this does not change: the model card says how to load it.
    """
    lm = causal_lm(model)
    lm.config.pad_token_id = lm.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    rows = lm.get_input_embeddings().weight.shape[0]
    if tokenizer.pad_token_id < rows or only_adapter:
        return
    more = tokenizer.pad_token_id + 1 - rows
    setattr(lm.config, PADDING_ROW, more)
    if weights is None:
        lm.resize_token_embeddings(rows + more, mean_resizing=False)
        nn.init.zeros_(lm.get_input_embeddings().weight.data[rows:])
        return
    lm.config.get_text_config().vocab_size = rows + more
    embeddings = lm.get_input_embeddings().weight
    for name in {n for n, p in lm.named_parameters(remove_duplicate=False) if p is embeddings} & weights.keys():
        weights[name] = nn.functional.pad(weights[name], (0, 0, 0, more))
