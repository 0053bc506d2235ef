"""dinov2.py against its fact sheet's oracles, slow versions written here, dino.py and timm.

What it has like dino.py is tested in test_dino.py: augmentation, positions, head, targets, moving average;
and of both the monitor, temperatures, centres, processes, backbone.pt, flags and the demo."""

import math
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import metrics_of, shaken, tiny_args
from test_dino import calls_of, logits, paper_args, steps_of

import dino
import dinov2
from dinov2 import DINOv2, DINOv2ViT, dino_losses, draw_masks, ibot_loss, koleo_loss, sinkhorn_knopp

MEAN, STD = (torch.tensor(numbers).view(3, 1, 1) for numbers in (dinov2.MEAN, dinov2.STD))


@pytest.fixture(autouse=True)
def a_small_vit_nano(monkeypatch):
    monkeypatch.setitem(dinov2.VITS, "vit_nano", (32, 3, 2))


def tiny_vit(**options):
    """Away from what the initialisation makes 0 or alike."""
    torch.manual_seed(0)
    return shaken(DINOv2ViT("vit_nano", 32, 8, **options), None, 0.05)


def hidden_patches(masks):
    """Of masks (2 B, N), one by one: places of the hidden patches among all, and their weights."""
    places = [i * masks.shape[1] + j for i, j in masks.nonzero().tolist()]
    weights = [1 / (masks[i].sum().item() * len(masks)) for i, _ in masks.nonzero().tolist()]
    return torch.tensor(places, dtype=torch.long), torch.tensor(weights)


# Masks: oracle 5


@pytest.mark.parametrize("side", [4, 7, 14])
def test_masks(side):
    """Half of the crops, each with its part of the ratios, wherever it is drawn. A mask may fall a few
    patches short: ten draws of a block may fail, even of the only one."""
    edges, short, empty = [0.1, 0.2, 0.3, 0.4, 0.5], 0, 0
    for seed in range(20):
        masks = draw_masks(9, range(9), (side, side), (0.1, 0.5), 0.5, seed)
        counts = sorted(masks.sum(dim=1).tolist(), reverse=True)
        assert (
            masks.shape == (9, side**2)
            and masks.dtype == torch.bool
            and counts[2] > 0
            and not any(counts[4:])
        )
        assert all(count <= int(side**2 * edges[4 - i]) for i, count in enumerate(counts[:4]))
        short += sum(count < int(side**2 * edges[3 - i]) for i, count in enumerate(counts[:4]))
        empty += counts[3] == 0
        for mine in ([0, 1, 5], [2, 3]):
            assert torch.equal(draw_masks(9, mine, (side, side), (0.1, 0.5), 0.5, seed), masks[mine])
    assert empty <= (4 if side == 4 else 0) and short <= 8
    assert not draw_masks(8, range(8), (side, side), (0.1, 0.5), 0.0, 0).any()
    assert not torch.equal(masks, draw_masks(9, range(9), (side, side), (0.1, 0.5), 0.5, 99))


def test_masks_are_stratified_blocks(monkeypatch):
    blocks = calls_of(monkeypatch, dinov2, "block_mask")
    masks = draw_masks(200, range(200), (16, 16), (0.1, 0.5), 0.5, 3)
    counts = masks.sum(dim=1).double()
    assert 30 < (counts[:100] > 0).sum() < 70  # in random crops, each by its own numbers
    assert len({rng.getstate() for (_, _, rng, least), _ in blocks if least == 4}) == 200
    used = counts[counts > 0] / 256
    assert len(used) == 100 and used.mean().item() == pytest.approx(0.3, abs=0.01)
    exact = torch.linspace(0.1, 0.5, 101)[:-1].double() + 0.002  # one u in each four thousandths
    assert (used.sort().values - exact).abs().mean() < 0.01
    grid = masks[counts > 0].view(-1, 16, 16)
    assert (grid[:, 1:] == grid[:, :-1]).double().mean() > 0.8  # blocks, not grains: those would have 0.58


# Model: oracles 7 to 10


