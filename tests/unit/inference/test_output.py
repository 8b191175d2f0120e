"""The writer of images beside generation.

python -m pytest tests/unit/inference/test_output.py
"""

import time

from sana_kit.inference.output import Writer
from sana_kit.inference.run import explain


def test_writing_overlaps_with_generation(tmp_path):
    """The writer's thread keeps the order, bounds what waits, and names the image that failed."""

    class Slow:
        def save(self, job, image, facts):
            time.sleep(0.01)
            if job == 3:
                raise OSError(28, "No space left on device")
            return {"file": job, **facts}

    failed = []
    writer = Writer(Slow(), lambda jobs, error: failed.append((jobs, explain(error))))
    for job in range(12):
        writer.submit(job, None, {"seconds": 1})
        assert len(writer._waiting) <= 4
    writer.close()
    assert [line["file"] for line in writer.lines] == [job for job in range(12) if job != 3]
    assert failed == [([3], "OSError: [Errno 28] No space left on device")]
