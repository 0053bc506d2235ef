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
    add_branch,
    dino_losses,
    dino_schedule,
    draw_masks,
    hidden_patches,
    ibot_loss,
    koleo_loss,
    momentum_update,
    move_center,
    parameter_groups,
    pca_picture,
    resize_positions,
    sinkhorn_knopp,
    target_metrics,
    to_timm_names,
)

FORMS = {
    "plain": {},
    "registers": {"registers": 4},
    "swiglu": {"ffn": "swiglu", "layer_scale": 0.1},
    "giant": {"registers": 4, "ffn": "swiglu"},
}


def logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny_vit(**options):
    torch.manual_seed(0)
    net = DINOv2ViT("vit_nano", 32, 8, **options).eval()
    with torch.no_grad():
        for p in net.parameters():  # away from what the initialisation makes 0 or alike
            p += 0.05 * torch.randn_like(p)
    return net


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
    assert torch.equal(places, masks.flatten().nonzero()[:, 0])
    assert weights.sum().item() == pytest.approx(5 / 6)
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
    assert koleo_loss(torch.ones(1, 5)) == 0


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
        assert of[f"backbone.{name}"]["lr_scale"] == pytest.approx(0.729) and of[f"backbone.{name}"]["decays"]
    assert of["backbone.patch_embed.proj.weight"]["lr_scale"] == pytest.approx(0.1458)
    assert of["backbone.patch_embed.proj.bias"]["lr_scale"] == pytest.approx(0.1458)
    assert of["backbone.blocks.0.attn.qkv.weight"]["lr_scale"] == pytest.approx(0.81)
    assert of["backbone.blocks.1.ls2.gamma"]["lr_scale"] == pytest.approx(0.9)
    for name in ("backbone.norm.weight", "dino_head.mlp.0.weight", "ibot_head.last_layer.weight_v"):
        assert of[name]["lr_scale"] == 1
    large = multipliers(24, 0.9)
    assert large["backbone.cls_token"]["lr_scale"] == pytest.approx(0.07179, abs=1e-5)
    assert large["backbone.patch_embed.proj.weight"]["lr_scale"] == pytest.approx(0.014358, abs=1e-6)
    plain = {name for name, group in of.items() if not group["decays"]}
    assert plain == {name for name in of if re.search(r"\.bias$|norm|gamma", name)}
    last = {name for name, group in of.items() if group["last"]}
    assert last == {f"{head}_head.last_layer.weight_{x}" for head in ("dino", "ibot") for x in "gv"}
    assert all(of[name]["decays"] for name in last)


# The model: oracles 7 to 11


