"""Linear layers on a CPU: y = x W^T + b.

Layout: x [..., K], W [M, K], b [M] or None, y [..., M]. The fast paths take float32; all else goes
to F.linear.

torch gives matrix products on a CPU to MKL; oneDNN is faster:
- linear(): without gradients oneDNN's own linear layer, which has no backward: up to 1.6 times
  (with AVX2; with one row 1.2). With gradients, where AMD's CPUs have AVX-512, of which MKL leaves
  half unused, a convolution of one pixel (with AVX2 that way is slower), from 2^26 multiply-adds
  on: for smaller ones steps of the demo's denoiser and captioner were 3 to 8% slower.
- few_rows(): up to 32 rows, a token of each text, without gradients: they take a CPU as long as the
  weights' way from memory, which is shorter (1.2 times) as a batch of products with parts of the
  weights, some for each thread.
- Columns: for one row. Its copy of the weights lies by columns, a part for each thread, which a CPU
  reads 1.5 times as fast as nn.Linear or more.
- join(): layers of one input as one layer: one product in the place of several, where calls cost as
  much as what they read.

What lost (AVX2): weights packed for oneDNN's convolutions, 16 rows 1.2 times as fast as few_rows,
but the layout that it wants changes with rows and threads; MKL's packed weights: nothing at 293 and
512 rows.

Limits: few_rows and Columns have no gradients; Columns is for the number of threads at its making.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from kernels import HAS_ONEDNN, IS_WIDE

# (rows, K, M): for the bench
SHAPES = [(4096, 1152, 4608), (16, 4096, 4096), (1, 4096, 4096)]
CPU_SHAPES = [(512, 384, 1536), (16, 768, 2048), (1, 768, 2048)]


def reference(x, weight, bias=None):
    """The formula."""
    y = x @ weight.T
    return y if bias is None else y + bias


def linear(x, weight, bias=None):
    """F.linear of x [..., K], weight [M, K]; on a CPU by oneDNN where that is faster."""
    n = x.numel() * len(weight)
    if x.device.type != "cpu" or x.dtype == torch.float64 or not n:
        return F.linear(x, weight, bias)
    if HAS_ONEDNN and x.dtype == weight.dtype == torch.float32 and not (
            torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")
            or torch.compiler.is_compiling()):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    if n < 2**26 or not IS_WIDE:
        return F.linear(x, weight, bias)
    rows = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)      # [1, K, N, 1]
    y = F.conv2d(rows, weight[:, :, None, None], bias)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)          # [..., M]


def few_rows(x, weight, bias=None):
    """`linear`, by parts of the weights where x [..., K] has at most 32 rows."""
    (M, K), threads = weight.shape, torch.get_num_threads()
    parts = math.gcd(M, 4 * threads)
    if (torch.is_grad_enabled() or x.numel() > 32 * K or parts < threads
            or x.device.type != "cpu" or not x.dtype == weight.dtype == torch.float32):
        return linear(x, weight, bias)
    rows = x.reshape(-1, K)                                                       # [N, K]
    y = torch.bmm(weight.unflatten(0, (parts, -1)),
                  rows.T.expand(parts, *rows.T.shape)).flatten(0, 1).T.contiguous()   # [N, M]
    return (y if bias is None else y + bias).view(*x.shape[:-1], M)


class Linear(nn.Linear):
    """nn.Linear by `linear`."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


class FewRows(Linear):
    """nn.Linear by `few_rows`."""

    def forward(self, x):
        return few_rows(x, self.weight, self.bias)


class Columns(nn.Module):
    """The linear layer of weight [M, K] for one row x [..., K], from a copy of the weights."""

    def __init__(self, weight, bias=None):
        super().__init__()
        parts = math.gcd(weight.shape[1], torch.get_num_threads())
        self.weight = weight.T.contiguous().view(parts, -1, len(weight))             # [., K / ., M]
        self.bias = bias

    def forward(self, x):
        y = torch.bmm(x.view(len(self.weight), 1, -1), self.weight).sum(0)           # [1, M]
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)


def join(layers, columns=False):
    """One layer with copies of the weights of several of one input, end to end, to run without
    gradients: of the first one's class, or for one row `Columns`."""
    copies = {name: torch.cat([getattr(layer, name).detach() for layer in layers])
              for name, _ in layers[0].named_parameters()}
    if columns:
        return Columns(**copies)
    joined = nn.utils.skip_init(type(layers[0]), *copies["weight"].T.shape, "bias" in copies)
    joined.load_state_dict(copies, assign=True)
    return joined.requires_grad_(False)
