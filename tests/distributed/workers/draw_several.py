"""Several runs of the inference scripts in one process: draw_several.py RUNS, a JSON file with a list of flags each.

Started by test_ascend.py, whose emulated NPU takes long to start.
"""

import json
import sys
from pathlib import Path

from sana_kit.inference.command import main

if __name__ == "__main__":
    sys.exit(max(main("several", flags) for flags in json.loads(Path(sys.argv[1]).read_text())))
