"""dino.py against its fact sheet's oracles, lightly and timm."""

import copy
import json
import math
import random
import re

import pytest
import timm
import torch
import torch.nn.functional as F
import tyro
from conftest import features_of, run_processes, tiny_args
from PIL import Image
from torchvision.transforms.v2.functional import normalize, pil_to_tensor

import dino
import eval_linear
from dino import (
    DINOHead,
    VisionTransformer,
    cls_attention,
    dino_loss,
    dino_schedule,
    mass_mask,
    momentum_update,
    resize_positions,
    teacher_metrics,
    teacher_targets,
    update_center,
)


def logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Loss and centre: oracles 1, 2, 3 and 11


def test_loss_by_hand():
    teacher = torch.tensor([[[0.04, 0.0]], [[0.0, 0.04]]])
    student = torch.tensor([[[0.1, 0.0]], [[0.0, 0.1]], [[0.0, 0.0]]])
    loss = dino_loss(student, teacher, torch.zeros(1, 2), 0.1, 0.04)
    assert loss.item() == pytest.approx(0.868734, abs=1e-6)  # with same-view pairs it were 0.7732
    center = update_center(torch.zeros(1, 2), teacher, 0.9)
    torch.testing.assert_close(center, torch.tensor([[0.002, 0.002]]))
    center = torch.ones(1, 2)
    assert update_center(center, torch.tensor([[[1.0, 0.0]], [[3.0, 2.0]]]), 0.9) is center
    torch.testing.assert_close(center, torch.tensor([[1.1, 1.0]]))


@pytest.mark.parametrize("views", [2, 3, 10])
def test_loss_is_the_mean_over_pairs_of_different_views(views):
    student, teacher, center = logits(views, 5, 7), logits(2, 5, 7, seed=1), logits(1, 7, seed=2)
    terms = []
    for u in range(2):
        for v in range(views):
            if u != v:
                q = ((teacher[u] - center) / 0.05).softmax(dim=1)
                terms.append(-(q * (student[v] / 0.1).log_softmax(dim=1)).sum(dim=1).mean())
    assert len(terms) == 2 * views - 2
    loss = dino_loss(student, teacher, center, 0.1, 0.05)
    assert loss.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-6)
    shuffled = student[[0, 1, *torch.randperm(views - 2).add(2).tolist()]]  # oracle 11
    assert dino_loss(shuffled, teacher, center, 0.1, 0.05).item() == pytest.approx(loss.item(), rel=1e-6)
    swapped = student[[1, 0, *range(2, views)]], teacher[[1, 0]]
    assert dino_loss(*swapped, center, 0.1, 0.05).item() == pytest.approx(loss.item(), rel=1e-6)
    uniform = dino_loss(0 * student, 0 * teacher, 0 * center, 0.1, 0.05)
    assert uniform.item() == pytest.approx(math.log(7), rel=1e-6)  # oracle 3


def test_loss_and_center_are_lightly_s_over_steps():
    from lightly.loss import DINOLoss

    theirs = DINOLoss(output_dim=16, teacher_temp=0.04, warmup_teacher_temp_epochs=0)
    center = torch.zeros(1, 16)
    for step in range(5):
        student = logits(6, 8, 16, seed=step).mul(0.1).requires_grad_()
        copied = student.detach().clone().requires_grad_()
        teacher = logits(2, 8, 16, seed=100 + step).mul(0.1) + 0.05 * step
        expected = theirs(list(teacher), list(copied), teacher_temp=0.04 + 0.005 * step)
        loss = dino_loss(student, teacher, center, 0.1, 0.04 + 0.005 * step)
        update_center(center, teacher, 0.9)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        torch.testing.assert_close(center, theirs.center.view(1, 16), atol=1e-7, rtol=1e-5)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(student.grad, copied.grad, atol=1e-8, rtol=1e-4)


def test_no_gradient_into_teacher_and_center():
    student, teacher, center = logits(6, 3, 5).requires_grad_(), logits(2, 3, 5, seed=1), torch.zeros(1, 5)
    teacher.requires_grad_()
    dino_loss(student, teacher, center, 0.1, 0.04).backward()
    assert teacher.grad is None and student.grad.abs().max() > 0
    update_center(center, teacher, 0.9)
    assert not center.requires_grad and center.grad_fn is None


