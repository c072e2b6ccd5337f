"""The whole suite as one base class."""

from __future__ import annotations

from alignkit.testing.contract import ContractChecks
from alignkit.testing.losses import LossChecks
from alignkit.testing.online import OnlineChecks
from alignkit.testing.runs import RunChecks


class Conformance(ContractChecks, LossChecks, OnlineChecks, RunChecks):
    """Checks everything the engine relies on, for `method` with each of `configs`; see `alignkit.testing`."""
