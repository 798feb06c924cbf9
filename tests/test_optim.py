"""kernels/optim.py: steps over many tensors against the formula and torch's AdamW."""

import copy

import pytest
import torch
from conftest import DEVICE

from kernels.optim import MuonAdamW, reference

PLAIN = ("head",)


def model():
    torch.manual_seed(0)
    return torch.nn.ModuleDict(dict(
        wide=torch.nn.Linear(16, 32), tall=torch.nn.Linear(32, 16, False), alike=torch.nn.Linear(16, 32),
        embed=torch.nn.Embedding(9, 16), head=torch.nn.Linear(16, 4),
        conv=torch.nn.Conv3d(4, 8, 3))).to(DEVICE)


def test_many_tensors_step_as_one_by_one(monkeypatch):
    """In float32, where errors are of rounding alone; a parameter without a gradient rests."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    ours = model()
    optimizer, plain = MuonAdamW(ours, PLAIN), dict(copy.deepcopy(ours).named_parameters())
    states = {name: {} for name in plain}
    for step in range(1, 5):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * step
        for name, p in ours.named_parameters():
            p.grad = torch.randn_like(p) if name != "wide.bias" else None
            if p.grad is not None:
                is_muon = p.dim() >= 2 and not name.startswith(("embed", "head"))
                plain[name] = reference(plain[name], p.grad, states[name], 0.01 * step, step, is_muon)
        optimizer.step()
        for name, p in ours.named_parameters():
            muon_on_gpu = DEVICE != "cpu" and "momentum" in states[name]
            torch.testing.assert_close(p, plain[name], rtol=1e-4, atol=2e-2 if muon_on_gpu else 1e-5)
        optimizer.zero_grad()
    assert ours["wide"].bias not in optimizer.state or not optimizer.state[ours["wide"].bias]
    for name, p in ours.named_parameters():
        assert set(optimizer.state[p]) - {"step"} == set(states[name])


@pytest.mark.parametrize("shape", [(8, 16), (16, 8), (6, 2, 2, 2)])
def test_muon_step_is_orthogonal_and_adamw_is_torchs(shape):
    torch.manual_seed(0)
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(torch.randn(shape, device=DEVICE))
    layer.bias = torch.nn.Parameter(torch.randn(8, device=DEVICE))
    before = layer.weight.detach().clone()
    layer.weight.grad, layer.bias.grad = torch.randn_like(layer.weight), torch.randn_like(layer.bias)
    twin = torch.nn.Parameter(layer.bias.detach().clone())
    twin.grad = layer.bias.grad.clone()
    theirs = torch.optim.AdamW([twin], lr=0.01, betas=(0.9, 0.99), weight_decay=0.0)
    ours = MuonAdamW(layer, weight_decay=0.0)
    for group in ours.param_groups:
        group["lr"] = 0.01
    for _ in range(3):
        ours.step()
        theirs.step()
    assert torch.allclose(layer.bias, twin, atol=1e-7)
    update = (before - layer.weight.detach()).flatten(1)
    values = torch.linalg.svdvals(update / (3 * 0.01 * 0.2 * max(update.shape)**0.5))
    assert 0.6 < values.min() and values.max() < 1.3
