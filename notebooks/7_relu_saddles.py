# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # From saddle to saddle with ReLU
#
# Bantzis, Simon & Jacot ([arXiv:2505.21722](https://arxiv.org/abs/2505.21722)) show that a deep ReLU network leaves the origin along a direction of
# rank one, and conjecture that it goes on from saddle to saddle, with a *bottleneck rank* that rises by one each time. Past the first escape most samples come to
# kinks of some units and stay there. This notebook follows one network along these kinks and looks at the rank on every plateau.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import saddlejax as sj

jax.config.update("jax_enable_x64", True)

digits = sj.tasks.digits()
x, y = digits.x[:100], digits.y[:100]
task = sj.Task(x - np.mean(x, axis=0), y - np.mean(y, axis=0))
net = sj.scale_layers(sj.MLP([task.in_size, 10, 10, task.out_size], "relu", key=jax.random.key(0)), 1e-2)

# %% [markdown]
# ## The flow
# Down to two thirds of the initial loss. Where hundreds of units come near their kinks in a step, a tolerance of 1e-2 is fine enough; the first plateau is followed
# at a finer one all the same.

# %%
start = float(task.mean_loss(jnp.zeros(task.y.shape)))
flow = sj.gradient_flow(net, task, sj.Loss(0.68 * start), rtol=1e-2, save=sj.Save(weights=True))
print(flow)

# %% [markdown]
# ## The plateaus
# The bottleneck rank is known up to an interval: it is at least the largest rank of a Jacobian `Jf(x)` over the samples, and at most the smallest rank of a layer. Singular values
# count above a tenth of the largest. Where the bounds agree the rank is known.

# %%
plateaus = flow.plateaus()
print(plateaus)

# %%
after = np.exp(flow.log_times) - plateaus[0].end
late = after > 1
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
left.semilogx(after[late], flow.losses[late], color="0.2")
for k, plateau in enumerate(plateaus[1:], 1):
    low, high = plateau.bottleneck_rank
    rank = f"{low}" if low == high else f"{low} to {high}"
    left.annotate(
        f"plateau {k}: rank {rank}",
        (np.exp(plateau.log_time) - plateaus[0].end, plateau.loss),
        xytext=(-4, -12),
        textcoords="offset points",
        ha="right",
        fontsize=8,
    )
left.set(xlabel="time after the first escape", ylabel="loss")
right.semilogx(after[late], flow.sliding[late], color="0.2", lw=0.9)
right.set(xlabel="time after the first escape", ylabel="units that slide, of all samples")
plt.show()

# %% [markdown]
# ## Is that the rule?
# Not for every network: at larger scales plateaus merge, and a flow may also rest at a point that is stationary in Clarke's sense before it has learned everything. The table over depths, scales and
# seeds is on the [page of benchmarks](../benchmarks.md#saddles-of-relu-networks), with what has not been reached.
