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
    DINO,
    DINOHead,
    VisionTransformer,
    attention_page,
    dino_loss,
    dino_schedule,
    momentum_update,
    monitor,
    resize_positions,
    target_moments,
    teacher_targets,
    update_center,
)

DOUBLE = torch.float64
MEAN, STD = (torch.tensor(numbers).view(3, 1, 1) for numbers in (dino.MEAN, dino.STD))


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


def test_loss_and_center_are_computed_in_float32_or_better():
    student, teacher, center = logits(4, 3, 9), logits(2, 3, 9, seed=1), logits(1, 9, seed=2)
    doubles = dino_loss(student.to(DOUBLE), teacher.to(DOUBLE), center.to(DOUBLE), 0.1, 0.04)
    moved = update_center(center.to(DOUBLE), teacher.to(DOUBLE), 0.9)
    assert doubles.dtype == moved.dtype == DOUBLE
    low = student.bfloat16(), teacher.bfloat16()
    loss, expected = (dino_loss(*pair, center, 0.1, 0.04) for pair in (low, [x.float() for x in low]))
    assert loss.dtype == torch.float32 and loss == expected
    moved, expected = (update_center(center.clone(), x, 0.9) for x in (low[1], low[1].float()))
    assert moved.dtype == torch.float32 and torch.equal(moved, expected)


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
    def ramp(side, new):
        grid = torch.arange(float(side)).repeat(side)[None, :, None]
        cls = torch.tensor([[[7.0]]])
        resized = resize_positions(torch.cat([cls, grid], dim=1), new, new)
        assert resized.shape == (1, 1 + new**2, 1) and resized[0, 0, 0] == 7
        return resized[0, 1:, 0].view(new, new)

    expected = [0.5535, 2.9187, 5.2852, 7.5246, 9.7811, 12.1736]  # without: .5741 3 5.3704 7.6296 10 12.4259
    torch.testing.assert_close(ramp(14, 6), torch.tensor([expected] * 6), atol=1e-4, rtol=0)
    assert ramp(8, 3)[0].tolist() == pytest.approx([0.7162, 3.4011, 5.9308], abs=1e-4)
    same = torch.randn(1, 17, 3)
    assert resize_positions(same, 4, 4) is same
    for side in range(1, 20):  # the offset is there against a size that is one short
        assert resize_positions(torch.randn(1, 197, 2), side, side + 1).shape[1] == 1 + side * (side + 1)


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
        state["pos_embed"] = resize_positions(ours.pos_embed, 2, 6)
        theirs.load_state_dict(state)
        x = torch.randn(3, 3, 16, 48)
        expected = theirs.forward_features(x)[:, 0]
        torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=1e-5)
        grid = ours.pos_embed[:, 1:].mT.unflatten(2, (4, 4))  # without the offset it is another network
        grid = F.interpolate(grid, (2, 6), mode="bicubic").flatten(2).mT
        state["pos_embed"] = torch.cat([ours.pos_embed[:, :1], grid], dim=1)
        theirs.load_state_dict(state)
        assert (theirs.forward_features(x)[:, 0] - expected).abs().max() > 1e-4


@pytest.mark.parametrize("arch, width, count", [("vit_tiny", 192, 5.52), ("vit_small", 384, 21.67)])
def test_sizes_are_the_paper_s(arch, width, count):
    with torch.device("meta"):
        net = VisionTransformer(arch, 224, 16)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(count, abs=0.005)
    assert net.norm.weight.shape == (width,)
    assert {name: heads for name, (_, _, heads) in dino.VITS.items()} == eval_linear.HEADS


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
    assert head(x).abs().max() <= 1 + 1e-6  # oracle 6
    assert [layer.bias.abs().max() for layer in head.mlp[::2]] == [0, 0, 0]
    assert [layer.weight.std().item() for layer in head.mlp[::2]] == pytest.approx([0.02] * 3, rel=0.02)
    bound = 1 / 16
    assert bound * 0.99 < head.last_layer.weight_v.abs().max() <= bound
    assert [p.requires_grad for p in head.last_layer.parameters()] == [False, True]
    free = DINOHead(128, 512, norm_last_layer=False)
    assert all(p.requires_grad for p in free.parameters())
    copy.deepcopy(head)

    head.mlp = torch.nn.Identity()  # the rest: cosines with the prototypes, all of length 1
    torch.testing.assert_close(head(torch.eye(256)).norm(dim=0), torch.ones(512))
    random = 3 * torch.randn(64, 256)
    assert head(random).std().item() == pytest.approx(1 / 16, rel=0.05)
    theirs = torch.nn.utils.weight_norm(torch.nn.Linear(256, 512, bias=False))
    state = {name: p.detach() + 0.3 for name, p in head.last_layer.named_parameters()}
    theirs.load_state_dict(state)
    head.last_layer.load_state_dict(state)
    expected = theirs(F.normalize(random, dim=1))
    torch.testing.assert_close(head(random), expected, atol=1e-5, rtol=1e-5)


