# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # From saddle to saddle
#
# After the first escape the flow visits further saddles. For deep linear networks the plateaus are known exactly (Saxe, McClelland &
# Ganguli, [arXiv:1312.6120](https://arxiv.org/abs/1312.6120); Jacot et al., [arXiv:2106.15933](https://arxiv.org/abs/2106.15933)):
# modes are learned one at a time, and the loss after `k` of them is `½ Σ_{j>k} S_j²`.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np

import saddlejax as sj

jax.config.update("jax_enable_x64", True)

# %% [markdown]
# ## A staircase
# Four layers at `ε = 1e-3`, a teacher of singular values 4, 2, 1, ½. `stiff=True` takes the exponential integrator, whose work does not
# follow the length of the plateaus.

# %%
strengths = np.asarray([4.0, 2.0, 1.0, 0.5])
task = sj.tasks.linear_teacher(strengths, in_size=10)
net = sj.scale_layers(sj.MLP([10, 10, 10, 10, 4], "identity", key=jax.random.key(0)), 1e-3)
flow = sj.gradient_flow(net, task, sj.Loss(1e-2), stiff=True, save=sj.Save(weights=True))
print(flow)

# %%
axes = sj.plot.staircase(flow)
plt.show()

# %% [markdown]
# ## Saddles, certified
# From the slowest point of each plateau, the nearest zero of the gradient is sought. The table says how far away it is, what is left of the
# gradient, and the extreme eigenvalues of the Hessian. The largest is the curvature along the strongest mode, `L S_1^{2(L−1)/L} = 32`. The lowest
# is nearly zero: in a linear network of more than two layers these saddles are degenerate, flat to second order in the directions of the modes
# not yet learned, which is why the plateaus are long.

# %%
plateaus = flow.plateaus(polish=True)
print(plateaus)

# %%
exact = [0.5 * np.sum(strengths[k:] ** 2) for k in range(4)]
for plateau, value in zip(plateaus, exact, strict=True):
    print(f"loss at the saddle {float(plateau.saddle.loss):.9f}, exactly {value}")
assert np.allclose([float(p.saddle.loss) for p in plateaus], exact, atol=1e-6)
assert np.allclose([float(p.saddle.highest_eigenvalue) for p in list(plateaus)[1:]], 32, rtol=1e-3)
assert [p.bottleneck_rank for p in plateaus] == [(k, k) for k in range(4)]

# %% [markdown]
# ## How long each plateau lasts
# Mode `j` leaves the origin at speed `S_j`, all of them from the same small weights: while it is small its product of four layers grows by
# `dy/dt = S_j y³`, so that it should appear at a time `∝ 1/S_j`. That assumes modes that do not know of each other, and a start aligned with
# them.

# %%
ends = np.exp([p.log_end for p in plateaus])
print("ends of the plateaus, relative to the first ", np.round(ends / ends[0], 3))
print("S_1/S_j                                      ", np.round(strengths[0] / strengths, 3))

# %% [markdown]
# The first two agree to a per cent. The weaker modes come later than the simple picture says, 4.7 and 15.8 times instead of 4 and 8: it leaves out
# that modes share the layers, and that the initial weights are not aligned with the modes.
#
# ## tanh on digits
# The same on 100 digits, three layers of width 10. No exact values here; the plateaus are found from the flow alone. A second flow at another tolerance
# says how far the ends of the plateaus can be trusted.

# %%
digits = sj.tasks.digits()
few = sj.Task(digits.x[:100], digits.y[:100])
net = sj.scale_layers(sj.MLP([64, 10, 10, 10], "tanh", key=jax.random.key(0)), 1e-3)
until = sj.Loss(0.15)
flow = sj.gradient_flow(net, few, until, stiff=True)
other = sj.gradient_flow(net, few, until, stiff=True, rtol=3e-2)
found = flow.plateaus(check=other)
print(found)

# %%
axes = sj.plot.staircase(flow)
plt.show()

# %% [markdown]
# The rank of the layers rises here too, by up to two modes from one plateau to the next. It is counted where the gradient is smallest, and
# a mode that is about to be learned may count already: two plateaus in a row have rank four. (The interval for the
# bottleneck rank begins at zero because the weights were not kept; `save=sj.Save(weights=True)` gives the lower end as well.)
#
# **Where this agrees with the papers.** For linear networks, exactly: the losses of the saddles to 1e-6, one rank a step. That the bottleneck
# rank rises from saddle to saddle in *ReLU* networks is a conjecture (Bantzis, Simon & Jacot,
# [arXiv:2505.21722](https://arxiv.org/abs/2505.21722)) which this notebook does not decide: kinks make late plateaus of ReLU networks known
# to some per cent only.
