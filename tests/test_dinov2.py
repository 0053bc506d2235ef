"""dinov2.py against its fact sheet's oracles, slow versions, dino.py and timm."""

import copy
import json
import math
import re

import pytest
import timm
import torch
import torch.nn.functional as F
import tyro
from conftest import features_of, run_processes, tiny_args

import convert
import dino
import dinov2
import eval_linear
from dinov2 import (
    DINOv2,
    DINOv2ViT,
    cosine_schedule,
    dino_losses,
    draw_masks,
    ibot_loss,
    koleo_loss,
    momentum_update,
    monitor,
    move_center,
    parameter_groups,
    resize_positions,
    sinkhorn_knopp,
    target_moments,
    to_timm,
)

DOUBLE = torch.float64
MEAN, STD = (torch.tensor(numbers).view(3, 1, 1) for numbers in (dinov2.MEAN, dinov2.STD))


def logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny_vit(**options):
    torch.manual_seed(0)
    net = DINOv2ViT("vit_nano", 32, 8, **options).eval()
    with torch.no_grad():
        for p in net.parameters():  # away from what the initialisation makes 0 or alike
            p += 0.05 * torch.randn_like(p)
    return net


def hidden_patches(masks):
    """Of masks (2 B, N), one by one: places of the hidden patches among all, and their weights."""
    places = [i * masks.shape[1] + j for i, j in masks.nonzero().tolist()]
    weights = [1 / (masks[i].sum().item() * len(masks)) for i, _ in masks.nonzero().tolist()]
    return torch.tensor(places, dtype=torch.long), torch.tensor(weights)


# Sinkhorn-Knopp and centre: oracles 1 and 10


def slow_sinkhorn(teacher_logits, temp, iterations=3):
    """The official order, in a K x R matrix: https://github.com/facebookresearch/dinov2, Sinkhorn-Knopp."""
    q = (teacher_logits.double() / temp).exp().T
    k, n = q.shape
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(dim=1, keepdim=True) / k
        q = q / q.sum(dim=0, keepdim=True) / n
    return (q * n).T


def test_sinkhorn_by_hand():
    q = sinkhorn_knopp(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), 1.0)
    torch.testing.assert_close(
        q, torch.tensor([[0.622358, 0.377642], [0.377439, 0.622561]]), atol=1e-6, rtol=0
    )
    assert q.sum(dim=0).tolist() == pytest.approx([0.999797, 1.000203], abs=1e-6)
    limit = sinkhorn_knopp(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), 1.0, iterations=60)[0, 0].item()
    assert limit == pytest.approx(math.sqrt(math.e) / (1 + math.sqrt(math.e)), abs=1e-6)
    torch.testing.assert_close(sinkhorn_knopp(logits(1, 2).expand(5, 2), 0.04), torch.full((5, 2), 0.5))


