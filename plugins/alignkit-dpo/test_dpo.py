from alignkit.testing import *
from alignkit_dpo import DPO


class TestDPO(Conformance):
    method = DPO
    configs = ({},)

    def expected(self, c, row):
        return -log_sigmoid(c.beta * (row.chosen.h - row.rejected.h))
