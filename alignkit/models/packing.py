"""Examples -> rows that a model reads: the forest (prompts once, trees share rows) or plain padded sequences.

    forest:  [ prompt A | chosen A | rejected A | prompt B | chosen B | rejected B | ... ]
    padded:  [ prompt A | chosen A ]  [ prompt A | rejected A ]  [ prompt B | chosen B ] ...

Both have the same C targets in the same order, so code outside this package cannot tell them apart. Where a model's
rotary frequencies depend on the length (`Layout.switch`), completions with different frequencies do not share a prompt.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from alignkit.types import Batch, Example, Layout, PackedRows


def batch_of(examples: Iterable[Example], layout: Layout, device: torch.device | str = "cpu") -> Batch:
    """Return the examples as a batch; it is packed when a model reads it."""
    return Batch(tuple(examples), packer=pack, layout=layout, device=torch.device(device))


def pack(examples: Sequence[Example], layout: Layout) -> PackedRows:
    """Lay the examples out in rows; int64 tensors on the CPU, see `PackedRows`. Raises ValueError on no examples."""
    if not examples:
        raise ValueError("cannot pack a batch of no examples")
    trees = _trees(examples, layout)
    lengths = [len(t.ids) for t in trees]
    if layout.kind == "forest":
        row_of, start_of, width = _fit(lengths, layout)
    else:
        row_of, start_of, width = list(range(len(trees))), [0] * len(trees), max(lengths)
    width = -(-width // layout.multiple_of) * layout.multiple_of
    n_rows = max(row_of) + 1
    first_of = [r * width + s for r, s in zip(row_of, start_of, strict=True)]

    at = torch.cat([torch.arange(first, first + n) for first, n in zip(first_of, lengths, strict=True)])
    sizes = torch.tensor(lengths)
    # trees hold their completions in another order than the batch where one example has several
    ends = sorted(
        (number, first + last, predict_at + first)
        for tree, first in zip(trees, first_of, strict=True)
        for number, last, predict_at in zip(tree.numbers, tree.last_at, tree.predict_at, strict=True)
    )

    def placed(values: Tensor, empty: int) -> Tensor:
        return torch.full((n_rows * width,), empty).index_copy_(0, at, values).view(n_rows, width)

    rope_as = torch.tensor([t.rope_as for t in trees])
    return PackedRows(
        input_ids=placed(torch.cat([t.ids for t in trees]).long(), 0),
        position_ids=placed(torch.cat([t.positions for t in trees]), 0),
        tree_ids=placed(torch.repeat_interleave(torch.arange(len(trees)), sizes), -1),
        branch_ids=placed(torch.cat([t.branches for t in trees]), 0),
        predict_at=torch.cat([predict_at for _, _, predict_at in ends]),
        last_at=torch.tensor([last for _, last, _ in ends], dtype=torch.int64),
        kind=layout.kind,
        rope_as=placed(torch.repeat_interleave(rope_as, sizes), 1) if layout.switch else None,
    )


@dataclass(frozen=True)
class _Tree:
    """One tree, or one sequence of the padded layout.

    numbers: of its completions in the batch. predict_at (of each completion) and last_at are relative to its start.
    rope_as: as in `PackedRows`.
    """

    ids: Tensor
    positions: Tensor
    branches: Tensor
    numbers: list[int]
    predict_at: list[Tensor]
    last_at: list[int]
    rope_as: int


def _trees(examples: Sequence[Example], layout: Layout) -> list[_Tree]:
    """Return a tree for each group of completions that share a copy of their prompt."""
    trees, before = list[_Tree](), 0
    for e in examples:
        trees += [_tree(e, group, before, layout) for group in layout.groups(e)]
        before += len(e.completions)
    return trees


def _tree(example: Example, group: Sequence[int], before: int, layout: Layout) -> _Tree:
    """Lay out a prompt and a group of its completions; before: completions of the batch before this example's."""
    n_prompt, some = len(example.prompt), [example.completions[k] for k in group]
    starts = [n_prompt]
    for c in some:
        starts.append(starts[-1] + len(c.tokens))
    spans = list(pairwise(starts))
    longest = n_prompt + max((b - a for a, b in spans), default=0)
    parts = torch.tensor([n_prompt, *(b - a for a, b in spans)])
    numbers = torch.arange(len(parts)) if layout.kind == "forest" else torch.zeros_like(parts)
    return _Tree(
        ids=torch.cat([example.prompt, *(c.tokens for c in some)]),
        positions=torch.cat([torch.arange(n_prompt), *(torch.arange(n_prompt, n_prompt + b - a) for a, b in spans)]),
        branches=torch.repeat_interleave(numbers, parts),
        numbers=[before + k for k in group],
        # the prompt's last position predicts the first token of every completion; each other token is predicted by the
        # one before it
        predict_at=[
            torch.where(c.trained_at == 0, n_prompt - 1, start + c.trained_at - 1)
            for c, start in zip(some, starts, strict=False)
        ],
        last_at=[end - 1 for _, end in spans],
        rope_as=layout.switch.same_as(longest) if layout.switch else 1,
    )


