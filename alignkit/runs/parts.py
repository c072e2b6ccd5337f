"""Sharded tensors in a checkpoint: each rank writes its own parts, and any number of ranks reads them.

torch.distributed.checkpoint in safetensors files, shard-RANK-....safetensors, whose headers say where a part belongs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from alignkit.errors import CheckpointError, first_line

LARGEST = 2**30  # bytes of a file
LEAST = 8  # files of a rank
Groups = Mapping[str, Mapping[str, Tensor]]
Like = Callable[[str, torch.Size], Tensor | None]
"""A tensor's name and shape -> the tensor that it is for, by which it is sharded; None for a whole one."""


def any_sharded(groups: Groups) -> bool:
    """Return whether one of the tensors is sharded."""
    return any(isinstance(t, DTensor) for named in groups.values() for t in named.values())


def n_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of whole tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def write_parts(folder: Path, groups: Groups, ranks: int) -> None:
    """Write this rank's parts, and what is whole once; every rank must call it. Raises on all where one cannot."""
    flat = {f"{group}/{name}": t.detach() for group, named in groups.items() for name, t in named.items()}
    writer = HuggingFaceStorageWriter(str(folder), file_of(flat, ranks), save_distributed=True)
    with _plain_errors():
        state_dict_saver.save(flat, storage_writer=writer)


def file_of(tensors: Mapping[str, Tensor], ranks: int) -> dict[str, int]:
    """Return the number, from 1, of the file for a rank's part of each tensor.

    torch writes a file from two copies of it in memory: so a rank's parts are spread over several of up to 1 GiB.
    """
    share = n_bytes(tensors.values()) / ranks
    size = min(LARGEST, share / LEAST) or 1.0
    found, filled = dict[str, int](), 0.0
    for name, t in tensors.items():
        found[name] = int(filled / size) + 1
        filled += n_bytes([t]) / ranks
    return found


def read_parts(folder: Path, group: str, like: Like) -> dict[str, Tensor]:
    """Return the tensors of a group, each sharded as the one that `like` returns; no rank waits for another."""
    with _plain_errors():
        reader = HuggingFaceStorageReader(str(folder))
        known = {
            name.removeprefix(f"{group}/"): about
            for name, about in reader.read_metadata().state_dict_metadata.items()
            if name.startswith(f"{group}/") and isinstance(about, TensorStorageMetadata)
        }
        made = {name: _empty(about, like(name, about.size)) for name, about in known.items()}
        state_dict_loader.load(
            {f"{group}/{name}": t for name, t in made.items()},
            storage_reader=HuggingFaceStorageReader(str(folder)),
            no_dist=True,
        )
    return made


def _empty(about: TensorStorageMetadata, like: Tensor | None) -> Tensor:
    dtype = about.properties.dtype
    if not isinstance(like, DTensor) or like.shape != about.size:
        return torch.empty(about.size, dtype=dtype)
    return torch.empty_like(like, dtype=dtype)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Inside, torch's collected errors, which are no Exceptions, become the first of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that no process group is used, as was asked for
        try:
            yield
        except CheckpointException as error:
            rank, (first, _) = next(iter(error.failures.items()))
            if isinstance(first, OSError):
                raise OSError(first.errno, f"{first.strerror or first} (rank {rank})") from error
            raise CheckpointError(f"rank {rank}: {first_line(first)}") from error  # type: ignore[arg-type]
