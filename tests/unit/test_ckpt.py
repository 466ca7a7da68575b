"""`hopcoll ckpt`: what it says of a store, of a broken one, and of something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result

import recovery
from hopcoll.cli import main
from hopcoll.errors import CheckpointCorruptError, CheckpointError, CheckpointFencedError
from recovery import repairs
from recovery.cli import ckpt


def ask(*words: Any) -> Result:
    return CliRunner().invoke(ckpt, [*map(str, words)], catch_exceptions=False)


def ask_json(*words: Any, code: int = 0) -> Any:
    said = ask(*words, "--json")
    assert said.exit_code == code, said.output
    return json.loads(said.stdout)


def state(step: int) -> dict[str, Any]:
    return {
        "weights": np.full((100, 30), step, np.float32),
        "frozen": np.arange(5000),
        "rate": 0.5 / step,
        "names": ["a", {"b": step}],
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Steps 1 to 4; then from 2 on again with 3 and 6. 3 and 4 of the first try are dead."""
    folder = tmp_path / "store"
    with recovery.CheckpointStore(folder, keep_last=3) as store:
        for step in range(1, 5):
            store.save_sync(step, state(step))
        store.restore(2)
        for step in (3, 6):
            store.save_sync(step, state(step * 10))
    return folder


def test_ls(path: Path) -> None:
    listed = ask_json("ls", path)
    assert listed["steps"] == [2, 3, 6]
    assert listed["newest"] == 6
    by_slot = {row["slot"]: row for row in listed["commits"]}
    fates = [(row["step"], row["fate"]) for _, row in sorted(by_slot.items())]
    assert fates == [
        (1, "pruned"),
        (2, "alive"),
        (3, "dead branch"),
        (4, "dead branch"),
        (3, "alive"),
        (6, "newest"),
    ]
    newest = listed["commits"][0]
    assert newest["step"] == 6
    assert by_slot[newest["parent"]]["step"] == 3
    assert newest["bytes"] == 100 * 30 * 4 + 5000 * 8
    assert newest["written_bytes"] < newest["bytes"] / 2  # frozen was not written again
    assert listed["disk_bytes"] == sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    text = ask("ls", path)
    assert text.exit_code == 0
    lines = text.stdout.splitlines()
    assert lines[0].split()[:3] == ["step", "slot", "parent"]
    assert lines[1].split()[0] == "6"
    assert lines[1].endswith("newest")
    assert sum("dead branch" in line for line in lines) == 2
    assert newest["incarnation"] in lines[-1]


def test_show(path: Path) -> None:
    shown = ask_json("show", path)
    assert [(one["name"], one["dtype"], one["shape"]) for one in shown["arrays"]] == [
        ("weights", "float32", [100, 30]),
        ("frozen", "int64", [5000]),
    ]
    assert [one["step"] for one in shown["chain"]] == [6, 3, 2, 1]
    assert [one["fate"] for one in shown["chain"]] == ["newest", "alive", "alive", "pruned"]
    assert shown["values"] == {"rate": 0.5 / 60, "names/0": "a", "names/1/b": 60}
    assert sorted(file["own"] for file in shown["shards"]) == [False, True]
    for array in shown["arrays"]:
        (piece,) = array["pieces"]
        assert (path / "shards" / piece["shard"]).is_file()
        assert all(len(hash) == 32 for hash in piece["xxh3_128"])
    assert ask_json("show", path, "--step", 3)["step"] == 3
    text = ask("show", path).stdout
    assert "100x30" in text
    assert "names/1/b = 60" in text
    assert "parents: 3 (alive) <- 2 (alive) <- 1 (pruned)" in text
    absent = ask("show", path, "--step", 4)
    assert absent.exit_code == 2
    assert f"{path} holds no step 4; there are 2, 3, 6" in absent.stderr


def test_verify_names_file_and_dataset(path: Path) -> None:
    said = ask("verify", path)
    assert (said.exit_code, said.stdout) == (0, "all is well\n")
    (piece,) = ask_json("show", path)["arrays"][0]["pieces"]
    shard = path / "shards" / piece["shard"]
    data = bytearray(shard.read_bytes())
    data[data.index(np.full(30, 60, np.float32).tobytes())] ^= 1
    shard.write_bytes(data)
    said = ask("verify", path)
    assert said.exit_code == 1
    assert f"{shard}, dataset weights" in said.stdout
    (problem,) = ask_json("verify", path, code=1)["problems"]
    assert (problem["file"], problem["dataset"]) == (str(shard), "weights")
    shard.unlink()
    (problem,) = ask_json("verify", path, code=1)["problems"]
    assert problem["file"] == str(shard)


