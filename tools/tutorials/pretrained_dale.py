"""A pretrained network under Dale's principle: ``python tools/tutorials/pretrained_dale.py``.

A network that has learned without signs cannot simply be given some: half of its weights would be wrong. The
method "expand" splits each unit into an excitatory and an inhibitory copy, so that the network computes what
it did and obeys Dale's principle from then on. Here a small residual network learns handwritten digits, is
expanded, learns on, is audited, drawn and deployed. Nothing is downloaded; it takes less than a minute.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import biofx
from biofx.demo import DigitNet
from learning import accuracy, digits, learn


def main(folder: Path, epochs: int) -> None:
    """Run the tutorial; leave report.html, graph.svg and deployed.pt in the folder."""
    train, test = digits()

    # 1. A network that someone has trained. Yours comes from torchvision, timm, or a checkpoint.
    torch.manual_seed(0)
    model = DigitNet()
    learn(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), train, epochs)
    print(f"pretrained:        {accuracy(model, test):.2f}% of the test digits")

    # 2. Signs. `dales_method="expand"` keeps the function; rates stay equal, to look at one thing at a time.
    config = biofx.BioConfig(
        apply_dales_principle=True,
        dales_method="expand",
        fuzzy_lr_distribution=biofx.Distribution.BASELINE,
    )
    bio_model, report = biofx.transform(model, config)
    print(f"with signs:        {accuracy(bio_model, test):.2f}%")
    sizes = [sum(parameter.numel() for parameter in net.parameters()) for net in (model, bio_model)]
    print(f"parameters:        {sizes[0]}, then {sizes[1]}: the price of the copies")

    # 3. What happened to which layer, and what was left alone and why.
    for remark in report.passes[0].remarks:
        print(f"  {remark}")
    report.to_html(folder / "report.html")
    report.to_svg(folder / "graph.svg")

    # 4. Learn on. `attach` writes signs back after every step, whatever the optimizer did.
    optimizer = torch.optim.SGD(bio_model.parameters(), lr=0.01, momentum=0.9)
    plasticity = biofx.attach(bio_model, optimizer)
    learn(bio_model, optimizer, train, max(1, epochs // 2))
    print(f"after fine-tuning: {accuracy(bio_model, test):.2f}%, {plasticity.steps} steps")
    plasticity.detach()

    # 5. An audit of the effective weights: every unit has one sign. It raises, naming layers, if not.
    audit = biofx.check(bio_model).raise_if_broken()
    print(f"audit:             {audit.summary()}")

    # 6. A plain PyTorch model for those who do not have biofx.
    deployed = biofx.deploy(bio_model)
    torch.save(deployed, folder / "deployed.pt")
    print(f"deployed:          {accuracy(deployed, test):.2f}%")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("biofx-dale"), help="folder for what it draws")
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # for networks this small, threads wait for each other longer than they compute
    main(options.out, options.epochs)