# Schedules: oracle 4


def test_schedules():
    values = [dino_schedule(step, 12, 4, 1.0) for step in range(12)]
    expected = [0, 0.3333, 0.6667, 1, 1, 0.96194, 0.85355, 0.69134, 0.5, 0.30866, 0.14645, 0.03806]
    assert values == pytest.approx(expected, abs=5e-5)
    momenta = [dino_schedule(step, 4, 0, 0.996, 1.0) for step in range(4)]
    assert momenta == pytest.approx([0.996, 0.996586, 0.998, 0.999414], abs=1e-6)
    assert dino_schedule(0, 4, 1, 1.0) == 0


# The model: oracles 5 and 6


def test_positions_with_the_official_offset():
    def ramp(side, new, offset):
        grid = torch.arange(float(side)).repeat(side)[None, :, None]
        cls = torch.tensor([[[7.0]]])
        resized = resize_positions(torch.cat([cls, grid], dim=1), new, new, offset)
        assert resized.shape == (1, 1 + new**2, 1) and resized[0, 0, 0] == 7
        return resized[0, 1:, 0].view(new, new)

    six = ramp(14, 6, 0.1)
    expected = [0.5535, 2.9187, 5.2852, 7.5246, 9.7811, 12.1736]
    torch.testing.assert_close(six, torch.tensor([expected] * 6), atol=1e-4, rtol=0)
    assert ramp(14, 6, 0.0)[0].tolist() == pytest.approx([0.5741, 3, 5.3704, 7.6296, 10, 12.4259], abs=1e-4)
    assert ramp(8, 3, 0.1)[0].tolist() == pytest.approx([0.7162, 3.4011, 5.9308], abs=1e-4)
    same = torch.randn(1, 17, 3)
    assert resize_positions(same, 4, 4, 0.1) is same
    for side in range(1, 20):  # the offset is there against a size that is one short
        assert resize_positions(torch.randn(1, 197, 2), side, side + 1, 0.1).shape[1] == 1 + side * (side + 1)


def tiny_vit(**options):
    torch.manual_seed(0)
    return VisionTransformer("vit_nano", 32, 8, **options)


def test_vit_is_timm_s_also_at_another_size():
    ours, names = tiny_vit().eval(), {"embed_dim": 128, "depth": 6, "num_heads": 4, "num_classes": 0}
    with torch.no_grad():
        for p in ours.parameters():
            p += 0.05 * torch.randn_like(p)
        theirs = timm.models.VisionTransformer(img_size=32, patch_size=8, **names).eval()
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(3, 3, 32, 32)
        torch.testing.assert_close(ours(x), theirs.forward_features(x)[:, 0], atol=1e-5, rtol=1e-5)
        theirs = timm.models.VisionTransformer(img_size=(16, 48), patch_size=8, **names).eval()
        state = ours.state_dict()
        state["pos_embed"] = resize_positions(ours.pos_embed, 2, 6, 0.1)  # the quirk, by its name
        theirs.load_state_dict(state)
        x = torch.randn(3, 3, 16, 48)
        expected = theirs.forward_features(x)[:, 0]
        torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=1e-5)
        state["pos_embed"] = resize_positions(ours.pos_embed, 2, 6)
        theirs.load_state_dict(state)
        assert (theirs.forward_features(x)[:, 0] - expected).abs().max() > 1e-4


def heads_of(vits):
    return {name: heads for name, (_, _, heads) in vits.items()}


@pytest.mark.parametrize("arch, width, count", [("vit_tiny", 192, 5.52), ("vit_small", 384, 21.67)])
def test_sizes_are_the_paper_s(arch, width, count):
    with torch.device("meta"):
        net = VisionTransformer(arch, 224, 16)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(count, abs=0.005)
    assert net.norm.weight.shape == (width,) and heads_of(dino.VITS) == eval_linear.HEADS


