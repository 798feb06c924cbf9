"""What makes nanosora fast, one file each, usable alone.

attention, adaln, rope (QK norm with rotary positions) and patchify hold the formula, a `reference`
in plain torch, Triton kernels, an operator registered with torch.library (so that
torch.compile(fullgraph=True) keeps it whole) and one or two public functions. conv, linear, decode
(a decoder's attention to its cache), optim and memory are plain torch, arranged for a CPU or GPU;
all but memory hold the formula and its `reference` too. Here is what they share: the choice of a
backend, the checks, the launch, the index vectors as the kernels read them, and the table that cuts
runs of a packed row into tiles.

NANOSORA_KERNELS picks the backend: `auto` (Triton on CUDA, torch elsewhere), `triton` or `torch`.
TRITON_INTERPRET=1 in the environment, set before triton is imported, lets `triton` run on a CPU:
slow, for tests. triton itself is absent on macOS and Windows; there everything takes the torch
path.
"""

import contextlib
import os
from types import SimpleNamespace

import torch
from torch.utils.weak import WeakTensorKeyDictionary

try:
    import triton
    import triton.language as tl
    HAS_TRITON = True
except ImportError:  # stand-ins, so that files with kernels import; backend() never picks them
    jit = lambda fn=None, **options: fn or (lambda fn: fn)
    triton, tl = SimpleNamespace(jit=jit), SimpleNamespace(constexpr=None)
    HAS_TRITON = False

# On AMD's CPUs with AVX-512 MKL leaves half of it unused: products go to oneDNN as convolutions
# there. With AVX2 alone that way is slower.
IS_WIDE = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
HAS_ONEDNN = torch.backends.mkldnn.is_available()
CHOICES = ("auto", "triton", "torch")
_kept = WeakTensorKeyDictionary()
FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # what the Triton kernels take


def backend(device):
    """Which implementation runs on `device`, and why: ("triton" or "torch", reason as text).

    device: torch.device or str. Raises ValueError for an unknown NANOSORA_KERNELS, RuntimeError
    where `triton` was asked for and cannot run.
    """
    choice = os.environ.get("NANOSORA_KERNELS", "auto")
    kind = torch.device(device).type
    if choice not in CHOICES:
        raise ValueError(f"NANOSORA_KERNELS={choice!r}: legal values are {', '.join(CHOICES)}")
    if choice == "torch":
        return "torch", "NANOSORA_KERNELS=torch"
    if choice == "triton":
        if not HAS_TRITON:
            raise RuntimeError(
                "NANOSORA_KERNELS=triton, but triton is not installed: use auto or torch")
        if kind != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError(
                f"NANOSORA_KERNELS=triton on {kind}: needs CUDA, or TRITON_INTERPRET=1 (slow)")
        return "triton", "NANOSORA_KERNELS=triton"
    if kind != "cuda":
        return "torch", f"device is {kind}, not cuda"
    if not HAS_TRITON:
        return "torch", "triton is not installed"
    return "triton", "device is cuda"


def use_triton(*tensors):
    """True where these tensors go to the Triton kernels. float64 goes to torch: the kernels
    accumulate in float32."""
    return backend(tensors[0].device)[0] == "triton" and all(x.dtype in FLOATS for x in tensors)


def check(ok, name, x, wanted):
    """Raises ValueError naming the argument, what it should be and what it is."""
    if not ok:
        is_tensor = isinstance(x, torch.Tensor)
        got = f"{x.dtype} {list(x.shape)} on {x.device}" if is_tensor else repr(x)
        raise ValueError(f"{name} must be {wanted}, got {got}")


def power_of_2(n):
    """The smallest power of two that is >= n."""
    return 1 << max(n - 1, 0).bit_length()


def row_tiles(width, most):
    """(rows, columns, warps) of a program that takes whole rows of `width` numbers, at most `most`
    of them: it holds about 2048 numbers, and a thread some 16."""
    columns = power_of_2(width)
    rows = min(max(2048 // columns, 1), most)
    return rows, columns, min(max(columns * rows // 512, 4), 16)


def launch(kernel, grid, *args, **options):
    """kernel[grid](*args, **options) on its first argument's device, which need not be the current
    one; nothing where the grid is empty."""
    if 0 not in grid:
        device = args[0].device
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            kernel[grid](*args, **options)


def is_capturing(x):
    """Whether what is launched now on x's device becomes part of a CUDA graph."""
    return x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def kept(x, make, *key):
    """make(), once for each key while tensor x lives as it is: every layer of a step asks for the
    same table of its bounds, and to start the dozen small kernels that it takes costs more than
    the work.

    Tables of x as it was are dropped. A change that torch does not count (through x.data, numpy, a
    kernel of one's own) is not noticed. Two cases keep nothing: a CUDA graph makes its tables
    inside, so that a replay makes them of the bounds that x then holds; and tensors of
    inference_mode, whose changes nobody counts.
    """
    if x.is_inference() or is_capturing(x):
        return make()
    version, result = _kept.get(x, (None, None))
    if version != x._version:
        result = {}
        _kept[x] = x._version, result
    if key not in result:
        result[key] = make()
    return result[key]


def check_numbers(name, numbers, most, ascend=False):
    """Raises ValueError naming the first of `numbers` that is not in 0..most or, of the bounds of
    runs, that does not ascend from 0."""
    least = 0
    for i, n in enumerate(numbers):
        top = 0 if ascend and i == 0 else most
        check(least <= n <= top, f"{name}[{i}]", n, f"in {least}..{top}")
        least = n if ascend else 0


def indices(name, x, most, ascend=False):
    """An index vector x as the kernels read it: without gaps, each number in 0..most, and ascending
    if it holds bounds. On a CPU the host sees the numbers, and names one that does not fit; on a
    GPU it would have to wait for them, and they are clamped."""
    def make():
        if x.device.type == "cpu":
            check_numbers(name, x.tolist(), most, ascend)
        clamped = x.clamp(0, most)
        return clamped.cummax(0).values if ascend else clamped

    return kept(x, make, "indices", most, ascend)


def tile_table(cu, block, n_rows):
    """Cuts runs of rows into tiles of at most `block` rows, on the device, without waiting for it.

    cu: int [G+1], where runs begin and end (ascending). n_rows bounds cu[-1], and with it the size
    of the table, on the host. Returns int32 [tiles, 3]: run, first row, end row. Tiles left over
    have run = G and no rows.
    """
    cu = cu.long()
    runs = cu.numel() - 1
    ends = ((cu[1:] - cu[:-1] + block - 1) // block).cumsum(0)
    tile = torch.arange(n_rows // block + runs, device=cu.device)
    run = torch.searchsorted(ends, tile, right=True)
    # a spare tile counts as one behind the last run, whose end it cannot pass
    safe = run.clamp(max=runs - 1)
    within = tile - torch.where(safe > 0, ends[safe - 1], 0)
    end = cu[safe + 1]
    first = torch.minimum(cu[safe] + within * block, end)
    last = torch.minimum(first + block, end)
    return torch.stack([run, first, last], 1).int()
