"""How large a store of encodings is, what in it was not used lately, and its pruning.

    python -m sana_kit.encodings STORE                                  says how large it is
    python -m sana_kit.encodings STORE --prune --unused_days 30 --dry_run    names what would go
    python -m sana_kit.encodings STORE --prune --unused_days 30              removes it

Shards that a live run uses stay. What was removed and is needed again is encoded again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sana_kit.errors import Problem, UserError, run_as_script
from sana_kit.files import expand
from sana_kit.flags import Parser


def main(argv: list[str] | None = None) -> int:
    """The command line; see the top of this file."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="folder of encodings: --encodings_dir, or OUTPUT_DIR/encodings")
    parser.add_argument("--prune", action="store_true", help="remove what was not used lately")
    parser.add_argument("--unused_days", type=float, default=30.0, help="days that count as lately (default: 30)")
    parser.add_argument("--dry_run", action="store_true", help="with --prune: only name what would go")
    args = parser.parse_args(argv)

    from sana_kit.encodings.usage import describe, prune, size_text

    store, days = Path(expand(args.store)), args.unused_days
    if not store.is_dir():
        raise UserError(Problem("store", args.store, "no such folder"))
    if not days >= 0:
        raise UserError(Problem("unused_days", days, "must not be negative"))
    if args.prune:
        gone = prune(store, days, dry_run=args.dry_run)
        if args.dry_run:
            print(
                *(f"{size_text(shard.bytes):>10}  {shard.unused_days:6.1f} days  {shard.path}" for shard in gone),
                sep="\n",
            )
        verb = "would go" if args.dry_run else "removed"
        print(f"{verb}: {size_text(sum(shard.bytes for shard in gone))} in {len(gone)} files")
    print(describe(store, days))
    return 0


if __name__ == "__main__":
    sys.exit(run_as_script(main, name=lambda field: "STORE" if field == "store" else f"--{field}"))
