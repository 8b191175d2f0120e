"""The patch of diffusers' own trainer, on our stand-in for it and, where a checkout is given, on diffusers' own.

python -m pytest tests/unit/test_patch_upstream.py
SANA_DIFFUSERS_CHECKOUT=PATH/diffusers python -m pytest tests/unit/test_patch_upstream.py    # a checkout with history
"""

import errno
import os
import re
import resource
import shutil
from pathlib import Path

import pytest
from helpers.upstream import FAKE_TRAINER as FAKE
from helpers.upstream import REFERENCE_COMMIT, TRAINER, upstream_source

import patch_sana
from sana_kit import patch_upstream


@pytest.fixture
def trainer(tmp_path):
    folder = tmp_path / "dreambooth"
    folder.mkdir()
    path = folder / TRAINER
    shutil.copy(FAKE, path)
    path.chmod(0o754)
    return path


def tree(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mode) for path in sorted(folder.iterdir())}


def check_patch_cycle(trainer, capsys):
    """Dry run, patch, patch again, revert: what each writes, keeps and restores."""
    before = tree(trainer.parent)
    assert patch_sana.main([str(trainer), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert tree(trainer.parent) == before
    removed, added = (re.findall(rf"^\{sign}(?!\{sign})(.*)$", shown, re.MULTILINE) for sign in "-+")
    stripped = [line.strip() for line in added]
    assert [line.strip() for line in removed] == [
        "from accelerate import Accelerator",
        "vae.to(dtype=torch.float32)",
        "accelerator.register_save_state_pre_hook(save_model_hook)",
        "accelerator.register_load_state_pre_hook(load_model_hook)",
        "if accelerator.is_main_process:",
        "if args.checkpoints_total_limit is not None:",
    ]
    for line in (
        "from accelerate import Accelerator, DistributedType",
        "from patch_sana import create_load_model_hook, create_save_model_hook",
        "vae.to(dtype=torch.bfloat16)  # patch_sana: was torch.float32",
        "create_save_model_hook(accelerator=accelerator, unwrap_model=unwrap_model, transformer=transformer)",
        "if accelerator.is_main_process or accelerator.distributed_type == DistributedType.DEEPSPEED:",
        "if args.checkpoints_total_limit is not None and accelerator.is_main_process:",
        "accelerator.wait_for_everyone()  # patch_sana: no rank makes the new folder before old ones are pruned",
        'accelerator.print("")',
    ):
        assert stripped.count(line) == 1, line

    assert patch_sana.main([str(trainer)]) == 0
    patched = tree(trainer.parent)
    name = trainer.name
    assert set(patched) == {*before, "patch_sana.py", f"{name}.orig"}
    assert patched[f"{name}.orig"] == before[name]
    assert patched[name][1] == before[name][1] and patched[name][0] != before[name][0]
    assert patched["patch_sana.py"][0] == Path(patch_sana.__file__).read_bytes()
    compile(patched[name][0], name, "exec")

    capsys.readouterr()
    assert patch_sana.main([str(trainer)]) == 0
    assert "already patched" in capsys.readouterr().out
    assert tree(trainer.parent) == patched

    assert patch_sana.main([str(trainer), "--revert", "--dry-run"]) == 0
    assert tree(trainer.parent) == patched
    assert patch_sana.main([str(trainer), "--revert"]) == 0
    assert tree(trainer.parent) == before


def test_patch_dry_run_idempotent_revert(trainer, capsys):
    check_patch_cycle(trainer, capsys)


def test_patch_keeps_windows_line_endings(trainer, capsys):
    trainer.write_bytes(trainer.read_bytes().replace(b"\n", b"\r\n"))
    assert patch_sana.main([str(trainer)]) == 0
    patched = trainer.read_bytes()
    assert patched.count(b"\n") == patched.count(b"\r\n") and b"create_save_model_hook" in patched
    assert patch_sana.main([str(trainer), "--revert"]) == 0
    assert trainer.read_bytes() == FAKE.read_bytes().replace(b"\n", b"\r\n")


def refused_patch(trainer, capsys, *flags):
    before = tree(trainer.parent)
    assert patch_sana.main([str(trainer), *flags]) == 1
    assert tree(trainer.parent) == before
    message = capsys.readouterr().err
    assert str(trainer) in message and "was not changed" in message
    return message


@pytest.mark.parametrize("edit", patch_upstream.EDITS, ids=lambda edit: edit.purpose.split(",")[0])
def test_each_missing_or_doubled_anchor_is_named(trainer, capsys, edit):
    source = FAKE.read_text()
    match = re.search(edit.pending, source, re.MULTILINE)
    trainer.write_text(source[: match.start()] + "\n" + source[match.end() :])
    message = refused_patch(trainer, capsys)
    assert f"`{edit.anchor}` is missing" in message and message.count("\n  - ") == 1
    following = source[match.end() :].split("\n", 2)[: 2 if "(?=" in edit.pending else 0]
    trainer.write_text(source + "\n" + match.group() + "\n".join(following) + "\n")
    message = refused_patch(trainer, capsys)
    assert f"`{edit.anchor}` is there 2 times" in message


def test_another_file_is_refused_with_every_anchor(trainer, capsys):
    trainer.write_text("print('something else')\n")
    message = refused_patch(trainer, capsys)
    for edit in patch_upstream.EDITS:
        assert f"`{edit.anchor}` is missing" in message
    assert "SanaTransformer2DModel is missing" in message and "unwrap_model is missing" in message
    trainer.write_bytes(b"\xff\xfe\x00binary")
    assert "not UTF-8" in refused_patch(trainer, capsys)


def by_hand(source):
    """The reference kit's manual, followed with an editor, and the barrier that it lacks."""
    for old, new in (
        ("import Accelerator\n", "import Accelerator, DistributedType\n# from accelerate import Accelerator\n"),
        ("if is_wandb", "from patch_sana import create_save_model_hook, create_load_model_hook\n\nif is_wandb"),
        ("    vae.to(dtype=torch.float32)", "    vae.to(dtype=torch.bfloat16)\n    # vae.to(dtype=torch.float32)"),
        (
            "    accelerator.register_save_state_pre_hook(save_model_hook)\n"
            "    accelerator.register_load_state_pre_hook(load_model_hook)\n",
            "    save_Model_Hook = create_save_model_hook(\n          accelerator=accelerator,\n"
            "          unwrap_model=unwrap_model,\n          transformer=transformer,\n    )\n"
            "    load_Model_Hook = create_load_model_hook(\n          accelerator=accelerator,\n"
            "          unwrap_model=unwrap_model,\n          transformer=transformer,\n          args=args,\n    )\n"
            "    accelerator.register_save_state_pre_hook(save_Model_Hook)\n"
            "    accelerator.register_load_state_pre_hook(load_Model_Hook)\n"
            "    # accelerator.register_save_state_pre_hook(save_model_hook)\n",
        ),
        (
            "if accelerator.is_main_process:\n                    if global_step % args.ch",
            "if accelerator.is_main_process or accelerator.distributed_type == DistributedType.DEEPSPEED:\n"
            "                    if global_step % args.ch",
        ),
        (
            "                        save_path = ",
            "                        accelerator.wait_for_everyone()\n                        save_path = ",
        ),
        ("total_limit is not None:", "total_limit is not None and accelerator.is_main_process:"),
        (
            "args.max_train_steps:\n                break\n",
            'args.max_train_steps:\n                break\n            accelerator.print("")\n',
        ),
    ):
        assert source.count(old) >= 1, old
        source = source.replace(old, new, 1) if "is_wandb" not in old else source.replace(f"\n{old}", f"\n{new}", 1)
    return source


def test_edits_made_by_hand_are_recognised_and_completed(trainer, capsys):
    trainer.write_text(by_hand(FAKE.read_text()))
    edited = trainer.read_bytes()
    assert patch_sana.main([str(trainer)]) == 0
    assert trainer.read_bytes() == edited and not Path(f"{trainer}.orig").exists()
    assert (trainer.parent / "patch_sana.py").exists()

    half = by_hand(FAKE.read_text()).replace("not None and accelerator.is_main_process:", "not None:")
    half = half.replace("                        accelerator.wait_for_everyone()\n", "")
    trainer.write_text(half)
    assert patch_sana.main([str(trainer)]) == 0
    completed = trainer.read_text()
    assert len(completed.splitlines()) == len(half.splitlines()) + 2
    assert "total_limit is not None and accelerator.is_main_process:" in completed
    assert completed.count("accelerator.wait_for_everyone()  # patch_sana") == 1
    assert patch_sana.main([str(trainer), "--revert"]) == 0
    assert trainer.read_text() == half


def test_nothing_that_is_kept_or_edited_is_lost(trainer, capsys):
    original = Path(f"{trainer}.orig")
    original.write_text("an older diffusers\n")
    assert f"{original} is there already" in refused_patch(trainer, capsys)
    assert "was changed after it was patched" not in capsys.readouterr().err
    original.unlink()

    assert f"no {original}" in refused_patch(trainer, capsys, "--revert")
    assert patch_sana.main([str(trainer)]) == 0
    trainer.write_text(trainer.read_text() + "# my own line\n")
    assert "was changed after it was patched" in refused_patch(trainer, capsys, "--revert")


def test_another_patch_sana_beside_the_trainer_comes_back(trainer, capsys):
    beside = trainer.parent / "patch_sana.py"
    beside.write_text("# the reference kit's\n")
    before = tree(trainer.parent)
    assert patch_sana.main([str(trainer)]) == 0
    assert beside.read_bytes() == Path(patch_sana.__file__).read_bytes()
    assert patch_sana.main([str(trainer), "--revert"]) == 0
    assert tree(trainer.parent) == before


def test_full_disk_while_patching_changes_nothing(trainer, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        message = refused_patch(trainer, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.strerror(errno.EFBIG) in message


def test_wrong_paths(trainer, tmp_path, capsys):
    for path, part in ((trainer.parent, f"did you mean {trainer}"), (tmp_path / "no.py", "there is no file")):
        with pytest.raises(SystemExit) as caught:
            patch_sana.main([str(path)])
        assert caught.value.code == 2 and part in capsys.readouterr().err


@pytest.mark.parametrize("commit", [REFERENCE_COMMIT, "HEAD"], ids=["reference", "today"])
def test_patch_upstream_trainers(commit, tmp_path, capsys):
    folder = tmp_path / "dreambooth"
    folder.mkdir()
    (folder / TRAINER).write_bytes(upstream_source(commit))
    check_patch_cycle(folder / TRAINER, capsys)
