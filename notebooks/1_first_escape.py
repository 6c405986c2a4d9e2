# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # A first escape, in ten cells
#
# A deep network that starts from tiny weights sits on a plateau for a long time and then learns suddenly. Here is one
# such escape, how long it takes, why, and how we know that the number is right.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import saddlejax as sj

jax.config.update("jax_enable_x64", True)

# %% [markdown]
# ## 1. A problem and a network
# Handwritten digits, and four layers whose weights are He-normal times `ε = 1e-4`.

# %%
task = sj.tasks.digits()
net = sj.MLP([64, 24, 24, 24, 10], activation="tanh", key=jax.random.key(0))
small = sj.scale_layers(net, 1e-4)
print(task, small, sep="\n")

# %% [markdown]
# ## 2. The flow, to its escape
# The escape is the steepest point of the first descent. Times are in steps × learning rate: at learning rate 0.1,
# gradient descent would take 3 · 10⁹ steps.

# %%
flow = sj.gradient_flow(small, task)
print(flow)

# %% [markdown]
# ## 3. What happened
# In time `t` nothing happens, then everything. In the steps of the integrator, whose clock follows the growth of the layers, the same escape
# is a steady growth of all layers by a factor of about 1000.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
for ax in (left, right):
    sj.plot.quiet(ax)
left.plot(flow.times / flow.escape_time, flow.losses, color=sj.plot.COLOURS[0], marker=".", linewidth=1.6)
left.set(xlabel="time $t/\\tau$", ylabel=r"loss $\mathcal{L}$")
for layer, norms in enumerate(np.asarray(flow.layer_norms).T):
    style = {"color": sj.plot.COLOURS[layer], "marker": sj.plot.MARKERS[layer], "markersize": 4}
    right.semilogy(flow.steps, norms, label=f"layer {layer + 1}", **style)
right.set(xlabel="step of the integrator", ylabel=r"norm $\|W_l\|_F$")
right.legend(frameon=False)
plt.show()

# %% [markdown]
# ## 4. How the time depends on the scale
# Ten times smaller weights take a hundred times longer, and hardly more work.

# %%
scales = np.asarray([1e-2, 1e-3, 1e-4, 1e-5])
flows = [sj.gradient_flow(sj.scale_layers(net, scale), task) for scale in scales]
for scale, one in zip(scales, flows, strict=True):
    work = int(one.stats["gradient_evaluations"])
    print(f"ε = {scale:.0e}: τ = {float(one.escape_time):.4g}, {work} gradients")

# %% [markdown]
# ## 5. The exponent, from one run
# The law says `τ ∝ ε^{−(r−2)}` for `r` small layers: here `r = 4`. Derivatives go through the escape, so the local exponent
# is one number a network.

# %%
exponent = sj.critical_exponent(small, task)
print(f"−d log τ / d log ε = {float(exponent):.6f}")
assert abs(exponent - 2) < 1e-3

# %% [markdown]
# ## 6. The same without training
# Near the origin only the leading order of the loss counts; following that is a problem without samples.

# %%
prediction = sj.predict_escape(small, task, learning_rate=0.1)
print(prediction)
print(f"predicted / computed = {float(prediction.time / flow.escape_time):.6f}")

# %% [markdown]
# ## 7. Is it right?
# For tanh the imbalance `‖W_{l+1}‖² − ‖W_l‖²` changes at a rate that an exact identity gives. What it violates along the
# flow is numerical error. A tighter tolerance must give the same time.

# %%
tight = sj.gradient_flow(small, task, rtol=1e-7)
change = float(tight.log_escape_time - flow.log_escape_time)
print(f"imbalance error {float(flow.imbalance_error):.1e}, at rtol 1e-7 {float(tight.imbalance_error):.1e}")
print(f"change of log τ: {change:.1e}")
assert abs(change) < 1e-3

# %% [markdown]
# ## 8. Where the network went
# One direction outgrows the others: at the escape every layer is close to rank one. The singular values of the first layer:

# %%
ax = sj.plot.quiet()
values = np.asarray(flow.singular_values[0])
ax.semilogy(flow.steps, values[:, 1:], color="0.7", linewidth=0.8)
ax.semilogy(flow.steps, values[:, 0], color=sj.plot.COLOURS[0], marker="o", markersize=4, label="largest")
ax.plot([], [], color="0.7", label="the other 23")
ax.set(xlabel="step of the integrator", ylabel="singular values of layer 1")
ax.legend(frameon=False)
plt.show()
print("second over first, by layer:", [f"{float(v[-1, 1] / v[-1, 0]):.0e}" for v in flow.singular_values])

# %% [markdown]
# ## 9. Who escapes how fast
# The prefactor is set by the speed of the fastest direction: the top singular value of `M = E[y xᵀ]` times `α^{L−1}`.

# %%
best = sj.escape_direction(task, [64, 24, 24, 24, 10], "tanh", key=jax.random.key(1))
print(f"speed {float(best.speed):.5f}; top singular value of M {jnp.linalg.norm(sj.saddle.origin_matrix(task), 2):.5f}")

# %% [markdown]
# ## 10. And at a scale of your choice
# How large must the weights be for the plateau to last 10,000 steps at learning rate 0.1?

# %%
factor = sj.scale_for_steps(small, task, steps=10_000, learning_rate=0.1)
chosen = sj.scale_layers(small, factor)
steps = sj.gradient_flow(chosen, task).escape_time / 0.1
print(f"weights {factor:.1f} times as large: {float(steps):.0f} steps")
assert 9_000 < steps < 11_000