def timms(net, size=(32, 32), registers=0, ffn="mlp", **_):
    gated = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": torch.nn.SiLU, "mlp_ratio": 2 * 344 / 128}
    options = {"img_size": size, "patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4}
    options |= {"init_values": 1e-5, "num_classes": 0} | (gated if ffn == "swiglu" else {})
    options |= {"reg_tokens": registers, "no_embed_class": True} if registers else {}
    theirs, state = timm.models.VisionTransformer(**options).eval(), to_timm_names(net.state_dict())
    if size != (32, 32):
        positions = state["pos_embed"][:, -16:].view(1, 4, 4, -1).permute(0, 3, 1, 2)
        grid = [side // 8 for side in size]
        if registers:
            new = F.interpolate(positions, size=grid, mode="bicubic", antialias=True)
        else:
            new = F.interpolate(positions, scale_factor=[(side + 0.1) / 4 for side in grid], mode="bicubic")
        state["pos_embed"] = torch.cat([state["pos_embed"][:, :-16], new.flatten(2).mT], dim=1)
    theirs.load_state_dict(state)
    return theirs


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [(32, 32), (16, 48)])
@torch.no_grad()
def test_vit_is_timm_s(form, size):
    net, x = tiny_vit(**FORMS[form]), logits(2, 3, *size)
    expected = timms(net, size, **FORMS[form]).forward_features(x)
    torch.testing.assert_close(net(x), expected, atol=1e-5, rtol=1e-5)


def ramp(side, new, *how):
    grid = torch.cat(
        [torch.full((1, 1, 1), 7.0), torch.arange(float(side)).repeat(side)[None, :, None]], dim=1
    )
    return resize_positions(grid, new, new, *how)[0, 1:, 0].view(new, new)[0].tolist()


def test_positions():
    expected = [0.5316, 2.8402, 5.1762, 7.4141, 9.6084, 11.8571, 14.2062]
    assert ramp(16, 7, 0.1, False) == pytest.approx(expected, abs=1e-4)
    # the other form, which models with registers take, and with antialiasing: see test_vit_is_timm_s
    expected = [0.5486, 2.9001, 5.2624, 7.5, 9.7376, 12.0999, 14.4514]
    assert ramp(16, 7, 0.0, False) == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
def test_registers():
    net, x = tiny_vit(registers=4), logits(2, 3, 32, 32)
    tokens = net(x)
    assert tokens.shape == (2, 1 + 4 + 16, 128) and net.pos_embed.shape == (1, 17, 128) and net.prefix == 5
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


def test_swiglu_sizes():
    for dim, hidden in {192: 512, 384: 1024, 768: 2048, 1024: 2736, 1536: 4096}.items():
        with torch.device("meta"):
            net = dinov2.SwiGLU(dim)
        assert net.w12.weight.shape == (2 * hidden, dim) and net.w3.weight.shape == (dim, hidden)
    net, x = dinov2.SwiGLU(8), logits(3, 8)
    one, two = net.w12(x).split(24, dim=1)
    torch.testing.assert_close(net(x), (one * one.sigmoid() * two) @ net.w3.weight.T + net.w3.bias)


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
    without = DINOv2ViT("vit_nano", 32, 8, layer_scale=0.0)
    assert not any("gamma" in name for name in without.state_dict())
    assert not torch.equal(without.blocks(x), x)


def test_stochastic_depth_runs_a_subset():
    seen, x = [], logits(10, 3, 4)
    double = lambda rows: seen.append(rows) or 2 * rows  # noqa: E731
    y = add_branch(x, double, 0.35)
    assert seen[0].shape == (6, 3, 4)
    grown = (y != x).flatten(1).any(dim=1)
    assert grown.sum() == 6
    torch.testing.assert_close(y[grown], x[grown] * (1 + 2 * 10 / 6))
    add_branch(x[:2], double, 0.9)
    assert len(seen[1]) == 1
    assert torch.equal(add_branch(x, double, 0.0), 3 * x)
    net = DINOv2ViT("vit_nano", 32, 8, layer_scale=1.0, drop_path_rate=0.4)
    assert [block.drop_path_rate for block in net.blocks] == [0.4] * 6  # not rising
    images = logits(5, 3, 32, 32)
    assert not torch.equal(net(images), net(images))
    net.eval()
    assert torch.equal(net(images), net(images))


def test_official_names():
    """The released ViT-g/14 with registers, and a training's file of heads."""
    with torch.device("meta"):
        net = DINOv2ViT("vit_giant", 518, 14, registers=4, ffn="swiglu")
    shapes = {name: tuple(p.shape) for name, p in net.state_dict().items()}
    d, h = 1536, 4096
    expected = {"cls_token": (1, 1, d), "pos_embed": (1, 1370, d), "mask_token": (1, d)}
    expected |= {"register_tokens": (1, 4, d), "patch_embed.proj.weight": (d, 3, 14, 14)}
    expected |= {"patch_embed.proj.bias": (d,), "norm.weight": (d,), "norm.bias": (d,)}
    block = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.w12": (2 * h, d), "mlp.w3": (d, h)}
    for i in range(40):
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


@pytest.mark.parametrize("form", FORMS)
def test_backbone_is_read_written_and_started_from(form, tmp_path):
    """eval_linear.py's features, what convert.py makes of the same official file, and --init."""
    net, path = tiny_vit(**FORMS[form]), str(tmp_path / "backbone.pt")
    args = tiny_args("dinov2", **FORMS[form])
    arch_args = {"patch_size": 8, "heads": 4} | ({} if "registers" in FORMS[form] else {"offset": 0.1})
    dinov2.export_backbone(tmp_path, "dinov2", args, 128, to_timm_names(net.state_dict()), **arch_args)
    for side, tolerance in ((32, 1e-5), (48, 1e-5 if "registers" in FORMS[form] else 0.05)):  # other rules
        x = logits(2, 3, side, side)
        theirs = features_of(eval_linear.load_backbone(path, side=side), x)
        assert (theirs - net(x)[:, 0]).norm() / theirs.norm() < tolerance
    x = logits(2, 3, 32, 32)
    mean = features_of(eval_linear.load_backbone(path, feature="mean"), x)
    torch.testing.assert_close(mean, net(x)[:, net.prefix :].mean(dim=1), atol=1e-5, rtol=1e-5)
    torch.save(net.state_dict(), tmp_path / "official.pth")
    convert.convert(convert.Args(str(tmp_path / "official.pth"), str(tmp_path / "converted.pt")))
    info = torch.load(tmp_path / "converted.pt", weights_only=True)
    ours = torch.load(path, weights_only=True)
    assert info["state_dict"].keys() == ours["state_dict"].keys()
    assert (info["arch_args"]["num_heads"], info["arch_args"]["patch_size"]) == (4, 8)
    assert all(torch.equal(tensor, ours["state_dict"][name]) for name, tensor in info["state_dict"].items())
    model = DINOv2(args)
    dinov2.load_encoder(model, "backbone.", path, 0)
    x = logits(2, 3, 48, 48)
    torch.testing.assert_close(model.eval().backbone(x), net(x), atol=1e-5, rtol=1e-5)


# Monitor: collapse.md's oracle 8


def test_target_metrics():
    k, even = 8, torch.full((8,), 1 / 8)
    metrics = target_metrics(torch.full((8, k), 1 / k), even, torch.tensor(math.log(k)))
    assert metrics["teacher_entropy"] == pytest.approx(math.log(k))
    assert metrics["kl"] == pytest.approx(0, abs=1e-6) and metrics["information"] == pytest.approx(
        0, abs=1e-6
    )
    same = F.one_hot(torch.full((8,), 3), k).float()
    metrics = target_metrics(same, even, torch.tensor(0.5))
    assert metrics == pytest.approx({"teacher_entropy": 0, "kl": 0.5, "information": 0, "prototypes_used": 1})
    metrics = target_metrics(torch.eye(k), even, torch.tensor(0.5))
    assert metrics["information"] == pytest.approx(math.log(k)) and metrics["prototypes_used"] == k
    q, loss = logits(6, k).softmax(dim=1), torch.tensor(3.0)
    theirs = dino.teacher_metrics(q.view(2, 3, k), loss)
    assert target_metrics(q, torch.full((6,), 1 / 6), loss) == pytest.approx(theirs, rel=1e-5)
    weights = torch.tensor([0.1, 0.2, 0.0, 0.1, 0.1, 0.0])
    student = logits(6, k, seed=1)
    kl = (q * (q.log() - (student / 0.1).log_softmax(dim=1))).sum(dim=1)
    expected = (weights * kl).sum() / weights.sum()
    metrics = target_metrics(q, weights, ibot_loss(student, q, weights, 0.1))
    assert metrics["kl"] == pytest.approx(expected.item(), rel=1e-5)
    assert all(math.isfinite(v) for v in target_metrics(q[:0], weights[:0], torch.tensor(0.0)).values())


def test_pca_picture():
    """Tokens that vary in one direction, by row of the image: red rises, green and blue are noise-free."""
    direction = F.normalize(logits(12), dim=0)
    tokens = torch.arange(4.0).repeat_interleave(4)[None, :, None] * direction + torch.zeros(2, 16, 12)
    page = pca_picture(torch.zeros(2, 3, 32, 32), tokens)
    assert page.shape == (3, 98 + 2, 4 * 98 + 2) and 0 <= page.min() and page.max() <= 1
    red = page[0, 2:98, 98 + 2 : 2 * 98]
    steps = red.view(4, 24, 96).mean(dim=(1, 2))
    steps = steps if steps[3] > steps[0] else steps.flip(0)
    torch.testing.assert_close(steps, torch.tensor([0, 1 / 3, 2 / 3, 1]), atol=1e-4, rtol=0)
    page = pca_picture(torch.zeros(2, 3, 32, 32), tokens.clone().fill_(math.nan))  # of a diverged run
    assert page.isfinite().all()
    for n in (1, 2):  # tokens in all, fewer than colours
        page = pca_picture(torch.zeros(n, 3, 32, 32), logits(n, 1, 12))
        reds = page[0, 50, [98 + 50, 3 * 98 + 50][:n]]
        assert page.isfinite().all() and sorted(reds.tolist()) == [0, 1][:n]


# Training


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_what_the_optimizer_gets(folder, tmp_path, monkeypatch):
    """Rates by layer, frozen prototypes, weight decay, clipping by part, T_t by step, teacher after it."""
    seen, temps, states, step, save = [], [], [], torch.optim.AdamW.step, dinov2.save_checkpoint

    def spy(self, *arguments):
        rates = {
            (g["lr_scale"], g["decays"], g["last"]): (g["lr"], g["weight_decay"]) for g in self.param_groups
        }
        seen.append((rates, [p.grad for g in self.param_groups for p in g["params"]]))
        seen[-1] = (rates, torch.stack([grad.norm() for grad in seen[-1][1]]).norm().item())
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    targets = dinov2.teacher_targets
    monkeypatch.setattr(dinov2, "teacher_targets", lambda *a: temps.append(a[2]) or targets(*a))
    monkeypatch.setattr(
        dinov2, "save_checkpoint", lambda path, **s: states.append(copy.deepcopy(s)) or save(path, **s)
    )
    flags = {"clip_norm": 1e-3, "freeze_last_layer": 2, "lr": 0.01, "layerwise_decay": 0.5, "momentum": 0.0}
    flags |= {
        "teacher_temp": 0.07,
        "warmup_teacher_temp_epochs": 2,
        "checkpoint_every": 1,
        "koleo_weight": 0.0,
    }
    args = tiny_args("dinov2", data=str(folder), **flags, run_dir=str(tmp_path))
    dinov2.train(args)
    for i, (rates, norm) in enumerate(seen):
        lr, decay = dino_schedule(i, 20, 5, 0.01, 1e-6), dino_schedule(i, 20, 0, 0.04, 0.4)
        for (scale, decays, last), (rate, given) in rates.items():
            assert rate == pytest.approx(0 if last and i < 10 else lr * scale)
            assert given == pytest.approx(decay if decays else 0)
        assert norm == pytest.approx(1e-3 * math.sqrt(3), rel=1e-2)  # backbone and two heads, each to 1e-3
    scales = sorted({0.2 * 0.5**7, *(0.5**i for i in range(8))})
    assert sorted({scale for scale, _, _ in seen[0][0]}) == pytest.approx(scales)
    expected = [0.04 + 0.03 * min(1, i / 9) for i in range(20) for _ in "12"]
    assert temps == pytest.approx(expected)
    states = [state for state in states if "optimizer" in state]
    for name in ("dino", "ibot"):
        layer = f"{name}_head.last_layer.weight_v"
        assert torch.equal(states[0]["student"][layer], states[9]["student"][layer])
        assert not torch.equal(states[9]["student"][layer], states[10]["student"][layer])
    assert all(torch.equal(states[0]["teacher"][name], p) for name, p in states[0]["student"].items())
    m = dino_schedule(1, 20, 0, 0.0, 1.0)
    name = "backbone.blocks.0.attn.qkv.weight"
    mixed = m * states[0]["teacher"][name] + (1 - m) * states[1]["student"][name]
    torch.testing.assert_close(states[1]["teacher"][name], mixed, atol=1e-7, rtol=1e-5)
    assert states[0]["centers"].keys() == {"cls", "patch"} and states[-1]["centers"]["patch"].any()


@pytest.mark.parametrize(
    "epochs, expected", [(0, [0.07] * 3), (1, [0.04, 0.07, 0.07]), (2, [0.04, 0.07, 0.07])]
)
def test_a_short_warmup_of_the_temperature(folder, tmp_path, monkeypatch, epochs, expected):
    """linspace of the official code: of one step it is the first value."""
    temps, targets = [], dinov2.teacher_targets
    monkeypatch.setattr(dinov2, "teacher_targets", lambda *a: temps.append(a[2]) or targets(*a))
    flags = {"teacher_temp": 0.07, "warmup_teacher_temp_epochs": epochs, "ibot_weight": 0.0, "epochs": 3}
    dinov2.train(tiny_args("dinov2", data=str(folder), **flags, batch_size=40, run_dir=str(tmp_path)))
    assert temps == pytest.approx(expected)


@pytest.mark.parametrize("sharpening, expected", [(True, 15), (False, 5)])
def test_when_the_alarm_is_armed(folder, tmp_path, monkeypatch, sharpening, expected):
    """After the warm-up of T_t, where there is one."""
    armed, alarm = [], dinov2.collapse_alarm
    monkeypatch.setattr(dinov2, "collapse_alarm", lambda *a: armed.append(a[2]) or alarm(*a))
    flags = {"teacher_temp": 0.07, "warmup_teacher_temp_epochs": 3, "sharpening": sharpening, "log_every": 20}
    dinov2.train(tiny_args("dinov2", data=str(folder), **flags, run_dir=str(tmp_path)))
    assert armed == [expected] * 2


def test_a_picture_of_a_diverged_run_does_not_end_it(folder, tmp_path):
    """In a step that is not logged: the next one that is says what happened."""
    flags = {"lr": 1e30, "log_every": 100, "picture_every": 1, "epochs": 1}
    with pytest.raises(SystemExit, match="step 5: loss nan"):
        dinov2.train(tiny_args("dinov2", data=str(folder), **flags, run_dir=str(tmp_path)))


@pytest.mark.parametrize(
    "centers", [None, {"cls": torch.zeros(1, 64)}, dict.fromkeys(("cls", "patch"), torch.zeros(1))]
)
def test_a_checkpoint_without_its_centers(folder, tmp_path, centers):
    args = tiny_args("dinov2", data=str(folder), epochs=1, batch_size=40, run_dir=str(tmp_path))
    dinov2.train(args)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    del state["centers"]
    torch.save(state | ({"centers": centers} if centers else {}), tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit, match=r"checkpoint.pt does not fit \(.*\): .* --restart"):
        dinov2.train(args)


def test_pictures_of_crops_hold_whole_images(folder, tmp_path, monkeypatch):
    """A row has the crops of one image, two global and three local ones."""
    grids, make_grid = [], dinov2.torchvision.utils.make_grid
    monkeypatch.setattr(
        dinov2.torchvision.utils, "make_grid", lambda x, *n: grids.append((len(x), *n)) or make_grid(x, *n)
    )
    flags = {"data": str(folder), "local_crops": 3, "batch_size": 32, "epochs": 1}
    dinov2.train(tiny_args("dinov2", **flags, run_dir=str(tmp_path)))
    assert grids[0] == (16 * 5, 5)


def test_centers_are_used_then_moved(folder, tmp_path, monkeypatch):
    """Oracle 10: 0 in the first step, a tenth of its mean logits in the second."""
    used, targets = [], dinov2.teacher_targets
    monkeypatch.setattr(
        dinov2, "teacher_targets", lambda t, c, temp: used.append((t, c.clone())) or targets(t, c, temp)
    )
    dinov2.train(tiny_args("dinov2", data=str(folder), epochs=1, batch_size=20, run_dir=str(tmp_path)))
    held = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["centers"]
    for name, (first, start), (second, center) in zip(("cls", "patch"), used[:2], used[2:], strict=True):
        mean, then = first.mean(dim=0, keepdim=True), second.mean(dim=0, keepdim=True)
        assert not start.any() and mean.abs().max() > 0.01
        torch.testing.assert_close(center, 0.1 * mean)
        torch.testing.assert_close(held[name], 0.09 * mean + 0.1 * then)


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


def test_koleo_between_no_images_is_said(folder, tmp_path, capsys):
    for batch_size, weight in ((1, 0.1), (2, 0.1), (1, 0.0)):
        flags = {"batch_size": batch_size, "koleo_weight": weight, "local_crops": 0}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dinov2.Images, "batches", lambda *_: iter([]))  # starts and trains nothing
            dinov2.train(
                tiny_args("dinov2", data=str(folder), **flags, run_dir=str(tmp_path / "run"), restart=True)
            )
        said = "KoLeo is 0" in capsys.readouterr().out
        assert said == (batch_size == 1 and weight > 0)


