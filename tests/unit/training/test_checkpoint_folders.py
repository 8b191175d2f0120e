"""Checkpoint folders: whose a checkpoint is, which is newest, what is pruned, set aside and brought back."""

import json
import os
import re
from pathlib import Path

import pytest

from sana_kit.errors import CheckpointError, UserError
from sana_kit.training import checkpoint_folders as folders

FORMAT_1 = {
    "global_step": 20,
    "samples_seen": 80,
    "epoch": 1.0,
    "seed": 5,
    "run": {"pretrained_model_name_or_path": "model", "train_mode": "lora", "rank": 4, "pictures": 6},
    "format": 1,
    "optimizer": {"class": "AdamW", "state": {"step": 20.0}, "groups": [{"lr": 0.1, "d": 0.5, "eps": 1e-8}]},
}


def make(output: Path, step: int, sequence: int = 0, run_id: str = "run", name: str | None = None, **more) -> Path:
    """A small whole checkpoint."""
    folder = output / (name or f"checkpoint-{step}")
    folder.mkdir(parents=True)
    state = {"format": 2, "global_step": step, "sequence": sequence, "run_id": run_id, "run": {}, **more}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    (folder / "optimizer.safetensors").write_bytes(b"tensors %d" % step)
    folders.write_manifest(folder)
    return folder


def names(output: Path) -> list[str]:
    return sorted(path.name for path in output.iterdir())


def test_the_order_is_that_of_writing_not_of_the_numbers(tmp_path):
    make(tmp_path, 20, 1)
    make(tmp_path, 30, 2)
    make(tmp_path, 5, 3)
    assert [step for step, _ in folders.list_checkpoints(tmp_path)] == [20, 30, 5]
    assert folders.find_checkpoint(tmp_path, "latest")[0].name == "checkpoint-5"


def test_checkpoints_of_format_1_are_older_than_all_others_and_ordered_by_step(tmp_path):
    for step in (8, 16):
        make(tmp_path, step, **{**FORMAT_1, "global_step": step})
    make(tmp_path, 3, 1)
    assert [step for step, _ in folders.list_checkpoints(tmp_path)] == [8, 16, 3]


def test_pruning_leaves_other_runs_and_the_newest_alone(tmp_path):
    for step, sequence, run in ((20, 1, "old"), (30, 2, "old"), (5, 3, "new"), (10, 4, "new"), (12, 5, "new")):
        make(tmp_path, step, sequence, run)
    newest = tmp_path / "checkpoint-12"
    assert folders.prune_checkpoints(tmp_path, 2, "new", newest) == ["checkpoint-5"]
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-12", "checkpoint-20", "checkpoint-30"]
    assert folders.prune_checkpoints(tmp_path, 1, "new", newest) == ["checkpoint-10"]
    assert folders.prune_checkpoints(tmp_path, None, "new", newest) == []


def test_a_removal_that_fails_ends_nothing(tmp_path, monkeypatch):
    """Network file systems keep files that are open: the folder stays, hidden, until the next start."""
    for step in (1, 2, 3):
        make(tmp_path, step, step)

    def refuse(path, *args, **kwargs):
        raise OSError(39, "Directory not empty")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", refuse)
        assert folders.prune_checkpoints(tmp_path, 1, "run", tmp_path / "checkpoint-3") == [
            "checkpoint-1",
            "checkpoint-2",
        ]
    assert [step for step, _ in folders.list_checkpoints(tmp_path)] == [3]
    assert folders.recover(tmp_path) == [] and names(tmp_path) == ["checkpoint-3"]


@pytest.mark.parametrize(
    "resume, overwrite, refused",
    [(None, False, True), (None, True, False), ("latest", False, False), ("checkpoint-20", False, False)],
)
def test_a_fresh_start_among_checkpoints_is_refused_with_three_ways_out(tmp_path, resume, overwrite, refused):
    make(tmp_path, 20, 1)
    problems = folders.folder_problems(tmp_path, resume, overwrite)
    assert bool(problems) == refused
    for way in ("resume_from_checkpoint=latest", "another output_dir", "overwrite_output_dir"):
        assert not refused or way in str(problems[0])
    assert folders.folder_problems(tmp_path / "empty", None, False) == []


