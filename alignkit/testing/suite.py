"""Turns a plugin's test class into tests: each check runs for each configuration, and declared failures must fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import pytest
import torch

from alignkit.method import DataKind, Method, Role
from alignkit.testing.bench import Bench
from alignkit.testing.byhand import ScoredRow
from alignkit.testing.world import tiny_examples
from alignkit.types import Example

F = TypeVar("F", bound=Callable[..., Any])


def only_for(*data: DataKind, role: Role | None = None) -> Callable[[F], F]:
    """Mark a check that applies to methods of these kinds of data, and to configurations that use this role."""

    def mark(check: F) -> F:
        check.only_for = data, role  # type: ignore[attr-defined]
        return check

    return mark


def applies(check: Any, method: type[Method[Any]]) -> bool:
    """Return whether a check applies to methods that read this method's kind of data."""
    data, _ = getattr(check, "only_for", (None, None))
    return data is None or method.data in data


_NOT_COLLECTED = object()  # in place of a check that does not apply: pytest ignores it, where a skip would be reported


class Suite:
    """The part that the author of a plugin defines.

    method: the class under test. configs: settings; every check runs for each.
    expected_failures: {"test_name" or "test_name[configuration]": reason}; one that passes is an error.
    """

    method: ClassVar[type[Method[Any]]]
    configs: ClassVar[Sequence[Mapping[str, Any]]] = ({},)
    expected_failures: ClassVar[Mapping[str, str]] = {}

    def expected(self, config: Any, row: ScoredRow) -> float:
        """Return the loss of one row, derived by hand with plain `math` and without the plugin's code."""
        raise NotImplementedError("define expected(self, config, row), or expected_step, in the test class")

    def expected_step(self, config: Any, rows: Sequence[ScoredRow], bench: Bench) -> float:
        """Return the loss of a step over these rows. Default: the mean of `expected`.

        Override it if the loss is not a mean over examples. bench.score(examples) scores other rows in the same way.
        """
        return sum(self.expected(config, row) for row in rows) / len(rows)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        tests = [name for name in dir(cls) if name.startswith("test_")]
        known = {*tests, *(f"{t}[{config_id(c)}]" for t in tests for c in cls.configs)}
        if unknown := sorted(set(cls.expected_failures) - known):
            raise TypeError(f"{cls.__name__}: expected_failures has unknown checks {unknown}; checks: {tests}")
        for name in tests if hasattr(cls, "method") else ():
            found = [vars(c)[name] for c in cls.__mro__ if name in vars(c)]
            check = next(f for f in found if f is not _NOT_COLLECTED)  # a parent's method may read other data
            setattr(cls, name, check if applies(check, cls.method) else _NOT_COLLECTED)

    @pytest.fixture(autouse=True)
    def _one_thread(self) -> Iterator[None]:
        with one_thread():
            yield

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run a check with the argument `config` once for each configuration (pytest calls this)."""
        if "config" not in metafunc.fixturenames:
            return
        _, role = getattr(metafunc.function, "only_for", (None, None))
        marked = [
            pytest.param(dict(c), id=config_id(c), marks=self._marks(metafunc.function.__name__, config_id(c)))
            for c in self.configs
            if applies(metafunc.function, self.method) and (role is None or role in self.made(c).roles())
        ]
        metafunc.parametrize("config", marked)

    def _marks(self, test: str, config: str) -> list[pytest.MarkDecorator]:
        for name in (test, f"{test}[{config}]"):
            if name in self.expected_failures:
                return [pytest.mark.xfail(reason=self.expected_failures[name], strict=True)]
        return []

    def made(self, config: Mapping[str, Any]) -> Method[Any]:
        """Return the method with these settings."""
        return self.method(self.method.Config(**config))

    def examples(self) -> list[Example]:
        """Return the examples of a step; override it if the method needs special ones."""
        return tiny_examples(self.method.data, columns=self.method.columns)


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit torch to one thread: with tensors this small, more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def config_id(config: Mapping[str, Any]) -> str:
    """Return the name of a configuration in test reports: "default", or "key=value,key=value"."""
    return ",".join(f"{k}={v}" for k, v in config.items()) or "default"
