"""What this host has for SANA: versions, drivers, devices, variables, and a remedy for each problem.

    python -m sana_kit.doctor

The launcher calls it first. The last line is `<kind> <count>`: npu 8, cuda 2, or cpu 0. Exit code 1 if something
keeps a run from starting, 0 otherwise. Imports nothing heavy before it can say what is wrong with it.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import re
import shutil
import sys
from pathlib import Path

from sana_kit.environment import SUPPORTED, launchers_environment
from sana_kit.flags import Parser, PlainHelp

# First and last version that the suite ran on; others may work.
TESTED = {
    "torch": ("2.1.0", "2.13.0"),
    "diffusers": ("0.33.1", "0.42.1"),
    "transformers": ("4.47.1", "5.24.0"),
    "accelerate": ("0.33.0", "1.15.0"),
    "deepspeed": ("0.15.2", "0.19.8"),
    "peft": ("0.14.0", "0.21.2"),
    "datasets": ("2.19.0", "5.2.0"),
}
# CANN that torch_npu's releases name for themselves (torch_npu's README).
CANN_FOR_TORCH_NPU = {
    "2.1": "8.0",
    "2.6": "8.2.RC1",
    "2.7": "8.3.RC1",
    "2.9": "8.5.0",
    "2.10": "9.1.0",
    "2.11": "9.1.0",
    "2.12": "9.1.0",
}
INSTALL = "pip install -r requirements_sana.txt -c sana_kit/constraints.txt"
SET_ENV = "/usr/local/Ascend/ascend-toolkit/set_env.sh"
HCCL_TIMEOUTS = {"HCCL_CONNECT_TIMEOUT": (120, 7200), "HCCL_EXEC_TIMEOUT": (68, 17340)}


def version(package: str) -> str | None:
    """The installed version, None without the package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def release(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: '2.13.0+cpu' -> (2, 13, 0)."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in match.group(0).split(".")) if match else ()


def driver_version() -> str | None:
    """Ascend driver's version from its version.info."""
    for path in (Path("/usr/local/Ascend/driver/version.info"), Path("/etc/ascend_install.info")):
        if path.is_file():
            match = re.search(r"(?im)^version\s*=\s*(\S+)", path.read_text(errors="replace"))
            return match.group(1) if match else "unknown"
    return None


def cann_version() -> tuple[str | None, str | None]:
    """(version, folder) of the CANN toolkit that set_env.sh made active."""
    home = os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME")
    if not home:
        return None, None
    for name in ("ascend_toolkit_install.info", "version.cfg", "version.info"):
        for path in sorted(Path(home).glob(f"**/{name}"))[:1] if Path(home).is_dir() else []:
            match = re.search(
                r"(?im)^(?:version|runtime_running_version)\s*=\s*\[?(?:[\d.]+:)?([\w.]+)", path.read_text()
            )
            if match:
                return match.group(1), home
    return "unknown", home


@dataclasses.dataclass
class Findings:
    """What the host has: lines to print, problems and warnings (each with its remedy), its devices' kind and count."""

    lines: list[str] = dataclasses.field(default_factory=list)
    fatal: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)
    kind: str = "cpu"
    count: int = 0


def examine() -> Findings:
    """Look at the host: Python, packages, Ascend's parts, devices, variables."""
    found = Findings()
    _examine_python(found)
    _examine_packages(found)
    torch_npu, driver, (cann, cann_home) = version("torch_npu"), driver_version(), cann_version()
    ascend_host = Path("/dev/davinci_manager").exists() or driver is not None
    if ascend_host or torch_npu or cann_home:
        parts = f"driver {driver or 'not found'}, CANN {cann or 'not active'}, torch_npu {torch_npu or 'missing'}"
        found.lines.append(f"ascend     {parts}")
        _examine_ascend(found, torch_npu, cann, ascend_host)
    if _torch_imports(found, torch_npu):
        _examine_devices(found, ascend_host)
    _examine_variables(found)
    return found


def _examine_python(found: Findings) -> None:
    python = platform.python_version()
    found.lines.append(f"host       {platform.node()}, {platform.system()} {platform.machine()}, Python {python}")
    if not SUPPORTED[0] <= sys.version_info[:2] <= SUPPORTED[1]:
        first, last = (".".join(map(str, version)) for version in SUPPORTED)
        found.warnings.append(f"Python {python}: accepted are {first} to {last}. Use one of them.")


