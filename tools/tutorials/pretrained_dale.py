# %% [markdown]
"""# A pretrained network under Dale's principle

A network that has learned without signs cannot simply be given some: half of its weights would be wrong.
The method "expand" splits each unit into an excitatory and an inhibitory copy, so that the network
computes what it did and obeys Dale's principle from then on. Here a small residual network learns
handwritten digits, is expanded, learns on, is audited, drawn and deployed. Nothing is downloaded; it
takes less than a minute, as a notebook or as `python tools/tutorials/pretrained_dale.py`, and needs `pip
install -e ".[demo]"`.
"""

# %%
from pathlib import Path

import torch
from matplotlib.figure import Figure

import biofx
from biofx.demo import DigitNet
from learning import accuracy, digits, learn, show

# %% tags=["parameters"]
EPOCHS = 8
IMAGES = 1400  # digits to learn from
FOLDER = Path("biofx-dale")  # for what is drawn and saved

# %%
torch.set_num_threads(1)  # for networks this small, threads wait for each other longer than they compute
FOLDER.mkdir(parents=True, exist_ok=True)
train, test = digits(IMAGES)

# %% [markdown]
"""## A network that someone has trained

Yours comes from torchvision, timm, or a checkpoint.
"""

# %%
torch.manual_seed(0)
model = DigitNet()
learn(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), train, EPOCHS)
print(f"pretrained: {accuracy(model, test):.2f}% of the test digits")

# %% [markdown]
"""## Signs

`dales_method="expand"` keeps the function; learning rates stay equal, to look at one thing at a time.
"""

# %%
config = biofx.BioConfig(
    apply_dales_principle=True,
    dales_method="expand",
    fuzzy_lr_distribution=biofx.Distribution.BASELINE,
)
bio_model, report = biofx.transform(model, config)
print(f"with signs: {accuracy(bio_model, test):.2f}%")

# %% [markdown]
"""The copies have a price: more parameters."""

# %%
for name, network in (("before", model), ("after", bio_model)):
    print(f"{name}: {sum(parameter.numel() for parameter in network.parameters())} parameters")

# %% [markdown]
"""What happened to which layer, and what was left alone and why, is in the report, a remark for each."""

# %%
for remark in report.passes[0].remarks:
    print(remark)

# %% [markdown]
"""The same as a page with both graphs side by side, and as a picture of the graph: `report.html` and
`graph.svg`.
"""

# %%
report.to_html(FOLDER / "report.html")
report.to_svg(FOLDER / "graph.svg")
sorted(path.name for path in FOLDER.iterdir())

# %% [markdown]
"""## Learn on

The loop is the one from above. `attach` writes signs back after every step, whatever the optimizer did.
"""

# %%
optimizer = torch.optim.SGD(bio_model.parameters(), lr=0.01, momentum=0.9)
plasticity = biofx.attach(bio_model, optimizer)
learn(bio_model, optimizer, train, max(1, EPOCHS // 2))
print(f"after fine-tuning: {accuracy(bio_model, test):.2f}%, {plasticity.steps} steps")
plasticity.detach()

# %% [markdown]
"""## An audit

Of the effective weights: every unit has one sign. It raises, naming layers, if not.
"""

# %%
print(biofx.check(bio_model).raise_if_broken().summary())

# %% [markdown]
"""## Deploy

A plain PyTorch model for those who do not have biofx. In its weights each column, the outgoing synapses
of a unit, has one color: red excites, blue inhibits.
"""

# %%
deployed = biofx.deploy(bio_model)
torch.save(deployed, FOLDER / "deployed.pt")
print(f"deployed: {accuracy(deployed, test):.2f}%")

# %%
layers = {name: layer for name, layer in deployed.named_modules() if isinstance(layer, torch.nn.Conv2d)}
name, layer = list(layers.items())[-1]
weight = layer.weight.detach().sum((2, 3))
figure = Figure(figsize=(5, 3), layout="constrained")
largest = float(weight.abs().max())
axes = figure.subplots()
axes.imshow(weight, cmap="RdBu_r", vmin=-largest, vmax=largest)
axes.set(xlabel="from unit", ylabel="to unit", title=f"kernels of {name}, summed")
figure.savefig(FOLDER / "weights.png", dpi=80)
show(FOLDER / "weights.png")
