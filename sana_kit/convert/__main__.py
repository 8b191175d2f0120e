"""Convert checkpoints between NVlabs' and diffusers' layouts, adapters between those of five tools.

    python -m sana_kit.convert Sana_1600M_1024px.pth ./SANA_transformer --to diffusers
    python -m sana_kit.convert ./SANA/transformer sana.pth --to nvlabs
    python -m sana_kit.convert ./output sana_style.safetensors --to comfyui

An adapter goes to diffusers, peft, kohya, comfyui or lycoris, a checkpoint to diffusers or nvlabs. Values and dtypes
stay as they are. docs/formats.md says what was proved, and how.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sana_kit.errors import Problem, UserError, run_as_script
from sana_kit.files import check_output_folder, expand, read_header
from sana_kit.flags import Parser

ADAPTERS = ("diffusers", "peft", "kohya", "comfyui", "lycoris")
CHECKPOINTS = ("diffusers", "nvlabs")


def is_adapter(source: Path) -> bool:
    """Whether a file or folder holds an adapter, by the names of its tensors; UserError where neither is there."""
    from sana_kit.convert.checkpoints import PICKLES
    from sana_kit.models.layouts import LORA_FILE, PEFT_FILE, is_adapter_name

    if source.is_dir():
        return any((source / name).is_file() for name in (LORA_FILE, PEFT_FILE))
    if not source.is_file():
        raise UserError(Problem("in", source, "no such file or folder"))
    if source.suffix in PICKLES:
        return False
    try:
        return any(map(is_adapter_name, read_header(source)[0]))
    except ValueError as error:
        raise UserError(Problem("in", source, f"cannot be used: {error}")) from None


def convert(source: str, target: str, layout: str, **options: Any) -> list[str]:
    """Convert `source` to `target` in `layout`; returns lines for the user.

    Args:
        options: fields of `checkpoints.Options`.

    Raises:
        UserError: all that is wrong, at once; nothing is written then.
    """
    from sana_kit.convert.adapters import convert_adapter
    from sana_kit.convert.checkpoints import Options, folder_to_nvlabs, nvlabs_to_folder

    found, out = expand(source), expand(target)
    kinds = ADAPTERS if is_adapter(found) else CHECKPOINTS
    problems = []
    if layout not in kinds:
        what = "an adapter" if kinds is ADAPTERS else "a checkpoint"
        problems.append(Problem("to", layout, f"{source} is {what}, which goes to {', '.join(kinds)}"))
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        problems.append(Problem("out", target, "is there already", "Name a new file or folder."))
    else:
        problems += check_output_folder(out.parent, "out")
    if layout == "nvlabs" and out.suffix not in (".pth", ".safetensors"):
        problems.append(
            Problem("out", target, "NVlabs' layout is one file", "Let its name end in .pth or .safetensors.")
        )
    if layout == "diffusers" and kinds is CHECKPOINTS and found.is_dir():
        problems.append(Problem("to", layout, f"{source} is a folder of diffusers already"))
    if problems:
        raise UserError(problems)
    if kinds is ADAPTERS:
        return convert_adapter(str(found), str(out), layout)
    if layout == "nvlabs":
        if found.is_file():
            raise UserError(Problem("to", layout, f"{source} is one file, as NVlabs' layout is"))
        return folder_to_nvlabs(found, out, Options(**options))
    return nvlabs_to_folder(found, out, Options(**options))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 0 when the target is written whole."""
    lines = __doc__.splitlines()
    parser = Parser(prog="python -m sana_kit.convert", description=lines[0], epilog=" ".join(lines[6:8]))
    parser.add_argument("source", metavar="IN", help="checkpoint or adapter: a file or a folder")
    parser.add_argument("target", metavar="OUT", help="a new file or folder")
    parser.add_argument("--to", required=True, choices=tuple(dict.fromkeys((*CHECKPOINTS, *ADAPTERS))), help="layout")
    parser.add_argument(
        "--image_size",
        type=int,
        choices=(512, 1024, 2048, 4096),
        help="pixels of NVlabs' checkpoint; default: what its pos_embed tells, else 1024",
    )
    parser.add_argument("--config", help="a config.json of diffusers that tells the heads of an unusual width")
    parser.add_argument("--base", help="of a ControlNet that goes to nvlabs: the transformer folder of its base")
    given = parser.parse_args(argv)
    options = {"image_size": given.image_size, "config": given.config, "base": given.base}
    for line in convert(given.source, given.target, given.to, **options):
        print(line)
    return 0


def _name(field: str) -> str:
    return {"in": "IN", "out": "OUT", "lora_weights": "IN"}.get(field, f"--{field}")


if __name__ == "__main__":
    sys.exit(run_as_script(main, name=_name))
