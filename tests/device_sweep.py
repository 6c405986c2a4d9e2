"""A small sweep in a process of its own: `device_sweep.py OUT BATCH [STORE PORT PROCESS]`.

Prints the devices that its blocks ran on. With a port it is one of two processes of `jax.distributed`.
"""

import sys

import jax

import saddlejax as sj
from saddlejax.sweeps import execute

jax.config.update("jax_enable_x64", True)


def main(out, batch, store=None, port=None, process=None):
    if port is not None:
        jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(process))
    from problems import HALF, teacher  # computes

    used, compute = [], execute._compute

    def noted(problem, block):
        used.append(str(jax.config.jax_default_device))
        return compute(problem, block)

    execute._compute = noted
    grid = {"width": 4, "depth": [2, 3], "activation": "tanh", "scale": [3e-1, 1e-2], "seed": range(3), "until": HALF}
    results = sj.sweep(teacher(samples=20), **grid, batch=int(batch) or None, block=3, store=store)
    results.to_netcdf(out, engine="scipy") if out != "-" else None
    print(f"{len(used)} blocks on {len(set(used))} devices")


if __name__ == "__main__":
    main(*sys.argv[1:])
