# %% [markdown]
"""# A transformer with plasticity

A small transformer reads a handwritten digit as a sequence of its eight rows. Its feed-forward synapses
begin with learning rates of their own; then, in all layers, weak synapses are replaced by new ones and
settled ones crystallize. All of it runs from the steps of AdamW, and the training loop does not change.
It takes less than a minute, as a notebook or as `python tools/tutorials/transformer_plasticity.py`, and
needs `pip install -e ".[demo]"`; nothing is downloaded.
"""

# %%
from pathlib import Path

import torch
from torch import Tensor, nn

import biofx
from biofx.diagnostics.layer_plot import plot_layers
from learning import accuracy, digits, learn, show

# %% tags=["parameters"]
EPOCHS = 15
IMAGES = 1400  # digits to learn from
FOLDER = Path("biofx-transformer")  # for what is recorded and drawn

# %%
torch.set_num_threads(1)  # for networks this small, threads wait for each other longer than they compute
FOLDER.mkdir(parents=True, exist_ok=True)
train, test = digits(IMAGES)

# %% [markdown]
"""## The model

An ordinary one, of modules from torch.
"""


# %%
class RowReader(nn.Module):
    """A transformer encoder over the rows of an image of shape ``(batch, 1, 8, 8)``; returns ten logits."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.place = nn.Parameter(torch.randn(8, width) * 0.1)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.readout = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        rows = self.embed(x.squeeze(1)) + self.place
        logits: Tensor = self.readout(self.encoder(rows).mean(1))
        return logits


torch.manual_seed(0)
model = RowReader()

# %% [markdown]
"""## Which layers?

Selectors go by name; one that matches nothing is an error that names the nearest. The later layer
explores more: of overrides, the last one that matches wins.
"""

# %%
feed_forward = ["encoder.layers.*.linear1", "encoder.layers.*.linear2"]
config = biofx.BioConfig(
    fuzzy_lr_distribution=biofx.Distribution.LOGNORMAL,
    fuzzy_learning_rate_factor_nu=0.4,
    rejuvenation_turnover=0.02,
    crystal_thresh=0.002,
)
config = config.override("encoder.layers.1.*", fuzzy_learning_rate_factor_nu=0.6)
bio_model, report = biofx.transform(model, config, only=feed_forward)
for remark in report.passes[0].remarks:
    if remark.kind == "applied":
        print(remark)

# %% [markdown]
"""Rates change learning, not the function. It is equal to the last bit:"""

# %%
print(f"equal: {torch.equal(bio_model.eval()(test[0]), model.eval()(test[0]))}")

# %% [markdown]
"""## When?

First explore, then settle. Rules run in every layer, chosen above or not. A monitor records what they
do. AdamW is indifferent to the scale of a gradient, so `attach` scales its updates instead.
"""

# %%
steps = EPOCHS * -(-len(train[1]) // 50)
schedule = [
    biofx.Rule("rejuvenate_weights", every=20, until=max(1, steps // 2)),
    biofx.Rule("crystallize", every=5, after=steps // 2),
]
(FOLDER / "run.jsonl").unlink(missing_ok=True)  # of an earlier run; a monitor never writes over one
monitor = biofx.Monitor(path=FOLDER / "run.jsonl", every=5)
optimizer = torch.optim.AdamW(bio_model.parameters(), lr=0.003)
plasticity = biofx.attach(bio_model, optimizer, schedule, observers=[monitor])
print(f"factors act on the {plasticity.modes['encoder.layers.0.linear1.weight']} of each weight")

# %% [markdown]
"""## The loop is yours

`with monitor.live():` around it would show a table that follows the run.
"""

# %%
print(f"before: {accuracy(bio_model, test):.2f}% of the test digits")
learn(bio_model, optimizer, train, EPOCHS)
print(f"after: {accuracy(bio_model, test):.2f}%, {plasticity.steps} steps")
plasticity.detach()

# %% [markdown]
"""## What happened?

The monitor knows; so does `biofx plot run.jsonl` on the file that it wrote.
"""

# %%
for path in monitor.records[-1].layers:
    layers = [record.layers[path] for record in monitor.records]
    replaced, last = sum(layer.replaced for layer in layers), layers[-1]
    print(f"{path}: {replaced} replaced, factors {last.factor_mean:.2f} ± {last.factor_std:.2f}")

# %%
monitor.plot().savefig(FOLDER / "run.png", dpi=60)
show(FOLDER / "run.png")

# %% [markdown]
"""The same with a row for each layer, `biofx plot run.jsonl --layers`, goes into a file."""

# %%
plot_layers(monitor.records, FOLDER / "layers.png")
sorted(path.name for path in FOLDER.iterdir())

# %% [markdown]
"""An audit: rates within their bounds, nothing lost. It raises, naming layers, if not."""

# %%
print(biofx.check(bio_model).raise_if_broken().summary())