def test_initialisation():
    net = tiny_vit(drop_path=0.1)
    assert [block.drop_path for block in net.blocks] == pytest.approx([0.02 * i for i in range(6)])
    linears = [m for m in net.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 24 and all(m.bias.abs().max() == 0 for m in linears)
    assert all(m.weight.std().item() == pytest.approx(0.02, rel=0.05) for m in linears)
    assert net.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    bound = 1 / math.sqrt(3 * 64)  # PyTorch's own of the convolution
    assert bound * 0.98 < net.patch_embed.proj.weight.abs().max() <= bound
    assert 0 < net.patch_embed.proj.bias.abs().max() <= bound


def test_head():
    torch.manual_seed(0)
    head, x = DINOHead(128, 512), torch.randn(64, 128)
    weight = head.last_layer(torch.eye(256)).T
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(512))
    assert head(x).abs().max() <= 1 + 1e-6  # oracle 6
    random = F.normalize(torch.randn(64, 256), dim=1)
    assert head.last_layer(random).std().item() == pytest.approx(1 / 16, rel=0.05)
    theirs = torch.nn.utils.weight_norm(torch.nn.Linear(256, 512, bias=False))
    state = {name: p.detach() + 0.3 for name, p in head.last_layer.named_parameters()}
    theirs.load_state_dict(state)
    head.last_layer.load_state_dict(state)
    torch.testing.assert_close(head.last_layer(random), theirs(random), atol=1e-5, rtol=1e-5)
    free = DINOHead(128, 512, norm_last_layer=False)
    assert [p.requires_grad for p in head.last_layer.parameters()] == [False, True]
    assert all(p.requires_grad for p in free.parameters())
    copy.deepcopy(head)
    bound = 1 / 16
    assert bound * 0.99 < DINOHead(8, 512).last_layer.weight_v.abs().max() <= bound
    assert DINOHead(64, 9).mlp[2].weight.std().item() == pytest.approx(0.02, rel=0.01)


def test_official_names():
    args = tiny_args("dino", patch_size=4, out_dim=64)
    shapes = {name: tuple(p.shape) for name, p in dino.build(args).state_dict().items()}
    blocks = "norm1 norm2 attn.qkv attn.proj mlp.fc1 mlp.fc2".split()
    expected = {
        f"blocks.{i}.{block}.{part}" for i in range(6) for block in blocks for part in ("weight", "bias")
    }
    expected |= {f"{layer}.{part}" for layer in ("patch_embed.proj", "norm") for part in ("weight", "bias")}
    expected = {f"backbone.{name}" for name in expected | {"cls_token", "pos_embed"}}
    expected |= {f"head.mlp.{i}.{part}" for i in (0, 2, 4) for part in ("weight", "bias")}
    assert shapes.keys() == expected | {"head.last_layer.weight_g", "head.last_layer.weight_v"}
    assert shapes["head.last_layer.weight_g"] == (64, 1) and shapes["head.last_layer.weight_v"] == (64, 256)
    assert shapes["head.mlp.0.weight"] == (args.head_dim, 128) and shapes["backbone.pos_embed"] == (
        1,
        65,
        128,
    )


# Attention: oracle 8


def test_mass_mask():
    attention = torch.tensor([0.05, 0.5, 0.15, 0.3]).view(1, 1, 2, 2)
    assert mass_mask(attention, 0.6).flatten().tolist() == [False, True, False, True]
    random = torch.rand(3, 4, 6, 5)
    share = (random * mass_mask(2 * random)).sum(dim=(2, 3)) / random.sum(dim=(2, 3))
    assert 0.6 <= share.min() and share.max() < 0.6 + 1.1 * (random.amax() / random.sum(dim=(2, 3)).min())


def test_attention_is_that_of_the_last_block():
    net, x = tiny_vit().eval(), torch.randn(2, 3, 32, 48)
    seen = []
    hook = net.blocks[-1].norm1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    attention = cls_attention(net, x)
    hook.remove()
    assert attention.shape == (2, 4, 4, 6)
    qkv = net.blocks[-1].attn.qkv(seen[0])
    for image in range(2):
        for head in range(4):
            q, k = (qkv[image, :, part * 128 + head * 32 : part * 128 + head * 32 + 32] for part in (0, 1))
            row = torch.softmax(k @ q[0] / 32**0.5, dim=0)
            torch.testing.assert_close(attention[image, head].flatten(), row[1:])
    assert not net.blocks[-1].attn.qkv._forward_hooks