def _examine_packages(found: Findings) -> None:
    shown = []
    for package, (first, last) in TESTED.items():
        have = version(package)
        shown.append(f"{package} {have or 'missing'}")
        if have is None:
            found.fatal.append(f"{package} is missing: {INSTALL}")
        elif not release(first) <= release(have)[:3] <= release(last):
            tested = f"{package} {have} is outside the tested range {first} to {last}"
            found.warnings.append(f"{tested}; if it fails, install {last}.")
    found.lines.append("packages   " + ", ".join(shown))


def _examine_ascend(found: Findings, torch_npu: str | None, cann: str | None, ascend_host: bool) -> None:
    torch = version("torch")
    if ascend_host and torch_npu is None:
        wanted = ".".join(map(str, release(torch or "0")))
        found.fatal.append(f"torch_npu is missing: pip install torch_npu=={wanted}")
    if torch_npu and torch and release(torch)[:2] != release(torch_npu)[:2]:
        remedy = f"pip install torch_npu=={'.'.join(map(str, release(torch)))}"
        found.fatal.append(
            f"torch {torch} and torch_npu {torch_npu} do not pair: they must have the same version. {remedy}"
        )
    if torch_npu and cann is None:
        found.fatal.append(f"CANN is not active (ASCEND_HOME_PATH is unset): source {SET_ENV}")
    if torch_npu and cann and cann != "unknown":
        wanted = CANN_FOR_TORCH_NPU.get(".".join(map(str, release(torch_npu)[:2])))
        if wanted and release(cann)[:2] < release(wanted)[:2]:
            found.warnings.append(
                f"CANN {cann} is older than {wanted}, which torch_npu {torch_npu} was released for. Update CANN."
            )


def _torch_imports(found: Findings, torch_npu: str | None) -> bool:
    try:
        import torch  # noqa: F401
    except Exception as error:
        remedy = f"reinstall torch: {INSTALL}"
        if torch_npu:
            remedy = (
                f"torch_npu is installed, but CANN's libraries are not found: run `source {SET_ENV}` first;"
                " on a host without NPU uninstall torch_npu"
            )
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        found.fatal.append(f"import torch fails ({reason}). Remedy: {remedy}")
        return False
    return True


def _examine_devices(found: Findings, ascend_host: bool) -> None:
    import torch

    from sana_kit import devices  # with torch

    kind = found.kind = devices.accelerator_type()
    found.count = devices.device_count()
    if kind == "cpu":
        found.lines.append(f"devices    none but the CPU ({os.cpu_count()} cores): fit for trials and tests")
    for index in range(found.count):
        device = torch.device(kind, index)
        free, total = devices.memory_info_bytes(device)
        memory = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        found.lines.append(f"devices    {kind}:{index} {devices.device_name(device)}, {memory}")
        if free < 0.5 * total:
            found.warnings.append(
                f"{kind}:{index}: less than half of its memory is free; end the process that holds it."
            )
    if ascend_host and kind != "npu":
        found.fatal.append(
            "this is an Ascend host, but torch sees no NPU: install torch_npu of torch's version, source set_env.sh,"
            " and check ASCEND_RT_VISIBLE_DEVICES and `npu-smi info`"
        )
    if kind == "cpu" and shutil.which("nvidia-smi"):
        found.warnings.append(
            "nvidia-smi is there, but torch sees no CUDA device: a CPU build of torch is installed, or the driver is"
            " too old for it. Install a CUDA build of torch."
        )


def _examine_variables(found: Findings) -> None:
    if os.environ.get("PYTORCH_ALLOC_CONF") and os.environ.get("PYTORCH_NPU_ALLOC_CONF"):
        found.warnings.append(
            "PYTORCH_ALLOC_CONF and PYTORCH_NPU_ALLOC_CONF are both set, an error in newer torch_npu: unset one."
        )
    if found.kind == "npu":
        for name, (low, high) in HCCL_TIMEOUTS.items():
            value = os.environ.get(name)
            if value is not None and not (value.isdigit() and low <= int(value) <= high):
                found.warnings.append(f"{name}={value}: must be a whole number of seconds from {low} to {high}.")


def main(arguments: list[str] | None = None) -> int:
    """Print what the host has; 1 if something keeps a run from starting, else 0."""
    parser = Parser(prog="python -m sana_kit.doctor", description=__doc__, formatter_class=PlainHelp)
    parser.parse_args(arguments)
    found = examine()
    print("\n".join(found.lines))
    for text in found.warnings:
        print(f"warning    {text}")
    for text in found.fatal:
        print(f"problem    {text}")
    if found.fatal and (made := launchers_environment()) is not None:
        print(f"note       this is {sys.executable}; the launcher has made an environment: {made}")
    print(f"{found.kind} {found.count}")
    return 1 if found.fatal else 0


if __name__ == "__main__":
    sys.exit(main())
