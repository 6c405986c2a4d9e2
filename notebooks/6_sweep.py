# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # A sweep on a GPU or a cluster
#
# Thousands of escapes in one call. Nothing in it depends on the machine: on a CPU each core takes one network after the other, on a GPU
# networks run in a batch with finished ones replaced, on a cluster blocks of networks go to workers. With a store it may be killed at
# any moment and goes on where it stopped.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import xarray as xr

import saddlejax as sj

jax.config.update("jax_enable_x64", True)
print(jax.devices())

# %% [markdown]
# ## The grid
# Small by default, so that it runs anywhere; set `SADDLEJAX_SEEDS=256` for a real one.

# %%
task = sj.tasks.digits()
few = sj.Task(task.x[:500], task.y[:500])
grid = {
    "width": 24,
    "depth": [3, 4],
    "activation": ["tanh", "relu"],
    "scale": [1e-1, 1e-2, 1e-3, 1e-4],
    "seed": range(int(os.environ.get("SADDLEJAX_SEEDS", 3))),
    "measure": {"margin": lambda flow: jnp.min(sj.low_rank_margin(flow.net))},
    "store": "digits.zarr",
}

# %% [markdown]
# ## On this machine
# On a GPU, `batch=` sets how many networks run together (by default as many as fit in half of its memory). Single precision is much faster there:
# `dtype="float32"`.

# %%
results = sj.sweep(few, **grid, on_progress=lambda done: print(f"{done.done} of {done.lanes}", end="\r"))
print(results)

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
for ax, activation in zip(axes, ["tanh", "relu"], strict=True):
    sj.plot.escape_times(results, ax, activation=activation)
plt.show()

# %% [markdown]
# ## On a cluster
# Any `concurrent.futures.Executor` will do. With Dask on SLURM, one worker a job (`pip install 'saddlejax[cluster]' dask-jobqueue`):
#
# ```python
# from dask.distributed import Client
# from dask_jobqueue import SLURMCluster
#
# cluster = SLURMCluster(cores=1, memory="4GB", walltime="12:00:00")
# cluster.scale(64)
# with Client(cluster) as client:
#     results = sj.sweep(few, **grid, executor=client.get_executor())
# ```
#
# For several GPUs in several processes, call `jax.distributed.initialize()` first and the same `sj.sweep` in each: every process computes its
# share of the blocks into the common store.
#
# ## From a file
# ```toml
# # digits.toml:  saddlejax sweep digits.toml
# [task]
# data = "digits"
# samples = 500
#
# [grid]
# width = 24
# depth = [3, 4]
# activation = ["tanh", "relu"]
# scale = { from = 1e-1, to = 1e-4, count = 4 }
# seed = { count = 256 }
# ```
#
# ## Looking in while it runs
# The store can be read at any time, from another process too.

# %%
so_far = xr.open_zarr("digits.zarr", consolidated=False)
print(so_far.status.to_series().value_counts())