def test_picture():
    images, attention = torch.rand(2, 3, 32, 32), torch.zeros(2, 3, 4, 4)
    attention[:, :, 1, 2] = 1  # all the attention on one patch
    page = dino.attention_picture(images, attention)
    assert page.shape == (3, 2 * 98 + 2, 7 * 98 + 2) and 0 <= page.min() and page.max() <= 1
    heat = page[:, 2:98, 100:196]
    lit = torch.zeros(96, 96)
    lit[24:48, 48:72] = 1
    assert torch.equal(heat, lit.expand(3, -1, -1))
    masked = page[:, 2:98, 4 * 98 + 2 : 4 * 98 + 98]
    assert masked[:, lit == 0].max() - masked[:, lit == 0].min() == 0 and masked[:, lit == 1].std() > 0.1


# Teacher: oracle 9, and collapse.md's oracle 8


def test_momentum_update():
    student, teacher = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    before = teacher.weight.detach().clone()
    momentum_update(student, teacher, 1.0)
    assert torch.equal(teacher.weight, before)
    momentum_update(student, teacher, 0.9)
    torch.testing.assert_close(teacher.weight, 0.9 * before + 0.1 * student.weight)
    gap = teacher.weight - student.weight
    for _ in range(5):
        momentum_update(student, teacher, 0.9)
    torch.testing.assert_close(teacher.weight - student.weight, gap * 0.9**5)
    momentum_update(student, teacher, 0.0)
    assert torch.equal(teacher.weight, student.weight) and torch.equal(teacher.bias, student.bias)


def test_teacher_metrics():
    k = 8
    uniform = torch.full((2, 4, k), 1 / k)
    metrics = teacher_metrics(uniform, torch.tensor(math.log(k)))
    assert metrics["teacher_entropy"] == pytest.approx(math.log(k)) and metrics["kl"] == pytest.approx(
        0, abs=1e-6
    )
    assert metrics["information"] == pytest.approx(0, abs=1e-6)
    same = F.one_hot(torch.full((2, 4), 3), k).float()
    metrics = teacher_metrics(same, torch.tensor(0.5))
    assert metrics == pytest.approx({"teacher_entropy": 0, "kl": 0.5, "information": 0, "prototypes_used": 1})
    apart = F.one_hot(torch.arange(k).view(2, 4), k).float()
    metrics = teacher_metrics(apart, torch.tensor(0.5))
    assert metrics["information"] == pytest.approx(math.log(k)) and metrics["prototypes_used"] == k
    student, teacher, center = (logits(*shape).double() for shape in ((6, 5, k), (2, 5, k), (1, k)))
    loss, q = dino_loss(student, teacher, center, 0.1, 0.04), teacher_targets(teacher, center, 0.04)
    log_p = (student.float() / 0.1).log_softmax(dim=2)
    pairs = [(u, v) for u in range(2) for v in range(6) if u != v]
    kl = sum((q[u] * (q[u].log() - log_p[v])).sum(dim=1).mean() for u, v in pairs) / len(pairs)
    assert teacher_metrics(q, loss)["kl"] == pytest.approx(kl.item(), rel=1e-5)


# Training


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_frozen_prototypes_clipping_and_what_the_optimizer_gets(
    folder, tmp_path, monkeypatch, norm_last_layer
):
    """Oracles 7 and 10, lr and weight decay of each step, decay on group 0 alone, that of the matrices."""
    seen, step = [], torch.optim.AdamW.step

    def spy(self, *arguments):
        groups = self.param_groups
        assert [{p.ndim > 1 for p in group["params"]} for group in groups] == [{True}, {False}]
        norms = [p.grad.norm().item() for group in groups for p in group["params"] if p.grad is not None]
        seen.append(([(group["lr"], group["weight_decay"]) for group in groups], norms))
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    flags = {"data": str(folder), "out_dim": 32, "clip_grad": 1e-3, "freeze_last_layer": 2, "base_lr": 0.1}
    flags |= {"norm_last_layer": norm_last_layer, "checkpoint_every": 5}
    args = tiny_args("dino", **flags, run_dir=str(tmp_path))
    states, save = [], dino.save_checkpoint
    monkeypatch.setattr(
        dino, "save_checkpoint", lambda path, **s: states.append(copy.deepcopy(s)) or save(path, **s)
    )
    dino.train(args)
    decays = [dino_schedule(i, 20, 0, 0.04, 0.4) for i in range(20)]
    rates = [dino_schedule(i, 20, 5, 0.1 * 8 / 256, 1e-6) for i in range(20)]
    assert [groups for groups, _ in seen] == [
        [(rate, decay), (rate, 0.0)] for rate, decay in zip(rates, decays, strict=True)
    ]
    assert all(norm <= 1e-3 + 1e-7 for _, norms in seen for norm in norms)
    assert sum(norm > 0.9e-3 for norm in seen[3][1]) > 5  # each on its own, not all together
    counts = [len(norms) for _, norms in seen]
    assert counts == [counts[0]] * 10 + [counts[0] + (1 if norm_last_layer else 2)] * 10
    states = [state for state in states if "optimizer" in state]
    torch.manual_seed(args.seed)
    start = dino.build(args, args.drop_path).state_dict()
    layer = "head.last_layer.weight_v"
    for state, epoch in zip(states, range(1, 5), strict=True):
        lengths = state["student"]["head.last_layer.weight_g"]
        assert torch.equal(lengths, torch.ones(32, 1)) == (norm_last_layer or epoch <= 2)
        assert torch.equal(state["student"][layer], start[layer]) == (epoch <= 2)
        assert not torch.equal(state["student"]["backbone.cls_token"], start["backbone.cls_token"])
        assert not torch.equal(state["teacher"]["head.mlp.0.weight"], state["student"]["head.mlp.0.weight"])


