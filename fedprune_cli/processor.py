"""The kind of processor that this process's arithmetic runs on: another kind gives other last digits."""

from __future__ import annotations

import functools
import platform
import re
from pathlib import Path


@functools.cache
def processor() -> str:
    """Returns this machine's kind of processor: its architecture, its name, and the instructions that PyTorch chose for it."""
    import torch

    try:
        named = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        named = None
    name = named[1].strip() if named else platform.processor()
    return ", ".join(filter(None, (platform.machine(), name, torch.backends.cpu.get_cpu_capability())))
