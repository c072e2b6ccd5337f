"""The conformance kit: one import and one class check everything about a method that the engine relies on.

    from alignkit.testing import *
    from alignkit_mine import Mine

    class TestMine(Conformance):
        method = Mine
        configs = ({}, {"beta": 0.5})       # the whole suite runs for each

        def expected(self, config, row):    # the loss of one row, by hand, from float64 log-probabilities
            return -math.log(sigmoid(config.beta * (row.chosen.h - row.rejected.h)))

`SamplerConformance` does the same for a sampler of rollouts (`alignkit.testing.samplers`).

Needs pytest (`pip install alignkit[testing]`), but no files, network or GPU.
"""

import pytest

# before these modules are imported, so that their plain asserts show the compared values
for _module in ("bench", "contract", "losses", "runs", "samplers", "suite"):
    pytest.register_assert_rewrite(f"alignkit.testing.{_module}")

from alignkit.testing.bench import Bench, Cut, Measured  # noqa: E402
from alignkit.testing.byhand import Answer, ScoredRow, log_sigmoid, sigmoid  # noqa: E402
from alignkit.testing.conformance import Conformance  # noqa: E402
from alignkit.testing.models import ScriptedModels  # noqa: E402
from alignkit.testing.runs import train  # noqa: E402
from alignkit.testing.samplers import SamplerConformance  # noqa: E402
from alignkit.testing.world import tiny_examples, tiny_model, tiny_rows, tiny_tokenizer  # noqa: E402

__all__ = [
    "Answer", "Bench", "Conformance", "Cut", "Measured", "SamplerConformance", "ScoredRow", "ScriptedModels",
    "log_sigmoid", "sigmoid", "tiny_examples", "tiny_model", "tiny_rows", "tiny_tokenizer", "train",
]  # fmt: skip