@pytest.mark.parametrize("rows, prototypes, temp", [(32, 8, 0.07), (6, 24, 0.04)])
def test_sinkhorn_rows_and_columns(rows, prototypes, temp):
    t = F.normalize(logits(rows, 16), dim=1) @ F.normalize(logits(prototypes, 16, seed=1), dim=1).T
    q = sinkhorn_knopp(t, temp)
    torch.testing.assert_close(q.double(), slow_sinkhorn(t, temp), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(q.sum(dim=1), torch.ones(rows))
    even = sinkhorn_knopp(t, temp, iterations=200)
    torch.testing.assert_close(
        even.sum(dim=0), torch.full((prototypes,), rows / prototypes), atol=1e-3, rtol=0
    )
    torch.testing.assert_close(sinkhorn_knopp(t + 5, temp), q, atol=1e-4, rtol=1e-3)
    each = t + 0.05 * logits(rows, 1, seed=2)  # one constant a row: the same in the limit alone
    assert (sinkhorn_knopp(each, temp) - q).abs().max() > 1e-4
    torch.testing.assert_close(sinkhorn_knopp(each, temp, iterations=200), even, atol=1e-4, rtol=1e-3)
    assert torch.isfinite(sinkhorn_knopp(40 * t, temp)).all()  # exp() of it would be infinite
    assert sinkhorn_knopp(t[:0], temp).shape == (0, prototypes)  # a process without hidden patches


def test_center():
    center, t = torch.zeros(1, 3), logits(5, 3)
    assert move_center(center, t, 0.9) is center
    torch.testing.assert_close(center, 0.1 * t.mean(dim=0, keepdim=True))
    theirs = torch.ones(1, 3)
    dino.update_center(theirs, t[:4].view(2, 2, 3), 0.9)
    torch.testing.assert_close(move_center(torch.ones(1, 3), t[:4], 0.9), theirs)
    assert torch.isfinite(move_center(torch.ones(1, 3), t[:0], 0.9)).all()


def test_losses_targets_and_center_are_computed_in_float32_or_better():
    student, teacher, weights = logits(4, 3, 9), logits(2, 3, 9, seed=1), logits(6).abs()
    rows, q = teacher.flatten(0, 1), teacher.softmax(dim=2)
    calls = [
        lambda to: sum(dino_losses(to(student), q, 0.1)),
        lambda to: ibot_loss(to(rows), q.flatten(0, 1), weights, 0.1),
        lambda to: koleo_loss(to(rows)),
        lambda to: sinkhorn_knopp(to(rows), 0.04),
        lambda to: move_center(torch.zeros(1, 9), to(rows), 0.9),
    ]
    for call in calls:
        low, expected = call(torch.Tensor.bfloat16), call(lambda x: x.bfloat16().float())
        assert low.dtype == torch.float32 and torch.equal(low, expected)
    q, weights = q.to(DOUBLE), weights.to(DOUBLE)
    assert all(call(torch.Tensor.double).dtype == DOUBLE for call in calls[:4])
    assert move_center(torch.zeros(1, 9).to(DOUBLE), rows.to(DOUBLE), 0.9).dtype == DOUBLE


def test_no_gradient_into_targets():
    teacher = logits(6, 5).requires_grad_()
    assert not sinkhorn_knopp(teacher, 0.1).requires_grad
    assert not dinov2.teacher_targets(teacher, torch.zeros(1, 5), 0.1).requires_grad
    center = move_center(torch.zeros(1, 5), teacher, 0.9)
    assert not center.requires_grad and center.grad_fn is None


# DINO, iBOT, KoLeo: oracles 2, 3, 4


def test_dino_losses():
    k, student, targets = 7, logits(10, 3, 7), logits(2, 3, 7, seed=1).mul(9).softmax(dim=2)
    local, between = dino_losses(student, targets, 0.1)
    ce = lambda u, v: -(targets[u] * (student[v] / 0.1).log_softmax(dim=1)).sum(dim=1).mean()  # noqa: E731
    slow = sum(ce(u, v) for u in (0, 1) for v in range(2, 10)) / 18
    torch.testing.assert_close(local, slow)
    torch.testing.assert_close(between, (ce(0, 1) + ce(1, 0)) / 18)
    uniform = torch.zeros(10, 3, k)
    parts = torch.stack(dino_losses(uniform, targets, 0.1)) / math.log(k)
    torch.testing.assert_close(parts, torch.tensor([16 / 18, 2 / 18]))  # oracle 4
    t, center = logits(2, 3, k, seed=2), logits(1, k, seed=3)
    theirs = dino.dino_loss(student, t, center, 0.1, 0.5)
    ours = sum(dino_losses(student, dinov2.teacher_targets(t, center, 0.5), 0.1))
    torch.testing.assert_close(ours, theirs)
    local, between = dino_losses(student[:2], targets, 0.1)  # the quirk: over 3 pairs where there are 2
    assert local == 0 and between.item() == pytest.approx((ce(0, 1) + ce(1, 0)).item() / 3, rel=1e-5)


def test_ibot_by_hand():
    """K = 2, one-hot targets, student logits for a cross-entropy of 1."""
    one = torch.tensor([0.0, math.log(math.e - 1)])
    for counts, expected in (((2, 1), 1.0), ((2, 0), 0.5)):
        masks = torch.arange(4).expand(2, 4) < torch.tensor(counts)[:, None]
        places, weights = hidden_patches(masks)
        student, q = one.expand(len(places), 2), F.one_hot(torch.zeros(len(places)).long(), 2).float()
        assert ibot_loss(student, q, weights, 1.0).item() == pytest.approx(expected)


def test_losses_of_a_uniform_collapse():
    """Section 9: K = 65536, eight local crops, half of the crops masked."""
    k = 65536
    even = torch.full((2, 1, k), 1 / k)
    local, between = dino_losses(torch.zeros(10, 1, k), even, 0.1)
    assert (local.item(), between.item()) == pytest.approx((9.858, 1.232), rel=5e-4)
    places, weights = hidden_patches(torch.tensor([[True, True, False], [False] * 3]))
    assert ibot_loss(torch.zeros(2, k), even[:, 0], weights, 0.1).item() == pytest.approx(5.545, rel=5e-4)


def test_ibot_is_the_slow_one():
    """Over all patches of all crops, with those that are hidden picked one by one."""
    masks = torch.rand(6, 16, generator=torch.Generator().manual_seed(0)) < 0.3
    masks[2] = False
    student, targets = logits(6, 16, 5).requires_grad_(), logits(6, 16, 5, seed=1).softmax(dim=2)
    slow = 0
    for i in range(6):
        for j in range(16):
            if masks[i, j]:
                ce = -(targets[i, j] * (student[i, j] / 0.1).log_softmax(dim=0)).sum()
                slow = slow + ce / masks[i].sum() / 6
    places, weights = hidden_patches(masks)
    loss = ibot_loss(student.flatten(0, 1)[places], targets.flatten(0, 1)[places], weights, 0.1)
    torch.testing.assert_close(loss, slow)
    loss.backward()
    assert not student.grad[~masks].any() and student.grad[masks].abs().sum(dim=1).min() > 0
    none = hidden_patches(masks & False)
    assert ibot_loss(student.flatten(0, 1)[none[0]], targets.flatten(0, 1)[none[0]], none[1], 0.1) == 0


def test_koleo():
    assert koleo_loss(torch.eye(2)).item() == pytest.approx(-math.log(math.sqrt(2)), abs=1e-6)
    angles = torch.arange(3) * 2 * math.pi / 3
    triangle = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert koleo_loss(triangle).item() == pytest.approx(-math.log(math.sqrt(3)), abs=1e-6)
    assert koleo_loss(triangle * torch.tensor([[1.0], [7.0], [0.2]])).item() == pytest.approx(
        -0.549306, abs=1e-6
    )
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])  # with -1 on the diagonal it were 8.42
    assert koleo_loss(opposite).item() == pytest.approx(-math.log(2), abs=1e-6)
    x = logits(9, 5).requires_grad_()
    unit = F.normalize(x, dim=1)
    least = [min((unit[i] - unit[j]).norm() for j in range(9) if j != i) for i in range(9)]
    slow = -torch.stack(least).log().mean()
    torch.testing.assert_close(koleo_loss(x), slow, atol=1e-5, rtol=1e-5)
    (expected,), (grad,) = torch.autograd.grad(slow, x), torch.autograd.grad(koleo_loss(x), x)
    torch.testing.assert_close(grad, expected, atol=1e-5, rtol=1e-4)
    same = koleo_loss(torch.ones(4, 384).half())
    assert 10 < same < 20  # a finite punishment of duplicates, in float32 also of half precision


# Masks: oracle 5


