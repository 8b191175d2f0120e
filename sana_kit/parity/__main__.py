"""Whether this kit computes what diffusers' pipeline and NVlabs' training compute, in numbers, for one checkpoint.

    python -m sana_kit.parity --model PATH                 # a diffusers folder or a hub name; fp32 and bf16
    python -m sana_kit.parity --model PATH --dtypes bf16   # half the memory

Each line names what is compared, with whom, the largest difference in each dtype (relative to the largest value where
it says so), and one of three words: equal, "on purpose" (with the reason), or DIFFERS, which makes the exit code 1.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from sana_kit.errors import UserError, run_as_script
from sana_kit.flags import Parser

DTYPES = ("fp32", "bf16")


def main(argv: Sequence[str] | None = None, say: Callable[[str], None] = print) -> int:
    """The command; 0 where nothing differs but on purpose."""
    parser = Parser(prog="python -m sana_kit.parity", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="diffusers folder, hub name, or output of a full fine-tuning")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="default: both")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or npu")
    parser.add_argument("--cache_dir", help="where hub models are kept")
    given = parser.parse_args(argv)

    # torch and the models are imported once the command line is known to be right: --help answers at once
    import torch

    from sana_kit.devices import pick_device
    from sana_kit.models.folder import ModelFields, find_model
    from sana_kit.models.members import MEMBERS
    from sana_kit.parity.comparisons import DIFFERS, compare, table

    fields = ModelFields(model="model", base=None)
    model, problems = find_model(
        given.model, cache_dir=given.cache_dir, dtype=torch.float32, members=MEMBERS, fields=fields
    )
    if model is None or problems:
        raise UserError(problems)
    rows = compare(model, given.dtypes, pick_device(given.device))
    say(f"{given.model}: {model.pipeline_class}, {model.transformer_config['num_layers']} layers\n")
    say(table(rows, given.dtypes))
    wrong = [row for row in rows if row.verdict == DIFFERS]
    say(f"\n{len(rows) - len(wrong)} of {len(rows)} as they should be" + (f", {len(wrong)} DIFFER" if wrong else ""))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(run_as_script(main))
