"""What the kernels' tests share: the device, the forced Triton path, and memory that starts as NaN."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where there is a GPU, tests of the compiled kernels are among `-m gpu` too; elsewhere they are interpreted."""
    if torch.cuda.is_available():
        for item in items:
            if "triton_path" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> torch.device:
    """A GPU where there is one; elsewhere the CPU, on which Triton kernels run in the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def triton_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Force the Triton kernels."""
    pytest.importorskip("triton")
    monkeypatch.setenv("ALIGNKIT_KERNELS", "triton")


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Let every freshly allocated tensor hold NaN (integers: the largest), so that a place never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # a GPU would refuse operations that have no other way
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
