# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Your own network and data
#
# How long will *your* network stay on its plateau? Predict it, choose the scale of the weights, and check with the optimiser that you
# use. Replace the next cell by your own arrays.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_wine

import saddlejax as sj

jax.config.update("jax_enable_x64", True)

# %% [markdown]
# ## Data
# `x` of shape `(samples, in_size)`, and labels or targets. Centre and scale the inputs: times are measured in units that they set.

# %%
data = load_wine()
x = (data.data - data.data.mean(axis=0)) / data.data.std(axis=0)
task = sj.Task(x / np.sqrt(x.shape[1]), data.target, loss=sj.cross_entropy)
print(task)

# %% [markdown]
# ## Your activation
# Any elementwise JAX function. The class tells which law holds.


# %%
def activation(z):
    return jnp.arcsinh(z)


print(sj.classify_activation(activation))

# %% [markdown]
# ## The plateau, predicted
# Four layers at 0.02 of the usual initialisation, trained by gradient descent at learning rate 0.5.

# %%
net = sj.MLP([13, 24, 24, 24, 3], activation, key=jax.random.key(0))
small = sj.scale_layers(net, 0.02)
print(sj.predict_escape(small, task, learning_rate=0.5))

# %% [markdown]
# ## Choose the scale
# We can afford a plateau of 2000 steps. How much larger must the weights be? Or: how many layers may stay at this scale?

# %%
factor = sj.scale_for_steps(small, task, steps=2000, learning_rate=0.5)
layers = sj.bottleneck_for_steps(net, task, 0.02, steps=2000, learning_rate=0.5)
print(f"scale {0.02 * factor:.4f} in all layers, or {layers} layers at scale 0.02")

# %% [markdown]
# ## Check
# Gradient flow without the assumptions of the prediction, and plain gradient descent. Both return the same record.

# %%
chosen = sj.scale_layers(small, factor)
flow = sj.gradient_flow(chosen, task)
rate = 0.5
descent = sj.gradient_descent(chosen, task, optax.sgd(rate), steps=4000)
step = int(descent.stats["escape_step"])
print(f"predicted 2000 steps, gradient flow {float(flow.escape_time) / rate:.0f}, gradient descent {step}")
assert abs(step / 2000 - 1) < 0.05

# %% [markdown]
# ## Other optimisers
# Momentum 0.9 moves nearly ten times as fast along the plateau. Adam rescales the gradient and hardly waits: its steps cover the more
# flow time the smaller the gradient is, most of the plateau in the first few. Its outcome is that there was no plateau.

# %%
momentum = sj.gradient_descent(chosen, task, optax.sgd(rate, momentum=0.9), steps=1000)
adam = sj.gradient_descent(chosen, task, optax.adam(1e-3), steps=1000)
for name, run in (("momentum", momentum), ("Adam", adam)):
    print(f"{name}: steepest after {int(run.stats['peak_step'])} steps; {sj.Status[run.status]}")

# %%
ax = sj.plot.quiet()
runs = (("gradient descent", descent), ("momentum 0.9", momentum), ("Adam", adam))
for number, (name, run) in enumerate(runs):
    ax.plot(
        run.steps[1:], run.losses[1:], color=sj.plot.COLOURS[number], linestyle=("-", "--", "-.")[number], label=name
    )
ax.axvline(2000, color="0.45", linewidth=1, linestyle=(0, (4, 3)))
ax.annotate(
    "predicted", (1950, 0.85), xycoords=("data", "axes fraction"), ha="right", va="top", rotation=90, color="0.35"
)
ax.set(xscale="log", xlabel="step", ylabel=r"loss $\mathcal{L}$")
ax.legend(frameon=False, loc="lower left")
plt.show()
