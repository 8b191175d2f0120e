"""The patch of diffusers' own trainer, made by `python patch_sana.py PATH`: edits, refusals, and the way back."""

from __future__ import annotations

import argparse
import ast
import difflib
import os
import re
import sys
from typing import NamedTuple

import patch_sana
from sana_kit.files import write_atomic


class Edit(NamedTuple):
    """One edit: `pending` is the place as diffusers ships it, `replacement` what it becomes (re.sub template),
    `applied` what tells that it is there already, ours or made by hand.
    """

    purpose: str
    anchor: str  # for messages: the line looked for
    pending: str
    replacement: str
    applied: str


EDITS = (
    Edit(
        "import DistributedType",
        "from accelerate import Accelerator",
        r"^from accelerate import Accelerator$",
        r"from accelerate import Accelerator, DistributedType",
        r"^from accelerate import .*\bDistributedType\b",
    ),
    Edit(
        "import the hooks",
        "if is_wandb_available(): / import wandb",
        r"^if is_wandb_available\(\):\n(?=    import wandb$)",
        "from patch_sana import create_load_model_hook, create_save_model_hook\n\n\\g<0>",
        r"^from patch_sana import .*\bcreate_save_model_hook\b",
    ),
    Edit(
        "keep the VAE in bfloat16, as its authors trained it",
        "vae.to(dtype=torch.float32)",
        r"^( +)vae\.to\(dtype=torch\.float32\)$",
        r"\1vae.to(dtype=torch.bfloat16)  # patch_sana: was torch.float32",
        r"^ +vae\.to\(dtype=torch\.bfloat16\)",
    ),
    Edit(
        "register the save hook",
        "accelerator.register_save_state_pre_hook(save_model_hook)",
        r"^( +)accelerator\.register_save_state_pre_hook\(save_model_hook\)$",
        "\\1accelerator.register_save_state_pre_hook(\n"
        "\\1    create_save_model_hook(accelerator=accelerator, unwrap_model=unwrap_model, transformer=transformer)\n"
        "\\1)",
        r"^ +(\w+ = |accelerator\.register_save_state_pre_hook\(\s*)create_save_model_hook\(",
    ),
    Edit(
        "register the load hook",
        "accelerator.register_load_state_pre_hook(load_model_hook)",
        r"^( +)accelerator\.register_load_state_pre_hook\(load_model_hook\)$",
        "\\1accelerator.register_load_state_pre_hook(\n"
        "\\1    create_load_model_hook(\n"
        "\\1        accelerator=accelerator, unwrap_model=unwrap_model, transformer=transformer, args=args\n"
        "\\1    )\n"
        "\\1)",
        r"^ +(\w+ = |accelerator\.register_load_state_pre_hook\(\s*)create_load_model_hook\(",
    ),
    Edit(
        "save on every rank under DeepSpeed, whose saving has barriers inside",
        "if accelerator.is_main_process: / if global_step % args.checkpointing_steps == 0:",
        r"^( +)if accelerator\.is_main_process:\n(?= +if global_step % args\.checkpointing_steps == 0:$)",
        "\\1if accelerator.is_main_process or accelerator.distributed_type == DistributedType.DEEPSPEED:\n",
        r"^ +if accelerator\.is_main_process or accelerator\.distributed_type == DistributedType\.DEEPSPEED:\n"
        r" +if global_step % args\.checkpointing_steps == 0:",
    ),
    Edit(
        "prune old checkpoints on the main process only",
        "if args.checkpoints_total_limit is not None:",
        r"^( +)if args\.checkpoints_total_limit is not None:$",
        r"\1if args.checkpoints_total_limit is not None and accelerator.is_main_process:",
        r"^ +if args\.checkpoints_total_limit is not None and accelerator\.is_main_process:",
    ),
    Edit(
        # Missing in the reference kit's manual: another rank then makes the new folder while the main process still
        # counts the old ones: with --checkpoints_total_limit one too many is deleted, with 1 perhaps the new one.
        "make the new checkpoint's folder only after pruning",
        'save_path = os.path.join(args.output_dir, f"checkpoint-{global_step}")',
        r'^( +)save_path = os\.path\.join\(args\.output_dir, f"checkpoint-\{global_step\}"\)$',
        "\\1if accelerator.distributed_type == DistributedType.DEEPSPEED:\n"
        "\\1    accelerator.wait_for_everyone()  # patch_sana: no rank makes the new folder before old ones are "
        "pruned\n"
        "\\g<0>",
        r"^ +accelerator\.wait_for_everyone\(\)[^\n]*\n +save_path = ",
    ),
    Edit(
        "print an empty line after each step, which Ubuntu needs to flush the progress bar into a log",
        "if global_step >= args.max_train_steps: / break",
        r"^( +)if global_step >= args\.max_train_steps:\n +break\n",
        '\\g<0>\\1accelerator.print("")\n',
        r'^ +if global_step >= args\.max_train_steps:\n +break\n\s*accelerator\.print\(""\)',
    ),
)


