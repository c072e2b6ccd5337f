from alignkit.testing import *
from alignkit_dpop import DPOP


class TestDPOP(Conformance):
    method = DPOP
    configs = ({}, {"lambda_": 0.0}, {"beta": 0.1, "lambda_": 5.0})

    def expected(self, c, row):
        """2402.13228: DPO with a penalty while the chosen answer is below its reference."""
        penalty = max(0.0, -row.chosen.h)
        return -log_sigmoid(c.beta * (row.chosen.h - row.rejected.h - c.lambda_ * penalty))
