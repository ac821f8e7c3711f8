"""Folders that are written again, by processes that are killed at every moment."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

import biofx
from biofx.checkpoints.tensor_folder import TensorFolder, write_tensors
from biofx.errors import CheckpointError

KILLED = """
import json, os, signal, sys
from pathlib import Path
import torch
import torch.distributed as dist
import biofx
from torch import nn

folder, ranks = Path(sys.argv[1]), int(sys.argv[2])
runs = 0


def net(seed):
    torch.manual_seed(seed)
    return biofx.transform(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))).graph_module


MODELS = [net(0), net(1)]
values = [{key: value.tolist() for key, value in model.state_dict().items()} for model in MODELS]
held = net(2)


def what_loads():
    extra = biofx.checkpoints.load_sharded(folder / "kept", held)
    number = extra["number"]
    assert {key: value.tolist() for key, value in held.state_dict().items()} == values[number]
    return number


def names():
    return sorted(path.name for path in (folder / "kept").iterdir())


def save(number, rank, die):
    # in a child; a rank of a run, if there are several
    if ranks > 1:
        store = dist.FileStore(str(folder / f"store{runs}"), ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    die()
    try:
        biofx.checkpoints.save_sharded(MODELS[number], folder / "kept", extra={"number": number})
    except biofx.errors.CheckpointError:
        os._exit(7)
    os._exit(0)


def children(number, die):
    global runs
    runs += 1
    made = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
            save(number, rank, lambda: die(rank))
        made.append(child)
    return made


def dying_before(operation, victim):
    # every call of Python that touches the file system is announced before it is made
    kinds = ("open", "os.", "shutil.", "fcntl.")
    left = operation

    def hook(event, args):
        nonlocal left
        ours = event != "open" or str(folder) in str(args[0])
        if event.startswith(kinds) and event != "os.kill" and ours:
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    return lambda rank: sys.addaudithook(hook) if rank == victim else None


found, counts = [], []
for child in children(0, lambda rank: None):
    os.waitpid(child, 0)
clean = len(names())
for victim in range(ranks):
    operation = 0
    while True:
        old = what_loads()
        new = 1 - old
        ends = [os.waitpid(child, 0)[1] for child in children(new, dying_before(operation, victim))]
        now = what_loads()
        assert now in (old, new)
        if not any(ends):
            assert now == new
            break
        assert any(os.WIFSIGNALED(end) and os.WTERMSIG(end) == signal.SIGKILL for end in ends), ends
        found.append(now == new)
        if operation % 5 == 0:  # the next save removes what the killed one has left
            for child in children(old, lambda rank: None):
                assert os.waitpid(child, 0)[1] == 0
            assert what_loads() == old
            assert len(names()) == clean, names()
        operation += 1
    counts.append(operation)
    assert len(names()) == clean, names()
print(json.dumps({"counts": counts, "new": sum(found), "old": len(found) - sum(found), "files": names()}))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_save_that_is_killed_before_any_of_its_operations_leaves_the_old_or_the_new(
    ranks: int, tmp_path: Path
) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(ranks)], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["old"] > 10
    assert told["new"] > 0
    assert min(told["counts"]) >= 1
    assert len(told["files"]) == 1 + ranks


class Chain(nn.Sequential):
    pass


def made(seed: int) -> biofx.BioGraphModule:
    torch.manual_seed(seed)
    return biofx.transform(Chain(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))).graph_module