def build(args):
    """The model as train() makes it."""
    torch.manual_seed(args.seed)
    sizes = args.image_size, args.patch_size, args.out_dim, args.head_dim
    return DINO(args.arch, *sizes, args.norm_last_layer, args.drop_path)


def test_official_names():
    args = tiny_args("dino", patch_size=4, out_dim=64)
    model = build(args)
    shapes = {name: tuple(p.shape) for name, p in model.teacher.state_dict().items()}
    blocks = "norm1 norm2 attn.qkv attn.proj mlp.fc1 mlp.fc2".split()
    expected = {
        f"blocks.{i}.{block}.{part}" for i in range(6) for block in blocks for part in ("weight", "bias")
    }
    expected |= {f"{layer}.{part}" for layer in ("patch_embed.proj", "norm") for part in ("weight", "bias")}
    expected = {f"backbone.{name}" for name in expected | {"cls_token", "pos_embed"}}
    expected |= {f"head.mlp.{i}.{part}" for i in (0, 2, 4) for part in ("weight", "bias")}
    assert shapes.keys() == expected | {"head.last_layer.weight_g", "head.last_layer.weight_v"}
    assert shapes == {name: tuple(p.shape) for name, p in model.student.state_dict().items()}
    assert shapes["head.last_layer.weight_g"] == (64, 1) and shapes["head.last_layer.weight_v"] == (64, 256)
    assert shapes["head.mlp.0.weight"] == (args.head_dim, 128)
    assert shapes["backbone.pos_embed"] == (1, 65, 128)
    others = {name for name in model.state_dict() if not name.startswith(("student.", "teacher."))}
    assert others == {"center"} and model.center.shape == (1, 64) and model.center.abs().max() == 0
    assert not any(p.requires_grad for p in model.teacher.parameters())


# Attention


def test_attention_is_that_of_the_last_block():
    """Each map over its highest value, every patch as large as in the image."""
    net, x, pixels = tiny_vit().eval(), torch.randn(2, 3, 32, 48), torch.rand(2, 3, 32, 48)
    seen = []
    hook = net.blocks[-1].norm1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    net(x)
    hook.remove()
    page = attention_page(net, x, pixels).unflatten(0, (2, 5))
    assert page.shape == (2, 5, 3, 32, 48) and torch.equal(page[:, 0], pixels) and not page.requires_grad
    qkv = net.blocks[-1].attn.qkv(seen[0])
    for image in range(2):
        for head in range(4):
            q, k = (qkv[image, :, part * 128 + head * 32 : part * 128 + head * 32 + 32] for part in (0, 1))
            row = torch.softmax(k @ q[0] / 32**0.5, dim=0)[1:].view(4, 6)
            expected = (row / row.max()).repeat_interleave(8, dim=0).repeat_interleave(8, dim=1)
            torch.testing.assert_close(page[image, 1 + head], expected.expand(3, -1, -1))


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


def seen(targets, loss=0.5, h=None):
    """Metrics of the teacher, and what is wrong without its remedy, of targets (2, B, K)."""
    h = logits(16, 32) if h is None else h
    metrics, problems = monitor(target_moments(targets), h, torch.tensor(loss))
    assert set(problems.values()) <= set(metrics)  # by which the alarm sees whether it mends
    words = [problem.split(";")[0] for problem in problems]
    names = "teacher_entropy", "kl", "information"
    return {name: metrics[f"dino/{name}"] for name in names}, words