def _fit(lengths: list[int], layout: Layout) -> tuple[list[int], list[int], int]:
    """Choose the cheapest row width: (row of each tree, its start in the row, the width).

    A wide row has fewer gaps, but its attention under a dense mask costs more.
    """
    longest, total = max(lengths), sum(lengths)
    widest = max(layout.row_tokens, longest)
    most_rows = min(len(lengths), -(-total // longest))
    # the width of n even rows, with and without room for trees that do not divide evenly
    widths = {int(total / n * slack) for n in _counts(most_rows) for slack in (1.0, 1.04, 1.1)}
    tries = [_best_fit(lengths, width) for width in sorted({min(max(w, longest), widest) for w in widths})]

    def cost(packed: tuple[list[int], list[int], int]) -> float:
        row_of, _, width = packed
        return (max(row_of) + 1) * width * (1 + width * layout.attention_cost)

    return min(tries, key=cost)


def _counts(most: int) -> Iterator[int]:
    """Yield numbers of rows to try: every small one; larger ones, which differ little, in steps of a quarter."""
    n = 1
    while n <= most:
        yield n
        n = n + 1 if n < 12 else n * 5 // 4


def _best_fit(lengths: list[int], capacity: int) -> tuple[list[int], list[int], int]:
    """Best-fit decreasing into rows of `capacity`; the width is that of the fullest row."""
    rows: list[tuple[int, int]] = []  # of each row what is used, and its number below 0; sorted
    row_of, start_of = [0] * len(lengths), [0] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fullest = bisect_right(rows, (capacity - lengths[i], 0)) - 1  # of those with room; of equal ones the first
        used, number = rows.pop(fullest) if fullest >= 0 else (0, -len(rows))
        row_of[i], start_of[i] = -number, used
        insort(rows, (used + lengths[i], number))
    return row_of, start_of, rows[-1][0]


def tree_mask(rows: PackedRows, window: int | None = None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return mask(b, h, q, k): whether query q of row b sees key k, as FlexAttention takes it; indices broadcast.

    A token sees its prompt and its own completion up to itself; with `window`, only the last `window` positions.
    """

    def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same_tree = rows.tree_ids[b, q] == rows.tree_ids[b, k]
        branch = rows.branch_ids[b, k]
        seen = same_tree & ((branch == 0) | (branch == rows.branch_ids[b, q])) & (k <= q)
        if window is not None:
            seen = seen & (rows.position_ids[b, q] - rows.position_ids[b, k] < window)
        return seen

    return mask


def dense_mask(rows: PackedRows, window: int | None = None) -> Tensor:
    """Return the tree mask as bool [R, 1, T, T]. Padding sees earlier padding, so no row of the mask is empty."""
    n_rows, width = rows.input_ids.shape
    device = rows.input_ids.device
    b = torch.arange(n_rows, device=device)[:, None, None]
    q, k = torch.arange(width, device=device)[:, None], torch.arange(width, device=device)[None, :]
    return tree_mask(rows, window)(b, b, q[None], k[None]).unsqueeze(1)