def values(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


OTHERS = [
    "notes.txt",
    "__0_0.distcp",
    "__7_0.distcp",
    "__0_123.distcp",
    ".metadata.tmp",
    "__0_0123abcd_0.bak",
]


def test_what_others_have_put_into_the_folder_stays(tmp_path: Path) -> None:
    for name in OTHERS:
        (tmp_path / name).write_text(name, encoding="utf-8")
    (tmp_path / "__0_0123abcd_0").mkdir()
    first, second = made(0), made(1)
    for model in (first, second, first):
        biofx.checkpoints.save_sharded(model, tmp_path)
    for name in OTHERS:
        assert (tmp_path / name).read_text(encoding="utf-8") == name
    own = set(names(tmp_path)) - {*OTHERS, "__0_0123abcd_0"}
    assert len(own) == 2
    assert ".metadata" in own
    biofx.checkpoints.load_sharded(tmp_path, second)
    assert equal(values(first), values(second))


def test_a_checkpoint_of_somebody_else_loses_its_index_alone(tmp_path: Path) -> None:
    tensors = {"w": torch.ones(3)}
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        save(tensors, checkpoint_id=str(tmp_path))
    before = (tmp_path / "__0_0.distcp").read_bytes()
    biofx.checkpoints.save_sharded(made(0), tmp_path)
    assert (tmp_path / "__0_0.distcp").read_bytes() == before
    biofx.checkpoints.load_sharded(tmp_path, made(1))


def test_the_folder_stays_one_that_torch_reads(tmp_path: Path) -> None:
    model = made(0)
    biofx.checkpoints.save_sharded(model, tmp_path)
    read = {"/model/0.weight": torch.zeros(6, 4)}
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        load(read, storage_reader=FileSystemReader(tmp_path))
    assert torch.equal(read["/model/0.weight"], model.get_parameter("0.weight"))


def test_what_was_left_by_a_save_that_is_gone_is_removed_and_what_goes_on_is_not(tmp_path: Path) -> None:
    from biofx.whole_file import create_locked

    biofx.checkpoints.save_sharded(made(0), tmp_path)
    dead, file = create_locked(tmp_path, "biofx-save")
    file.close()
    alive, held = create_locked(tmp_path, "biofx-save")
    (tmp_path / f"__0_{dead.name.split('.')[2]}_0.distcp").write_bytes(b"half")
    (tmp_path / "__3_0123abcd_0.distcp").write_bytes(b"whose claim is gone")
    going_on = tmp_path / f"__0_{alive.name.split('.')[2]}_0.distcp"
    going_on.write_bytes(b"half")
    biofx.checkpoints.save_sharded(made(1), tmp_path)
    assert len(names(tmp_path)) == 4
    assert alive.exists()
    assert going_on.exists()
    held.close()
    biofx.checkpoints.save_sharded(made(1), tmp_path)
    assert len(names(tmp_path)) == 2


def test_the_files_of_an_older_version_go_once_they_are_replaced(tmp_path: Path) -> None:
    biofx.checkpoints.save_sharded(made(0), tmp_path)
    (data,) = tmp_path.glob("*.distcp")
    index = (tmp_path / ".metadata").read_bytes()
    older = b"__0_0.distcp"
    # as torch names it: the name's length stands before it, in one byte
    name = data.name.encode()
    index = index.replace(bytes([len(name)]) + name, bytes([len(older)]) + older)
    index = index.replace(b"\x80\x04\x95" + index[3:11], b"\x80\x04")  # the length of the frame
    (tmp_path / ".metadata").write_bytes(index)
    data.rename(tmp_path / older.decode())
    target = made(3)
    biofx.checkpoints.load_sharded(tmp_path, target)
    assert equal(values(target), values(made(0)))
    biofx.checkpoints.save_sharded(made(1), tmp_path)
    assert older.decode() not in names(tmp_path)
    assert len(names(tmp_path)) == 2


def test_a_symlink_to_a_folder_is_followed_and_one_that_leads_to_nothing_yet(tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(tmp_path / "run" / "7")
    (tmp_path / "run").mkdir()
    for seed in range(2):
        biofx.checkpoints.save_sharded(made(seed), tmp_path / "latest")
        assert (tmp_path / "latest").is_symlink()
        assert len(names(tmp_path / "run" / "7")) == 2
        target = made(5)
        biofx.checkpoints.load_sharded(tmp_path / "latest", target)
        assert equal(values(target), values(made(seed)))


def full_disk(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("place", ["os.replace", "os.fsync", "os.mkdir", "torch.save", "pickle.dump"])
def test_a_save_that_fails_leaves_the_old_one_and_nothing_else(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "kept"
    if place != "os.mkdir":
        biofx.checkpoints.save_sharded(made(0), folder)
    before = names(tmp_path)
    inside = names(folder) if folder.exists() else []
    with monkeypatch.context() as patched:
        patched.setattr(place, full_disk)
        with pytest.raises(CheckpointError, match="No space left on device"):
            biofx.checkpoints.save_sharded(made(1), folder)
    assert names(tmp_path) == before
    if inside:
        assert names(folder) == inside
        target = made(5)
        biofx.checkpoints.load_sharded(folder, target)
        assert equal(values(target), values(made(0)))


def test_what_is_no_folder_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"text")
    wrong: list[Any] = [tmp_path / "file", tmp_path / "file" / "below", "\0", 3]
    for folder in wrong:
        with pytest.raises(CheckpointError, match="expected a folder to write to"):
            biofx.checkpoints.save_sharded(made(0), folder)
        with pytest.raises(
            CheckpointError, match=r"expected a folder that biofx\.checkpoints\.save_sharded wrote"
        ):
            biofx.checkpoints.load_sharded(folder, made(0))


def test_a_load_sees_one_checkpoint_whatever_is_saved_meanwhile(tmp_path: Path) -> None:
    tensors: list[dict[str, Tensor]] = [{"biofx": torch.full((4,), number)} for number in (1.0, 2.0)]
    write_tensors(tensors[0], tmp_path, "biofx")
    opened = TensorFolder(tmp_path)
    write_tensors(tensors[1], tmp_path, "biofx")
    with pytest.raises(CheckpointError, match="No such file"):  # not the other's numbers
        opened.read({"biofx": torch.zeros(4)})
    found = {"biofx": torch.zeros(4)}
    TensorFolder(tmp_path).read(found)
    assert torch.equal(found["biofx"], tensors[1]["biofx"])


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_no_bit_that_is_turned_over_changes_what_loads(tmp_path: Path) -> None:
    model, target = made(0), made(1)
    checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        biofx.checkpoints.save_sharded(model, tmp_path)
    finally:
        torch.serialization.set_crc32_options(checksums)
    (data,) = tmp_path.glob("*.distcp")
    whole, generator, found = data.read_bytes(), torch.Generator().manual_seed(0), 0
    for _ in range(60):
        place, bit = (int(torch.randint(high, (), generator=generator)) for high in (len(whole), 8))
        data.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :])
        before = values(target)
        try:
            biofx.checkpoints.load_sharded(tmp_path, target)
        except CheckpointError:
            found += 1
            assert equal(values(target), before)
        else:  # a bit that nothing reads, such as padding
            assert equal(values(target), values(model))
            target = made(1)
    assert found > 10


def test_keys_that_are_numbers_come_back_as_numbers(tmp_path: Path) -> None:
    extra = {"seen": {3: [1, (2, "b")], "3": None}, "nested": {"a": {0: torch.arange(3)}}, "empty": {}}
    biofx.checkpoints.save_sharded(made(0), tmp_path, extra=extra)
    found = biofx.checkpoints.load_sharded(tmp_path, made(1))
    assert torch.equal(found["nested"]["a"].pop(0), torch.arange(3))
    assert found == {"seen": extra["seen"], "nested": {"a": {}}, "empty": {}}


class Numbered(torch.optim.SGD):
    """Remembers things by numbers."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] = {0: torch.zeros_like(parameter), 1: {2: 4.5}}


def test_what_an_optimizer_remembers_by_numbers_comes_back(tmp_path: Path) -> None:
    model, target = made(0), made(1)
    optimizer, own = (Numbered(each.parameters(), lr=0.1) for each in (model, target))
    optimizer.step()
    biofx.checkpoints.save_sharded(model, tmp_path, optimizer=optimizer)
    biofx.checkpoints.load_sharded(tmp_path, target, optimizer=own)
    assert [set(entry) for entry in own.state.values()] == [{0, 1}] * 4
    assert all(entry[1] == {2: 4.5} for entry in own.state.values())


class Refusing(torch.optim.SGD):
    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        for parameter in self.state:
            self.state[parameter]["momentum_buffer"].zero_()
        raise KeyError("not this state")


def test_a_load_that_fails_at_its_end_changes_nothing(tmp_path: Path) -> None:
    def stepped(seed: int, kind: Callable[..., Any]) -> tuple[Any, Any]:
        model = made(seed)
        optimizer = kind(model.parameters(), lr=0.1 + seed, momentum=0.9)
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        return model, optimizer

    model, optimizer = stepped(0, Refusing)
    biofx.checkpoints.save_sharded(model, tmp_path, optimizer=optimizer)
    target, own = stepped(1, Refusing)
    before, remembered = values(target), [value["momentum_buffer"].clone() for value in own.state.values()]
    with pytest.raises(CheckpointError, match="Refusing that raises: KeyError: 'not this state'"):
        biofx.checkpoints.load_sharded(tmp_path, target, optimizer=own)
    assert equal(before, values(target))
    assert own.param_groups[0]["lr"] == 1.1
    for value, entry in zip(remembered, own.state.values(), strict=True):
        assert torch.equal(value, entry["momentum_buffer"])


def test_random_kills_of_a_process_that_saves_all_the_time(tmp_path: Path) -> None:
    code = (
        "import sys, biofx, torch\nfrom torch import nn\n"
        "class Chain(nn.Sequential): pass\n"
        "def made(seed):\n    torch.manual_seed(seed)\n"
        "    return biofx.transform(Chain(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))).graph_module\n"
        "models = made(0), made(1)\n"
        "while True:\n    for model in models:\n"
        "        biofx.checkpoints.save_sharded(model, sys.argv[1]); print(flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        running.stdout.readline()
        generator = torch.Generator().manual_seed(0)
        for _ in range(10):  # it is not killed yet, but stopped at some moment, as if it had been
            for _ in range(int(torch.randint(1, 4, (), generator=generator))):
                running.stdout.readline()
            running.send_signal(signal.SIGSTOP)
            target = made(5)
            biofx.checkpoints.load_sharded(tmp_path, target)
            assert any(equal(values(target), values(made(seed))) for seed in (0, 1))
            running.send_signal(signal.SIGCONT)
        running.kill()
    target = made(5)
    biofx.checkpoints.load_sharded(tmp_path, target)
    biofx.checkpoints.save_sharded(target, tmp_path)
    assert len(names(tmp_path)) == 2