def test_stochastic_depth_depends_on_the_step_alone(folder, tmp_path, monkeypatch):
    """Not on what was drawn before, as by images read in this process or by workers; each step another."""
    draw, lines = dinov2.draw_masks, []
    flags = {"drop_path_rate": 0.5, "epochs": 1, "batch_size": 20, "restart": True}
    args = tiny_args("dinov2", data=str(folder), **flags, run_dir=str(tmp_path))
    for numbers in (0, 3):
        monkeypatch.setattr(dinov2, "draw_masks", lambda *a, n=numbers: (torch.rand(n), draw(*a))[1])
        dinov2.train(args)
        lines.append([line["train/loss"] for line in lines_of(tmp_path)])
    assert lines[0] == lines[1]


def test_momentum_update():
    student, teacher = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    before = teacher.weight.detach().clone()
    momentum_update(student, teacher, 1.0)
    assert torch.equal(teacher.weight, before)
    momentum_update(student, teacher, 0.9)
    torch.testing.assert_close(teacher.weight, 0.9 * before + 0.1 * student.weight)


def test_what_the_networks_and_losses_get(folder, tmp_path, monkeypatch):
    """The teacher sees global crops, unmasked, the student masked ones; effective blur; total; pictures."""
    calls, forward, numbers, augment = [], DINOv2.forward, [], dinov2.augment
    monkeypatch.setattr(DINOv2, "forward", lambda self, *a: calls.append((self, a)) or forward(self, *a))
    monkeypatch.setattr(dinov2, "augment", lambda x, n, *a: numbers.append((n, a)) or augment(x, n, *a))
    flags = {"crop_blurs": (0.0, 1.0, 0.5), "solarize": 1.0, "koleo_weight": 0.3, "ibot_weight": 0.7}
    dinov2.train(
        tiny_args("dinov2", data=str(folder), **flags, run_dir=str(tmp_path), epochs=1, local_crops=3)
    )
    (teacher, taught), (student, given) = calls[:2]
    assert not teacher.training and student.training and len(calls) == 10
    assert taught[1] is None and len(taught) == 3 and torch.equal(taught[0], given[0])
    masks, places, local = given[1:]
    assert masks.shape == (16, 16) and (masks.sum(dim=1) > 0).sum() <= 8 and masks.sum() == len(places) > 0
    assert given[0].shape == (16, 3, 32, 32) and local.shape == (24, 3, 16, 16)
    first, second, *others = (drawn for drawn, _ in numbers[:5])
    others = torch.cat(others)
    assert numbers[0][1][1] == 4  # the official kernel of 9 pixels
    assert (first[:, 5] == 0).all() and (second[:, 5] > 0).all() and 0 < (others[:, 5] > 0).sum() < 24
    assert (first[:, 6] == 0).all() and (second[:, 6] == 1).all() and (others[:, 6] == 0).all()
    for line in lines_of(tmp_path):
        part = {name: line[f"dinov2/{name}_loss"] for name in ("local", "global", "ibot", "koleo")}
        total = part["local"] + part["global"] + 0.7 * part["ibot"] + 0.3 * part["koleo"]
        assert line["train/loss"] == pytest.approx(total, rel=1e-5)
        entropy, kl = line["dinov2/teacher_entropy"], line["dinov2/kl"]
        assert entropy + kl == pytest.approx(part["local"] + part["global"], rel=1e-4)
    names = {path.name for path in tmp_path.glob("*.png")}
    assert names == {"views.png", "pca-000001.png", "pca-000005.png"}