@pytest.mark.parametrize("result", folders.RESULTS)
def test_results_without_a_checkpoint_are_not_written_over(tmp_path, result):
    """A finished run whose checkpoints were removed to save room: its LoRA would be lost."""
    (tmp_path / "train_log.jsonl").write_text("")  # left by a run that was stopped early: no reason to refuse
    assert folders.folder_problems(tmp_path, None, False) == []
    (tmp_path / result).mkdir()
    (problem,) = folders.folder_problems(tmp_path, None, False)
    assert result in str(problem) and "no checkpoint to go on from" in str(problem)
    assert "Choose another output_dir" in str(problem)
    assert folders.folder_problems(tmp_path, None, True) == []
    assert folders.folder_problems(tmp_path, "latest", False) == []


def test_a_checkpoint_from_elsewhere_does_not_open_a_used_folder(tmp_path):
    make(tmp_path / "one", 20, 1)
    other = make(tmp_path / "two", 4, 1)
    assert "lies elsewhere" in str(folders.folder_problems(tmp_path / "one", str(other), False)[0])
    assert folders.folder_problems(tmp_path / "new", str(other), False) == []
    assert folders.folder_problems(tmp_path / "two", str(other), False) == []


def test_resume_and_overwrite_exclude_each_other(tmp_path):
    assert "Give one of them" in str(folders.folder_problems(tmp_path, "latest", True)[0])


