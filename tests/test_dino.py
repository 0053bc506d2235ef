"""dino.py against its fact sheet's oracles, slow versions written here, lightly, timm and torch; and what
dinov2.py has like it."""

import copy
import math
import re
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import tyro
from conftest import features_of, in_processes, load, metrics_of, refused, shaken, tiny_args
from PIL import Image
from torchvision.transforms.v2.functional import normalize, pil_to_tensor

import convert
import dino
import dinov2
import eval_linear
from dino import DINOHead, VisionTransformer, dino_loss, dino_schedule, resize_positions, update_center
from dinov2 import sinkhorn_knopp

VITS = dict(dino.VITS)
MEAN, STD = (torch.tensor(numbers).view(3, 1, 1) for numbers in (dino.MEAN, dino.STD))


@pytest.fixture(autouse=True)
def a_small_vit_nano(monkeypatch):
    for module in (dino, dinov2):
        monkeypatch.setitem(module.VITS, "vit_nano", (32, 3, 2))


def logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def calls_of(patch, place, name):
    """A list that fills with (arguments, result) of each call."""
    calls, call = [], getattr(place, name)

    def spy(*given, **more):
        calls.append(((*given, *more.values()), call(*given, **more)))
        return calls[-1][1]

    patch.setattr(place, name, spy)
    return calls


# Augmentation