@pytest.mark.parametrize(
    "flags, there",
    [
        ({"dino_weight": 0.0}, {"ibot", "koleo"}),
        ({"ibot_weight": 0.0}, {"local", "global", "koleo"}),
        ({"koleo_weight": 0.0, "local_crops": 0, "mask_probability": 1.0}, {"local", "global", "ibot"}),
        ({"dino_weight": 0.0, "ibot_weight": 0.0, "mask_probability": 0.0}, {"koleo"}),
        ({"dino_weight": 0.0, "shared_head": True, "sinkhorn": True, "registers": 2}, {"ibot", "koleo"}),
        ({"dino_weight": 0.0, "shared_head": True, "ibot_weight": 0.0}, {"koleo"}),
        ({"shared_head": True}, {"local", "global", "ibot", "koleo"}),
    ],
)
def test_each_loss_can_be_off(folder, tmp_path, flags, there):
    dinov2.train(tiny_args("dinov2", data=str(folder), **flags, epochs=1, run_dir=str(tmp_path)))
    for line in lines_of(tmp_path):
        assert {tag[7:-5] for tag in line if re.fullmatch(r"dinov2/\w+_loss", tag)} == there
        assert all(math.isfinite(value) for value in line.values())
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    heads = {name.split(".")[0] for name in state["student"]} - {"backbone"}
    dino, ibot = "local" in there or "global" in there, "ibot" in there
    assert ("dino_head" in heads) == dino  # a head without a loss would have no gradient
    assert ("ibot_head" in heads) == (ibot and not (dino and flags.get("shared_head")))
    tags = {"cls": "dinov2/center_norm", "patch": "dinov2/patch_center_norm"}
    used = {"cls": dino and not flags.get("sinkhorn"), "patch": ibot and not flags.get("sinkhorn")}
    assert {tag for tag in line if "center_norm" in tag} == {tags[name] for name in used if used[name]}
    for name, center in state["centers"].items():
        assert center.any() == used[name]
        assert line.get(tags[name], 0.0) == pytest.approx(center.norm().item(), rel=1e-5)


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_local_crops_are_for_the_loss_of_crops(folder, tmp_path, monkeypatch, weight):
    """Without it none is cut, and what --local-size is does not matter."""
    sides, random_crop, forward, given = [], dinov2.random_crop, DINOv2.forward, []
    monkeypatch.setattr(dinov2, "random_crop", lambda *a: sides.append(a[0]) or random_crop(*a))
    monkeypatch.setattr(DINOv2, "forward", lambda self, *a: given.append(a) or forward(self, *a))
    flags = {"dino_weight": weight, "shared_head": True} | ({} if weight else {"local_size": 13})
    dinov2.train(
        tiny_args("dinov2", data=str(folder), **flags, epochs=1, batch_size=40, run_dir=str(tmp_path))
    )
    assert sides.count(32) == 1 and len(sides) == (3 if weight else 1)
    assert [len(arguments) for arguments in given] == [3, 4 if weight else 3]


