"""Linear layers on a CPU: y = x W^T + b.

Layout: x [..., K], W [M, K], b [M] or None, y [..., M]. torch gives matrix products on a CPU to
MKL; oneDNN is faster in float32:
- Without gradients its own linear layer, which has no backward: without it captioning 16 clips took
  6% (AVX-512) to 20% (AVX2) longer, one clip 4 to 10%.
- With gradients, where AMD's CPUs have AVX-512, of which MKL leaves half unused, a convolution of
  one pixel (with AVX2 that is slower), from 2^26 multiply-adds on: steps of the demo's denoiser
  and captioner, which are smaller, were 3 to 8% slower with it.

What lost (two cores, share of its stage's time that it won): products with parts of the weights for
up to 32 rows, at most 9%; copies of the weights by columns for one row, -9%; q, k, v and gate, up
as one product each, at most 9%.
"""

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
    """F.linear of x [..., K], weight [M, K]; on a CPU in float32 by oneDNN where that is faster."""
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


class Linear(nn.Linear):
    """nn.Linear by `linear`."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)