def test_metrics_of_the_teacher():
    k = 8
    uniform, words = seen(torch.full((2, 4, k), 1 / k), math.log(k))
    expected = {"teacher_entropy": math.log(k), "kl": 0, "information": 0}
    assert uniform == pytest.approx(expected, abs=1e-6) and words == ["uniform teacher"]
    same, words = seen(F.one_hot(torch.full((2, 4), 3), k).float())
    assert same == pytest.approx({"teacher_entropy": 0, "kl": 0.5, "information": 0})
    assert words == ["one-hot teacher"]
    apart, words = seen(F.one_hot(torch.arange(k).view(2, 4), k).float())
    assert apart["information"] == pytest.approx(math.log(k)) and not words

    student, teacher, center = (logits(*shape).to(DOUBLE) for shape in ((6, 5, k), (2, 5, k), (1, k)))
    loss, q = dino_loss(student, teacher, center, 0.1, 0.04), teacher_targets(teacher, center, 0.04)
    log_p = (student / 0.1).log_softmax(dim=2)
    pairs = [(u, v) for u in range(2) for v in range(6) if u != v]
    kl = sum((q[u] * (q[u].log() - log_p[v])).sum(dim=1).mean() for u, v in pairs) / len(pairs)
    moments = target_moments(q)
    torch.testing.assert_close(moments[:-1], q.view(10, k).mean(dim=0))
    metrics, _ = monitor(moments, logits(16, 32), loss)
    assert metrics["dino/kl"] == pytest.approx(kl.item(), rel=1e-9)


def test_each_problem_appears_when_it_should():
    """All targets nearly alike: below half of ln K their entropy says one-hot, above it uniform."""
    one = torch.zeros(2, 8, 16)
    one[..., 3] = 1
    soft = lambda share: share * one + (1 - share) / 16  # noqa: E731
    assert seen(soft(0.9))[0]["teacher_entropy"] < 0.5 * math.log(16) < seen(soft(0.6))[0]["teacher_entropy"]
    assert [seen(soft(share))[1] for share in (1.0, 0.9)] == [["one-hot teacher"]] * 2
    assert [seen(soft(share))[1] for share in (0.6, 0.0)] == [["uniform teacher"]] * 2
    telling = (0.5 * one + 0.5 * F.one_hot(torch.arange(16).view(2, 8), 16)) * 0.98 + 0.02 / 16
    metrics, words = seen(telling)
    assert metrics["information"] > 0.1 and not words


def test_features_are_centred():
    h = logits(20, 16, seed=3) + 5
    metrics, _ = monitor(target_moments(logits(2, 4, 9).softmax(dim=2)), h, torch.tensor(1.0))
    for name, value in dino.collapse_metrics(h, center=True).items():
        assert metrics[f"monitor/{name}"] == pytest.approx(value)


# Training


def checkpoints(monkeypatch):
    """A list that fills with what is saved as checkpoint.pt."""
    states, save = [], dino.save_checkpoint

    def spy(path, **state):
        if "optimizer" in state:
            states.append(copy.deepcopy(state))
        save(path, **state)

    monkeypatch.setattr(dino, "save_checkpoint", spy)
    return states


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
    flags |= {"norm_last_layer": norm_last_layer, "log_every": 5, "save_minutes": 0.0}
    args = tiny_args("dino", **flags, run_dir=str(tmp_path))
    states = checkpoints(monkeypatch)
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

    start = build(args).student.state_dict()
    assert [state["step"] for state in states] == [1, 5, 10, 15, 20]
    for state in states:
        model, frozen = state["model"], state["step"] <= 10
        lengths, directions = (model[f"student.head.last_layer.weight_{part}"] for part in "gv")
        assert torch.equal(lengths, torch.ones(32, 1)) == (norm_last_layer or frozen)
        assert torch.equal(directions, start["head.last_layer.weight_v"]) == frozen
        if state["step"] > 1:
            assert not torch.equal(model["student.backbone.cls_token"], start["backbone.cls_token"])
            assert not torch.equal(model["teacher.head.mlp.0.weight"], model["student.head.mlp.0.weight"])


