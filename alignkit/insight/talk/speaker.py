"""One model of a conversation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, TextStreamer

from alignkit.config import RunConfig
from alignkit.data import load
from alignkit.data.chat import Chat
from alignkit.data.tokenise import tokenise
from alignkit.models.loading import causal_lm
from alignkit.rollout.sampling import check_prompts, ends_of

Message = dict[str, str]


class _Words(TextStreamer):
    """Passes an answer's text on, a word at a time."""

    def __init__(self, tokenizer: Any, say: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.say = say

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass on what is sure not to change any more."""
        self.say(text)


@dataclass
class Speaker:
    """A model with the conversation that it has had. context: entered around its passes.

    A tokenizer without a chat template has no conversations: the model continues each text on its own.
    """

    name: str
    model: Any
    tokenizer: Any
    config: RunConfig
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    messages: list[Message] = field(default_factory=list)

    @property
    def converses(self) -> bool:
        """Whether it sees what was said before."""
        return bool(self.tokenizer.chat_template)

    def answer(self, text: str, say: Callable[[str], None]) -> str:
        """Answer a message; say: gets the answer in pieces, as it is sampled. Both become part of the conversation.

        An answer that is interrupted is kept as far as it was said. Raises AlignkitError, which changes nothing: the
        conversation is longer than the model's positions, or its template refuses it.
        """
        asked: list[Message] = [*self.messages, {"role": "user", "content": text}]
        ids = self._tokens(asked if self.converses else text)
        lm = causal_lm(self.model)
        check_prompts(lm, [ids], self.config.sampling.max_new_tokens)
        settings = self._generation(lm)
        said: list[str] = []

        def heard(piece: str) -> None:
            said.append(piece)
            say(piece)

        try:
            with self.context(), torch.inference_mode():
                lm.generate(
                    torch.tensor([ids], device=lm.device),
                    attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=lm.device),
                    generation_config=settings,
                    tokenizer=self.tokenizer,
                    streamer=_Words(self.tokenizer, heard),
                )
        finally:
            whole = "".join(said)
            if self.converses:
                self.messages = [*asked, {"role": "assistant", "content": whole}]
        return whole

    def _tokens(self, prompt: str | list[Message]) -> list[int]:
        """Return the tokens that a run would sample from."""
        made, _ = tokenise(load([{"prompt": prompt}], "prompts"), self.tokenizer, chat=Chat.of(self.config))
        return [int(i) for i in made[0].prompt]

    def _generation(self, lm: Any) -> GenerationConfig:
        ends, s = ends_of(lm, self.tokenizer), self.config.sampling
        # every value is set: `generate` takes those that are not from the model's folder
        return GenerationConfig(
            do_sample=True,
            num_beams=1,
            use_cache=True,
            max_new_tokens=s.max_new_tokens,
            min_new_tokens=s.min_new_tokens or None,
            temperature=s.temperature,
            top_p=s.top_p,
            top_k=s.top_k,
            repetition_penalty=1.0,
            stop_strings=s.stop or None,
            eos_token_id=ends,
            pad_token_id=ends[0],
        )