def test_teacher_follows_after_the_step(folder, tmp_path, monkeypatch):
    """momentum 0 at the first step: the teacher is the student that the optimiser has just left."""
    states, save = [], dino.save_checkpoint
    monkeypatch.setattr(
        dino, "save_checkpoint", lambda path, **s: states.append(copy.deepcopy(s)) or save(path, **s)
    )
    flags = {"data": str(folder), "momentum": 0.0, "checkpoint_every": 1, "warmup_epochs": 0}
    dino.train(tiny_args("dino", **flags, run_dir=str(tmp_path)))
    first, second = [state for state in states if "optimizer" in state][:2]
    assert all(torch.equal(first["teacher"][name], p) for name, p in first["student"].items())
    name, m = "backbone.blocks.0.attn.qkv.weight", dino_schedule(1, 20, 0, 0.0, 1.0)
    expected = m * first["teacher"][name] + (1 - m) * second["student"][name]
    torch.testing.assert_close(second["teacher"][name], expected, atol=1e-7, rtol=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    momenta = [dino_schedule(step, 20, 0, 0.0, 1.0) for step in range(20)]
    assert [line["dino/momentum"] for line in lines] == pytest.approx(momenta)


def test_temperatures_views_and_numbers_of_a_run(folder, tmp_path, monkeypatch):
    temps, batches, loss, augment, numbers = [], [], dino.dino_loss, dino.augment, []
    centers, data, nets, images, build = [], [], [], dino.Images, dino.build

    def spy(student, teacher, center, *a):
        temps.append(a)
        centers.append((center.clone(), teacher.clone()))
        return loss(student, teacher, center, *a)

    monkeypatch.setattr(dino, "dino_loss", spy)
    monkeypatch.setattr(dino, "Images", lambda *a: data.append(images(*a)) or data[-1])
    monkeypatch.setattr(dino, "build", lambda *a: nets.append(build(*a)) or nets[-1])
    monkeypatch.setattr(
        dino, "augment", lambda x, n, *a: (batches.append(x), numbers.append(n), augment(x, n, *a))[2]
    )
    flags = {"teacher_temp": 0.07, "warmup_teacher_temp_epochs": 3, "out_dim": 32, "solarize": 1.0}
    flags |= {"drop_path": 0.1, "min_scale": 0.3, "local_min_scale": 0.1}
    dino.train(
        tiny_args("dino", data=str(folder), crop_blurs=(1.0, 0.0, 0.0), **flags, run_dir=str(tmp_path / "a"))
    )
    expected = [0.04] * 5 + [0.055] * 5 + [0.07] * 10
    assert [temp for _, temp in temps] == pytest.approx(expected) and {temp for temp, _ in temps} == {0.1}
    assert [batch.shape for batch in batches[:4]] == [(8, 3, 32, 32)] * 2 + [(8, 3, 16, 16)] * 2
    first, second, third, _ = numbers[:4]
    assert (first[:, 5] > 0).all() and (second[:, 5] == 0).all() and (third[:, 5] == 0).all()
    assert (first[:, 6] == 0).all() and (second[:, 6] == 1).all() and (third[:, 6] == 0).all()
    crops = [view.transforms[0] for view in data[0].views]
    expected = [((32, 32), (0.3, 1.0))] * 2 + [((16, 16), (0.1, 0.3))] * 2
    assert [(tuple(crop.size), crop.scale) for crop in crops] == expected
    assert [net.backbone.blocks[-1].drop_path for net in nets] == [0.1, 0.0]  # student, teacher
    (first, logits), (second, _) = centers[:2]
    assert first.abs().max() == 0  # used, and only then moved
    torch.testing.assert_close(second, update_center(torch.zeros(1, 32), logits, 0.9))
    temps.clear()
    dino.train(
        tiny_args(
            "dino",
            data=str(folder),
            sharpening=False,
            out_dim=32,
            local_crops=0,
            epochs=1,
            run_dir=str(tmp_path / "b"),
        )
    )
    assert temps == [(0.1, 0.1)] * 5
    temps.clear()
    flags = {"local_crops": 0, "patch_size": 32, "min_scale": 0.1, "epochs": 1, "out_dim": 32}
    dino.train(tiny_args("dino", data=str(folder), **flags, run_dir=str(tmp_path / "c")))
    assert temps == [(0.1, 0.02)] * 5
    names = {path.name for path in (tmp_path / "a").glob("*.png")}
    assert names == {"views.png", "attention-000001.png", "attention-000020.png"}


def test_pictures_of_crops_hold_whole_images(folder, tmp_path, monkeypatch):
    """A row has the crops of one image: two global ones, and five or three local ones."""
    grids, make_grid = [], dino.torchvision.utils.make_grid

    def spy(images, *nrow, **options):
        grids.append((len(images), *nrow))
        return make_grid(images, *nrow, **options)

    monkeypatch.setattr(dino.torchvision.utils, "make_grid", spy)
    for crops in (5, 3):
        flags = {"data": str(folder), "local_crops": crops, "batch_size": 32, "epochs": 1, "arch": "resnet18"}
        dino.train(tiny_args("dino", **flags, run_dir=str(tmp_path / str(crops))))
    assert [grid for grid in grids if len(grid) > 1] == [(16 * 7, 7), (16 * 5, 5)]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_what_is_a_collapse(tmp_path, monkeypatch, batch_size):
    """Of several images: targets without information. Of one, which has none: a KL near 0."""
    (tmp_path / "photos").mkdir()
    for i in range(4):
        dino.demo_image(i)[0].save(tmp_path / "photos" / f"{i}.png")
    seen, names = [], ("teacher_entropy", "kl", "information")
    states = [(3.0, 0.001, 2.0), (3.0, 1.0, 0.0), (0.1, 0.001, 0.0), (4.1, 0.001, 0.0)]  # ln K 4.16
    values = iter(dict(zip(names, s, strict=True)) for s in states)
    monkeypatch.setattr(dino, "teacher_metrics", lambda *a: next(values))
    monkeypatch.setattr(dino, "collapse_alarm", lambda *a: seen.append([*a[3].values()]) or 0.0)
    flags = {"data": str(tmp_path / "photos"), "batch_size": batch_size, "epochs": batch_size}
    dino.train(tiny_args("dino", **flags, run_dir=str(tmp_path / "run")))
    none, one_hot, uniform = [False, False], [True, False], [False, True]
    expected = {1: [uniform, none, one_hot, uniform], 4: [none, uniform, one_hot, uniform]}
    assert seen == expected[batch_size]


@pytest.mark.parametrize("center", [None, torch.zeros(1, 32), torch.zeros(64)])
def test_a_checkpoint_without_its_centre(folder, tmp_path, center):
    args = tiny_args("dino", data=str(folder), epochs=1, batch_size=40, run_dir=str(tmp_path))
    dino.train(args)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    torch.save(state | {"center": center}, tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit, match=r"checkpoint.pt does not fit \(center\): .* --restart"):
        dino.train(args)


def test_two_processes_are_one(tmp_path):
    """train() itself, with the centre; stochastic depth off, since each process draws its own."""
    code = """
import dino
args = dino.Args(
    data="photos", image_size=16, local_size=8, patch_size=4, batch_size=24, epochs=2, warmup_epochs=0.5,
    workers=0, log_every=1, run_dir="RUN", drop_path=0.0, out_dim=64, head_dim=64, base_lr=5e-3,
    momentum=0.5,
)
dino.train(args)
"""
    (tmp_path / "photos").mkdir()
    for i in range(72):
        dino.demo_image(i)[0].save(tmp_path / "photos" / f"{i:03d}.png")
    runs = []
    for n in (1, 2):
        run_processes(tmp_path, code.replace("RUN", f"run{n}"), n)
        lines = (tmp_path / f"run{n}" / "metrics.jsonl").read_text().splitlines()
        runs.append([json.loads(line) for line in lines])
    assert len(runs[0]) == len(runs[1]) == 6
    for line, first in zip(runs[1], runs[0], strict=True):
        for tag in first.keys() - {"perf/images_per_second", "perf/data_wait"}:
            assert line[tag] == pytest.approx(first[tag], rel=1e-3, abs=1e-4), tag
    one, two = (torch.load(tmp_path / f"run{n}/checkpoint.pt", weights_only=True) for n in (1, 2))
    assert one["center"].abs().max() > 1e-3
    torch.testing.assert_close(two["center"], one["center"], atol=1e-5, rtol=1e-3)
    torch.manual_seed(0)
    start = dino.build(dino.Args(image_size=16, patch_size=4, out_dim=64, head_dim=64)).state_dict()
    start, one, two = (
        torch.cat([p.flatten() for p in net.values()]) for net in (start, one["teacher"], two["teacher"])
    )
    assert (two - one).norm() < 0.01 * (one - start).norm()  # of the way that the teacher has gone


@pytest.mark.slow
def test_a_resnet_in_two_processes(tmp_path, folder):
    """Two passes of one network with BatchNorm, and then its gradient, under DDP."""
    code = f"""
import dino
dino.train(dino.Args(
    data={str(folder)!r}, arch="resnet18", batch_size=8, epochs=1, warmup_epochs=0.5, workers=0,
    log_every=1, run_dir="run", out_dim=64, head_dim=64,
))
"""
    run_processes(tmp_path, code, 2)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 5 and all(math.isfinite(line["train/loss"]) for line in lines)
    backbone = eval_linear.load_backbone(str(tmp_path / "run/backbone.pt"))
    assert backbone.dim == 512 and backbone.name == "dino resnet18"
    teacher = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["teacher"]
    mean = backbone.net.bn1.running_mean
    assert torch.equal(mean, teacher["backbone.bn1.running_mean"]) and mean.abs().max() > 0.01


def test_exported_backbone_is_the_teacher(folder, tmp_path):
    """eval_linear.py's features are the teacher's [CLS]; at other sizes timm resamples, not DINO."""
    dino.train(tiny_args("dino", data=str(folder), epochs=1, out_dim=32, run_dir=str(tmp_path)))
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    teacher = dino.build(tiny_args("dino", out_dim=32))
    teacher.load_state_dict(state["teacher"])
    assert state["center"].shape == (1, 32) and state["center"].abs().max() > 0
    with torch.no_grad():
        for side, tolerance in ((32, 1e-5), (48, 0.05)):
            backbone = eval_linear.load_backbone(str(tmp_path / "backbone.pt"), side=side)
            x = torch.randn(2, 3, side, side)
            ours, theirs = features_of(backbone, x), teacher.backbone(x)
            assert (ours - theirs).norm() / theirs.norm() < tolerance
    layers = eval_linear.load_backbone(str(tmp_path / "backbone.pt"), layers=(-4, -3, -2, -1))
    assert layers.dim == 4 * 128


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"patch_size": 5}, "--image-size 32 --local-size 16: give multiples of --patch-size 5"),
        ({"local_size": 10}, "--image-size 32 --local-size 10: give multiples of --patch-size 8"),
        ({"local_min_scale": 0.5}, "--local-min-scale 0.5: must be above 0, at most 0.4"),
        ({"crop_blurs": (1.0, 0.1, 1.5)}, "--crop-blurs (1.0, 0.1, 1.5): must be 0 or more, at most 1"),
        ({"jitter": (0.4, -0.4, 0.2, 0.1)}, "--jitter (0.4, -0.4, 0.2, 0.1): must be 0 or more"),
        ({"teacher_temp": 0.0}, "--teacher-temp 0.0: must be above 0"),
        ({"momentum": 1.5}, "--momentum 1.5: must be 0 or more, at most 1"),
        ({"warmup_teacher_temp_epochs": 2}, "--warmup-teacher-temp 0.04: must be above 0, at most 0.02"),
    ],
)
def test_bad_flags(tmp_path, flags, message):
    with pytest.raises(SystemExit) as stop:
        dino.train(tiny_args("dino", run_dir=str(tmp_path / "run"), **flags))
    assert message in str(stop.value) and not (tmp_path / "run").exists()


