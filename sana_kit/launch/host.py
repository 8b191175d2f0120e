"""What a run finds on this host: devices, the accelerate config, a free port, how many processes.

The accelerate config is read by a YAML parser, as accelerate reads it: "2" in quotes is 2.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import yaml

from sana_kit.errors import Problem, UserError


class AccelerateConfig:
    """The accelerate config, as far as starting a run needs it.

    Attributes:
        path: the file.
        machines: num_machines, 1 if not there.
        processes, port, machine_rank: num_processes, main_process_port and machine_rank, None if not there.
        decides: of "mixed_precision" and "gradient_accumulation_steps" those that it, or the DeepSpeed file that it
            names, has a value for.

    Raises:
        UserError: the file cannot be read, is no mapping, or one of these is no whole number.
    """

    def __init__(self, path: str):
        self.path = path
        content = _read_yaml(path)
        self._problems: list[Problem] = []
        self.machines = self._whole(content, "num_machines", 1) or 1
        self.processes = self._whole(content, "num_processes", 1)
        self.port = self._whole(content, "main_process_port", 0)
        self.machine_rank = self._whole(content, "machine_rank", 0)
        self.decides = _decided(content)
        if self._problems:
            raise UserError(self._problems)

    def _whole(self, content: dict[str, Any], key: str, least: int) -> int | None:
        value = content.get(key)
        if value is None or (isinstance(value, str) and value.strip().lower() in ("", "null", "none")):
            return None
        try:
            number = int(str(value))
        except ValueError:
            number = least - 1
        if number < least:
            reason = f"{key} is {value}, and must be a whole number of at least {least}"
            self._problems.append(Problem("config_file", self.path, reason))
            return None
        return number


def _decided(content: dict[str, Any]) -> set[str]:
    deepspeed = content.get("deepspeed_config") or {}
    if deepspeed.get("deepspeed_config_file"):
        return {"mixed_precision", "gradient_accumulation_steps"}
    steps = deepspeed.get("gradient_accumulation_steps", content.get("gradient_accumulation_steps"))
    said = {"mixed_precision": content.get("mixed_precision"), "gradient_accumulation_steps": steps}
    return {name for name, value in said.items() if value not in (None, "", "auto")}


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(Problem("config_file", path, f"it cannot be read ({reason})")) from error
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())
        raise UserError(Problem("config_file", path, f"not a YAML file ({where})")) from error
    if not isinstance(content, dict):
        raise UserError(Problem("config_file", path, "not an accelerate config: it holds no lines `key: value`"))
    return content


def free_port(wanted: int | None) -> int:
    """The wanted port, or any free one, so that two runs on one machine do not collide.

    Raises:
        UserError: the wanted one is in use.
    """
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", wanted or 0))
        except OSError as error:
            remedy = "Free it, or name another one in the accelerate config."
            raise UserError(Problem("", None, f"main_process_port: {wanted} is in use", remedy)) from error
        return probe.getsockname()[1]


def host_threads(processes: int) -> int:
    """OMP_NUM_THREADS on a host without accelerator: its cores, shared among the processes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, -(-cores // processes))


def processes_here(config: AccelerateConfig, kind: str, devices: int, wanted: int | None, small: bool) -> int:
    """How many processes a run on this one machine gets.

    Args:
        kind, devices: of this host's accelerators: "npu", "cuda" or "cpu", and how many.
        wanted: what was asked for, None if nothing was.
        small: the quick start, which shows two processes on a host without accelerator.

    Raises:
        UserError: more than there are devices.
    """
    if kind == "cpu":
        return wanted or (2 if small else 1)
    if wanted and wanted > devices:
        reason = f"this machine has {devices} {kind} device(s)"
        raise UserError(Problem("num_processors", wanted, reason, "Ask for at most that many."))
    return wanted or devices


def launch_words(config: AccelerateConfig, processes: int | None) -> list[str]:
    """Words for `accelerate launch`: the config and where the processes meet.

    Args:
        processes: on this machine alone; with several machines of all together, None for the config's number.

    Raises:
        UserError: the port that the config names is in use.
    """
    words = ["--config_file", config.path]
    words += ["--num_processes", str(processes)] if processes else []
    if config.machines == 1:
        return [*words, "--num_machines", "1", "--main_process_port", str(free_port(config.port))]
    found = {"num_machines": config.machines, "machine_rank": config.machine_rank, "main_process_port": config.port}
    return [*words, *(word for key, value in found.items() if value is not None for word in (f"--{key}", str(value)))]


def without_free_port(words: list[str], config: AccelerateConfig) -> list[str]:
    """`launch_words` for another start: without the port that was free at this one."""
    if config.machines > 1 or "--main_process_port" not in words:
        return words
    place = words.index("--main_process_port")
    return words[:place] + words[place + 2 :]
