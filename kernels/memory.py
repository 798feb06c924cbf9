"""What a CPU's allocator does with freed memory; asynchronous copies to and from a GPU.

The operating system clears every page that it hands out, a fifth of a training step on a CPU where
freed memory goes back at once, as glibc has it for large blocks. keep_memory() keeps what is freed.
Where an autoencoder codes long clips, blocks of all sizes in one heap leave holes, a third of what
coding holds: there (coding=True) blocks from 2 MiB on are huge pages of their own, of which fewer
are mapped and cleared. With those, training steps of large clips took 1.7 times as long.

Limits: glibc only (elsewhere nothing is changed), and before the first tensor is made.

A copy between pageable memory and a GPU, or `.item()`, waits for all work that the GPU has queued:
moved() copies from pinned memory, fetched() returns before the copy is done.
"""

import ctypes
import os

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3          # of glibc's malloc.h


def keep_memory(coding=False):
    """Keeps freed memory in this process; coding: large blocks are mapped on their own."""
    if coding:
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")                 # of torch
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 2**21 if coding else 2**25)
        libc.mallopt(M_TRIM_THRESHOLD, -1)                                 # never


def moved(x, device):
    """x on the device, copied asynchronously to a GPU."""
    if torch.device(device).type != "cuda" or x.is_cuda:
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def fetched(x):
    """(x on the CPU, a function to call before reading it), copied asynchronously."""
    if not x.is_cuda:
        return x, lambda: None
    x, is_there = x.to("cpu", non_blocking=True), torch.cuda.Event()
    is_there.record()
    return x, is_there.synchronize