# What the edits rely on without touching it.
CONTEXT = (
    (
        "the class SanaTransformer2DModel",
        r"^ +transformer = SanaTransformer2DModel\.",
    ),
    ("the function unwrap_model", r"^ +def unwrap_model\("),
    ("the call transformer.add_adapter", r"^ +transformer\.add_adapter\("),
)


class Refusal(Exception):
    """The patch cannot be made; the message says why and what to do. Nothing was written."""


def patch_text(text: str) -> tuple[str, list[str]]:
    """Apply every edit to `text`, the source of diffusers' trainer (lines ending in LF).

    Returns (new text, purposes of the edits made). An edit that is there already is left as it is. Raises Refusal
    naming every anchor that is missing or found more than once.
    """
    problems = [f"{name} is missing" for name, pattern in CONTEXT if not re.search(pattern, text, re.MULTILINE)]
    made = []
    for edit in EDITS:
        if re.search(edit.applied, text, re.MULTILINE):
            continue
        count = len(re.findall(edit.pending, text, re.MULTILINE))
        if count == 1:
            text = re.sub(edit.pending, edit.replacement, text, flags=re.MULTILINE)
            made.append(edit.purpose)
        else:
            times = "is missing" if count == 0 else f"is there {count} times, expected once"
            problems.append(f"`{edit.anchor}` {times} (to {edit.purpose})")
    if problems:
        raise Refusal(
            "this is not diffusers' train_dreambooth_lora_sana.py as known from March 2025 to August 2026:"
            + "".join(f"\n  - {problem}" for problem in problems)
        )
    try:
        ast.parse(text)
    except SyntaxError as error:
        raise Refusal(f"the patched file would not be valid Python (line {error.lineno}: {error.msg})") from error
    return text, made


def _patch_bytes(data: bytes) -> tuple[bytes, list[str]]:
    """`patch_text` on the bytes of a file; line endings (LF or CRLF) stay what they are."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refusal(f"it is not UTF-8 text ({error})") from error
    crlf = "\r\n" in text
    text, made = patch_text(text.replace("\r\n", "\n") if crlf else text)
    return (text.replace("\n", "\r\n") if crlf else text).encode("utf-8"), made


def _read(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None


def _write(path: str, data: bytes, like: str) -> None:
    """Write a file whole or not at all, with the permissions of the file `like`."""
    write_atomic(path, lambda file: file.write(data), mode_of=like)


def _differing_original(path: str, data: bytes) -> Refusal | None:
    original = _read(path + ".orig")
    if original is not None and original != data:
        return Refusal(
            f"{path}.orig is there already and holds something else than {path}. Move it away if you no longer need "
            "it, then try again."
        )
    return None


def patch(path: str, dry_run: bool) -> None:
    """Patch diffusers' trainer at `path` and put the hooks beside it; Refusal where that cannot be done."""
    data = _read(path)
    patched, made = _patch_bytes(data)
    here = os.path.realpath(patch_sana.__file__)
    hooks = os.path.join(os.path.dirname(path), "patch_sana.py")
    own, beside = _read(here), _read(hooks)
    copy_hooks = beside != own

    found = [_differing_original(path, data)] if made else []
    if copy_hooks and beside is not None:
        found.append(_differing_original(hooks, beside))
    refusals = [str(refusal) for refusal in found if refusal]
    if refusals:
        raise Refusal("\n".join(refusals))

    if dry_run:
        name = os.path.basename(path)
        old, new = (part.decode("utf-8").splitlines(keepends=True) for part in (data, patched))
        sys.stdout.writelines(difflib.unified_diff(old, new, fromfile=f"a/{name}", tofile=f"b/{name}"))
    if not made and not copy_hooks:
        print(f"{path} is already patched; nothing to do.")
        return
    will = "would " if dry_run else ""
    # The trainer is replaced last: until then it runs as before.
    if copy_hooks:
        if not dry_run:
            if beside is not None:
                _write(hooks + ".orig", beside, like=hooks)
            _write(hooks, own, like=here)
        kept = f" (the one there kept as {os.path.basename(hooks)}.orig)" if beside is not None else ""
        print(f"{will}copy patch_sana.py to {hooks}{kept}")
    if made:
        if not dry_run:
            _write(path + ".orig", data, like=path)
            _write(path, patched, like=path)
        for purpose in made:
            print(f"{will}{purpose}")
        print(f"{will}keep the original as {path}.orig; --revert restores it")


