"""Muon against the exact orthogonal factor, PyTorch's own Muon, and AdamW."""

import pytest
import torch
from torch import nn

from sdlite.training.muon import ADAMW_SHARE, Muon, orthogonalized


def matrix(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(24, 24), (16, 144), (144, 16)])
def test_its_direction_is_that_of_the_orthogonal_factor(shape):
    given = matrix(*shape)
    u, _, v = torch.linalg.svd(given, full_matrices=False)
    ours = orthogonalized(given)
    assert torch.cosine_similarity(ours.flatten(), (u @ v).flatten(), dim=0) > 0.98
    values = torch.linalg.svdvals(ours)
    assert values.min() > 0.6 and values.max() < 1.25


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 4))


def steps(module, optimizers, number=3):
    x = matrix(8, 6, seed=1)
    for _ in range(number):
        for optimizer in optimizers:
            optimizer.zero_grad()
        module(x).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    return module


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch has Muon from 2.9 on")
def test_equals_pytorchs_muon_and_adamw():
    ours, theirs = small(), small()
    matrices = [[p for p in m.parameters() if p.ndim > 1] for m in (ours, theirs)]
    others = [[p for p in m.parameters() if p.ndim == 1] for m in (ours, theirs)]
    options = {"lr": 1e-3, "weight_decay": 0.1}
    steps(ours, [Muon(matrices[0], others[0], **options)])
    peers = [
        torch.optim.Muon(matrices[1], **options, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others[1], lr=1e-3 * ADAMW_SHARE, weight_decay=0.1, betas=(0.9, 0.99)),
    ]
    steps(theirs, peers)
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(
            weight, theirs.state_dict()[name], atol=2.5e-4, rtol=0
        )  # three steps of 7e-4; theirs in bfloat16


def test_a_kernel_is_the_matrix_of_its_output_channels():
    conv, linear = nn.Conv2d(3, 8, 3, bias=False), nn.Linear(27, 8, bias=False)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.flatten(1))
    gradient = matrix(8, 27)
    for module in (conv, linear):
        module.weight.grad = gradient.view_as(module.weight).clone()
        Muon([module.weight], [], lr=0.1, weight_decay=0.0).step()
    torch.testing.assert_close(conv.weight.flatten(1), linear.weight)


def test_an_update_has_adamws_size_whatever_the_gradients():
    for size in (1e-6, 1.0, 1e6):
        layer = nn.Linear(200, 100, bias=False)
        before = layer.weight.detach().clone()
        layer.weight.grad = size * matrix(100, 200)
        Muon([layer.weight], [], lr=1.0, weight_decay=0.0).step()
        assert (layer.weight - before).square().mean().sqrt().item() == pytest.approx(0.2, rel=0.2)