def test_overwriting_sets_the_old_run_aside_and_keeps_encodings_and_foreign_files(tmp_path):
    make(tmp_path, 20, 1, "0123456789abcdef")
    for name in ("train_log.jsonl", "summary.json", "report.html", "pytorch_lora_weights.safetensors", "notes.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "encodings").mkdir()
    aside = folders.set_run_aside(tmp_path)
    assert names(tmp_path) == sorted(["encodings", "notes.txt", aside.name])
    assert aside.name.startswith("previous-") and aside.name.endswith("-01234567")
    assert folders.find_damage(aside / "checkpoint-20") is None and (aside / "summary.json").read_text()
    assert folders.set_run_aside(tmp_path) is None
    make(tmp_path, 20, 1, "0123456789abcdef")
    assert folders.set_run_aside(tmp_path) != aside  # a second one of the same day overwrites nothing


def test_a_run_without_a_checkpoint_is_set_aside_by_its_time(tmp_path):
    (tmp_path / "summary.json").touch()
    aside = folders.set_run_aside(tmp_path)
    assert re.fullmatch(r"previous-\d{4}-\d\d-\d\d-\d{6}", aside.name)


def test_going_back_sets_later_checkpoints_aside(tmp_path):
    for step, sequence in ((20, 1), (24, 2), (28, 3), (30, 4)):
        make(tmp_path, step, sequence)
    aside = folders.set_later_aside(tmp_path, tmp_path / "checkpoint-20")
    assert names(aside) == ["checkpoint-24", "checkpoint-28", "checkpoint-30"]
    assert [step for step, _ in folders.list_checkpoints(tmp_path)] == [20]
    assert folders.set_later_aside(tmp_path, tmp_path / "checkpoint-20") is None


def _kill_at(monkeypatch, number: int) -> None:
    """Let the `number`-th rename from now on be the last thing that happens."""
    calls, rename = [], os.replace

    def counted(source, target):
        calls.append(1)
        if len(calls) > number:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "replace", counted)


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_step_saved_again_can_be_found_at_every_moment(tmp_path, monkeypatch, renames):
    """Killed before the first rename, between the two, or before the old one was removed."""
    final = make(tmp_path, 8, 1)
    partial = make(tmp_path, 8, 2, name=".checkpoint-8.partial-1")
    with monkeypatch.context() as patch:
        _kill_at(patch, renames)
        if renames == 2:
            patch.setattr(folders, "remove_tree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            folders.put_in_place(partial, final)
    folders.recover(tmp_path)
    assert names(tmp_path) == ["checkpoint-8"] and folders.find_damage(final) is None
    assert folders.read_state(final)["sequence"] == (1 if renames == 0 else 2)


def test_what_a_kill_left_half_written_goes_and_the_replaced_one_comes_back(tmp_path):
    make(tmp_path, 8, 1, name=".checkpoint-8.replaced-1")
    half = tmp_path / ".checkpoint-8.partial-1"
    half.mkdir()
    (half / "optimizer.safetensors").write_bytes(b"half")
    doomed = make(tmp_path, 4, 0, name=".checkpoint-4.removed-1")
    assert folders.recover(tmp_path) == ["checkpoint-8"]
    assert names(tmp_path) == ["checkpoint-8"] and not doomed.exists()


def test_latest_names_a_damaged_checkpoint_whose_state_is_gone(tmp_path):
    make(tmp_path, 3, 1)
    (make(tmp_path, 6, 2) / "trainer_state.json").unlink()
    folder, notes = folders.find_checkpoint(tmp_path, "latest")
    assert folder.name == "checkpoint-3" and "checkpoint-6 is damaged (trainer_state.json is missing)" in notes[0]


def test_a_checkpoint_by_name_that_is_not_there_is_a_problem_of_that_setting(tmp_path):
    make(tmp_path, 3, 1)
    with pytest.raises(UserError, match="Checkpoints there: checkpoint-3") as caught:
        folders.find_checkpoint(tmp_path, "checkpoint-4")
    assert caught.value.problems[0].field == "resume_from_checkpoint"


def test_format_1_is_migrated(tmp_path):
    state = folders.migrate(FORMAT_1)
    assert state["run"]["images"] == 6 and "pictures" not in state["run"]
    assert state["optimizer"]["numbers"] == {"step": 20.0} and state["optimizer"]["groups"] == [{"d": 0.5}]
    assert state["run_id"] == folders.migrate({**FORMAT_1, "global_step": 24})["run_id"]
    assert state["run_id"] != folders.migrate({**FORMAT_1, "seed": 6})["run_id"]
    assert folders.migrate(state) == state and state["format"] == 2


def test_a_format_is_reached_over_those_between(tmp_path, monkeypatch):
    """A new format is one number and one step, from the format before it."""
    monkeypatch.setattr(folders, "FORMAT", 3)
    steps = {**folders._STEPS, 2: lambda state: {**state, "format": 3, "best": state["run"]["images"]}}
    monkeypatch.setattr(folders, "_STEPS", steps)
    assert folders.migrate(FORMAT_1)["format"] == 3 and folders.migrate(FORMAT_1)["best"] == 6
    folder = make(tmp_path, 4, 1, format=2, run={"images": 9})
    assert folders.read_state(folder)["best"] == 9


@pytest.mark.parametrize("text", ["[]", "null", '{"format": "2"}', '{"format": 0}', "{"])
def test_a_state_that_is_none_is_told(tmp_path, text):
    (make(tmp_path, 4, 1) / folders.STATE_FILE).write_text(text)
    with pytest.raises(CheckpointError, match="cannot be read"):
        folders.read_state(tmp_path / "checkpoint-4")
    assert [checkpoint.readable for checkpoint in folders.all_checkpoints(tmp_path)] == [False]


def test_a_newer_format_is_refused(tmp_path):
    newer = folders.FORMAT + 1
    make(tmp_path, 3, 1, format=newer)
    for name in ("checkpoint-3", "latest"):
        with pytest.raises(CheckpointError, match=f"format {newer}.*newer kit"):
            folders.find_checkpoint(tmp_path, name)