def test_order_of_the_step(folder, tmp_path, monkeypatch):
    """The centre moves after its use, the teacher after the step: with momentum 0 at the first it is the
    student that the optimiser has just left."""
    steps, states, adamw = [], checkpoints(monkeypatch), torch.optim.AdamW.step
    loss, update, move = dino.dino_loss, dino.update_center, dino.momentum_update

    def spy_loss(student, teacher, center, *temps):
        steps.append("loss")
        used.append((center.clone(), teacher.clone()))
        return loss(student, teacher, center, *temps)

    used = []
    monkeypatch.setattr(dino, "dino_loss", spy_loss)
    monkeypatch.setattr(dino, "update_center", lambda *a: steps.append("center") or update(*a))
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *a, **k: steps.append("step") or adamw(*a, **k))
    monkeypatch.setattr(dino, "momentum_update", lambda *a: steps.append("teacher") or move(*a))
    flags = {"data": str(folder), "momentum": 0.0, "save_minutes": 0.0, "warmup_epochs": 0}
    dino.train(tiny_args("dino", **flags, run_dir=str(tmp_path)))
    assert steps == ["loss", "center", "step", "teacher"] * 20

    (first, taught), (second, _) = used[:2]
    assert first.abs().max() == 0
    torch.testing.assert_close(second, update(torch.zeros(1, 64), taught, 0.9))
    assert torch.equal(states[0]["model"]["center"], second)
    first, second = (state["model"] for state in states[:2])
    names = [name[8:] for name in first if name.startswith("teacher.")]
    assert len(names) > 80
    assert all(torch.equal(first[f"teacher.{name}"], first[f"student.{name}"]) for name in names)
    name, m = "backbone.blocks.0.attn.qkv.weight", dino_schedule(1, 20, 0, 0.0, 1.0)
    expected = m * first[f"teacher.{name}"] + (1 - m) * second[f"student.{name}"]
    torch.testing.assert_close(second[f"teacher.{name}"], expected, atol=1e-7, rtol=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    momenta = [dino_schedule(step, 20, 0, 0.0, 1.0) for step in range(20)]
    assert [line["dino/momentum"] for line in lines] == pytest.approx(momenta)


def test_without_centering_the_center_stays(folder, tmp_path):
    flags = {"data": str(folder), "epochs": 1, "centering": False}
    dino.train(tiny_args("dino", **flags, run_dir=str(tmp_path)))
    model = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    assert model["center"].abs().max() == 0


@pytest.mark.parametrize(
    "flags, expected",
    [
        ({"teacher_temp": 0.07, "warmup_teacher_temp_epochs": 3}, [0.04, 0.055, 0.07, 0.07]),
        ({"teacher_temp": 0.07, "warmup_teacher_temp_epochs": 9}, [0.04, 0.04375, 0.0475, 0.05125]),
        ({"teacher_temp": 0.07, "warmup_teacher_temp_epochs": 1}, [0.04, 0.07, 0.07, 0.07]),
        ({"local_crops": 0, "patch_size": 32, "min_scale": 0.1}, [0.02] * 4),
        ({"sharpening": False, "warmup_teacher_temp_epochs": 3}, [0.1] * 4),
    ],
)
def test_temperatures_of_a_run(folder, tmp_path, monkeypatch, flags, expected):
    """That of the teacher by epochs, two steps each; and how many crops the student sees."""
    temps, views, loss = [], [], dino.dino_loss

    def spy(student, teacher, center, *temperatures):
        temps.append(temperatures)
        views.append((student.shape, teacher.shape))
        return loss(student, teacher, center, *temperatures)

    monkeypatch.setattr(dino, "dino_loss", spy)
    args = tiny_args("dino", data=str(folder), batch_size=20, **flags, run_dir=str(tmp_path))
    dino.train(args)
    assert [temp for _, temp in temps] == pytest.approx([temp for temp in expected for _ in range(2)])
    assert {temp for temp, _ in temps} == {0.1}
    assert set(views) == {((2 + args.local_crops, 20, 64), (2, 20, 64))}


@pytest.mark.parametrize("local_crops", [3, 0])
def test_recipe_of_a_run(folder, tmp_path, monkeypatch, local_crops):
    """What augment gets, in one call for each size: numbers by crop and image, blur by each crop's chance,
    solarization of the second global crop alone; what the networks get: those crops, normalised."""
    given, seen, augment, forward = [], [], dino.augment, VisionTransformer.forward

    def spy_augment(images, u, order, jitter, blur, radius, solarize=0.0):
        out = augment(images, u, order, jitter, blur, radius, solarize)
        given.append((images, u, order, jitter, blur, radius, solarize, out))
        return out

    def spy_forward(self, images):
        seen.append((self.blocks[-1].drop_path, images))
        return forward(self, images)

    crops, data, images = [], [], dino.Images
    augment_crops = dino.augment_crops
    monkeypatch.setattr(dino, "augment_crops", lambda c, *a: crops.append(c) or augment_crops(c, *a))
    monkeypatch.setattr(dino, "augment", spy_augment)
    monkeypatch.setattr(VisionTransformer, "forward", spy_forward)
    monkeypatch.setattr(dino, "Images", lambda *a: data.append((a[1:], images(*a))) or data[-1][1])
    flags = {"min_scale": 0.3, "local_min_scale": 0.1, "crop_blurs": (0.9, 0.2, 0.6), "solarize": 0.7}
    flags |= {"jitter": (0.1, 0.2, 0.3, 0.4), "drop_path": 0.1, "local_crops": local_crops, "seed": 5}
    args = tiny_args("dino", data=str(folder), epochs=1, batch_size=40, **flags, run_dir=str(tmp_path))
    dino.train(args)

    [((views, shortest), _)] = data
    kinds = [((32, 32), (0.3, 1.0))] * 2 + [((16, 16), (0.1, 0.3))] * local_crops
    assert [(tuple(view.transforms[0].size), view.transforms[0].scale) for view in views] == kinds
    sizes = [32 / (0.75 * 0.3) ** 0.5, 16 / (0.75 * 0.1) ** 0.5]  # 67.5 and 58.4
    assert shortest == max(sizes)

    numbers = torch.rand(2 + local_crops, 40, 9, generator=dino.seeded(3, 5, 0))
    parts = [slice(0, 2), slice(2, None)] if local_crops else [slice(0, 2)]
    parts = [*zip(parts, given, strict=True)]
    for part, (pixels, u, order, jitter, _, radius, _, _) in parts:
        assert torch.equal(pixels, torch.cat(crops[0][part])) and pixels.dtype == torch.uint8
        assert torch.equal(u, numbers[part].flatten(0, 1))
        assert sorted(order[:4]) == [0, 1, 2, 3] and order[4:] == [4] and order == given[0][2]
        assert jitter == args.jitter and radius == 5
    blur, solarize = given[0][4], given[0][6]
    assert blur.shape == solarize.shape == (80, 1, 1, 1)
    assert blur.flatten().tolist() == pytest.approx([0.9] * 40 + [0.2] * 40)
    assert solarize.flatten().tolist() == pytest.approx([0] * 40 + [0.7] * 40)
    if local_crops:
        assert (given[1][4], given[1][6]) == (0.6, 0.0)

    teacher, *student = seen[: 1 + len(parts)]
    assert teacher[0] == 0 and all(rate == 0.1 for rate, _ in student)
    for out, (_, x) in zip([given[0], *given], [teacher, *student], strict=True):
        torch.testing.assert_close(x, (out[-1] - MEAN) / STD)


def test_the_smallest_crop_says_how_large_an_image_is_read():
    flags = {"image_size": 32, "min_scale": 0.4, "local_min_scale": 0.05, "patch_size": 8}
    for size, expected in ((16, 16 / (0.75 * 0.05) ** 0.5), (8, 32 / (0.75 * 0.4) ** 0.5)):
        views, shortest = dino.multi_crop(dino.Args(**flags, local_size=size, local_crops=6))
        assert len(views) == 8 and shortest == pytest.approx(expected)


def test_small_crops_are_blurred_within_their_borders():
    """Of 3 pixels, where a kernel of 11 would reach beyond the reflection."""
    crops = [torch.randint(0, 256, (4, 3, side, side), dtype=torch.uint8) for side in (8, 8, 3)]
    args = dino.Args(crop_blurs=(1.0, 1.0, 1.0))
    large, small = dino.augment_crops(crops, torch.rand(3, 4, 9), [0, 1, 2, 3, 4], args)
    assert large.shape == (8, 3, 8, 8) and small.shape == (4, 3, 3, 3) and small.std() > 0


def test_pictures(folder, tmp_path, monkeypatch):
    """views.png: a column for each image, with all its crops; attention.png: a row for each image."""
    pages, save = {}, dino.torchvision.utils.save_image

    def spy(images, path, nrow):
        pages.setdefault(path.name, []).append((images, nrow))
        save(images, path, nrow=nrow)

    monkeypatch.setattr(dino.torchvision.utils, "save_image", spy)
    augment_crops, pixels = dino.augment_crops, []
    monkeypatch.setattr(dino, "augment_crops", lambda *a: pixels.append(augment_crops(*a)) or pixels[-1])
    for batch_size, columns in ((20, 8), (5, 5)):
        pages.clear()
        pixels.clear()
        flags = {"data": str(folder), "local_crops": 3, "batch_size": batch_size, "epochs": 1}
        dino.train(tiny_args("dino", **flags, run_dir=str(tmp_path / str(batch_size))))
        assert pages.keys() == {"views.png", "attention.png"}
        assert [len(saved) for saved in pages.values()] == [2, 2]  # at the first and at the last step
        rows, nrow = pages["views.png"][0]
        large, small = pixels[0]
        assert rows.shape == (5 * columns, 3, 32, 32) and nrow == columns
        for image in range(columns):
            views = rows[image::nrow]
            expected = [large[image], large[batch_size + image]]
            assert torch.equal(views[:2], torch.stack(expected))
            local = small[image::batch_size]
            assert torch.equal(views[2:], local.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
        panels, nrow = pages["attention.png"][0]
        assert len(panels) == 8 * nrow and nrow == 1 + 4
        assert torch.equal(panels[::nrow], large[:8]) and panels.min() >= 0 and panels.max() <= 1


def test_two_processes_are_one(tmp_path):
    """train() itself in float64, with the centre; stochastic depth off, since each process draws its own."""
    code = """
import torch, dino
augment = dino.augment_crops
def augment_in_float32(crops, u, *more):
    torch.set_default_dtype(torch.float32)
    pixels = augment(crops, u.float(), *more)
    torch.set_default_dtype(torch.float64)
    return [x.double() for x in pixels]
dino.augment_crops = augment_in_float32
torch.set_default_dtype(torch.float64)
args = dino.Args(
    data="photos", image_size=16, local_size=8, patch_size=4, batch_size=24, epochs=2, warmup_epochs=0.5,
    workers=0, log_every=1, run_dir="RUN", drop_path=0.0, out_dim=64, head_dim=64, base_lr=5e-3,
    momentum=0.5, crop_blurs=(0.9, 0.2, 0.5), solarize=0.5,
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
        for tag in first.keys() - {"perf/images_per_second"}:
            assert line[tag] == pytest.approx(first[tag], rel=1e-6, abs=1e-6), tag
    one, two = (torch.load(tmp_path / f"run{n}/checkpoint.pt", weights_only=True)["model"] for n in (1, 2))
    assert one["center"].abs().max() > 1e-3 and one["center"].dtype == DOUBLE
    torch.testing.assert_close(two["center"], one["center"], atol=1e-8, rtol=1e-6)
    names = [name for name in one if name.startswith("teacher.")]
    torch.manual_seed(0)
    start = DINO("vit_nano", 16, 4, 64, 64, True, 0.0).student.state_dict()
    start = torch.cat([start[name[8:]].flatten() for name in names])
    one, two = (torch.cat([model[name].flatten() for name in names]) for model in (one, two))
    assert (two - one).norm() < 1e-4 * (one - start).norm()  # of the way that the teacher has gone


def test_processes_draw_their_own_stochastic_depth(folder, tmp_path, monkeypatch):
    """Another for each step, seed and process; the same after a resume: by key alone."""
    keys, seeded = [], dino.seeded

    def spy(*integers):
        keys.append(integers)
        return seeded(*integers)

    monkeypatch.setattr(dino, "seeded", spy)
    flags = {"data": str(folder), "epochs": 1, "seed": 7, "drop_path": 0.5}
    dino.train(tiny_args("dino", **flags, run_dir=str(tmp_path)))
    assert [key for key in keys if key[0] == 4] == [(4, 7, step, 0) for step in range(5)]
    assert len({seeded(*key).initial_seed() for key in ((4, 7, 0, 0), (4, 7, 0, 1), (4, 7, 1, 0))}) == 3


def test_exported_backbone_is_the_teacher(folder, tmp_path):
    """eval_linear.py's features are the teacher's [CLS]; at other sizes timm resamples, not DINO."""
    args = tiny_args("dino", data=str(folder), epochs=1, out_dim=32, run_dir=str(tmp_path))
    dino.train(args)
    model = build(args)
    model.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"])
    assert model.center.shape == (1, 32) and model.center.abs().max() > 0
    saved = torch.load(tmp_path / "backbone.pt", weights_only=True)["state_dict"]
    teacher, student = model.teacher.backbone.state_dict(), model.student.backbone.state_dict()
    assert all(torch.equal(saved[name], teacher[name]) for name in teacher)
    assert not all(torch.equal(saved[name], student[name]) for name in student)
    with torch.no_grad():
        for side, tolerance in ((32, 1e-5), (48, 0.05)):
            backbone = eval_linear.load_backbone(str(tmp_path / "backbone.pt"), side=side)
            x = torch.randn(2, 3, side, side)
            ours, theirs = features_of(backbone, x), model.teacher.backbone(x)
            assert (ours - theirs).norm() / theirs.norm() < tolerance
    layers = eval_linear.load_backbone(str(tmp_path / "backbone.pt"), layers=(-4, -3, -2, -1))
    assert layers.dim == 4 * 128


def test_the_teacher_starts_as_the_student_of_init(folder, tmp_path):
    """Encoder of the file, head and all."""
    flags = {"data": str(folder), "epochs": 0}
    dino.train(tiny_args("dino", **flags, seed=1, run_dir=str(tmp_path / "first")))
    path = tmp_path / "first/backbone.pt"
    dino.train(tiny_args("dino", **flags, init=str(path), run_dir=str(tmp_path / "second")))
    model = torch.load(tmp_path / "second/checkpoint.pt", weights_only=True)["model"]
    teacher = {name[8:]: tensor for name, tensor in model.items() if name.startswith("teacher.")}
    assert len(teacher) > 80 and all(torch.equal(model[f"student.{name}"], teacher[name]) for name in teacher)
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert all(torch.equal(tensor, teacher[f"backbone.{name}"]) for name, tensor in saved.items())


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"patch_size": 5}, "--image-size, --local-size [32, 16]: give multiples of --patch-size 5"),
        ({"local_size": 10}, "--image-size, --local-size [32, 10]: give multiples of --patch-size 8"),
        ({"local_min_scale": 0.5}, "--local-min-scale 0.5: must be above 0 and at most 0.4"),
        ({"crop_blurs": (1.0, 0.1, 1.5)}, "--crop-blurs (1.0, 0.1, 1.5): must be at least 0 and at most 1"),
        ({"jitter": (0.4, -0.4, 0.2, 0.1)}, "--jitter (0.4, -0.4, 0.2, 0.1): must be at least 0"),
        ({"teacher_temp": 0.0}, "--teacher-temp 0.0: must be above 0"),
        ({"momentum": 1.5}, "--momentum 1.5: must be at least 0 and at most 1"),
        ({"local_crops": -1}, "--local-crops -1: must be at least 0"),
    ],
)
def test_bad_flags(tmp_path, flags, message):
    with pytest.raises(SystemExit) as stop:
        dino.train(tiny_args("dino", run_dir=str(tmp_path / "run"), **flags))
    assert message in str(stop.value) and not (tmp_path / "run").exists()


def test_without_local_crops_their_flags_do_not_matter(folder, tmp_path):
    """--min-scale 0.14 is the official advice then, below the default of --local-min-scale."""
    flags = {"local_crops": 0, "min_scale": 0.14, "local_min_scale": 0.15, "local_size": 10, "epochs": 0}
    dino.train(tiny_args("dino", data=str(folder), **flags, run_dir=str(tmp_path)))


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
    thing = Image.frombytes("1", (8, 8), dino.THINGS[label].to_bytes(8, "big")).convert("L")
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
    attention = attention_page(vit, images, images).unflatten(0, (256, -1))[:, 1:, 0]
    attention = attention / attention.sum(dim=(2, 3), keepdim=True)
    mass = torch.stack([things(i, 32) for i in indices])[:, None]
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