def test_paper_command_is_the_sheet_s():
    command = re.search(r"torchrun --nnodes 2 --nproc-per-node 8 dino\.py(.*?)(?<!\\)\n", dino.__doc__, re.S)[
        1
    ]
    args = tyro.cli(dino.Args, args=command.replace("\\\n", " ").split())
    sizes = args.image_size, args.local_size, args.local_crops, args.patch_size, args.arch
    assert sizes == (224, 96, 8, 16, "vit_small")
    assert (args.min_scale, args.local_min_scale, args.jitter) == (0.4, 0.05, (0.4, 0.4, 0.2, 0.1))
    assert (args.crop_blurs, args.solarize, args.drop_path) == ((1.0, 0.1, 0.5), 0.2, 0.1)
    assert (args.head_dim, args.out_dim, args.norm_last_layer) == (2048, 65536, True)
    assert (args.teacher_temp, args.warmup_teacher_temp_epochs, args.student_temp) == (0.04, 0, 0.1)
    assert (args.momentum, args.epochs, args.batch_size, args.base_lr) == (0.996, 100, 1024, 5e-4)
    assert (args.weight_decay, args.final_weight_decay, args.warmup_epochs) == (0.04, 0.4, 10)
    assert (args.freeze_last_layer, args.clip_grad) == (1, 3.0)


