"""The name of the processor: what stands beside every timing."""

import platform
from pathlib import Path


def processor_name() -> str:
    """As `/proc/cpuinfo` has it; elsewhere as Python knows it, often no more than the architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
