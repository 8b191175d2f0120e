"""Report pages by hand, from an output folder.

    python -m sana_kit.reports OUTPUT_DIR                   writes OUTPUT_DIR/report.html (training)
    python -m sana_kit.reports RUN_A RUN_B                  writes RUN_B/comparison.html, the two side by side
    python -m sana_kit.reports OUTPUT_DIR --gallery         writes OUTPUT_DIR/gallery.html (inference)
    python -m sana_kit.reports --result-block OUTPUT_DIR    prints and saves the result block (the bash launcher does)

Nothing here imports torch, so that these commands start at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sana_kit.errors import run_as_script
from sana_kit.flags import Parser
from sana_kit.reports.result_block import made_by, write_result_block


def write_page(options: argparse.Namespace) -> Path:
    """The page that the command line asks for; its libraries are imported here: the result block needs none."""
    from sana_kit.reports import compare, gallery, report

    if options.gallery:
        return gallery.write_gallery(options.output_dir, options.base)
    if options.other_run:
        return compare.write_comparison(options.output_dir, options.other_run)
    return report.write_report(options.output_dir, options.before, options.after)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m sana_kit.reports", description=__doc__.splitlines()[0])
    parser.add_argument("output_dir", help="output folder of a training run or of an inference script")
    parser.add_argument("other_run", nargs="?", help="a second training run: the two are shown side by side")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--result-block", action="store_true", help="print and save the run's result block")
    parser.add_argument("--block-only", action="store_true", help="with --result-block: not what the run made")
    what.add_argument("--gallery", action="store_true", help="write gallery.html of an inference script's images")
    parser.add_argument("--base", metavar="DIR", help="with --gallery: images made without the LoRA, shown beside")
    parser.add_argument("--before", metavar="DIR", help="images before the fine-tuning (default OUTPUT_DIR/before)")
    parser.add_argument("--after", metavar="DIR", help="images after the fine-tuning (default OUTPUT_DIR/after)")
    options = parser.parse_args(arguments)
    if options.base and not options.gallery:
        parser.error("--base goes with --gallery.")
    if (options.before or options.after) and (options.gallery or options.result_block):
        parser.error("--before and --after go with the training report.")
    if options.other_run and (options.gallery or options.result_block or options.before or options.after):
        parser.error("a second run goes with no other flag.")
    for flag in ("base", "before", "after"):
        if getattr(options, flag) and not Path(getattr(options, flag)).is_dir():
            parser.error(f"--{flag}={getattr(options, flag)}: no such folder.")
    try:
        if options.result_block:
            write_result_block(options.output_dir)
            if not options.block_only:
                print("".join(f"{line}\n" for line in made_by(options.output_dir)), end="")
        else:
            print(write_page(options))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run_as_script(main))
