"""A sweep whose lanes cost nothing but time, to test what surrounds them: store, restarts, executors.

As a program: `toy_sweep.py STORE LOG` runs it into a store and appends the lanes it computes to a log.
"""

import sys
import time
from dataclasses import dataclass

import numpy as np

from saddlejax.sweeps.execute import execute
from saddlejax.sweeps.grid import Axis, Grid
from saddlejax.sweeps.measures import Variable
from saddlejax.sweeps.problem import AbstractProblem, Output, each_lane
from saddlejax.sweeps.store import ZarrStore

BLOCK = (1, 2)


@dataclass
class ToyProblem(AbstractProblem):
    """`value = 10 a + b`, and `powers = value^(1, 2, 3)`; the lane with `value == failing` raises."""

    rows: int = 4
    columns: int = 5
    seconds: float = 0.0
    failing: int = -1
    log: str = ""
    factor: float = 10.0

    @property
    def grid(self):
        axes = (("a", self.rows, False), ("b", self.columns, True))
        return Grid(tuple(Axis(name, tuple(range(n)), tuple(range(n)), together, name) for name, n, together in axes))

    @property
    def outputs(self):
        return {
            "value": Output((), "float64", Variable(float, "value")),
            "powers": Output((3,), "float64", Variable(float, "powers", dims=("power",))),
        }

    def run(self, points):
        def lane(point):
            time.sleep(self.seconds)
            value = self.factor * point["a"] + point["b"]
            if value == self.failing:
                raise ArithmeticError("this lane fails")
            if self.log:
                with open(self.log, "a") as file:
                    file.write(f"{value:g}\n")
            return {"value": value, "powers": value ** np.arange(1, 4), "status": "escaped"}

        return each_lane(lane, points, self.outputs)

    def specification(self):
        return {"grid": {axis.name: list(axis.labels) for axis in self.grid.axes}, "factor": self.factor}

    def attributes(self):
        return {"quantity": "toy"}


def run(problem, path, executor=None, retries=2, on_progress=lambda progress: None):
    """The results of a toy sweep in a store."""
    store = ZarrStore(path, problem, BLOCK)
    execute(problem, store, executor, retries, on_progress)
    return store.dataset()


if __name__ == "__main__":
    run(ToyProblem(rows=6, columns=8, seconds=0.02, log=sys.argv[2]), sys.argv[1])