def things(index, side):
    """Share of the demo image's object in each pixel (side, side), drawn as demo_image does."""
    rng = random.Random(index)
    label, scale, _ = rng.randrange(10), rng.uniform(0.35, 0.9), rng.uniform(0.35, 1.0)
    bitmap = list(dino.WORLD.values())[label]
    thing = Image.frombytes("1", (8, 8), bitmap.to_bytes(8, "big")).convert("L")
    thing = thing.resize((round(48 * scale),) * 2, Image.BICUBIC)
    thing = thing.rotate(rng.uniform(-25, 25), Image.BICUBIC, expand=True)
    x, y = (rng.randint(*sorted((0, 48 - s))) for s in thing.size)
    page = Image.new("L", (48, 48))
    page.paste(255, (x, y), thing)
    return pil_to_tensor(page.resize((side, side), Image.BICUBIC))[0] / 255


def attention_on_things(vit):
    """Share of the [CLS] attention on the object over the object's share of the image, of each head."""
    indices = range(10**6, 10**6 + 256)
    images = [dino.demo_image(i)[0].resize((32, 32), Image.BICUBIC) for i in indices]
    images = normalize(torch.stack([pil_to_tensor(image) for image in images]) / 255, dino.MEAN, dino.STD)
    attention = cls_attention(vit, images)
    attention = attention / attention.sum(dim=(2, 3), keepdim=True)
    things_of = torch.stack([things(i, 32) for i in indices])[:, None]
    mass = F.adaptive_avg_pool2d(things_of, attention.shape[2:])
    return ((attention * mass).sum(dim=(2, 3)) / mass.mean(dim=(2, 3))).mean(dim=0)


@pytest.mark.slow
def test_the_demo_learns_and_looks_at_the_object(tmp_path):
    """python dino.py: logistic regression 5 points above the untrained ViT, attention on the object 1.5."""
    dino.train(dino.Args(run_dir=str(tmp_path)))
    scores, path = {}, str(tmp_path / "backbone.pt")
    for name in (path, f"random:{path}"):
        results = eval_linear.evaluate(eval_linear.Args(backbone=name, mode="logreg"))
        scores[name] = results["top1"]
    assert scores[path] > scores[f"random:{path}"] + 5
    torch.manual_seed(0)
    vit = VisionTransformer("vit_nano", 32, 8)
    untrained = attention_on_things(vit).max()
    vit.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    assert attention_on_things(vit).max() > max(1.5, untrained) and untrained < 1.2