@pytest.mark.parametrize("flags", [{}, {"sinkhorn": True}])
def test_two_processes_are_one(tmp_path, flags):
    """train() itself: masks, centres, Sinkhorn-Knopp; 9 masks of 18 crops, not the same number in each half.
    KoLeo is off, it stays within a process; so is stochastic depth."""
    code = f"""
import dinov2
args = dinov2.Args(
    data="photos", image_size=16, local_size=8, patch_size=4, batch_size=18, epochs=2, warmup_epochs=0.5,
    workers=0, log_every=1, run_dir="RUN", out_dim=64, head_dim=64, lr=1e-3, koleo_weight=0.0, **{flags!r},
)
dinov2.train(args)
"""
    (tmp_path / "photos").mkdir()
    for i in range(54):
        dinov2.demo_image(i)[0].save(tmp_path / "photos" / f"{i:03d}.png")
    runs = []
    for n in (1, 2):
        run_processes(tmp_path, code.replace("RUN", f"run{n}"), n)
        runs.append(lines_of(tmp_path / f"run{n}"))
    assert len(runs[0]) == len(runs[1]) == 6
    for line, first in zip(runs[1], runs[0], strict=True):
        for tag in first.keys() - {"perf/images_per_second", "perf/data_wait"}:
            assert line[tag] == pytest.approx(first[tag], rel=1e-3, abs=1e-4), tag
    one, two = (torch.load(tmp_path / f"run{n}/checkpoint.pt", weights_only=True) for n in (1, 2))
    for name, center in one["centers"].items():
        assert bool(flags) != (center.abs().max() > 1e-3)
        torch.testing.assert_close(two["centers"][name], center, atol=1e-5, rtol=1e-3)
    for name, tensor in one["teacher"].items():
        torch.testing.assert_close(two["teacher"][name], tensor, atol=2e-4, rtol=1e-3)