@pytest.mark.parametrize("registers", [0, 4])
@torch.no_grad()
def test_vit_is_timm_s_in_whose_names_it_shares_the_memory(registers):
    """What goes from [CLS]'s position into its token changes no feature; what --init writes is the network's.
    Positions of other sizes are those of the official training, with registers, too."""
    net, x = tiny_vit(registers=registers), logits(2, 3, 32, 32)
    before = net(x)
    assert before.shape == (2, 1 + registers + 16, 32) and net.pos_embed.shape == (1, 17, 32)
    named = dinov2.to_timm(net.state_dict())
    torch.testing.assert_close(net(x), before)
    if registers:  # oracle 8
        order = torch.tensor([2, 0, 3, 1])
        named["reg_token"][:] = named["reg_token"][:, order]
        before[:, 1:5] = before[:, 1:5][:, order]
        torch.testing.assert_close(net(x), before, atol=1e-5, rtol=1e-5)
    assert "mask_token" not in named and ("reg_token" in named) == bool(registers)
    for tensor in named.values():
        tensor.copy_(0.3 * torch.randn_like(tensor))
    for size in ((32, 32), (16, 48)):
        shape = {"embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 0, "init_values": 1}
        shape |= {"reg_tokens": registers, "no_embed_class": True} if registers else {}
        theirs = timm.models.VisionTransformer(size, 8, **shape).eval()
        positions = dinov2.resize_positions(net.pos_embed, size[0] // 8, size[1] // 8)
        theirs.load_state_dict(named | {"pos_embed": positions[:, 1 if registers else 0 :]})
        x = logits(2, 3, *size)
        torch.testing.assert_close(net(x), theirs.forward_features(x), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_hidden_patches_are_not_seen():
    """Oracle 9, and with a part hidden: other pixels there change nothing, pixels elsewhere do."""
    net, a, b = tiny_vit(), logits(2, 3, 32, 32), logits(2, 3, 32, 32, seed=1)
    every = torch.ones(2, 16, dtype=torch.bool)
    torch.testing.assert_close(net(a, every), net(b, every))
    torch.testing.assert_close(net(a, ~every), net(a))
    masks = logits(2, 16, seed=2) > 0
    pixels = masks.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert torch.equal(net(torch.where(pixels, b, a), masks), net(a, masks))
    assert not torch.equal(net(torch.where(pixels, a, b), masks), net(a, masks))


def test_initialisation_and_layer_scale():
    torch.manual_seed(0)
    net, x = DINOv2ViT("vit_tiny", 32, 8, registers=4), logits(3, 17, 192)
    assert 0.8e-6 < net.register_tokens.std() < 1.2e-6 and 0.8e-6 < net.cls_token.std() < 1.2e-6
    assert not net.mask_token.any() and net.mask_token.shape == (1, 192)
    for gamma in [layer.gamma for block in net.blocks for layer in (block.ls1, block.ls2)]:
        assert (gamma == 1e-5).all()
        gamma.data.zero_()
    assert torch.equal(net.blocks(x), x)  # oracle 10


def test_stochastic_depth_skips_branches_of_single_images():
    """At the same rate in every block: an image keeps a branch, then twice as large, or skips it."""
    blocks = DINOv2(tiny_args("dinov2", drop_path_rate=0.5, layer_scale=1.0)).backbone.blocks
    assert [block.drop_path for block in blocks] == [0.5] * 3
    block, x = blocks[0], logits(64, 3, 32)
    for p in block.mlp.parameters():
        p.data.zero_()
    branch = block.attn(block.norm1(x))
    torch.manual_seed(0)
    grown = ((y := block(x)) != x).flatten(1).any(dim=1)
    assert 16 < grown.sum() < 48
    torch.testing.assert_close(y[grown], (x + 2 * branch)[grown], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(block.eval()(x), x + branch, atol=1e-5, rtol=1e-5)


def shapes_of(module):
    return {name: tuple(p.shape) for name, p in module.state_dict().items()}


def test_names_of_the_official_files():
    """The released ViT-L/14 with registers, which is timm's but for three; and the heads of a training."""
    with torch.device("meta"):
        large = shapes_of(DINOv2ViT("vit_large", 518, 14, registers=4))
        theirs = shapes_of(timm.create_model("vit_large_patch14_reg4_dinov2", num_classes=0))
    changed = {"mask_token": (1, 1024), "register_tokens": (1, 4, 1024), "pos_embed": (1, 1370, 1024)}
    del theirs["reg_token"]
    assert large == theirs | changed

    backbone, head = shapes_of(DINOv2ViT("vit_nano", 32, 8)), shapes_of(dino.DINOHead(32, 64, 48))
    for shared, names in ((False, ("dino_head", "ibot_head")), (True, ("dino_head",))):
        model = DINOv2(tiny_args("dinov2", shared_head=shared, head_dim=48))
        expected = {f"backbone.{name}": shape for name, shape in backbone.items()}
        expected |= {f"{name}.{part}": shape for name in names for part, shape in head.items()}
        assert shapes_of(model) == expected
        assert all(p.requires_grad for p in model.parameters())  # weight_g, too, unlike DINO's


@pytest.mark.parametrize("shared_head, registers", [(False, 0), (True, 3)])
def test_model_forward(shared_head, registers):
    model = DINOv2(tiny_args("dinov2", shared_head=shared_head, registers=registers))
    crops, local = logits(4, 3, 32, 32), logits(6, 3, 16, 16, seed=1)
    masks = draw_masks(4, range(4), (4, 4), (0.3, 0.5), 0.5, 0)
    places, _ = hidden_patches(masks)
    x, small = model.backbone(crops, masks), model.backbone(local)
    head = model.dino_head if shared_head else model.ibot_head
    cls = x[:, 0]
    expected = cls, model.dino_head(torch.cat([cls, small[:, 0]])), head(x[:, 1 + registers :][masks])
    torch.testing.assert_close(model(crops, masks, places, local), expected, atol=1e-5, rtol=1e-4)
    alone = model(crops, None, places)[1]
    torch.testing.assert_close(alone, model.dino_head(model.backbone(crops)[:, 0]), atol=1e-5, rtol=1e-4)


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
    t = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    q, expected = sinkhorn_knopp(t, 1.0), torch.tensor([[0.622358, 0.377642], [0.377439, 0.622561]])
    torch.testing.assert_close(q, expected, atol=1e-6, rtol=0)
    assert q.sum(dim=0).tolist() == pytest.approx([0.999797, 1.000203], abs=1e-6)
    limit = math.sqrt(math.e) / (1 + math.sqrt(math.e))
    assert sinkhorn_knopp(t, 1.0, iterations=60)[0, 0].item() == pytest.approx(limit, abs=1e-6)
    torch.testing.assert_close(sinkhorn_knopp(logits(1, 2).expand(5, 2), 0.04), torch.full((5, 2), 0.5))


@pytest.mark.parametrize("rows, prototypes, temp", [(32, 8, 0.07), (6, 24, 0.04)])
def test_sinkhorn_rows_and_columns(rows, prototypes, temp):
    t = F.normalize(logits(rows, 16), dim=1) @ F.normalize(logits(prototypes, 16, seed=1), dim=1).T
    q, even = sinkhorn_knopp(t, temp), sinkhorn_knopp(t, temp, iterations=200)
    torch.testing.assert_close(q.double(), slow_sinkhorn(t, temp), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(q.sum(dim=1), torch.ones(rows))
    shares = torch.full((prototypes,), rows / prototypes)
    torch.testing.assert_close(even.sum(dim=0), shares, atol=1e-3, rtol=0)
    torch.testing.assert_close(sinkhorn_knopp(t + 5, temp), q, atol=1e-4, rtol=1e-3)
    each = t + 0.05 * logits(rows, 1, seed=2)  # one constant a row: the same in the limit alone
    assert (sinkhorn_knopp(each, temp) - q).abs().max() > 1e-4
    torch.testing.assert_close(sinkhorn_knopp(each, temp, iterations=200), even, atol=1e-4, rtol=1e-3)
    assert torch.isfinite(sinkhorn_knopp(40 * t, temp)).all()  # exp() of it would be infinite
    assert sinkhorn_knopp(t[:0], temp).shape == (0, prototypes)  # a process without hidden patches


# DINO, iBOT, KoLeo: oracles 2, 3, 4


def test_losses_targets_and_center_are_computed_in_float32_or_better():
    """And no gradient goes into targets and centre; of no rows, as of a process without hidden patches, the
    centre stays finite."""
    student, teacher, weights = logits(4, 3, 9), logits(2, 3, 9, seed=1), logits(6).abs()
    rows, q = teacher.flatten(0, 1), teacher.softmax(dim=2)
    for low, high in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):

        def results(dtype, low=low, high=high):
            s, t = (x.to(low).to(dtype).requires_grad_() for x in (student, rows))
            yield sum(dino_losses(s, q.to(high), 0.1)), True
            yield ibot_loss(t, q.to(high).flatten(0, 1), weights.to(high), 0.1), True
            yield koleo_loss(t), True
            yield sinkhorn_knopp(t, 0.04), False
            yield dinov2.move_center(torch.zeros(1, 9, dtype=high), t, 0.9), False
            yield dinov2.move_center(torch.zeros(1, 9, dtype=high), t[:0], 0.9), False

        for (found, learns), (expected, _) in zip(results(low), results(high), strict=True):
            assert found.dtype == high and torch.equal(found, expected) and found.isfinite().all()
            assert found.requires_grad == learns


def test_dino_losses():
    """With dino.py's where there are local crops; without, over 3 pairs where there are 2, as officially."""
    student, t, center = logits(10, 3, 7), logits(2, 3, 7, seed=2), logits(1, 7, seed=3)
    q = dinov2.teacher_targets(t, center, 0.5)
    log_p = (student / 0.1).log_softmax(dim=2)
    slow = {(u, v): -(q[u] * log_p[v]).sum(dim=1).mean() for u in (0, 1) for v in range(10) if u != v}
    between = slow.pop((0, 1)) + slow.pop((1, 0))
    torch.testing.assert_close(dino_losses(student, q, 0.1), (sum(slow.values()) / 18, between / 18))
    both = dino.dino_loss(student, t, center, 0.1, 0.5)
    torch.testing.assert_close(sum(dino_losses(student, q, 0.1)), both)
    torch.testing.assert_close(dino_losses(student[:2], q, 0.1), (torch.tensor(0.0), between / 3))
    found = dino_losses(torch.zeros(10, 1, 65536), torch.full((2, 1, 65536), 1 / 65536), 0.1)
    expected = torch.tensor([16, 2]) / 18 * math.log(65536)  # the sheet's 9.858 and 1.232
    torch.testing.assert_close(torch.stack(found), expected, atol=0, rtol=5e-4)


def test_ibot():
    """Cross-entropies of 1 by hand, of ln 65536; over all patches, with the hidden ones picked one by one."""
    one = torch.tensor([0.0, math.log(math.e - 1)])
    for counts, row, expected in (((2, 1), one, 1), ((2, 0), one, 0.5), ((2, 0), torch.zeros(65536), 5.545)):
        places, weights = hidden_patches(torch.arange(4).expand(2, 4) < torch.tensor(counts)[:, None])
        targets = torch.eye(1, len(row)).expand(len(places), -1)
        loss = ibot_loss(row.expand_as(targets), targets, weights, 1.0)
        assert loss.item() == pytest.approx(expected, rel=1e-4)

    masks = logits(6, 16) < -0.5
    masks[2] = False
    student, targets, slow = logits(6, 16, 5).requires_grad_(), logits(6, 16, 5, seed=1).softmax(dim=2), 0
    for i, j in masks.nonzero().tolist():
        ce = -(targets[i, j] * (student[i, j] / 0.1).log_softmax(dim=0)).sum()
        slow = slow + ce / masks[i].sum() / 6
    places, weights = hidden_patches(masks)
    loss = ibot_loss(student.flatten(0, 1)[places], targets.flatten(0, 1)[places], weights, 0.1)
    torch.testing.assert_close(loss, slow)
    (grad,) = torch.autograd.grad(loss, student)
    assert not grad[~masks].any() and grad[masks].abs().sum(dim=1).min() > 0
    assert ibot_loss(student[0, :0], targets[0, :0], weights[:0], 0.1) == 0


def test_koleo():
    angles = torch.arange(3) * 2 * math.pi / 3
    triangle = torch.stack([angles.cos(), angles.sin()], dim=1)
    for x, expected in (
        (torch.eye(2), -0.346574),
        (triangle, -0.549306),
        (triangle * torch.tensor([[1.0], [7.0], [0.2]]), -0.549306),
        (torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), -math.log(2)),  # with -1 on the diagonal it were 8.42
        (torch.ones(4, 384).half(), 15.3956),  # a finite punishment of duplicates
    ):
        assert koleo_loss(x).item() == pytest.approx(expected, rel=1e-5, abs=1e-6), x
    x = logits(9, 5).requires_grad_()
    unit = F.normalize(x, dim=1)
    least = [min((unit[i] - unit[j]).norm() for j in range(9) if j != i) for i in range(9)]
    slow = -torch.stack(least).log().mean()
    torch.testing.assert_close(koleo_loss(x), slow, atol=1e-5, rtol=1e-5)
    grads = torch.autograd.grad(koleo_loss(x), x), torch.autograd.grad(slow, x)
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)


# Learning rates and weight decay: oracle 6


def groups_of(depth, monkeypatch):
    """{name: AdamW's group} of a model of this depth."""
    monkeypatch.setitem(dinov2.VITS, "vit_nano", (16, depth, 2))
    model = DINOv2(tiny_args("dinov2", registers=2))
    groups = {p: group for group in dinov2.parameter_groups(model, 0.9, 0.2) for p in group["params"]}
    return {name: groups[p] for name, p in model.named_parameters()}


def test_learning_rates_by_layer(monkeypatch):
    of, large = groups_of(2, monkeypatch), groups_of(24, monkeypatch)
    expected = {"patch_embed.proj.weight": 0.1458, "patch_embed.proj.bias": 0.1458, "norm.weight": 1}
    expected |= dict.fromkeys(("cls_token", "pos_embed", "mask_token", "register_tokens"), 0.729)
    expected |= {"blocks.0.attn.qkv.weight": 0.81, "blocks.1.ls2.gamma": 0.9}
    assert {name: of[f"backbone.{name}"]["scale"] for name in expected} == pytest.approx(expected)
    assert large["backbone.cls_token"]["scale"] == pytest.approx(0.07179, abs=1e-5)
    assert large["backbone.patch_embed.proj.weight"]["scale"] == pytest.approx(0.014358, abs=1e-6)
    for name, group in of.items():
        assert group["decays"] == (not re.search(r"\.bias$|norm|gamma", name)), name
        assert group["last"] == bool(re.search(r"(dino|ibot)_head\.last_layer\.weight_[gv]$", name)), name
        assert "_head" not in name or group["scale"] == 1


# A run


def test_what_the_optimizer_gets(folder, monkeypatch):
    """Rate and decay of each step, none on vectors; frozen prototypes; clipping of backbone and each head."""
    flags = {"clip_norm": 1e-3, "freeze_last_layer": 2, "lr": 1e-4, "registers": 2, "koleo_weight": 0.0}
    steps = steps_of(dinov2, monkeypatch, data=str(folder), **flags)
    start = steps[0][1]  # after a step of rate 0
    for i, (given, weights) in enumerate(steps):
        rate, decay = dino.dino_schedule(i, 8, 2, 1e-4, 1e-6), dino.dino_schedule(i, 8, 0, 0.04, 0.4)
        assert given.keys() == start.keys()
        for name, (lr, weight_decay, _) in given.items():
            scale = 0.2 if "patch_embed" in name else 1
            assert lr == pytest.approx(0 if "last_layer" in name and i < 4 else rate * scale)
            assert weight_decay == pytest.approx(0 if re.search(r"\.bias$|norm|gamma", name) else decay)
        for part in ("backbone", "dino_head", "ibot_head"):
            norms = [norm for name, (_, _, norm) in given.items() if name.startswith(part)]
            assert math.hypot(*norms) == pytest.approx(1e-3, rel=1e-2)

        for layer in ("dino_head.last_layer.weight_v", "ibot_head.last_layer.weight_v"):
            assert torch.equal(weights[layer], start[layer]) == (i < 4)
        assert torch.equal(weights["backbone.cls_token"], start["backbone.cls_token"]) == (i == 0)


@pytest.mark.parametrize("local_crops, shared_head", [(3, False), (0, True)])
def test_what_the_networks_and_losses_get(folder, monkeypatch, local_crops, shared_head):
    """The teacher sees global crops, unmasked, the student masked ones; weights, targets, total, picture.
    KoLeo takes each global crop alone: the other crop of an image would be the nearest."""
    names = "ibot_loss", "koleo_loss", "augment_crops", "draw_masks", "seeded"
    losses, koleos, cropped, drawn, keys = (calls_of(monkeypatch, dinov2, name) for name in names)
    passes = calls_of(monkeypatch, DINOv2, "forward")
    pictures = calls_of(monkeypatch, dinov2.torchvision.utils, "save_image")
    flags = {"koleo_weight": 0.3, "ibot_weight": 0.7, "mask_ratios": (0.2, 0.6), "epochs": 1}
    flags |= {"local_crops": local_crops}
    flags |= {"shared_head": shared_head, "seed": 5, "drop_path_rate": 0.5, "run_dir": "run"}
    dinov2.train(tiny_args("dinov2", data=str(folder), **flags))

    ((teacher, *taught), targets), ((student, *given), outputs) = passes[:2]
    pixels, masks = cropped[0][1], drawn[0][1]
    assert len(passes) == 10 and not teacher.training and student.training
    assert not targets[0].requires_grad and outputs[0].requires_grad
    expected, weights = hidden_patches(masks)
    x = [(part - MEAN) / STD for part in pixels]
    assert [part.shape[0] for part in x] == ([16, 24] if local_crops else [16])
    torch.testing.assert_close(taught, [x[0], None, expected])
    torch.testing.assert_close(given, [x[0], masks, expected, *x[1:]])
    seed = next(generator.initial_seed() for key, generator in keys if key[0] == 5)
    assert drawn[0][0] == (16, [*range(16)], (4, 4), (0.2, 0.6), 0.5, seed)
    for stream, more in ((3, ()), (4, (0,)), (5, ())):  # augmentation, stochastic depth, masks: by key alone
        steps = [key for key, _ in keys if key[0] == stream]
        assert steps == [(stream, 5, step, *more) for step in range(5)]

    cls_logits, q = (
        outputs[1].unflatten(0, (2 + local_crops, -1)),
        [(t / 0.02).softmax(1) for t in targets[1:]],
    )
    torch.testing.assert_close(losses[0][0], (outputs[2], q[1], weights, 0.1))
    torch.testing.assert_close([rows for (rows,), _ in koleos[:2]], [*outputs[0].chunk(2)])
    parts = (
        sum(dino_losses(cls_logits, q[0].unflatten(0, (2, -1)), 0.1)),
        losses[0][1],
        koleos[0][1] + koleos[1][1],
    )
    line, (d, i, k) = metrics_of("run")[0], (part.item() for part in parts)
    names = "dinov2/dino_loss", "dinov2/ibot_loss", "dinov2/koleo_loss", "train/loss"
    assert [line[name] for name in names] == pytest.approx([d, i, k, d + 0.7 * i + 0.3 * k], rel=1e-5)

    [((page, path), _)] = pictures
    shown = masks.view(16, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert path.name == "views.png" and torch.equal(page, torch.where(shown, 0, pixels[0]))


# Flags


def test_paper_command_is_the_sheet_s():
    """ViT-L/16 on ImageNet-1k: 100 "epochs" of 1250 steps of 2048 images are 200 passes over 1.28 million."""
    args = paper_args(dinov2, r"torchrun --nnodes 4 .*HOST:29500 .\n +")
    expected = {"image_size": 224, "local_size": 96, "local_crops": 8, "patch_size": 16, "arch": "vit_large"}
    expected |= {"min_scale": 0.32, "local_min_scale": 0.05, "jitter": (0.4, 0.4, 0.2, 0.1), "solarize": 0.2}
    expected |= {"crop_blurs": (0.0, 0.9, 0.5), "mask_ratios": (0.1, 0.5), "registers": 0}  # blurs as applied
    expected |= {"layer_scale": 1e-5, "drop_path_rate": 0.3, "shared_head": True, "head_dim": 2048}
    expected |= {
        "out_dim": 65536,
        "koleo_weight": 0.1,
        "ibot_weight": 1,
        "sinkhorn": False,
        "warmup_teacher_temp": 0.04,
    }
    expected |= {"teacher_temp": 0.07, "student_temp": 0.1, "momentum": 0.992, "weight_decay": 0.04}
    expected |= {"final_weight_decay": 0.4, "layerwise_decay": 0.9, "patch_embed_lr": 0.2, "clip_norm": 3.0}
    assert expected.items() <= args.items() and args["batch_size"] == 2048
    assert args["lr"] == pytest.approx(0.004 * math.sqrt(2), rel=1e-4)
    officials = {"epochs": 100, "warmup_epochs": 10, "freeze_last_layer": 1, "warmup_teacher_temp_epochs": 30}
    for name, official in officials.items():
        assert args[name] == round(official * 1250 * 2048 / 1_281_167), name
