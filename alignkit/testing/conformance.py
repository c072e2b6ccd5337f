"""The whole suite as one class to inherit from."""

from __future__ import annotations

from alignkit.testing.contract import ContractChecks
from alignkit.testing.losses import LossChecks
from alignkit.testing.online import OnlineChecks
from alignkit.testing.runs import RunChecks


class Conformance(ContractChecks, LossChecks, OnlineChecks, RunChecks):
    """Everything the engine relies on, checked for `method` in each of `configs`; see `alignkit.testing`."""