@pytest.mark.parametrize("side", [4, 7, 14])
def test_masks(side):
    n, short, empty = side**2, 0, 0
    for seed in range(20):
        masks = draw_masks(9, range(9), (side, side), (0.1, 0.5), 0.5, seed)
        counts = sorted(masks.sum(dim=1).tolist(), reverse=True)
        assert masks.shape == (9, n) and masks.dtype == torch.bool and not any(counts[4:])
        edges = [0.1, 0.2, 0.3, 0.4, 0.5]
        bounds = [int(n * high) for high in edges[:0:-1]]
        assert all(count <= bound for count, bound in zip(counts, bounds, strict=False))
        empty += counts[3] == 0
        assert counts[2] > 0  # int(9 * 0.5) crops have hidden patches, but for the draws below
        lows = [int(n * low) for low in edges[3::-1]]
        short += sum(count < low for count, low in zip(counts, lows, strict=False))
        parts = [draw_masks(9, mine, (side, side), (0.1, 0.5), 0.5, seed) for mine in ((0, 1, 5), (2, 3))]
        assert torch.equal(parts[0], masks[[0, 1, 5]]) and torch.equal(parts[1], masks[2:4])
    assert empty <= (4 if side == 4 else 0)  # ten draws may fail to find a block of one patch of 16
    assert short <= 8  # a mask may fall a few patches short of its count, and so of its part
    assert not draw_masks(8, range(8), (side, side), (0.1, 0.5), 0.0, 0).any()
    assert not torch.equal(masks, draw_masks(9, range(9), (side, side), (0.1, 0.5), 0.5, 99))


def test_masks_are_stratified_blocks():
    masks = draw_masks(400, range(400), (16, 16), (0.1, 0.5), 0.5, 3)
    counts = masks.sum(dim=1).double()
    used = counts[counts > 0] / 256
    assert len(used) == 200 and used.mean().item() == pytest.approx(0.3, abs=0.01)
    exact = torch.linspace(0.1, 0.5, 201)[:-1].double() + 0.001  # one u in each two thousandths
    assert (used.sort().values - exact).abs().mean() < 0.01
    grid = masks[counts > 0].view(-1, 16, 16).double()
    alike = (grid[:, 1:] == grid[:, :-1]).double().mean()
    assert alike > 0.8  # blocks, not grains: those would have 0.58


# The model: oracles 7 to 11


