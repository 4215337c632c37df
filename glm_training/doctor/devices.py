"""The GPUs, their driver, and why torch does not see them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

from glm_training.doctor.commands import Asked, apt_install, glm_train, pip_install
from glm_training.doctor.findings import Finding, failed, note, ok

NAME = "GPU"
DRIVER = Path("/proc/driver/nvidia/version")
NODE = Path("/dev/nvidiactl")
PCI = Path("/sys/bus/pci/devices")
NVIDIA, DISPLAYS = "0x10de", ("0x0300", "0x0302")
"""Vendor, and the classes of graphics cards and of cards that only compute, as the PCI bus gives them."""


def devices(asked: Asked) -> Iterator[Finding]:
    """Each GPU, tried; or why there is none."""
    if not torch.cuda.is_available():
        yield _none(asked)
        return
    driver = _driver_version()
    for index in range(torch.cuda.device_count()):
        yield _tried(index, driver)


def _tried(index: int, driver: str | None) -> Finding:
    properties = torch.cuda.get_device_properties(index)
    size = properties.total_memory / 2**30
    told = f"{properties.name}, {size:.0f} GiB" + ("" if driver is None else f", driver {driver}")
    facts = {"name": properties.name, "gib": round(size, 1), "driver": driver, "cuda": torch.version.cuda}
    name = f"{NAME} {index}"
    try:
        ones = torch.ones(64, 64, dtype=torch.bfloat16, device=f"cuda:{index}")
        right = bool(((ones @ ones) == 64).all())
    except RuntimeError as error:  # no kernel for this GPU, memory that others hold, a broken driver
        line = str(error).splitlines()[0]
        if "out of memory" in line:
            return failed(name, f"{told}: no memory is free; to see whose it is:", ["nvidia-smi"], **facts)
        return failed(name, f"{told} does not compute: {line}", _torch_anew(), **facts)
    if not right:
        return failed(name, f"{told} multiplies wrongly; to see its errors:", ["nvidia-smi", "-q"], **facts)
    return ok(name, told, **facts)


def _none(asked: Asked) -> Finding:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not (DRIVER.exists() or _on_the_bus()):
        return note(
            NAME,
            "none here; the tiny models train on the CPU, zai-org/GLM-Image and SDXL need one. What a run takes of it: "
            "glm-train plan CONFIG --gpu-memory GIB",
        )
    if hidden is not None and not hidden.strip("-1 ,"):
        return note(NAME, f"hidden by CUDA_VISIBLE_DEVICES={hidden!r}; to see it:", ["unset", "CUDA_VISIBLE_DEVICES"])
    if not DRIVER.exists():
        drivers = (
            ["sudo", "ubuntu-drivers", "install"] if shutil.which("ubuntu-drivers") else apt_install("nvidia-driver")
        )
        return failed(NAME, "there is an NVIDIA card and no driver; then restart the machine:", drivers)
    if not NODE.exists():
        command = ["docker", "run", "--gpus", "all", "IMAGE", *glm_train("doctor", asked)]
        return failed(NAME, "the machine has one, and this container was started without it:", command)
    if torch.version.cuda is None:
        return failed(NAME, f"torch {torch.__version__} was built without CUDA", _torch_anew())
    driver = _driver_version() or "of unknown version"
    why = f"driver {driver} does not serve torch {torch.__version__} (CUDA {torch.version.cuda}): {_why()}"
    return failed(NAME, f"{why}; then restart the machine:", apt_install("nvidia-driver"))


def _torch_anew() -> list[str]:
    """torch and torchvision in the builds of PyPI, which have CUDA on Linux."""
    from importlib.metadata import version

    same = [f"{name}=={version(name).partition('+')[0]}" for name in ("torch", "torchvision")]
    return pip_install(*same, options=["--force-reinstall"])


def _why() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().partition("\n")[0].partition(". ")[0]
    return "it gives no reason"


def _driver_version() -> str | None:
    """As nvidia-smi says; None where it is not there or says nothing."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return None
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None


def _on_the_bus() -> bool:
    """Whether the PCI bus has an NVIDIA card."""
    return any(
        (device / "vendor").read_text().strip() == NVIDIA and (device / "class").read_text().startswith(DISPLAYS)
        for device in (PCI.iterdir() if PCI.is_dir() else ())
        if (device / "vendor").is_file() and (device / "class").is_file()
    )
