"""A transformer with plasticity: ``python tools/tutorials/transformer_plasticity.py``.

A small transformer reads a handwritten digit as a sequence of its eight rows. Its feed-forward synapses begin
with learning rates of their own; then, in all layers, weak synapses are replaced by new ones and settled ones
crystallize. All of it runs from the steps of AdamW, and the training loop does not change. It takes less than
a minute; nothing is downloaded.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import biofx
from biofx.diagnostics.layer_plot import plot_layers
from learning import accuracy, digits, learn


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


def main(folder: Path, epochs: int) -> None:
    """Run the tutorial; leave run.jsonl, run.png and layers.png in the folder."""
    train, test = digits()
    torch.manual_seed(0)
    model = RowReader()

    # 1. Which layers? Selectors go by name; one that matches nothing is an error that names the nearest.
    feed_forward = ["encoder.layers.*.linear1", "encoder.layers.*.linear2"]
    config = biofx.BioConfig(
        fuzzy_lr_distribution=biofx.Distribution.LOGNORMAL,
        fuzzy_learning_rate_factor_nu=0.4,
        rejuvenation_turnover=0.02,
        crystal_thresh=0.002,
    )
    # The later layer explores more: the last override that matches wins.
    config = config.override("encoder.layers.1.*", fuzzy_learning_rate_factor_nu=0.6)
    bio_model, report = biofx.transform(model, config, only=feed_forward)
    for remark in report.passes[0].remarks:
        print(f"  {remark}")
    same = torch.equal(bio_model.eval()(test[0]), model.eval()(test[0]))
    print(f"rates change learning, not the function; equal to the last bit: {same}")

    # 2. When? Rules run in every layer, chosen above or not. AdamW is indifferent to the scale of a gradient,
    # so `attach` scales its updates instead.
    (folder / "run.jsonl").unlink(missing_ok=True)  # of an earlier run; a monitor never writes over one
    monitor = biofx.Monitor(path=folder / "run.jsonl", every=5)
    optimizer = torch.optim.AdamW(bio_model.parameters(), lr=0.003)
    steps = epochs * -(-len(train[1]) // 50)
    schedule = [
        biofx.Rule("rejuvenate_weights", every=20, until=max(1, steps // 2)),  # first explore,
        biofx.Rule("crystallize", every=5, after=steps // 2),  # then settle
    ]
    plasticity = biofx.attach(bio_model, optimizer, schedule, observers=[monitor])
    print(f"factors act on the {plasticity.modes['encoder.layers.0.linear1.weight']} of each weight")

    # 3. The loop is yours.
    print(f"before: {accuracy(bio_model, test):.2f}% of the test digits")
    with monitor.live():
        learn(bio_model, optimizer, train, epochs)
    print(f"after:  {accuracy(bio_model, test):.2f}%, {plasticity.steps} steps")
    plasticity.detach()

    # 4. What happened? The monitor knows; so does `biofx plot run.jsonl` on the file it wrote.
    for path in monitor.records[-1].layers:
        layers = [record.layers[path] for record in monitor.records]
        replaced, last = sum(layer.replaced for layer in layers), layers[-1]
        print(f"  {path}: {replaced} replaced, factors {last.factor_mean:.2f} ± {last.factor_std:.2f}")
    monitor.plot(folder / "run.png")
    plot_layers(monitor.records, folder / "layers.png")

    # 5. An audit: rates within their bounds, nothing lost. It raises, naming layers, if not.
    print(biofx.check(bio_model).raise_if_broken().summary())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("biofx-transformer"), help="folder for what it records"
    )
    parser.add_argument("--epochs", type=int, default=15)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # for networks this small, threads wait for each other longer than they compute
    main(options.out, options.epochs)