def arguments(registers=0):
    """DESIGN 6."""
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4, "num_classes": 0}
    more = {"reg_tokens": registers, "no_embed_class": True} if registers else {}
    return shape | {"init_values": 1e-5} | more


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("size", [(32, 32), (16, 48)])
@torch.no_grad()
def test_vit_is_timm_s(registers, size):
    net, x = tiny_vit(registers=registers), logits(2, 3, *size)
    state = to_timm(copy.deepcopy(net.state_dict()))
    grid = [side // 8 for side in size]
    if size != (32, 32):  # as in the official training, with registers, too
        positions = state["pos_embed"][:, -16:].view(1, 4, 4, -1).permute(0, 3, 1, 2)
        scale = [(side + 0.1) / 4 for side in grid]
        new = F.interpolate(positions, scale_factor=scale, mode="bicubic").flatten(2).mT
        state["pos_embed"] = torch.cat([state["pos_embed"][:, :-16], new], dim=1)
    theirs = timm.models.VisionTransformer(**arguments(registers) | {"img_size": size}).eval()
    theirs.load_state_dict(state)
    torch.testing.assert_close(net(x), theirs.forward_features(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("registers", [0, 4])
def test_names_of_timm_share_the_memory(registers):
    """What --init writes under timm's names is the network's; what goes from [CLS]'s position into its token
    changes no feature."""
    net, x = tiny_vit(registers=registers), logits(2, 3, 32, 32)
    with torch.no_grad():
        before = net(x)
        named = to_timm(net.state_dict())
        torch.testing.assert_close(net(x), before)
        assert "mask_token" not in named and ("reg_token" in named) == bool(registers)
        for tensor in named.values():
            tensor.copy_(torch.randn_like(tensor))
        theirs = timm.models.VisionTransformer(**arguments(registers)).eval()
        theirs.load_state_dict(named)
        torch.testing.assert_close(net(x), theirs.forward_features(x), atol=1e-4, rtol=1e-4)


def test_positions():
    ramp = torch.arange(16.0).repeat(16)[None, :, None]
    resized = resize_positions(torch.cat([torch.full((1, 1, 1), 7.0), ramp], dim=1), 7, 7)
    expected = [0.5316, 2.8402, 5.1762, 7.4141, 9.6084, 11.8571, 14.2062]
    torch.testing.assert_close(resized[0, 1:, 0].view(7, 7), torch.tensor([expected] * 7), atol=1e-4, rtol=0)


@torch.no_grad()
def test_registers():
    net, x = tiny_vit(registers=4), logits(2, 3, 32, 32)
    tokens = net(x)
    assert tokens.shape == (2, 1 + 4 + 16, 128) and net.pos_embed.shape == (1, 17, 128) and net.registers == 4
    order = torch.tensor([2, 0, 3, 1])
    net.register_tokens.data = net.register_tokens[:, order]
    torch.testing.assert_close(net(x)[:, 1:5], tokens[:, 1:5][:, order], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(net(x)[:, 5:], tokens[:, 5:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_hidden_patches_are_not_seen():
    """Oracle 9, and with a part hidden: other pixels there change nothing, pixels elsewhere do."""
    net, a, b = tiny_vit(), logits(2, 3, 32, 32), logits(2, 3, 32, 32, seed=1)
    every = torch.ones(2, 16, dtype=torch.bool)
    torch.testing.assert_close(net(a, every), net(b, every))
    masks = logits(2, 16, seed=2) > 0
    pixels = masks.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert torch.equal(net(torch.where(pixels, b, a), masks), net(a, masks))
    assert not torch.equal(net(torch.where(pixels, a, b), masks), net(a, masks))
    torch.testing.assert_close(net(a, ~every), net(a))


def test_initialisation_and_layer_scale():
    torch.manual_seed(0)
    net, x = DINOv2ViT("vit_nano", 32, 8, registers=4), logits(3, 17, 128)
    assert all((block.ls1.gamma == 1e-5).all() and (block.ls2.gamma == 1e-5).all() for block in net.blocks)
    assert 0.8e-6 < net.register_tokens.std() < 1.2e-6 and net.cls_token.abs().max() < 5e-6
    assert not net.mask_token.any() and net.mask_token.shape == (1, 128)
    assert net.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    linears = [m for m in net.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 24 and not any(m.bias.any() for m in linears)
    assert all(m.weight.std().item() == pytest.approx(0.02, rel=0.05) for m in linears)
    bound = 1 / math.sqrt(3 * 64)  # PyTorch's own of the convolution
    assert bound * 0.98 < net.patch_embed.proj.weight.abs().max() <= bound
    for block in net.blocks:
        block.ls1.gamma.data.zero_(), block.ls2.gamma.data.zero_()
    assert torch.equal(net.blocks(x), x)  # oracle 10


def test_stochastic_depth_skips_branches_of_single_images():
    """At the same rate in every block: an image keeps a branch, then twice as large, or skips it."""
    args = tiny_args("dinov2", drop_path_rate=0.5, layer_scale=1.0)
    assert [block.drop_path for block in DINOv2(args).backbone.blocks] == [0.5] * 6
    block, x = DINOv2(args).backbone.blocks[0], logits(64, 3, 128)
    for p in block.mlp.parameters():
        p.data.zero_()
    branch = block.attn(block.norm1(x))
    torch.manual_seed(0)
    y = block(x)
    grown = (y != x).flatten(1).any(dim=1)
    assert 16 < grown.sum() < 48
    torch.testing.assert_close(y[grown], (x + 2 * branch)[grown], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(block.eval()(x), x + branch, atol=1e-5, rtol=1e-5)


def test_official_names():
    """The released ViT-L/14 with registers, and a training's file of heads."""
    with torch.device("meta"):
        net = DINOv2ViT("vit_large", 518, 14, registers=4)
    shapes = {name: tuple(p.shape) for name, p in net.state_dict().items()}
    d, h = 1024, 4096
    expected = {"cls_token": (1, 1, d), "pos_embed": (1, 1370, d), "mask_token": (1, d)}
    expected |= {"register_tokens": (1, 4, d), "patch_embed.proj.weight": (d, 3, 14, 14)}
    expected |= {"patch_embed.proj.bias": (d,), "norm.weight": (d,), "norm.bias": (d,)}
    block = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.fc1": (h, d), "mlp.fc2": (d, h)}
    for i in range(24):
        for name, shape in block.items():
            expected |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
            expected[f"blocks.{i}.{name}"] = (d,)
    assert shapes == expected
    with torch.device("meta"):
        small = DINOv2ViT("vit_small", 518, 14).state_dict()
    assert small["blocks.11.mlp.fc1.weight"].shape == (1536, 384) and "register_tokens" not in small
    model = DINOv2(tiny_args("dinov2", registers=2))
    heads = {name for name in model.state_dict() if not name.startswith("backbone.")}
    layers = [f"mlp.{i}.{part}" for i in (0, 2, 4) for part in ("weight", "bias")]
    layers += ["last_layer.weight_g", "last_layer.weight_v"]
    assert heads == {f"{head}_head.{name}" for head in ("dino", "ibot") for name in layers}
    official = {name: torch.randn(tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict(official)  # strictly
    assert all(torch.equal(p, official[name]) for name, p in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())  # weight_g too, unlike DINO's
    shared = DINOv2(tiny_args("dinov2", shared_head=True))
    assert not any(name.startswith("ibot_head") for name in shared.state_dict())
    dino_head = dino.DINOHead(128, 64, 64).state_dict()
    assert {name: p.shape for name, p in dino_head.items()} == {
        name: p.shape for name, p in shared.dino_head.state_dict().items()
    }


def test_model_forward():
    model = DINOv2(tiny_args("dinov2"))
    crops, local = logits(4, 3, 32, 32), logits(6, 3, 16, 16, seed=1)
    masks = draw_masks(4, range(4), (4, 4), (0.3, 0.5), 0.5, 0)
    places, _ = hidden_patches(masks)
    features, cls_logits, patch_logits = model(crops, masks, places, local)
    x = model.backbone(crops, masks)
    torch.testing.assert_close(features, x[:, 0])
    torch.testing.assert_close(cls_logits[:4], model.dino_head(x[:, 0]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        cls_logits[4:], model.dino_head(model.backbone(local)[:, 0]), atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(patch_logits, model.ibot_head(x[:, 1:][masks]), atol=1e-5, rtol=1e-4)
    shared = DINOv2(tiny_args("dinov2", shared_head=True, registers=3))
    x, (_, _, patch_logits) = shared.backbone(crops), shared(crops, None, places)
    torch.testing.assert_close(patch_logits, shared.dino_head(x[:, 4:][masks]), atol=1e-5, rtol=1e-4)


# backbone.pt


@pytest.mark.parametrize("registers", [0, 2])
def test_backbone_is_the_teacher_and_where_init_starts(folder, tmp_path, registers):
    """In timm, strictly; in eval_linear.py; what convert.py makes of the official file; and --init."""
    flags = {"data": str(folder), "registers": registers}
    args = tiny_args("dinov2", **flags, epochs=1, momentum=0.5, run_dir=str(tmp_path / "run"))
    dinov2.train(args)
    path = str(tmp_path / "run/backbone.pt")
    saved = torch.load(path, weights_only=True)
    assert saved["arch_args"] == arguments(registers) | {"init_values": 0.1}
    model = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["model"]
    official = {k[17:]: v for k, v in model.items() if k.startswith("teacher.backbone.")}
    student = {k[17:]: v for k, v in model.items() if k.startswith("student.backbone.")}
    assert official["pos_embed"][:, 0].any() and official["pos_embed"].shape == (1, 17, 128)
    teacher = DINOv2ViT("vit_nano", 32, 8, registers).eval()
    teacher.load_state_dict(official)
    theirs = timm.models.VisionTransformer(**saved["arch_args"]).eval()
    theirs.load_state_dict(saved["state_dict"])
    x = logits(2, 3, 32, 32)
    with torch.no_grad():
        tokens = teacher(x)
        torch.testing.assert_close(theirs.forward_features(x), tokens, atol=1e-5, rtol=1e-5)
        cls = features_of(eval_linear.load_backbone(path), x)
        torch.testing.assert_close(cls, tokens[:, 0], atol=1e-5, rtol=1e-5)
        mean = features_of(eval_linear.load_backbone(path, feature="mean"), x)
        torch.testing.assert_close(mean, tokens[:, 1 + registers :].mean(dim=1), atol=1e-5, rtol=1e-5)
        teacher.load_state_dict(student)
        assert (teacher(x) - tokens).abs().max() > 1e-4  # of the teacher, not of the student

    torch.save(official, tmp_path / "official.pth")
    convert.convert(convert.Args(str(tmp_path / "official.pth"), str(tmp_path / "converted.pt")))
    info = torch.load(tmp_path / "converted.pt", weights_only=True)
    assert info["state_dict"].keys() == saved["state_dict"].keys()
    assert all(torch.equal(tensor, saved["state_dict"][name]) for name, tensor in info["state_dict"].items())

    init = tiny_args("dinov2", **flags, epochs=0, seed=1, init=path, run_dir=str(tmp_path / "init"))
    dinov2.train(init)
    again = torch.load(tmp_path / "init/backbone.pt", weights_only=True)["state_dict"]
    assert all(torch.equal(tensor, again[name]) for name, tensor in saved["state_dict"].items())
    model = torch.load(tmp_path / "init/checkpoint.pt", weights_only=True)["model"]
    names = [name[8:] for name in model if name.startswith("student.")]
    assert len(names) > 100
    assert all(torch.equal(model[f"student.{name}"], model[f"teacher.{name}"]) for name in names)
    teacher.load_state_dict({k[17:]: v for k, v in model.items() if k.startswith("teacher.backbone.")})
    with torch.no_grad():
        torch.testing.assert_close(teacher(x), tokens, atol=1e-5, rtol=1e-5)


# Monitor: collapse.md's oracle 8


def seen(targets, losses=(0.5, 2.0, 3.0), h=None):
    """Metrics of the teacher, and what is wrong without its remedy, of targets (2, B, K)."""
    h = logits(16, 32) if h is None else h
    metrics, problems = monitor(target_moments(targets), h, torch.tensor(losses))
    assert set(problems.values()) <= set(metrics)  # by which the alarm sees whether it mends
    return metrics, [problem.split(";")[0] for problem in problems]


def test_metrics_of_the_teacher():
    k = 8
    uniform, words = seen(torch.full((2, 4, k), 1 / k))
    assert uniform["dinov2/teacher_entropy"] == pytest.approx(math.log(k))
    assert uniform["dinov2/information"] == pytest.approx(0, abs=1e-6) and words == ["uniform teacher"]
    losses = [uniform[f"dinov2/{name}_loss"] for name in ("dino", "ibot", "koleo")]
    assert losses == pytest.approx([0.5, 2, 3])
    same, words = seen(F.one_hot(torch.full((2, 4), 3), k).float())
    assert same["dinov2/teacher_entropy"] == same["dinov2/information"] == 0 and words == ["one-hot teacher"]
    apart, words = seen(F.one_hot(torch.arange(k).view(2, 4), k).float())
    assert apart["dinov2/information"] == pytest.approx(math.log(k)) and not words
    h = logits(20, 16, seed=3) + 5
    for name, value in dinov2.collapse_metrics(h, center=True).items():
        assert seen(torch.full((2, 4, k), 1 / k), h=h)[0][f"monitor/{name}"] == pytest.approx(value)


def test_each_problem_appears_when_it_should():
    """All targets nearly alike: below half of ln K their entropy says one-hot, above it uniform."""
    one = torch.zeros(2, 8, 16)
    one[..., 3] = 1
    soft = lambda share: share * one + (1 - share) / 16  # noqa: E731
    entropies = [seen(soft(share))[0]["dinov2/teacher_entropy"] for share in (0.9, 0.6)]
    assert entropies[0] < 0.5 * math.log(16) < entropies[1]
    assert [seen(soft(share))[1] for share in (1.0, 0.9)] == [["one-hot teacher"]] * 2
    assert [seen(soft(share))[1] for share in (0.6, 0.0)] == [["uniform teacher"]] * 2
    telling = (0.5 * one + 0.5 * F.one_hot(torch.arange(16).view(2, 8), 16)) * 0.98 + 0.02 / 16
    metrics, words = seen(telling)
    assert metrics["dinov2/information"] > 0.1 and not words


# Training


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def checkpoints(monkeypatch):
    """A list that fills with what is saved as checkpoint.pt."""
    states, save = [], dinov2.save_checkpoint

    def spy(path, **state):
        if "optimizer" in state:
            states.append(copy.deepcopy(state))
        save(path, **state)

    monkeypatch.setattr(dinov2, "save_checkpoint", spy)
    return states


# Learning rates and weight decay: oracle 6


def multipliers(depth, decay):
    dinov2.VITS["deep"] = (16, depth, 2)
    try:
        model = DINOv2(tiny_args("dinov2", arch="deep", registers=2))
    finally:
        del dinov2.VITS["deep"]
    groups = parameter_groups(model, decay, 0.2)
    names = {p: name for name, p in model.named_parameters()}
    assert sum(len(group["params"]) for group in groups) == len(names)
    return {names[p]: group for group in groups for p in group["params"]}


def test_learning_rates_by_layer():
    of = multipliers(2, 0.9)
    for name in ("cls_token", "pos_embed", "mask_token", "register_tokens"):
        assert of[f"backbone.{name}"]["scale"] == pytest.approx(0.729) and of[f"backbone.{name}"]["decays"]
    assert of["backbone.patch_embed.proj.weight"]["scale"] == pytest.approx(0.1458)
    assert of["backbone.patch_embed.proj.bias"]["scale"] == pytest.approx(0.1458)
    assert of["backbone.blocks.0.attn.qkv.weight"]["scale"] == pytest.approx(0.81)
    assert of["backbone.blocks.1.ls2.gamma"]["scale"] == pytest.approx(0.9)
    for name in ("backbone.norm.weight", "dino_head.mlp.0.weight", "ibot_head.last_layer.weight_v"):
        assert of[name]["scale"] == 1
    large = multipliers(24, 0.9)
    assert large["backbone.cls_token"]["scale"] == pytest.approx(0.07179, abs=1e-5)
    assert large["backbone.patch_embed.proj.weight"]["scale"] == pytest.approx(0.014358, abs=1e-6)
    plain = {name for name, group in of.items() if not group["decays"]}
    assert plain == {name for name in of if re.search(r"\.bias$|norm|gamma", name)}
    last = {name for name, group in of.items() if group["last"]}
    assert last == {f"{head}_head.last_layer.weight_{x}" for head in ("dino", "ibot") for x in "gv"}
    assert all(of[name]["decays"] for name in last)


def test_what_the_optimizer_gets(folder, tmp_path, monkeypatch):
    """Rate and weight decay of each step, on no vector; frozen prototypes; clipping by part; the teacher
    after the step: with momentum 0 at the first it is the student that the optimiser has just left."""
    seen, step, states = [], torch.optim.AdamW.step, checkpoints(monkeypatch)
    built, build, start = [], dinov2.DINOv2, {}
    monkeypatch.setattr(dinov2, "DINOv2", lambda args: built.append(build(args)) or built[-1])

    def spy(self, *arguments):
        names = {p: name for name, p in built[0].named_parameters()}  # of the student
        start.setdefault("backbone.cls_token", built[0].backbone.cls_token.detach().clone())
        given = {}
        for group in self.param_groups:
            given |= {names[p]: (group["lr"], group["weight_decay"]) for p in group["params"]}
        parts = [[p.grad for p in part.parameters()] for part in built[0].children()]
        norms = [torch.stack([grad.norm() for grad in part]).norm().item() for part in parts]
        seen.append((given, norms))
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    flags = {"clip_norm": 1e-3, "freeze_last_layer": 2, "lr": 1e-4, "momentum": 0.0, "registers": 2}
    flags |= {"save_minutes": 0.0, "koleo_weight": 0.0, "batch_size": 20, "warmup_epochs": 0}
    dinov2.train(tiny_args("dinov2", data=str(folder), **flags, run_dir=str(tmp_path)))
    assert len(seen) == len(states) == 8
    for i, (given, norms) in enumerate(seen):
        lr, decay = cosine_schedule(i, 8, 0, 1e-4, 1e-6), cosine_schedule(i, 8, 0, 0.04, 0.4)
        assert given.keys() == {name for name, _ in built[0].named_parameters()}
        for name, (rate, strength) in given.items():
            scale = 0.2 if "patch_embed" in name else 1
            assert rate == pytest.approx(0 if "last_layer" in name and i < 4 else lr * scale)
            assert strength == pytest.approx(0 if re.search(r"\.bias$|norm|gamma", name) else decay)
        assert norms == pytest.approx([1e-3] * 3, rel=1e-2)  # backbone and two heads, each to 1e-3

    models = [state["model"] for state in states]
    for name in ("dino", "ibot"):
        layer = f"student.{name}_head.last_layer.weight_v"
        assert torch.equal(models[0][layer], models[3][layer])
        assert not torch.equal(models[3][layer], models[4][layer])
    names = [name[8:] for name in models[0] if name.startswith("student.")]
    assert all(torch.equal(models[0][f"teacher.{name}"], models[0][f"student.{name}"]) for name in names)
    assert not torch.equal(models[0]["student.backbone.cls_token"], start["backbone.cls_token"])
    name, m = "backbone.blocks.0.attn.qkv.weight", cosine_schedule(1, 8, 0, 0.0, 1.0)
    mixed = m * models[0][f"teacher.{name}"] + (1 - m) * models[1][f"student.{name}"]
    torch.testing.assert_close(models[1][f"teacher.{name}"], mixed, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(
    "flags, expected",
    [
        ({}, [0.07] * 6),
        ({"warmup_teacher_temp_epochs": 1}, [0.04, 0.07, 0.07, 0.07, 0.07, 0.07]),
        ({"warmup_teacher_temp_epochs": 2}, [0.04, 0.05, 0.06, 0.07, 0.07, 0.07]),
        ({"warmup_teacher_temp_epochs": 9}, [0.04 + 0.03 * i / 17 for i in range(6)]),
        ({"warmup_teacher_temp_epochs": 2, "sharpening": False}, [0.1] * 6),
    ],
)
def test_temperatures_of_a_run(folder, tmp_path, monkeypatch, flags, expected):
    """linspace of the official code, by steps: the same for [CLS] and patches."""
    temps, targets = [], dinov2.teacher_targets
    monkeypatch.setattr(dinov2, "teacher_targets", lambda *a: temps.append(a[2]) or targets(*a))
    flags = {"teacher_temp": 0.07, "epochs": 3, "batch_size": 20, "local_crops": 0} | flags
    dinov2.train(tiny_args("dinov2", data=str(folder), **flags, run_dir=str(tmp_path)))
    assert temps == pytest.approx([temp for temp in expected for _ in "12"])


@pytest.mark.parametrize("flags", [{}, {"centering": False}, {"sinkhorn": True}])
def test_centers_are_used_then_moved(folder, tmp_path, monkeypatch, flags):
    """Oracle 10: 0 in the first step, a tenth of its mean logits in the second; or never moved."""
    used, targets = [], dinov2.teacher_targets
    monkeypatch.setattr(
        dinov2, "teacher_targets", lambda t, c, temp: used.append((t, c.clone())) or targets(t, c, temp)
    )
    balanced, sinkhorn = [], dinov2.sinkhorn_knopp
    monkeypatch.setattr(dinov2, "sinkhorn_knopp", lambda *a: balanced.append(a) or sinkhorn(*a))
    args = tiny_args("dinov2", data=str(folder), epochs=1, batch_size=20, **flags, run_dir=str(tmp_path))
    dinov2.train(args)
    model = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    held = [model["centers.0"], model["centers.1"]]
    assert (len(used), len(balanced)) == ((0, 4) if "sinkhorn" in flags else (4, 0))
    if flags:
        assert not held[0].any() and not held[1].any()
        return
    for center, (first, start), (second, then) in zip(held, used[:2], used[2:], strict=True):
        mean, later = first.mean(dim=0, keepdim=True), second.mean(dim=0, keepdim=True)
        assert not start.any() and mean.abs().max() > 0.01
        torch.testing.assert_close(then, 0.1 * mean)
        torch.testing.assert_close(center, 0.09 * mean + 0.1 * later)


def test_koleo_takes_each_crop_alone(folder, tmp_path, monkeypatch):
    """Two calls of B rows: with the other crop of an image among them, that would be the nearest."""
    taken, made, forward = [], [], DINOv2.forward
    monkeypatch.setattr(dinov2, "koleo_loss", lambda x: taken.append(x.detach()) or koleo_loss(x))

    def spy(self, *arguments):
        outputs = forward(self, *arguments)
        made.append(outputs[0].detach())
        return outputs

    monkeypatch.setattr(DINOv2, "forward", spy)
    dinov2.train(tiny_args("dinov2", data=str(folder), epochs=1, batch_size=20, run_dir=str(tmp_path)))
    assert [x.shape for x in taken] == [(20, 128)] * 4
    assert torch.equal(torch.cat(taken), torch.cat(made[1::2]))  # of the student


def test_processes_draw_their_own_stochastic_depth(folder, tmp_path, monkeypatch):
    """Another for each step, seed and process, and masks by step: by key alone, whatever was drawn before."""
    keys, seeded = [], dinov2.seeded
    monkeypatch.setattr(dinov2, "seeded", lambda *key: keys.append(key) or seeded(*key))
    flags = {"data": str(folder), "epochs": 1, "seed": 7, "drop_path_rate": 0.5}
    dinov2.train(tiny_args("dinov2", **flags, run_dir=str(tmp_path)))
    for stream, more in ((3, ()), (4, (0,)), (5, ())):
        assert [key for key in keys if key[0] == stream] == [(stream, 7, step, *more) for step in range(5)]


def test_momentum_update():
    student, teacher = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    before = teacher.weight.detach().clone()
    momentum_update(student, teacher, 1.0)
    assert torch.equal(teacher.weight, before)
    momentum_update(student, teacher, 0.9)
    torch.testing.assert_close(teacher.weight, 0.9 * before + 0.1 * student.weight)


@pytest.mark.parametrize("local_crops, shared_head", [(3, False), (0, True)])
def test_what_the_networks_and_losses_get(folder, tmp_path, monkeypatch, local_crops, shared_head):
    """The teacher sees global crops, unmasked, the student masked ones; weights, targets, total, picture."""
    calls, forward, losses, pages, pixels = [], DINOv2.forward, [], [], []

    def spy_forward(self, *given):
        calls.append((self, given, forward(self, *given)))
        return calls[-1][-1]

    def spy_loss(*given):
        losses.append((given, ibot_loss(*given)))
        return losses[-1][-1]

    monkeypatch.setattr(DINOv2, "forward", spy_forward)
    monkeypatch.setattr(dinov2, "ibot_loss", spy_loss)
    save, augment_crops, masks_of = dinov2.torchvision.utils.save_image, dinov2.augment_crops, []
    save_image = lambda x, path: pages.append((x, path.name)) or save(x, path)  # noqa: E731
    monkeypatch.setattr(dinov2.torchvision.utils, "save_image", save_image)
    crops_of = lambda *a: pixels.append(augment_crops(*a)) or pixels[-1]  # noqa: E731
    monkeypatch.setattr(dinov2, "augment_crops", crops_of)
    draw = lambda *a: masks_of.append((a, draw_masks(*a))) or masks_of[-1][-1]  # noqa: E731
    monkeypatch.setattr(dinov2, "draw_masks", draw)
    flags = {"koleo_weight": 0.3, "mask_ratios": (0.2, 0.6), "local_crops": local_crops, "epochs": 1}
    flags |= {"shared_head": shared_head, "seed": 5}
    dinov2.train(tiny_args("dinov2", data=str(folder), **flags, run_dir=str(tmp_path)))

    (teacher, taught, targets), (student, given, outputs) = calls[:2]
    assert not teacher.training and student.training and len(calls) == 10
    assert not targets[0].requires_grad and outputs[0].requires_grad
    assert taught[1] is None and len(taught) == 3 and torch.equal(taught[0], given[0])
    torch.testing.assert_close(given[0], (pixels[0][0] - MEAN) / STD)
    masks, places = given[1:3]
    (crops, mine, grid, ratios, share, seed), drawn = masks_of[0]
    assert (crops, mine, grid, ratios, share) == (16, [*range(16)], (4, 4), (0.2, 0.6), 0.5)
    assert seed == dinov2.seeded(5, 5, 0).initial_seed() and torch.equal(masks, drawn)
    assert given[0].shape == (16, 3, 32, 32) and len(given) == (4 if local_crops else 3)
    if local_crops:
        torch.testing.assert_close(given[3], (pixels[0][1] - MEAN) / STD)
        assert given[3].shape == (24, 3, 16, 16)

    expected, weights = hidden_patches(masks)
    (patch_logits, q, used, temp), _ = losses[0]
    assert torch.equal(places, expected) and torch.equal(taught[2], places) and temp == 0.1
    torch.testing.assert_close(used, weights)
    assert patch_logits is outputs[2]
    torch.testing.assert_close(q, (targets[2] / 0.02).softmax(dim=1))
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    q = (targets[1] / 0.02).softmax(dim=1).unflatten(0, (2, -1))
    dinos = sum(dino_losses(outputs[1].unflatten(0, (2 + local_crops, -1)), q, 0.1)).item()
    koleo = sum(koleo_loss(rows) for rows in outputs[0].chunk(2)).item()
    ibot = losses[0][-1].item()
    found = [line[f"dinov2/{name}_loss"] for name in ("dino", "ibot", "koleo")]
    assert found == pytest.approx([dinos, ibot, koleo], rel=1e-5)
    assert line["train/loss"] == pytest.approx(dinos + ibot + 0.3 * koleo, rel=1e-5)

    [(page, name)] = pages
    shown = masks.view(16, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert name == "views.png" and torch.equal(page, torch.where(shown, 0, pixels[0][0]))


@pytest.mark.parametrize("flags", [{}, {"sinkhorn": True}])
def test_two_processes_are_one(tmp_path, flags):
    """train() itself in float64: masks, centres, Sinkhorn-Knopp; 9 masks of 18 crops, not the same number in
    each half. KoLeo is off, it stays within a process; so is stochastic depth."""
    code = f"""
import torch, dinov2
augment = dinov2.augment_crops
def augment_in_float32(crops, u, *more):
    torch.set_default_dtype(torch.float32)
    pixels = augment(crops, u.float(), *more)
    torch.set_default_dtype(torch.float64)
    return [x.double() for x in pixels]
dinov2.augment_crops = augment_in_float32
torch.set_default_dtype(torch.float64)
args = dinov2.Args(
    data="photos", image_size=16, local_size=8, patch_size=4, batch_size=18, epochs=2, warmup_epochs=0.5,
    workers=0, log_every=1, run_dir="RUN", out_dim=64, head_dim=64, lr=1e-3, koleo_weight=0.0,
    momentum=0.5, **{flags!r},
)
dinov2.train(args)
"""
    (tmp_path / "photos").mkdir()
    for i in range(54):
        dinov2.demo_image(i)[0].save(tmp_path / "photos" / f"{i:03d}.png")
    runs = []
    for n in (1, 2):
        run_processes(tmp_path, code.replace("RUN", f"run{n}"), n)
        lines = (tmp_path / f"run{n}" / "metrics.jsonl").read_text().splitlines()
        runs.append([json.loads(line) for line in lines])
    assert len(runs[0]) == len(runs[1]) == 6
    for line, first in zip(runs[1], runs[0], strict=True):
        for tag in first.keys() - {"perf/images_per_second", "dinov2/koleo_loss"}:
            assert line[tag] == pytest.approx(first[tag], rel=1e-6, abs=1e-6), tag
    one, two = (torch.load(tmp_path / f"run{n}/checkpoint.pt", weights_only=True)["model"] for n in (1, 2))
    for name in ("centers.0", "centers.1"):
        assert one[name].dtype == DOUBLE and bool(flags) != (one[name].abs().max() > 1e-3)
        torch.testing.assert_close(two[name], one[name], atol=1e-8, rtol=1e-6)
    names = [name for name in one if name.startswith("teacher.")]
    one, two = (torch.cat([model[name].flatten() for name in names]) for model in (one, two))
    assert (two - one).norm() < 1e-6 * one.norm()


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"patch_size": 5}, "--image-size, --local-size [32, 16]: give multiples of --patch-size 5"),
        ({"local_min_scale": 0.5}, "--local-min-scale 0.5: must be above 0 and at most 0.4"),
        ({"mask_ratios": (0.1, 1.5)}, "--mask-ratios (0.1, 1.5): must be at least 0 and at most 1"),
        ({"drop_path_rate": 1.5}, "--drop-path-rate 1.5: must be at least 0 and at most 1"),
        ({"koleo_weight": -0.1}, "--koleo-weight -0.1: must be at least 0"),
        ({"layer_scale": 0.0}, "--layer-scale 0.0: must be above 0"),
        ({"registers": -1}, "--registers -1: must be at least 0"),
        ({"momentum": 1.5}, "--momentum 1.5: must be at least 0 and at most 1"),
    ],
)
def test_bad_flags(tmp_path, flags, message):
    with pytest.raises(SystemExit) as stop:
        dinov2.train(tiny_args("dinov2", run_dir=str(tmp_path / "run"), **flags))
    assert message in str(stop.value) and not (tmp_path / "run").exists()


def test_paper_command_is_the_sheet_s():
    """ViT-L/16 on ImageNet-1k: 100 "epochs" of 1250 steps of 2048 images are 200 passes over 1.28 million."""
    command = re.search(
        r"torchrun --nnodes 4 --nproc-per-node 8 dinov2\.py(.*?)(?<!\\)\n", dinov2.__doc__, re.S
    )[1]
    args = tyro.cli(dinov2.Args, args=command.replace("\\\n", " ").split())
    sizes = args.image_size, args.local_size, args.local_crops, args.patch_size, args.arch
    assert sizes == (224, 96, 8, 16, "vit_large") and args.registers == 0
    assert (args.min_scale, args.local_min_scale, args.jitter) == (0.32, 0.05, (0.4, 0.4, 0.2, 0.1))
    assert (args.crop_blurs, args.solarize) == ((0.0, 0.9, 0.5), 0.2)  # as applied
    assert args.mask_ratios == (0.1, 0.5)
    assert (args.layer_scale, args.drop_path_rate, args.shared_head) == (1e-5, 0.3, True)
    assert (args.head_dim, args.out_dim) == (2048, 65536)
    assert DINOv2(tiny_args("dinov2")).dino_head.last_layer.weight_v.shape == (64, 256)
    assert (args.koleo_weight, args.sinkhorn) == (0.1, False)
    assert (args.warmup_teacher_temp, args.teacher_temp, args.student_temp) == (0.04, 0.07, 0.1)
    assert (args.momentum, args.weight_decay, args.final_weight_decay) == (0.992, 0.04, 0.4)
    assert (args.layerwise_decay, args.patch_embed_lr, args.clip_norm) == (0.9, 0.2, 3.0)
    assert (args.batch_size, args.epochs) == (2048, 200)
    assert args.lr == pytest.approx(0.004 * math.sqrt(2), rel=1e-4)
    passes = 1250 * 2048 / 1_281_167
    for ours, official in ((args.epochs, 100), (args.warmup_epochs, 10), (args.freeze_last_layer, 1)):
        assert ours == round(official * passes)
    assert args.warmup_teacher_temp_epochs == round(30 * passes)


@pytest.mark.slow
def test_the_demo_learns(tmp_path):
    """python dinov2.py: 5 points above the untrained ViT in logistic regression and in k-NN."""
    dinov2.train(dinov2.Args(run_dir=str(tmp_path)))
    path = str(tmp_path / "backbone.pt")
    for mode in ("logreg", "knn"):
        scores = [
            eval_linear.evaluate(eval_linear.Args(backbone=name, mode=mode))["top1"]
            for name in (path, f"random:{path}")
        ]
        assert scores[0] > scores[1] + 5, mode