@pytest.mark.parametrize("batch_size, columns", [(20, 8), (5, 5)])
def test_recipe_and_pictures_of_a_run(folder, monkeypatch, batch_size, columns):
    """What augment gets, in one call for each size: numbers by crop and image, blur by each crop's chance,
    solarization of the second global crop alone; what the networks get: those crops, normalised. views.png: a
    column for each image, with all its crops; attention.png: a row for each image."""
    names = "Images", "augment_crops", "augment", "seeded", "dino_loss"
    data, cropped, augmented, keys, losses = (calls_of(monkeypatch, dino, name) for name in names)
    passes = calls_of(monkeypatch, VisionTransformer, "forward")
    saved = calls_of(monkeypatch, dino.torchvision.utils, "save_image")
    flags = {"min_scale": 0.3, "local_min_scale": 0.1, "crop_blurs": (0.9, 0.2, 0.6), "solarize": 0.7}
    flags |= {"jitter": (0.1, 0.2, 0.3, 0.4), "drop_path": 0.1, "local_crops": 3, "seed": 5}
    dino.train(tiny_args("dino", data=str(folder), epochs=1, batch_size=batch_size, **flags))

    [((_, views, shortest), _)] = data
    kinds = [((32, 32), (0.3, 1.0))] * 2 + [((16, 16), (0.1, 0.3))] * 3
    assert [(tuple(view.transforms[0].size), view.transforms[0].scale) for view in views] == kinds
    assert shortest == 32 / (0.75 * 0.3) ** 0.5  # more than that of local crops
    assert dino.multi_crop(dino.Args(local_min_scale=0.05))[1] == 16 / (0.75 * 0.05) ** 0.5  # but here

    numbers, crops = torch.rand(5, batch_size, 9, generator=dino.seeded(3, 5, 0)), cropped[0][0][0]
    (large, large_pixels), (small, small_pixels) = augmented[:2]
    for part, (images, u, order, jitter, _, radius, *_) in ((slice(0, 2), large), (slice(2, 5), small)):
        assert torch.equal(images, torch.cat(crops[part])) and images.dtype == torch.uint8
        assert torch.equal(u, numbers[part].flatten(0, 1))
        assert sorted(order[:4]) == [0, 1, 2, 3] and order[4:] == [4] and order == large[2]
        assert jitter == flags["jitter"] and radius == 5
    blur, solarize = (large[i].unflatten(0, (2, batch_size)).flatten(1) for i in (4, 6))
    torch.testing.assert_close(blur, torch.tensor([[0.9], [0.2]]).expand_as(blur))
    torch.testing.assert_close(solarize, torch.tensor([[0.0], [0.7]]).expand_as(blur))
    assert small[4] == 0.6 and len(small) == 6

    expected = (large_pixels, 0), (large_pixels, 0.1), (small_pixels, 0.1)  # the teacher comes first
    for (pixels, drop_path), ((net, x), _) in zip(expected, passes[:3], strict=True):
        torch.testing.assert_close(x, (pixels - MEAN) / STD)
        assert net.blocks[-1].drop_path == drop_path
    steps = range(40 // batch_size)
    assert [key for key, _ in keys if key[0] == 4] == [(4, 5, step, 0) for step in steps]  # of drop path
    for (student, teacher, _, student_temp, _), _ in losses:
        assert student.shape == (5, batch_size, 64) and student_temp == 0.1 and not teacher.requires_grad

    assert [given[1].name for given, _ in saved] == ["views.png", "attention.png"] * 2  # first, last step
    ((rows, _, nrow), _), ((panels, _, heads), _) = saved[:2]
    assert rows.shape == (5 * columns, 3, 32, 32) and (nrow, heads) == (columns, 1 + 2)
    for image in range(columns):
        local = small_pixels[image::batch_size].repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        assert torch.equal(rows[image::columns], torch.cat([large_pixels[image::batch_size], local]))
    assert torch.equal(panels[::3], large_pixels[:8]) and 0 <= panels.min() and panels.max() <= 1


# Model: oracles 5 and 6


def test_positions_with_the_official_offset():
    for side, expected in (
        (14, [0.5535, 2.9187, 5.2852, 7.5246, 9.7811, 12.1736]),  # without the offset it starts at .5741
        (8, [0.7162, 3.4011, 5.9308]),
        (16, [0.5316, 2.8402, 5.1762, 7.4141, 9.6084, 11.8571, 14.2062]),  # of DINOv2's sheet
    ):
        ramp = torch.cat([torch.tensor([7.0]), torch.arange(float(side)).repeat(side)])[None, :, None]
        found = resize_positions(ramp, 2, len(expected))[0, :, 0]
        torch.testing.assert_close(found, torch.tensor([7.0, *expected * 2]), atol=1e-4, rtol=0)
    same = torch.randn(1, 17, 3)
    assert resize_positions(same, 4, 4) is same
    for side in range(1, 20):  # the offset is there against a size that is one short
        assert resize_positions(torch.randn(1, 197, 2), side, side + 1).shape[1] == 1 + side * (side + 1)


@torch.no_grad()
def test_vit_is_timm_s_also_at_another_size(generator):
    ours = shaken(VisionTransformer("vit_nano", 32, 8), generator)
    for size in ((32, 32), (16, 48)):
        names = {"embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 0}
        theirs = timm.models.VisionTransformer(img_size=size, patch_size=8, **names).eval()
        positions = resize_positions(ours.pos_embed, size[0] // 8, size[1] // 8)
        theirs.load_state_dict(ours.state_dict() | {"pos_embed": positions})
        x = logits(3, 3, *size)
        torch.testing.assert_close(ours(x), theirs.forward_features(x)[:, 0], atol=1e-5, rtol=1e-5)


def test_sizes_are_the_paper_s():
    for arch, width, count in (("vit_tiny", 192, 5.52), ("vit_small", 384, 21.67), ("vit_base", 768, 85.80)):
        with torch.device("meta"):
            net = VisionTransformer(arch, 224, 16)
        assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(count, abs=0.005)
        assert net.norm.weight.shape == (width,)
    assert {name: heads for name, (_, _, heads) in VITS.items()} == eval_linear.HEADS


def test_initialisation():
    torch.manual_seed(0)
    nets = VisionTransformer("vit_tiny", 32, 8, drop_path=0.1), dinov2.DINOv2ViT("vit_tiny", 32, 8)
    for net in nets:
        linears = [m for m in net.modules() if isinstance(m, torch.nn.Linear)]
        assert len(linears) == 48 and not any(m.bias.any() for m in linears)
        assert all(m.weight.std().item() == pytest.approx(0.02, rel=0.05) for m in linears)
        assert net.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
        bound = 1 / math.sqrt(3 * 64)  # PyTorch's own of the convolution
        assert bound * 0.98 < net.patch_embed.proj.weight.abs().max() <= bound
        assert 0 < net.patch_embed.proj.bias.abs().max() <= bound
    assert nets[0].cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert [block.drop_path for block in nets[0].blocks] == pytest.approx([0.1 * i / 11 for i in range(12)])


def test_head_has_the_cosines_of_torch_s_weight_norm():
    torch.manual_seed(0)
    head, x = DINOHead(128, 512), torch.randn(64, 128)
    layers = {f"mlp.{i}.{part}" for i in (0, 2, 4) for part in ("weight", "bias")}
    assert head.state_dict().keys() == layers | {"last_layer.weight_g", "last_layer.weight_v"}
    assert head(x).abs().max() <= 1 + 1e-6
    assert not any(layer.bias.any() for layer in head.mlp[::2])
    assert [layer.weight.std().item() for layer in head.mlp[::2]] == pytest.approx([0.02] * 3, rel=0.02)
    assert 0.99 / 16 < head.last_layer.weight_v.abs().max() <= 1 / 16
    assert [p.requires_grad for p in head.last_layer.parameters()] == [False, True]
    assert all(p.requires_grad for p in DINOHead(128, 512, norm_last_layer=False).parameters())

    rest, random = copy.deepcopy(head), 3 * torch.randn(64, 256)
    rest.mlp = torch.nn.Identity()
    torch.testing.assert_close(rest(torch.eye(256)).norm(dim=0), torch.ones(512))
    assert rest(random).std().item() == pytest.approx(1 / 16, rel=0.05)
    theirs = torch.nn.utils.weight_norm(torch.nn.Linear(256, 512, bias=False))
    state = {name: p.detach() + 0.3 for name, p in rest.last_layer.named_parameters()}
    theirs.load_state_dict(state)
    rest.last_layer.load_state_dict(state)
    torch.testing.assert_close(rest(random), theirs(F.normalize(random, dim=1)), atol=1e-5, rtol=1e-5)


def test_attention_is_that_of_the_last_block():
    """Each map over its highest value, every patch as large as in the image."""
    torch.manual_seed(0)
    net, x, pixels = VisionTransformer("vit_nano", 32, 8), logits(2, 3, 32, 48), torch.rand(2, 3, 32, 48)
    page = dino.attention_page(net, x, pixels).unflatten(0, (2, 3))
    assert page.shape == (2, 3, 3, 32, 48) and torch.equal(page[:, 0], pixels) and not page.requires_grad
    last = net.blocks[-1]
    qkv = last.attn.qkv(last.norm1(net.blocks[:-1](net.embed(x))))
    for image in range(2):
        for head in range(2):
            q, k = (qkv[image, :, part * 32 + head * 16 :][:, :16] for part in (0, 1))
            row = torch.softmax(k @ q[0] / 16**0.5, dim=0)[1:].view(4, 6)
            expected = (row / row.max()).repeat_interleave(8, dim=0).repeat_interleave(8, dim=1)
            torch.testing.assert_close(page[image, 1 + head], expected.expand(3, -1, -1))


# Loss and centre: oracles 1, 2, 3 and 11


def test_loss_and_center_by_hand():
    teacher = torch.tensor([[[0.04, 0.0]], [[0.0, 0.04]]])
    student = torch.tensor([[[0.1, 0.0]], [[0.0, 0.1]], [[0.0, 0.0]]])
    loss = dino_loss(student, teacher, torch.zeros(1, 2), 0.1, 0.04)
    assert loss.item() == pytest.approx(0.868734, abs=1e-6)  # with same-view pairs it were 0.7732
    torch.testing.assert_close(update_center(torch.zeros(1, 2), teacher, 0.9), torch.full((1, 2), 0.002))
    center = torch.ones(1, 2)
    assert update_center(center, torch.tensor([[[1.0, 0.0]], [[3.0, 2.0]]]), 0.9) is center
    torch.testing.assert_close(center, torch.tensor([[1.1, 1.0]]))


def test_loss_is_the_mean_over_pairs_of_different_views():
    """In float32 or better, whatever it gets."""
    for views in (2, 3, 10):
        student, teacher, center = logits(views, 5, 7), logits(2, 5, 7, seed=1), logits(1, 7, seed=2)
        q = ((teacher - center) / 0.05).softmax(dim=2)
        pairs = [(u, v) for u in range(2) for v in range(views) if u != v]
        terms = [-(q[u] * (student[v] / 0.1).log_softmax(dim=1)).sum(dim=1).mean() for u, v in pairs]
        expected = pytest.approx(torch.stack(terms).mean().item(), rel=1e-6)
        local = torch.randperm(views - 2).add(2).tolist()
        for order in ([0, 1, *range(2, views)], [0, 1, *local], [1, 0, *local]):
            assert dino_loss(student[order], teacher[order[:2]], center, 0.1, 0.05).item() == expected
        uniform = dino_loss(0 * student, 0 * teacher, 0 * center, 0.1, 0.05)
        assert uniform.item() == pytest.approx(math.log(7), rel=1e-6)

    for low, high in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        center = center.to(high)
        pairs = [(student.to(low).to(dtype), teacher.to(low).to(dtype)) for dtype in (low, high)]
        loss, expected = (dino_loss(*pair, center, 0.1, 0.05) for pair in pairs)
        assert loss.dtype == high and loss == expected
        moved, expected = (update_center(center.clone(), pair[1], 0.9) for pair in pairs)
        assert moved.dtype == high and torch.equal(moved, expected)


def test_loss_and_center_are_lightly_s_over_steps():
    from lightly.loss import DINOLoss

    theirs = DINOLoss(output_dim=16, teacher_temp=0.04, warmup_teacher_temp_epochs=0)
    center = torch.zeros(1, 16)
    for step in range(5):
        student = logits(6, 8, 16, seed=step).mul(0.1).requires_grad_()
        teacher = (logits(2, 8, 16, seed=100 + step).mul(0.1) + 0.05 * step).requires_grad_()
        expected = theirs(list(teacher.detach()), list(student), teacher_temp=0.04 + 0.005 * step)
        loss = dino_loss(student, teacher, center, 0.1, 0.04 + 0.005 * step)
        grads = torch.autograd.grad(loss, (student, teacher), allow_unused=True)
        update_center(center, teacher, 0.9)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        torch.testing.assert_close(center, theirs.center.view(1, 16), atol=1e-7, rtol=1e-5)
        torch.testing.assert_close(grads[0], *torch.autograd.grad(expected, student), atol=1e-8, rtol=1e-4)
        assert grads[1] is None and not center.requires_grad


def test_sinkhorn_center():
    """The targets are those of dinov2.py's Sinkhorn-Knopp; in the limit each prototype has its share."""
    for temp in (0.02, 0.2):
        teacher = logits(2, 12, 8).tanh()
        center = dino.sinkhorn_center(teacher, temp)
        q, expected = dino.teacher_targets(teacher, center, temp), sinkhorn_knopp(teacher.flatten(0, 1), temp)
        assert center.shape == (1, 8) and not center.requires_grad
        torch.testing.assert_close(q.flatten(0, 1), expected, atol=1e-5, rtol=1e-3)
        even = dino.sinkhorn_center(teacher, temp, iterations=500)
        q = dino.teacher_targets(teacher, even, temp)
        torch.testing.assert_close(q.mean(dim=(0, 1)), torch.full((8,), 1 / 8), atol=1e-4, rtol=0)


# Schedules: oracle 4


def test_schedules():
    values = [dino_schedule(step, 12, 4, 1.0) for step in range(12)]
    expected = [0, 0.3333, 0.6667, 1, 1, 0.96194, 0.85355, 0.69134, 0.5, 0.30866, 0.14645, 0.03806]
    assert values == pytest.approx(expected, abs=5e-5)
    momenta = [dino_schedule(step, 4, 0, 0.996, 1.0) for step in range(4)]
    assert momenta == pytest.approx([0.996, 0.996586, 0.998, 0.999414], abs=1e-6)
    assert dino_schedule(0, 4, 1, 1.0) == 0


# Monitor: collapse.md's oracle 8


def test_metrics_and_problems_of_the_teacher():
    """All targets nearly alike: below half of ln K their entropy says one-hot, above it uniform."""
    h, losses = logits(20, 16) + 5, {"dino_loss": 0.5, "ibot_loss": 2, "koleo_loss": 3}
    features = {f"monitor/{name}": value for name, value in dino.collapse_metrics(h, center=True).items()}
    one = F.one_hot(torch.full((2, 8), 3), 16).float()
    each = F.one_hot(torch.arange(16).view(2, 8), 16).float()
    for targets, entropy, information, words in (
        (0 * one + 1 / 16, math.log(16), 0, ["uniform teacher"]),
        (0.6 * one + 0.4 / 16, 1.6771, 0, ["uniform teacher"]),
        (0.9 * one + 0.1 / 16, 0.5650, 0, ["one-hot teacher"]),
        (one, 0, 0, ["one-hot teacher"]),
        (each, 0, math.log(16), []),
        (0.49 * (one + each) + 0.02 / 16, 0.7734, 1.2136, []),
    ):
        moments = dino.target_moments(targets)
        both = {"teacher_entropy": entropy, "information": information}
        for module, loss, own in ((dino, 2, {"kl": 2 - entropy}), (dinov2, [*losses.values()], losses)):
            metrics, problems = module.monitor(moments, h, torch.tensor(loss))
            own = {f"{module.__name__}/{name}": value for name, value in (both | own).items()}
            assert metrics == pytest.approx(own | features, abs=1e-4)
            assert [problem.split(";")[0] for problem in problems] == words
            assert set(problems.values()) <= set(metrics)  # by which the alarm sees whether it mends


# A run


def steps_of(module, patch, **flags):
    """Of each of 8 steps {name: (rate, decay, norm of the gradient)}, as AdamW gets them, and the weights it
    leaves, of which the teacher's must be the moving average."""
    steps, given, step, update = [], {}, torch.optim.AdamW.step, module.momentum_update

    def spy_step(self, *more):
        for group in self.param_groups:
            for p in group["params"]:
                norm = None if p.grad is None else p.grad.norm().item()
                given[p] = group["lr"], group["weight_decay"], norm
        return step(self, *more)

    def spy_update(student, teacher, m):
        before, weights = copy.deepcopy((teacher.state_dict(), student.state_dict()))
        update(student, teacher, m)
        assert m == pytest.approx(dino_schedule(len(steps), 8, 0, 0.0, 0.9))
        for name, p in teacher.state_dict().items():
            mixed = m * before[name] + (1 - m) * weights[name]
            torch.testing.assert_close(p, mixed, atol=1e-7, rtol=1e-5)
        steps.append(({name: given.pop(p) for name, p in student.named_parameters() if p in given}, weights))

    patch.setattr(torch.optim.AdamW, "step", spy_step)
    patch.setattr(module, "momentum_update", spy_update)
    momenta = {"momentum": 0.0, "final_momentum": 0.9}
    module.train(tiny_args(module.__name__, **momenta, batch_size=20, run_dir="run", **flags))
    assert len(steps) == 8 and not given
    return steps


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_what_the_optimizer_gets(folder, monkeypatch, norm_last_layer):
    """Oracles 7 and 10: rate and decay of each step, decay on matrices alone; each gradient clipped by
    itself; frozen prototypes."""
    flags = {"out_dim": 32, "clip_grad": 1e-4, "freeze_last_layer": 2, "base_lr": 0.01, "data": str(folder)}
    steps = steps_of(dino, monkeypatch, norm_last_layer=norm_last_layer, **flags)
    start = steps[0][1]  # after a step of rate 0
    assert start["head.mlp.0.weight"].shape == (64, 32)
    for i, (given, weights) in enumerate(steps):
        rate, decay = dino_schedule(i, 8, 2, 0.01 * 20 / 256, 1e-6), dino_schedule(i, 8, 0, 0.04, 0.4)
        assert start.keys() - given.keys() == ({"head.last_layer.weight_g"} if norm_last_layer else set())
        for name, (lr, weight_decay, norm) in given.items():
            assert lr == rate and weight_decay == (decay if start[name].ndim > 1 else 0)
            assert (norm is None) == ("last_layer" in name and i < 4) and (norm or 0) <= 1e-4 + 1e-8
        assert sum((norm or 0) > 0.9e-4 for *_, norm in given.values()) > 5  # each on its own

        lengths, directions = (weights[f"head.last_layer.weight_{part}"] for part in "gv")
        assert torch.equal(lengths, torch.ones(32, 1)) == (norm_last_layer or i < 4)
        assert torch.equal(directions, start["head.last_layer.weight_v"]) == (i < 4)
        assert torch.equal(weights["backbone.cls_token"], start["backbone.cls_token"]) == (i == 0)
    momenta = [line["dino/momentum"] for line in metrics_of("run")]
    assert momenta == pytest.approx([dino_schedule(i, 8, 0, 0.0, 0.9) for i in range(8)])


WARM = {"warmup_teacher_temp_epochs": 2, "teacher_temp": 0.07}
SMALL = {"local_size": 4, "patch_size": 4, "crop_blurs": (1.0, 1.0, 1.0)}
NO_LOCAL = {"local_crops": 0, "min_scale": 0.14, "local_min_scale": 0.15, "local_size": 10}


@pytest.mark.parametrize(
    "module, flags, expected",
    [
        (dino, WARM | {"warmup_teacher_temp_epochs": 3}, [0.04] * 2 + [0.055] * 2 + [0.07] * 4),
        (dino, WARM | {"warmup_teacher_temp_epochs": 9}, [0.04] * 2 + [0.04375] * 2 + [0.0475] * 2),
        (dino, SMALL, [0.02] * 2),  # a blur of 11 pixels stays within the borders of 4
        (dino, NO_LOCAL, [0.02] * 2),  # their flags do not matter; --min-scale 0.14 is the official advice
        (dino, WARM | {"sharpening": False, "centering": False}, [0.1] * 2),
        (dino, {"sinkhorn": True, "teacher_temp": 0.2}, [0.2] * 4),
        (dinov2, WARM | {"warmup_teacher_temp_epochs": 1, "local_crops": 0}, [0.04] + [0.07] * 3),
        (dinov2, WARM | {"centering": False}, [0.04, 0.05, 0.06, 0.07, 0.07, 0.07]),
        (dinov2, WARM | {"warmup_teacher_temp_epochs": 4, "sinkhorn": True}, [0.04, 0.04 + 0.03 / 7]),
        (dinov2, WARM | {"sharpening": False}, [0.1] * 2),
    ],
)
def test_temperatures_and_centers_of_a_run(folder, monkeypatch, module, flags, expected):
    """T_t of each step: DINO's goes by epochs, of two steps; DINOv2's by steps, for [CLS] and patches alike.
    A centre is 0 in the first step, a tenth of its mean logits in the second, or never moved."""
    sinkhorn = "sinkhorn" in flags
    name = "sinkhorn_knopp" if sinkhorn and module is dinov2 else "teacher_targets"
    calls = calls_of(monkeypatch, module, name)
    flags = {"epochs": len(expected) // 2, "batch_size": 20, "data": str(folder), "run_dir": "run"} | flags
    module.train(tiny_args(module.__name__, **flags))
    assert [given[-1] for given, _ in calls] == pytest.approx([temp for temp in expected for _ in "12"])
    model = load("run/checkpoint.pt")["model"]
    for number in (0, 1):  # in dino.py a second time for the monitor
        center = torch.zeros(64)
        for (taught, *given), q in calls[number::2]:
            if not sinkhorn:
                torch.testing.assert_close(q, ((taught - center) / given[-1]).softmax(dim=-1))
            elif module is dino:
                torch.testing.assert_close(q.flatten(0, 1), sinkhorn_knopp(taught.flatten(0, 1), given[-1]))
            if flags.get("centering", not sinkhorn):
                center = 0.9 * center + 0.1 * taught.flatten(0, -2).mean(dim=0)
        torch.testing.assert_close(model["center" if module is dino else f"centers.{number}"][0], center)


OWN = {"koleo_weight": 0.0}


@pytest.mark.parametrize(
    "module, flags",
    [
        (dino, {"base_lr": 5e-3}),
        (dino, {"base_lr": 5e-3, "sinkhorn": True}),
        (dinov2, OWN),
        (dinov2, OWN | {"sinkhorn": True}),
    ],
)
def test_two_processes_are_one(folder, module, flags):
    """train() in float64, with a plain augmentation by the same numbers: metrics, centres, and the way of the
    teacher. DINOv2 has hidden patches of another number in each process. KoLeo stays within a process."""

    def plain(images, u, order, jitter, blur, radius, solarize=0.0):
        return images.double() / 255 * u[:, :1, None, None] + solarize

    def train(rank):
        torch.set_default_dtype(torch.float64)
        module.augment = plain  # in the child alone
        module.train(args)

    flags = {"image_size": 16, "local_size": 8, "patch_size": 4, "batch_size": 10, "momentum": 0.5} | flags
    models = []
    for n, epochs in ((1, 0), (1, 2), (2, 2)):
        args = tiny_args(module.__name__, data=str(folder), epochs=epochs, run_dir=f"{n}{epochs}", **flags)
        in_processes(train, n)
        models.append(load(f"{n}{epochs}/checkpoint.pt")["model"])
    for one, two in zip(metrics_of("12"), metrics_of("22"), strict=True):
        two["dinov2/koleo_loss"] = one.setdefault("dinov2/koleo_loss", 0)
        assert two == pytest.approx(one, rel=1e-6, abs=1e-6)

    names = [name for name in models[0] if name.startswith("teacher.")]
    start, one, two = (torch.cat([model[name].flatten() for name in names]) for model in models)
    assert (two - one).norm() < 1e-4 * (one - start).norm()
    for name in [name for name in models[0] if name.startswith("center")]:
        torch.testing.assert_close(models[2][name], models[1][name], atol=1e-8, rtol=1e-6)
        assert (models[1][name].abs().max() > 1e-3) != ("sinkhorn" in flags)


@pytest.mark.parametrize("module, registers", [(dino, 0), (dinov2, 0), (dinov2, 2)])
def test_backbone_is_the_teacher_and_where_init_starts(folder, module, registers):
    """In timm, strictly; in eval_linear.py; what convert.py makes of the official file; and --init, from
    which student and teacher start alike, head and all."""
    flags = {"data": str(folder)} | ({"registers": registers} if module is dinov2 else {})
    module.train(tiny_args(module.__name__, **flags, epochs=1, momentum=0.5, run_dir="run"))
    saved, model = load("run/backbone.pt"), load("run/checkpoint.pt")["model"]
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 0}
    shape |= {"init_values": 0.1} if module is dinov2 else {}  # DESIGN 6
    shape |= {"reg_tokens": registers, "no_embed_class": True} if registers else {}
    assert saved["arch_args"] == shape
    official = {name[17:]: p for name, p in model.items() if name.startswith("teacher.backbone.")}
    assert not torch.equal(model["student.backbone.norm.weight"], official["norm.weight"])
    assert official["pos_embed"][:, 0].any() and official["pos_embed"].shape == (1, 17, 32)

    build = dinov2.DINOv2ViT if module is dinov2 else VisionTransformer
    teacher = build("vit_nano", 32, 8, *([registers] if registers else [])).eval()
    teacher.load_state_dict(official)
    theirs = timm.models.VisionTransformer(**shape).eval()
    theirs.load_state_dict(saved["state_dict"])
    for side, tolerance in ((48, 0.05), (32, 1e-5)):  # at other sizes timm resamples, not DINO
        x = logits(2, 3, side, side)
        expected = teacher(x) if module is dino else teacher(x)[:, 0]
        found = features_of(eval_linear.load_backbone("run/backbone.pt", side=side), x)
        assert (found - expected).norm() < tolerance * expected.norm()
    mean = features_of(eval_linear.load_backbone("run/backbone.pt", feature="mean"), x)
    expected = theirs.forward_features(x)[:, 1 + registers :].mean(dim=1)
    torch.testing.assert_close(mean, expected, atol=1e-5, rtol=1e-5)

    full = {"teacher": {name[8:]: p for name, p in model.items() if name.startswith("teacher.")}}
    torch.save(full if module is dino else official, "official.pth")
    convert.convert(convert.Args("official.pth", "converted.pt", heads=2))
    module.train(
        tiny_args(module.__name__, **flags, epochs=0, seed=1, init="run/backbone.pt", run_dir="init")
    )
    for path in ("converted.pt", "init/backbone.pt"):
        again = load(path)["state_dict"]
        assert again.keys() == saved["state_dict"].keys()
        assert all(torch.equal(tensor, saved["state_dict"][name]) for name, tensor in again.items())
    model = load("init/checkpoint.pt")["model"]
    names = [name[8:] for name in model if name.startswith("student.")]
    assert len(names) > 40
    assert all(torch.equal(model[f"student.{name}"], model[f"teacher.{name}"]) for name in names)


# Flags


def test_bad_flags():
    for script, flags, words in (
        ("dino", {"patch_size": 5}, "-size, --local-size [32, 16]: give multiples of --patch-size 5"),
        ("dino", {"local_size": 10}, "-size, --local-size [32, 10]: give multiples of --patch-size 8"),
        ("dino", {"local_min_scale": 0.5}, "--local-min-scale 0.5: must be above 0 and at most 0.4"),
        ("dino", {"crop_blurs": (1.0, 0.1, 1.5)}, "--crop-blurs (1.0, 0.1, 1.5): must be at least 0 and"),
        ("dinov2", {"local_min_scale": 0.5}, "--local-min-scale 0.5: must be above 0 and at most 0.4"),
        ("dinov2", {"mask_ratios": (0.1, 1.5)}, "--mask-ratios (0.1, 1.5): must be at least 0 and at most 1"),
        ("dinov2", {"drop_path_rate": 1.5}, "--drop-path-rate 1.5: must be at least 0 and at most 1"),
    ):
        refused(script, re.escape(words), epochs=0, **flags)
    assert not list(Path().iterdir())


def paper_args(module, launcher):
    """Flags of the third command of a docstring."""
    command = re.search(rf"{launcher}{module.__name__}\.py(.*?)(?<!\\)\n", module.__doc__, re.S)[1]
    return vars(tyro.cli(module.Args, args=command.replace("\\\n", " ").split()))


def test_paper_command_is_the_sheet_s():
    expected = {"image_size": 224, "local_size": 96, "local_crops": 8, "patch_size": 16, "arch": "vit_small"}
    expected |= {"min_scale": 0.4, "local_min_scale": 0.05, "jitter": (0.4, 0.4, 0.2, 0.1), "solarize": 0.2}
    expected |= {"crop_blurs": (1.0, 0.1, 0.5), "drop_path": 0.1, "head_dim": 2048, "out_dim": 65536}
    expected |= {"norm_last_layer": True, "teacher_temp": 0.04, "student_temp": 0.1, "momentum": 0.996}
    expected |= {"final_momentum": 1.0}
    expected |= {"warmup_teacher_temp_epochs": 0, "epochs": 100, "batch_size": 1024, "base_lr": 5e-4}
    expected |= {"weight_decay": 0.04, "final_weight_decay": 0.4, "warmup_epochs": 10, "clip_grad": 3.0}
    expected |= {"freeze_last_layer": 1}
    assert expected.items() <= paper_args(dino, r"torchrun --nnodes 2 .*HOST:29500 .\n +").items()


# The demo


def attention_on_things(vit, monkeypatch):
    """Share of the [CLS] attention on the object over the object's share of the image, of each head."""

    def demo():
        images = [dino.demo_image(i)[0].resize((32, 32), Image.BICUBIC) for i in range(10**6, 10**6 + 256)]
        return torch.stack([pil_to_tensor(image) for image in images]) / 255

    pixels = demo()
    with monkeypatch.context() as patch:
        patch.setattr(dino, "THINGS", (0,) * 10)
        things = (demo() - pixels).abs().sum(dim=1, keepdim=True)
    things = things / things.amax(dim=(2, 3), keepdim=True)
    images = normalize(pixels, dino.MEAN, dino.STD)
    attention = dino.attention_page(vit, images, images).unflatten(0, (256, -1))[:, 1:, 0]
    attention = attention / attention.sum(dim=(2, 3), keepdim=True)
    return ((attention * things).sum(dim=(2, 3)) / things.mean(dim=(2, 3))).mean(dim=0).max()


@pytest.mark.slow
@pytest.mark.parametrize("module, modes", [(dino, ["logreg", "knn"]), (dinov2, ["logreg", "knn"])])
def test_the_demo_learns_and_looks_at_the_object(monkeypatch, module, modes):
    """python dino.py, dinov2.py: 5 points above the untrained ViT; DINO looks at the object by 1.5."""
    monkeypatch.setitem(module.VITS, "vit_nano", VITS["vit_nano"])
    module.train(module.Args(run_dir="run"))
    for mode in modes:
        trained, untrained = (
            eval_linear.evaluate(eval_linear.Args(backbone=name, mode=mode))["top1"]
            for name in ("run/backbone.pt", "random:run/backbone.pt")
        )
        assert trained > untrained + 5, mode
    if module is dino:
        torch.manual_seed(0)
        vit = VisionTransformer("vit_nano", 32, 8)
        assert attention_on_things(vit, monkeypatch) < 1.2
        vit.load_state_dict(load("run/backbone.pt")["state_dict"])
        assert attention_on_things(vit, monkeypatch) > 1.5
