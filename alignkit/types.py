"""The batch type: a packed forest of prompt trees; and the terms that a method returns for it.

A tree is a prompt with k completions that branch off it. The prompt's tokens occur once, trees share rows, and only the
positions that predict trained completion tokens reach the language-model head.

Shape letters, used as suffixes throughout alignkit:
    E examples (trees)    S completions    C trained completion tokens    N tokens
    R rows    T tokens a row    H hidden size    V vocabulary    G completions a group
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

LayoutKind = Literal["forest", "padded"]


@dataclass(frozen=True, eq=False)
class Completion:
    """One answer to a prompt.

    tokens: int32 [n], including the end-of-sequence token where the answer has one.
    trained: bool [n], False where a token is read but not learned (a user's turn inside a multi-turn answer);
        None: every token is trained.
    """

    tokens: Tensor
    trained: Tensor | None = None

    @cached_property
    def trained_at(self) -> Tensor:
        """Offsets of the trained tokens, int64 [c]."""
        if self.trained is None:
            return torch.arange(len(self.tokens))
        return self.trained.nonzero().squeeze(1)


@dataclass(frozen=True, eq=False)
class Example:
    """A prompt, its completions, and the numbers given with them.

    prompt: int32 [n], n >= 1: its last token predicts the first token of every completion.
    completions: the chosen one of a pair comes first.
    numbers: one float each, such as "margin" (pairs) or "desirable" (1.0 or 0.0, unpaired).
    row: the 1-based row of the source, for messages.
    asked, columns: for rows that are only a prompt, the prompt as it was given (text or messages) and the row's other
        columns, for the rewards of its sampled completions.
    source: the name of the row's source, where there are several. order: the row's number in the column `order_by`.
    declared: the row's values of the columns that the method declares.
    """

    prompt: Tensor
    completions: tuple[Completion, ...]
    numbers: Mapping[str, float] = field(default_factory=dict)
    row: int = 0
    asked: str | list[dict[str, Any]] = ""
    columns: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    order: float | None = None
    declared: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def n_tokens(self) -> int:
        """Tokens of the tree: the prompt once, and every completion."""
        return len(self.prompt) + sum(len(c.tokens) for c in self.completions)

    @cached_property
    def n_trained(self) -> tuple[int, ...]:
        """Trained tokens of each completion."""
        return tuple(len(c.trained_at) for c in self.completions)


@dataclass(frozen=True)
class Switch:
    """Where a model's rotary frequencies change with the length of a sequence.

    limits: a sequence that is longer than one of them has other frequencies. exact_beyond: sequences that are longer
    than this have the frequencies of their exact length.
    """

    limits: tuple[int, ...] = ()
    exact_beyond: int | None = None

    def __str__(self) -> str:
        exact = [] if self.exact_beyond is None else [f"with every token beyond {self.exact_beyond}"]
        return " and ".join([*(f"beyond {limit} tokens" for limit in self.limits), *exact])

    def same_as(self, length: int) -> int:
        """Return the smallest length that has the same frequencies as `length`."""
        if self.exact_beyond is not None and length > self.exact_beyond:
            return length
        return max((limit for limit in self.limits if length > limit), default=0) + 1


@dataclass(frozen=True)
class Layout:
    """The layout of trees for the model.

    kind: "forest" packs whole trees into rows under a tree mask; "padded" puts each prompt + completion into a row.
    row_tokens: most tokens of a forest row (a longer tree gets a longer row).
    attention_cost: of a token, per token of its row, relative to the costs that do not depend on the row's width; about
        1 / 1500 under a dense mask, 0 where empty blocks of the mask are skipped.
    multiple_of: rows are padded to a multiple of this (128 for block masks).
    switch: of the model's rotary frequencies; completions on different sides of it do not share a tree.
    """

    kind: LayoutKind = "forest"
    row_tokens: int = 2048
    attention_cost: float = 1 / 1500
    multiple_of: int = 1
    switch: Switch | None = None

    def groups(self, example: Example) -> list[list[int]]:
        """Return the completions, by number, that share each copy of the example's prompt."""
        if self.kind == "padded":
            return [[k] for k in range(len(example.completions))]
        groups: dict[int, list[int]] = {}
        for k, c in enumerate(example.completions):
            length = len(example.prompt) + len(c.tokens)
            groups.setdefault(self.switch.same_as(length) if self.switch else 0, []).append(k)
        return list(groups.values())


@dataclass(frozen=True)
class PackedRows:
    """The tensors that a model reads.

    input_ids, position_ids, tree_ids, branch_ids: int64 [R, T]; tree_ids is -1 on padding; branch_ids is 0 on
    prompts and k + 1 on the k-th completion. predict_at: int64 [C], indices into the flattened R * T positions.
    last_at: int64 [S], the index of each completion's last token, where a scalar head scores the whole answer.
    rope_as: int64 [R, T], the length whose rotary frequencies each token has (`Switch.same_as`); None without a switch.
    """

    input_ids: Tensor
    position_ids: Tensor
    tree_ids: Tensor
    branch_ids: Tensor
    predict_at: Tensor
    last_at: Tensor
    kind: LayoutKind = "forest"
    rope_as: Tensor | None = None

    def to(self, device: torch.device | str) -> PackedRows:
        """Return the same rows on `device`."""
        names = ("input_ids", "position_ids", "tree_ids", "branch_ids", "predict_at", "last_at")
        moved = {n: getattr(self, n).to(device, non_blocking=True) for n in names}
        rope_as = None if self.rope_as is None else self.rope_as.to(device, non_blocking=True)
        return replace(self, **moved, rope_as=rope_as)


Packer = Callable[[Sequence[Example], Layout], PackedRows]


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples with the numbers computed for them; packed into rows when a model reads them.

    packer: lays examples out in rows (`alignkit.models.packing.pack`).
    per_example, per_completion, per_token: tensors whose first dimension is E, S or C. They follow the examples
    through `select`, `minibatches` and `micro_batches`, so that a method does not see how a step was cut.
    temperature: of the completions' sampling, at which they are scored; None: the run's.
    The order of E, S and C is that of `examples`, independent of the rows.
    """

    examples: tuple[Example, ...]
    packer: Packer
    layout: Layout = Layout()
    device: torch.device = torch.device("cpu")
    per_example: Mapping[str, Tensor] = field(default_factory=dict)
    per_completion: Mapping[str, Tensor] = field(default_factory=dict)
    per_token: Mapping[str, Tensor] = field(default_factory=dict)
    temperature: float | None = None

    def __len__(self) -> int:
        return len(self.examples)

    @cached_property
    def rows(self) -> PackedRows:
        """The packed tensors, on the batch's device."""
        return self.packer(self.examples, self.layout).to(self.device)

    @cached_property
    def targets(self) -> Tensor:
        """The tokens to predict, int64 [C]."""
        parts = [c.tokens[c.trained_at] for e in self.examples for c in e.completions]
        return torch.cat(parts or [torch.empty(0)]).long().to(self.device)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """Boundaries of the completions among the C tokens, int64 [S + 1]."""
        return _borders([n for e in self.examples for n in e.n_trained]).to(self.device)

    @cached_property
    def cu_completions(self) -> Tensor:
        """Boundaries of the examples among the S completions, int64 [E + 1]."""
        return _borders([len(e.completions) for e in self.examples]).to(self.device)

    @cached_property
    def lengths(self) -> Tensor:
        """Trained tokens of each completion, int64 [S]."""
        return self.cu_seqlens.diff()

    @cached_property
    def columns(self) -> Columns:
        """The columns that the method declares: numbers as a tensor [E] (float32, int64 or bool), others as a list."""
        names = self.examples[0].declared if self.examples else ()
        return Columns({name: self._column(name) for name in names})

    def _column(self, name: str) -> Tensor | list[Any]:
        values = [e.declared[name] for e in self.examples]
        number = isinstance(values[0], float | int)
        return torch.tensor(values, device=self.device) if number else values

    @property
    def n_tokens(self) -> int:
        """Tokens of all trees; prompts count once, padding does not count."""
        return sum(e.n_tokens for e in self.examples)

    @property
    def reference_logps(self) -> Tensor:
        """The reference's log-probabilities of the targets, float32 [C], nats."""
        return self["reference_logps"]

    def __getitem__(self, name: str) -> Tensor:
        """Return the named number of any extent. Raises KeyError, which lists the names that exist."""
        for numbers in (self.per_example, self.per_completion, self.per_token):
            if name in numbers:
                return numbers[name]
        known = sorted([*self.per_example, *self.per_completion, *self.per_token])
        hint = " (does the method declare uses={'reference'}?)" if name == "reference_logps" else ""
        raise KeyError(f"the batch has no '{name}'{hint}; it has {known or 'no numbers'}")

    def __contains__(self, name: object) -> bool:
        return any(name in numbers for numbers in (self.per_example, self.per_completion, self.per_token))

    def pairs(self, value_S: Tensor) -> tuple[Tensor, Tensor]:
        """Split a value [S] of a batch of pairs into (chosen [E], rejected [E])."""
        return value_S[0::2], value_S[1::2]

    def attach(
        self,
        *,
        per_example: Mapping[str, Tensor] | None = None,
        per_completion: Mapping[str, Tensor] | None = None,
        per_token: Mapping[str, Tensor] | None = None,
    ) -> Batch:
        """Return a copy with these numbers added; sizes are checked against E, S and C."""
        given = (("per_example", per_example), ("per_completion", per_completion), ("per_token", per_token))
        sizes = {"per_example": len(self), "per_completion": len(self.lengths), "per_token": len(self.targets)}
        merged = {}
        for extent, new in given:
            for name, value in (new or {}).items():
                if len(value) != sizes[extent]:
                    raise ValueError(f"{extent} number '{name}' must have {sizes[extent]} entries, got {len(value)}")
            merged[extent] = {**getattr(self, extent), **(new or {})}
        return self._like(**merged)

    def select(self, indices: Sequence[int]) -> Batch:
        """Return the examples at `indices` with their part of every number."""
        at = torch.as_tensor(list(indices), dtype=torch.int64, device=self.device)
        at_S = _expand(at, self.cu_completions)
        at_C = _expand(at_S, self.cu_seqlens)
        return self._like(
            examples=tuple(self.examples[i] for i in indices),
            per_example={k: v[at] for k, v in self.per_example.items()},
            per_completion={k: v[at_S] for k, v in self.per_completion.items()},
            per_token={k: v[at_C] for k, v in self.per_token.items()},
        )

    def minibatches(
        self, n: int, generator: torch.Generator, rank: int = 0, world: int = 1, total: int | None = None
    ) -> Iterator[tuple[Batch, float]]:
        """Yield this rank's share of n shuffled parts of nearly equal size, with its weight; for n = 1 the whole batch.

        total: examples of the step, of which this batch holds every world-th from `rank` on. The parts do not depend on
        the ranks. weight: 1, or 0 for a placeholder where this rank has no share of a part.
        """
        if n == 1:
            yield self, 1.0
            return
        total = len(self) if total is None else total
        for part in torch.randperm(total, generator=generator).tensor_split(min(n, total)):
            own = [i // world for i in part.tolist() if i % world == rank]
            yield self.select(own or [0]), float(bool(own))

    def micro_batches(self, max_tokens: int) -> list[Batch]:
        """Cut between trees into parts of at most `max_tokens` tokens (at least one tree), longest trees first."""
        order = sorted(range(len(self)), key=lambda i: -self.cost(i))
        parts: list[list[int]] = []
        room = 0
        for i in order:
            if not parts or self.cost(i) > room:
                parts.append([])
                room = max_tokens
            parts[-1].append(i)
            room -= self.cost(i)
        return [self.select(sorted(part)) for part in parts] if len(parts) > 1 else [self]

    def cost(self, i: int) -> int:
        """Return the tokens of example i in this layout."""
        e = self.examples[i]
        return e.n_tokens + max(0, len(self.layout.groups(e)) - 1) * len(e.prompt)

    def count(self, over: str) -> int:
        """Return the count that a Term over `over` is averaged over: examples, completions, tokens, or a mask's sum."""
        if over == "examples":
            return len(self)
        if over == "completions":
            return len(self.lengths)
        if over == "tokens":
            return len(self.targets)
        return int(self[over].sum())

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with its numbers on `device`."""
        moved = {
            extent: {k: v.to(device) for k, v in getattr(self, extent).items()}
            for extent in ("per_example", "per_completion", "per_token")
        }
        return self._like(device=torch.device(device), **moved)

    def _like(self, **changes: object) -> Batch:
        # replace() drops the cached properties, as every caller needs
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Term:
    """One summand of a loss: `coef` times the mean of `value` over the extent `over`.

    value: [E] for "examples", [S] for "completions", [C] for "tokens", or the shape of the mask that `over` names.
    coef: 0 for a metric: averaged and logged, never differentiated.
    largest: log the step's largest value of a metric instead of the mean.
    The engine divides by the count over ALL micro-batches and ranks, so a method must not average.
    """

    value: Tensor
    over: str = "examples"
    coef: float = 1.0
    largest: bool = False


def metric(value: Tensor, over: str = "examples", largest: bool = False) -> Term:
    """Return a Term that is logged, not differentiated: its mean, or its largest value."""
    return Term(value.detach(), over, coef=0.0, largest=largest)


class Columns(dict[str, Any]):
    """A batch's columns by name; an unknown one is a KeyError that lists those that the method declares."""

    def __missing__(self, name: str) -> Any:
        have = ", ".join(self) or "none"
        raise KeyError(f"the batch has no column '{name}'; the method's `columns` declares: {have}")


class Outputs(NamedTuple):
    """The results of a model for a batch, float32 [C] each.

    logps: of the targets, in nats. entropy: of the distribution that each target was drawn from, in nats, where
    requested. values: the critic's value before each target, in the reward's units, where requested. drawn: of the
    targets in the distribution that sampling leaves of the policy's, in nats, where requested.
    A named tuple, in which the wrappers of data parallelism and FSDP2 look for tensors.
    """

    logps: Tensor
    entropy: Tensor | None = None
    values: Tensor | None = None
    drawn: Tensor | None = None


def _borders(lengths: list[int]) -> Tensor:
    borders = torch.zeros(len(lengths) + 1, dtype=torch.int64)
    torch.cumsum(torch.tensor(lengths, dtype=torch.int64), 0, out=borders[1:])
    return borders


def _expand(at: Tensor, borders: Tensor) -> Tensor:
    """Return the indices of all entries of the segments `at`, in order."""
    sizes = borders.diff()[at]
    starts = torch.repeat_interleave(borders[:-1][at] - (sizes.cumsum(0) - sizes), sizes)
    return starts + torch.arange(len(starts), device=at.device)
