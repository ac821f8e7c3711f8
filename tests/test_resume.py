"""A run that is killed at any moment goes on from its last save as if nothing had happened."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import biofx

STEPS = 40
RUN = """
import json
import sys
from pathlib import Path

import torch
from torch import nn

import biofx

folder, steps = Path(sys.argv[1]), int(sys.argv[2])
checkpoint = folder / "run.pt"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm1d(4)
        self.hidden = nn.Linear(20, 12)
        self.again = nn.Linear(12, 12)
        self.out = nn.Linear(12, 3)

    def forward(self, x):
        y = torch.relu(self.norm(self.conv(x))).flatten(1)
        y = nn.functional.dropout(torch.relu(self.hidden(y)), 0.2, self.training)
        return self.out(torch.relu(self.again(torch.relu(self.again(y)))))


torch.set_num_threads(1)
torch.manual_seed(0)
config = biofx.BioConfig(
    weight_splitting_Gamma=2,
    apply_dales_principle=True,
    fuzzy_lr_distribution=biofx.Distribution.ACTIVITY,
    fuzzy_lr_dynamic=True,
).override("hidden", fuzzy_lr_distribution="temporal", fuzzy_lr_update_freq=3)
bio_model, _ = biofx.transform(Net(), config)
optimizer = torch.optim.AdamW(bio_model.parameters(), lr=1e-2)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
rules = ["crystallize", "volume_dependent_lr", "synaptic_scaling", biofx.Rule("rejuvenate_weights", every=4)]
plasticity = biofx.attach(bio_model, optimizer, rules)
first = 0
if checkpoint.exists():
    saved = biofx.checkpoints.Checkpoint.read(checkpoint)
    biofx.load(saved, bio_model, optimizer=optimizer, plasticity=plasticity)
    schedule.load_state_dict(saved.extra["schedule"])
    torch.set_rng_state(saved.extra["random"])
    first = saved.extra["step"]
with open(folder / "losses.jsonl", "a") as losses:
    for step in range(first, steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(bio_model(torch.randn(16, 2, 5)), torch.randint(3, (16,)))
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.write(json.dumps([step, loss.item().hex()]) + "\\n")
        losses.flush()
        if step % 3 == 2:
            extra = {"step": step + 1, "schedule": schedule.state_dict(), "random": torch.get_rng_state()}
            biofx.save(bio_model, checkpoint, optimizer=optimizer, plasticity=plasticity, extra=extra)
"""


def losses_in(folder: Path) -> list[tuple[int, str]]:
    """Number and loss of each step that was taken; a line is written at once or not at all."""
    path = folder / "losses.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [tuple(json.loads(line)) for line in text.splitlines()]


def test_the_loss_curve_of_a_killed_run_is_that_of_an_undisturbed_one(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(RUN, encoding="utf-8")
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    undisturbed.mkdir()
    killed.mkdir()
    command = [sys.executable, str(script)]
    reference = subprocess.Popen([*command, str(undisturbed), str(STEPS)])
    chance = random.Random(4)
    place = chance.randrange(5, 25)
    process = subprocess.Popen([*command, str(killed), str(STEPS)])
    while not (found := losses_in(killed)) or found[-1][0] < place:
        assert process.poll() is None
        time.sleep(0.002)
    time.sleep(chance.random() * 0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert place - 2 <= biofx.checkpoints.Checkpoint.read(killed / "run.pt").extra["step"] < STEPS
    subprocess.run([*command, str(killed), str(STEPS)], check=True)
    assert reference.wait() == 0
    expected = dict(losses_in(undisturbed))
    assert len(expected) == STEPS
    assert len(set(expected.values())) > STEPS // 2
    found = losses_in(killed)
    assert {step for step, _ in found} == set(range(STEPS))
    assert [(step, loss) for step, loss in found if loss != expected[step]] == []
    final, other = (biofx.checkpoints.Checkpoint.read(folder / "run.pt") for folder in (undisturbed, killed))
    assert final.model.keys() == other.model.keys()
    assert all((other.model[key] == value).all() for key, value in final.model.items())
