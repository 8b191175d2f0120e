"""The result block that the launcher prints and saves."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from sana_kit.files import write_atomic

SUMMARY = "summary.json"


def _result_line(value: float | None, digits: int, reason: str | None) -> str:
    if isinstance(value, (int, float)) and math.isfinite(value):
        return f"{value:.{digits}f}"
    return f"n/a ({reason})" if reason else "n/a"


def case_name(summary: dict) -> str:
    """`Sana_lora_bs8_8p_npu`: train mode, batch size per process, processes and device kind of a run's summary.

    Raises:
        ValueError: the summary lacks one of them.
    """
    missing = [key for key in ("batch_size", "world_size", "device_type") if summary.get(key) is None]
    if missing:
        raise ValueError(f"the summary lacks {', '.join(missing)}: it was not written by this kit's trainer.")
    mode = summary.get("train_mode") or "lora"
    return f"Sana_{mode}_bs{summary['batch_size']}_{summary['world_size']}p_{summary['device_type']}"


def format_result_block(summary: dict, case_name: str) -> str:
    """The figures that the reference kit's launcher ends with, from the trainer's own summary.

    Args:
        summary: the content of summary.json: images_per_second and iterations_per_second of the steady state (with
            `steady_state_note` where they are null), final_loss, duration_seconds.
        case_name: see `case_name()`.
    """
    reason = summary.get("steady_state_note")
    lines = [
        "------------------ Final result ------------------",
        f"Average it/s: {_result_line(summary.get('iterations_per_second'), 4, reason)}",
        f"Final Performance images/sec: {_result_line(summary.get('images_per_second'), 3, reason)}",
        f"Final Train Loss: {_result_line(summary.get('final_loss'), 6, None)}",
        f"E2E Training Duration sec: {_result_line(summary.get('duration_seconds'), 1, None)}",
        f"CaseName: {case_name}",
    ]
    return "\n".join(lines) + "\n"


def _summary(output_dir: str | os.PathLike) -> dict:
    path = Path(output_dir) / SUMMARY
    if not path.is_file():
        raise ValueError(f"{path}: not there. The trainer writes it at its end; the run did not get so far.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}).") from error


def made_by(output_dir: str | os.PathLike) -> list[str]:
    """The last lines of the run in `output_dir`: what it made, and how to draw with it; none from an older kit's run.

    Raises:
        ValueError: no summary.json, or none that can be read.
    """
    return list(_summary(output_dir).get("made") or [])


def write_result_block(output_dir: str | os.PathLike) -> Path:
    """Print the result block of the run in `output_dir` and save it there as `{CaseName}.log`; returns that path.

    Raises:
        ValueError: no summary.json (the run did not end), or one that is not a run's.
    """
    summary = _summary(output_dir)
    try:
        name = case_name(summary)
    except ValueError as error:
        raise ValueError(f"{Path(output_dir) / SUMMARY}: {error}") from error
    block = format_result_block(summary, name)
    print(block, end="")
    return write_atomic(Path(output_dir) / f"{name}.log", lambda file: file.write(block.encode()))
