"""kernels/memory.py: what becomes of freed memory."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_large_blocks_are_given_back_from_between_small_ones():
    """In a process of its own, whose heap has no room from before."""
    code = """
import pathlib, re, torch
from kernels import memory
held = lambda: int(re.search(r"VmRSS:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
memory.keep_memory(coding=True)
before = held()
blocks = [torch.ones(n) for n in (3 * 2**20, 2**10) * 10]        # 12 MiB and 4 KiB, by turns
most = held()
blocks = blocks[1::2]
print(most - before, held() - before)                            # KiB
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True,
                          capture_output=True, check=True)
    most, left = (int(n) / 1024 for n in done.stdout.split())
    assert most > 100 and left < 20