def test_a_slot_that_cannot_be_read(path: Path) -> None:
    slot = ask_json("show", path, "--step", 3)["slot"]
    name = path / "slots" / f"{slot:010d}.json"
    name.write_bytes(name.read_bytes().replace(b"float", b"flaot").replace(b"<f4", b"<f8"))
    listed = ask_json("ls", path, code=1)
    assert list(listed["unreadable"]) == [str(slot)]
    said = ask("show", path, "--step", 3)
    assert said.exit_code == 1
    assert f"{name} is corrupt" in said.stderr
    assert ask_json("show", path)["step"] == 6


def test_diff_of_two_steps(path: Path) -> None:
    said = ask("diff", path)
    assert said.exit_code == 1
    assert said.stdout.splitlines() == [
        "weights: 3000 of 3000 elements differ, by 30 at the most",
        f"rate: {0.5 / 30} and {0.5 / 60}",
        "names/1/b: 30 and 60",
    ]
    found = ask_json("diff", path, "--steps", 2, 6, code=1)
    assert (found["a"]["step"], found["b"]["step"]) == (2, 6)
    assert found["differences"][0]["largest"] == 58
    assert ask_json("diff", path, "--steps", 3, 3)["differences"] == []


def test_diff_of_two_stores(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    changed = state(60)
    with recovery.CheckpointStore(other) as store:
        store.save_sync(9, changed)
    said = ask("diff", path, other)
    assert (said.exit_code, said.stdout) == (0, "no difference in 2 arrays\n")
    changed["weights"][3, 4] = np.nan
    changed["weights"][3, 5] = -0.5
    changed["frozen"] = changed["frozen"].reshape(50, 100)
    changed["more"] = np.zeros(2)
    del changed["rate"]
    with recovery.CheckpointStore(other) as store:
        store.save_sync(10, changed)
    said = ask("diff", path, other)
    assert said.exit_code == 1
    assert said.stdout.splitlines() == [
        "weights: 2 of 3000 elements differ, by 60.5 at the most (1 of them with a NaN)",
        "frozen: int64 (5000,) and int64 (50, 100)",
        "more: only in the second",
        "rate: only in the first",
    ]


@pytest.mark.parametrize("dtype", [np.int8, np.uint64, np.complex64, "S4", bool, "f4,i2"])
def test_diff_knows_every_kind_of_array(tmp_path: Path, dtype: Any) -> None:
    array = np.zeros(5, dtype)
    for name in ("a", "b"):
        if name == "b":
            array.view(np.uint8)[0] = 1
        with recovery.CheckpointStore(tmp_path / name) as store:
            store.save_sync(1, {"x": array, "same": np.float64(np.nan), "scalar": np.array(7)})
    (found,) = ask_json("diff", tmp_path / "a", tmp_path / "b", code=1)["differences"]
    assert (found["name"], found["count"], found["size"]) == ("x", 1, 5)


def test_diff_of_one_step_alone(tmp_path: Path) -> None:
    with recovery.CheckpointStore(tmp_path / "one") as store:
        store.save_sync(1, {})
    said = ask("diff", tmp_path / "one")
    assert said.exit_code == 2
    assert "holds one step; name another store" in said.stderr


def test_prune(path: Path) -> None:
    before = sorted(file.name for file in (path / "shards").iterdir())
    plan = ask_json("prune", path, "--keep-last", 1, "--keep-every", 2, "--dry-run")
    assert plan == {"path": str(path), "removed": [3], "kept": [2, 6], "dry_run": True}
    assert sorted(file.name for file in (path / "shards").iterdir()) == before
    said = ask("prune", path, "--keep-last", 1)
    assert (said.exit_code, said.stdout) == (0, "removed: 2, 3; kept: 6\n")
    assert len(list((path / "shards").iterdir())) < len(before)
    assert ask("verify", path).exit_code == 0
    with recovery.CheckpointStore(path, readonly=True) as store:
        assert store.steps() == [6]
        assert store.restore().state["rate"] == 0.5 / 60
    assert ask("prune", path).exit_code == 2  # what should stay has to be said


@pytest.mark.parametrize("command", ["ls", "show", "verify", "diff", "prune"])
def test_something_else(tmp_path: Path, command: str) -> None:
    more = ["--keep-last", "1"] if command == "prune" else []
    (tmp_path / "notes.txt").write_text("mine")
    said = ask(command, tmp_path, *more)
    assert said.exit_code == 2
    assert f"{tmp_path} holds no checkpoint store" in said.stderr
    said = ask(command, tmp_path / "nowhere", *more)
    assert said.exit_code == 2
    assert "nowhere" in said.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("command", ["ls", "show", "diff"])
def test_a_newer_version_or_another_format(path: Path, command: str) -> None:
    (path / "STORE.json").write_text("{}")
    said = ask(command, path)
    assert said.exit_code == 1
    assert "STORE.json is corrupt" in said.stderr


def test_a_store_without_a_commit(tmp_path: Path) -> None:
    recovery.CheckpointStore(tmp_path / "empty").close()
    assert ask_json("ls", tmp_path / "empty")["commits"] == []
    said = ask("show", tmp_path / "empty")
    assert said.exit_code == 2
    assert "holds no checkpoint" in said.stderr


def spoil_newest_slots(path: Path, count: int = 1) -> list[Path]:
    slots = sorted((path / "slots").iterdir())[-count:][::-1]
    for slot in slots:
        data = bytearray(slot.read_bytes())
        data[len(data) // 2] ^= 4
        slot.write_bytes(data)
    return slots


@pytest.mark.parametrize("count", [1, 2])
def test_repair(path: Path, count: int) -> None:
    """Steps 2, 3 and 6 were alive. What the last slots said is given up, the rest goes on."""
    owner = recovery.CheckpointStore(path, keep_last=3)
    owner.save_sync(7, state(70))
    owner.wait()
    slots = spoil_newest_slots(path, count)
    for readonly in (True, False):
        with pytest.raises(CheckpointCorruptError, match=f"{slots[0].name} is corrupt.*repair"):
            recovery.CheckpointStore(path, readonly=readonly)
    before = sorted(path.rglob("*"))
    said = ask("repair", path, "--dry-run")
    assert said.exit_code == 0
    assert [str(slot) in said.stdout for slot in slots] == [True] * count
    assert "steps: 3, 6" in said.stdout  # 2 went when 7 came
    assert sorted(path.rglob("*")) == before

    with pytest.raises(click.exceptions.Abort):
        CliRunner().invoke(ckpt, ["repair", str(path)], "n\n", standalone_mode=False,
                           catch_exceptions=False)  # fmt: skip
    assert sorted(path.rglob("*")) == before
    assert ask_json("repair", path, "--yes") == {
        "path": str(path),
        "corrupt": [str(slot) for slot in slots],
        "kept": [3, 6],
        "gone": [2],
        "dry_run": False,
    }
    with recovery.CheckpointStore(path, readonly=True) as store:
        step, found = store.restore()
        assert step == 6 and (found["weights"] == 60).all()
    assert ask("verify", path).exit_code == 0
    assert ask_json("ls", path)["steps"] == [3, 6]
    with pytest.raises(CheckpointFencedError):
        owner.save_sync(8, state(80))
    with recovery.CheckpointStore(path) as store:
        assert store.restore().step == 6
        store.save_sync(7, state(7))
        store.wait()
        assert store.steps() == [6, 7]
        assert not list(store.verify())
    assert not slots[0].exists()


def test_repair_keeps_what_is_whole(path: Path) -> None:
    """The slot before names a commit that the corrupt one let die, files and all."""
    with recovery.CheckpointStore(path, keep_last=1) as store:
        store.save_sync(7, state(70))
    assert ask_json("ls", path)["steps"] == [7]
    spoil_newest_slots(path)
    assert ask_json("repair", path, "--yes")["kept"] == []
    with recovery.CheckpointStore(path) as store:
        assert store.steps() == []
        store.save_sync(1, state(1))


def test_nothing_to_repair(path: Path, tmp_path: Path) -> None:
    before = sorted(path.rglob("*"))
    assert "nothing to repair" in ask("repair", path).stdout
    assert sorted(path.rglob("*")) == before
    assert ask("repair", tmp_path).exit_code == 2
    assert ask("repair", path, "--json").exit_code == 2
    spoil_newest_slots(path, 100)
    said = ask("repair", path, "--yes")
    assert said.exit_code == 1
    assert "no slot can be read" in said.stderr


def test_a_repair_beside_another(path: Path) -> None:
    """It was looked at before the other one filled the slot."""
    spoil_newest_slots(path)
    finding = repairs.examine(path)
    repairs.repair(path, repairs.examine(path))
    with pytest.raises(CheckpointError, match="was made meanwhile"):
        repairs.repair(path, finding)
    assert ask("verify", path).exit_code == 0


def test_the_command_is_found_by_its_entry_point() -> None:
    said = CliRunner().invoke(main, ["--help"])
    assert "ckpt" in said.stdout
    assert "Look into a checkpoint store" in said.stdout