def test_exported_backbone_is_the_teacher(folder, tmp_path):
    flags = {"registers": 2, "ffn": "swiglu", "compile": False}
    dinov2.train(tiny_args("dinov2", data=str(folder), epochs=1, run_dir=str(tmp_path), **flags))
    teacher = DINOv2(tiny_args("dinov2", **flags)).eval()
    teacher.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["teacher"])
    x = logits(2, 3, 48, 48)
    with torch.no_grad():
        backbone = eval_linear.load_backbone(str(tmp_path / "backbone.pt"), side=48)
        torch.testing.assert_close(features_of(backbone, x), teacher.backbone(x)[:, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"patch_size": 5}, "--image-size 32 --local-size 16: give multiples of --patch-size 5"),
        ({"local_min_scale": 0.5}, "--local-min-scale 0.5: must be above 0, at most 0.4"),
        ({"mask_ratios": (0.1, 1.5)}, "--mask-ratios (0.1, 1.5): must be 0 or more, at most 1"),
        ({"mask_probability": 0.0}, "--mask-probability 0.0: must be above 0, at most 1"),
        ({"drop_path_rate": 1.0}, "--drop-path-rate 1.0: must be 0 or more, at most 0.99"),
        ({"layerwise_decay": 1.5}, "--layerwise-decay 1.5: must be above 0, at most 1"),
        ({"koleo_weight": -0.1}, "--koleo-weight -0.1: must be 0 or more"),
        ({"warmup_teacher_temp_epochs": 2}, "--warmup-teacher-temp 0.04: must be above 0, at most 0.02"),
        (
            {"mask_probability": 0.06},
            "--mask-probability 0.06 --mask-ratios (0.1, 0.5): hide no patch of 4 x 4",
        ),
        ({"mask_ratios": (0.0, 0.06)}, "hide no patch of 4 x 4; raise them, or --ibot-weight 0"),
        ({"mask_ratios": (1.0, 1.0), "patch_size": 32, "local_crops": 0}, "hide no patch of 1 x 1"),
        (dict.fromkeys(("dino_weight", "ibot_weight", "koleo_weight"), 0.0), "give one above 0"),
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
    sizes = args.image_size, args.local_size, args.local_crops, args.patch_size, args.arch, args.ffn
    assert sizes == (224, 96, 8, 16, "vit_large", "mlp") and args.registers == 0
    assert (args.min_scale, args.local_min_scale, args.jitter) == (0.32, 0.05, (0.4, 0.4, 0.2, 0.1))
    assert (args.crop_blurs, args.solarize) == ((0.0, 0.9, 0.5), 0.2)  # as applied
    assert (args.mask_probability, args.mask_ratios) == (0.5, (0.1, 0.5))
    assert (args.layer_scale, args.drop_path_rate, args.shared_head) == (1e-5, 0.3, True)
    assert (args.head_dim, args.bottleneck_dim, args.out_dim) == (2048, 256, 65536)
    assert (args.dino_weight, args.ibot_weight, args.koleo_weight, args.sinkhorn) == (1, 1, 0.1, False)
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
