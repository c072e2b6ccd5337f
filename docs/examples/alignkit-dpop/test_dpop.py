from alignkit_dpop import DPOP

from alignkit.testing import *


class TestDPOP(Conformance):
    method = DPOP
    configs = ({}, {"lambda_": 0.0}, {"beta": 0.1, "lambda_": 5.0})

    def expected(self, c, row):
        """2402.13228, eq. 3."""
        penalty = max(0.0, -row.chosen.h)
        return -log_sigmoid(c.beta * (row.chosen.h - row.rejected.h - c.lambda_ * penalty))