def revert(path: str, dry_run: bool) -> None:
    """Bring back the original, byte for byte; Refusal where that would lose something."""
    data, original = _read(path), _read(path + ".orig")
    here = os.path.realpath(patch_sana.__file__)
    hooks = os.path.join(os.path.dirname(path), "patch_sana.py")
    if original is None:
        raise Refusal(f"there is no {path}.orig to go back to.")
    if data != original and _patch_bytes(original)[0] != data:
        raise Refusal(
            f"{path} was changed after it was patched; going back would lose that. To go back all the same: mv "
            f"{path}.orig {path}"
        )
    will = "would " if dry_run else ""
    print(f"{will}restore {path} from {path}.orig")
    if not dry_run:
        os.replace(path + ".orig", path)  # the kept file itself: same bytes, same permissions
    if _read(hooks + ".orig") is not None:
        print(f"{will}restore {hooks} from {hooks}.orig")
        if not dry_run:
            os.replace(hooks + ".orig", hooks)
    elif os.path.realpath(hooks) != here and _read(hooks) == _read(here):
        print(f"{will}remove the copy {hooks}")
        if not dry_run:
            os.unlink(hooks)


def run(argv: list[str] | None = None) -> int:
    """The command line of patch_sana.py. Exit code 0: done, or nothing to do; 1: refused; 2: wrong command line."""
    parser = argparse.ArgumentParser(
        prog="patch_sana.py",
        description="Put DeepSpeed-aware LoRA saving into diffusers' train_dreambooth_lora_sana.py.",
        epilog="Edits: " + "; ".join(edit.purpose for edit in EDITS) + ".",
    )
    parser.add_argument("path", help="train_dreambooth_lora_sana.py of a diffusers checkout (examples/dreambooth)")
    parser.add_argument(
        "--dry-run", "--dry_run", action="store_true", help="show the difference and what would be done; write nothing"
    )
    parser.add_argument("--revert", action="store_true", help="restore the original, byte for byte")
    arguments = parser.parse_args(argv)
    path = os.path.realpath(arguments.path)  # patch the file itself where PATH is a link
    if os.path.isdir(path):
        inside = os.path.join(arguments.path, "train_dreambooth_lora_sana.py")
        parser.error(
            f"{arguments.path} is a folder" + (f"; did you mean {inside}?" if os.path.isfile(inside) else ".")
        )
    if not os.path.isfile(path):
        parser.error(f"there is no file {arguments.path}; give the path of diffusers' train_dreambooth_lora_sana.py.")
    try:
        (revert if arguments.revert else patch)(path, arguments.dry_run)
    except Refusal as refusal:
        print(f"{arguments.path} was not changed: {refusal}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{arguments.path} was not changed: {error}", file=sys.stderr)
        return 1
    return 0
