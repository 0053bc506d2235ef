"""simclr.py against its fact sheet's oracles, slow versions written here, torchvision and lightly."""

import importlib
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
import torchvision
import tyro
from conftest import run_processes, tiny_args
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import functional as TF

import simclr
from simclr import LARS, SimCLR, augment, backward_in_chunks, contrastive_logits, contrastive_metrics, nt_xent

DOUBLE = torch.float64


def slow_nt_xent(z0, z1, temperature):
    """Eq. 1 row by row."""
    z = torch.cat([z0, z1])
    z = z / z.norm(dim=1, keepdim=True)
    n, losses = len(z0), []
    for i in range(2 * n):
        exponentials = [torch.exp(z[i] @ z[j] / temperature) for j in range(2 * n)]
        partner = (i + n) % (2 * n)
        losses.append(
            -torch.log(exponentials[partner] / sum(e for j, e in enumerate(exponentials) if j != i))
        )
    return sum(losses) / (2 * n)


def views(n, dim, seed=0, dtype=DOUBLE):
    return torch.randn(2, n, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# The loss: oracles 1 to 5


@pytest.mark.parametrize("n, expected", [(2, 1.098612), (4, 1.945910)])
def test_equal_embeddings_give_ln_of_the_candidates(n, expected):
    z = torch.ones(n, 3, dtype=DOUBLE)
    assert nt_xent(z, z, 0.5).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("n, tau, expected", [(2, 0.5, 0.239545), (2, 0.1, 9.0796e-5), (4, 0.5, 0.594438)])
def test_orthonormal_pairs(n, tau, expected):
    z = torch.eye(n, dtype=DOUBLE)
    assert nt_xent(z, z, tau).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("tau, expected", [(0.5, 0.535969), (1.0, 0.732602)])
def test_unnormalised_rows_and_invariances(tau, expected):
    z0 = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=DOUBLE)
    z1 = torch.tensor([[1.0, 1.0], [-1.0, 1.0]], dtype=DOUBLE)
    loss = nt_xent(z0, z1, tau)
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    scale = torch.tensor([[7.0], [0.01]], dtype=DOUBLE)
    for same in (nt_xent(z0 * scale, z1, tau), nt_xent(z1, z0, tau), nt_xent(z0.flip(0), z1.flip(0), tau)):
        torch.testing.assert_close(same, loss)


def test_swapped_partners_and_a_single_image():
    z = torch.eye(2, dtype=DOUBLE)
    assert nt_xent(z, z.flip(0), 0.5).item() == pytest.approx(2.239545, abs=1e-6)
    one = torch.randn(1, 5)
    assert nt_xent(one, torch.randn(1, 5), 0.1).item() == 0


@settings(max_examples=20, deadline=None)
@given(n=st.integers(2, 6), dim=st.integers(2, 8), tau=st.floats(0.05, 2), seed=st.integers(0, 1000))
def test_loss_and_gradient_are_those_of_the_slow_version(n, dim, tau, seed):
    z = views(n, dim, seed).requires_grad_()
    ours, slow = nt_xent(*z, tau), slow_nt_xent(*z, tau)
    torch.testing.assert_close(ours, slow)
    torch.testing.assert_close(torch.autograd.grad(ours, z), torch.autograd.grad(slow, z))


def test_gradient_of_a_row_is_orthogonal_to_it_and_none_is_zero():
    z = views(4, 6).requires_grad_()
    (grad,) = torch.autograd.grad(nt_xent(*z, 0.5), z)
    assert (grad * z).sum(-1).abs().max() < 1e-15 and grad.norm(dim=-1).min() > 1e-3
    # also as a negative only: the loss of anchor 0 alone moves every row
    logits, positive = contrastive_logits(*z, 0.5)
    (grad,) = torch.autograd.grad(F.cross_entropy(logits[:1], positive[:1]), z)
    assert grad.norm(dim=-1).min() > 1e-3


@pytest.mark.parametrize("tau, expected", [(0.07, 2.516e-4), (0.2, 0.124017), (0.5, 0.702462)])
def test_the_fox_line_up(tau, expected):
    """One positive of cosine .85 against four negatives, found among the rows of contrastive_logits."""
    cosines = torch.tensor([0.85, 0.21, 0.18, 0.12, 0.15], dtype=DOUBLE)
    fox = torch.eye(6, dtype=DOUBLE)[0]
    others = torch.zeros(5, 6, dtype=DOUBLE)
    others[:, 0] = cosines
    others[torch.arange(5), torch.arange(1, 6)] = (1 - cosines**2).sqrt()
    z0, z1 = torch.stack([fox, others[1], others[2]]), torch.stack([others[0], others[3], others[4]])
    logits, positive = contrastive_logits(z0, z1, tau)
    assert F.cross_entropy(logits[:1], positive[:1]).item() == pytest.approx(expected, rel=1e-3)


def test_a_batch_of_256_has_510_negatives():
    logits, positive = contrastive_logits(*views(256, 8), 0.1)
    finite = torch.isfinite(logits)
    assert (finite.sum(1) - 1 == 510).all() and finite.gather(1, positive[:, None]).all()
    assert (~finite).nonzero()[:, 1].tolist() == list(range(512)) == positive.roll(256).tolist()


def test_equals_lightly():
    from lightly.loss import NTXentLoss

    z = views(16, 32, dtype=torch.float32).requires_grad_()
    for tau in (0.1, 0.5):
        ours, theirs = nt_xent(*z, tau), NTXentLoss(temperature=tau)(*z)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(torch.autograd.grad(ours, z), torch.autograd.grad(theirs, z))


def test_half_precision_is_computed_in_float32():
    z = views(8, 16, dtype=torch.bfloat16)
    assert nt_xent(*z, 0.05).dtype == torch.float32
    torch.testing.assert_close(nt_xent(*z, 0.05), nt_xent(*z.float(), 0.05))


def test_without_negatives_only_attraction_is_left():
    z = views(4, 6)
    cosine = F.cosine_similarity(z[0], z[1], dim=1).mean()
    torch.testing.assert_close(nt_xent(*z, 0.5, negatives=False), -cosine / 0.5)


def test_accuracy_is_strict_and_gap_is_from_equal_logits():
    z = torch.ones(4, 3)
    accuracy, gap = contrastive_metrics(*contrastive_logits(z, z, 0.5))
    assert accuracy == 0 and gap.item() == pytest.approx(0, abs=1e-6)
    logits, positive = contrastive_logits(torch.eye(4), torch.eye(4), 0.5)
    assert F.cross_entropy(torch.zeros(1, 7), torch.tensor([0])).item() == pytest.approx(1.945910, abs=1e-6)
    accuracy, gap = contrastive_metrics(logits, positive)
    assert accuracy == 1 and gap.item() == pytest.approx(math.log(7) - 0.594438, abs=1e-5)
    nan = torch.full((2, 5), math.nan)
    assert contrastive_metrics(nan, torch.tensor([0, 1]))[0] == 0


# Several processes: oracle 6, and chunks


@pytest.mark.parametrize("chunks", [0, 1])
def test_two_processes_are_one(tmp_path, chunks):
    """Loss and gradient under DDP, or in chunks without it, of a ResNet with BatchNorm in eval mode."""
    run_processes(
        tmp_path,
        f"""
import torch, torch.distributed as dist, simclr
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = simclr.SimCLR("resnet18").double().eval()
for m in model.modules():
    if isinstance(m, torch.nn.modules.batchnorm._BatchNorm):
        m.running_var.fill_(4.0)
params = [p for p in model.parameters() if p.requires_grad]
images = torch.randn(4, 2, 3, 32, 32, dtype=torch.float64)
net = model if {chunks} else torch.nn.parallel.DistributedDataParallel(model)
scaler = torch.amp.GradScaler("cpu", enabled=False)
def embed(chunk):
    z, h = net(chunk[0].flatten(0, 1), return_features=True)
    return z.unflatten(0, (-1, 2)), h
def loss_of(z):
    return simclr.nt_xent(z[:, 0], z[:, 1], 0.5)
mine = images.chunk(2)[rank]
if {chunks}:
    loss, z, h = simclr.backward_in_chunks(lambda c: embed((c,)), mine.split(1), loss_of, scaler, params)
else:
    z, h = embed((mine,))
    loss = loss_of(z)
    loss.backward()
loss = simclr.gather(loss.detach()[None]).mean()
metrics = simclr.collapse_metrics(h), simclr.collapse_metrics(z.flatten(0, 1))
accuracy = simclr.contrastive_metrics(*simclr.contrastive_logits(z[:, 0].detach(), z[:, 1].detach(), 0.5))[0]
accuracy = simclr.gather(accuracy[None]).mean()
grads = [p.grad.clone() for p in params]
dist.destroy_process_group()
net = model
model.zero_grad()
z, h = embed((images,))
whole = loss_of(z)
whole.backward()
assert abs(loss - whole) < 1e-12, (loss, whole)
assert max((a - p.grad).abs().max() for a, p in zip(grads, params)) < 1e-12
assert max(p.grad.abs().max() for p in params) > 1e-3
for ours, one in zip(metrics, (simclr.collapse_metrics(h), simclr.collapse_metrics(z.flatten(0, 1)))):
    assert all(abs(ours[k] - one[k]) < 1e-6 for k in one), (ours, one)
one = simclr.contrastive_metrics(*simclr.contrastive_logits(z[:, 0].detach(), z[:, 1].detach(), 0.5))[0]
assert abs(accuracy - one) < 1e-6
""",
    )


@pytest.mark.parametrize("optimizer", ["sgd", pytest.param("lars", marks=pytest.mark.slow)])
def test_training_is_the_same_in_chunks_and_in_processes(tmp_path, optimizer):
    """train() itself, with a network without BatchNorm: 1 process = chunks = 2 processes = 2 in chunks."""
    code = f"""
import sys, torch, simclr
from torch import nn
class Scale(nn.BatchNorm1d):
    def forward(self, x):
        return x * self.weight + self.bias
def small(arch, stem):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 32), nn.Tanh()), 32
simclr.resnet, simclr.nn.BatchNorm1d = small, Scale
args = simclr.Args(
    data="photos", image_size=16, batch_size=24, epochs=1, warmup_epochs=0.01, workers=0, log_every=1,
    blur=0.5, solarize=0.3, proj_layers=3, optimizer={optimizer!r}, lr_scaling="sqrt", base_lr=0.02,
    micro_batch_size=MICRO, run_dir="RUN",
)
simclr.train(args)
"""
    (tmp_path / "photos").mkdir()
    for i in range(144):
        simclr.demo_image(i)[0].save(tmp_path / "photos" / f"{i:03d}.png")
    curves = {}
    for n, micro in ((1, 0), (1, 5), (2, 0), (2, 5)):
        name = f"run{n}{micro}"
        run_processes(tmp_path, code.replace("MICRO", str(micro)).replace("RUN", name), n)
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        curves[name] = lines
        assert len(lines) == 6
        for line, first in zip(lines, curves["run10"], strict=True):
            for tag in ("train/loss", "train/lr", "monitor/projection_rank"):
                assert line[tag] == pytest.approx(first[tag], rel=2e-5), (name, tag)
            accuracy = [run["simclr/contrastive_accuracy"] for run in (line, first)]
            assert abs(accuracy[0] - accuracy[1]) < 1.1 / 24, name  # a rounding turns one image, no more
    assert lines[0]["train/loss"] != pytest.approx(lines[-1]["train/loss"], rel=1e-4)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 3e-6), (DOUBLE, 1e-12)])
def test_gradient_in_chunks_is_that_of_the_batch(dtype, tolerance):
    torch.manual_seed(0)
    model = SimCLR().to(dtype).eval()
    images = torch.randn(5, 2, 3, 32, 32, dtype=dtype)
    calls = []

    def embed(chunk):
        calls.append(len(chunk))
        z, h = model(chunk.flatten(0, 1), return_features=True)
        return z.unflatten(0, (-1, 2)), h

    def loss_of(z):
        return nt_xent(z[:, 0], z[:, 1], 0.1)

    params = [p for p in model.parameters() if p.requires_grad]
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    whole = loss_of(embed(images)[0])
    expected = torch.autograd.grad(whole, params)
    loss, z, h = backward_in_chunks(embed, images.split(2), loss_of, scaler, params)
    assert calls == [5, 2, 2, 1, 2, 2, 1] and z.shape == (5, 2, 128) and h.shape == (10, 512)
    torch.testing.assert_close(loss, whole.detach())
    scale = max(g.abs().max() for g in expected)
    assert max((p.grad - g).abs().max() for p, g in zip(params, expected, strict=True)) < tolerance * scale


# Optimiser and schedule: oracles 7 and 8


@pytest.mark.parametrize(
    "decay, steps",
    [(0, [(3, 3.995), (3, 3.988002)]), (0.1, [(2.99895235, 3.99511099), (2.99748613, 3.98826859)])],
)
def test_lars(decay, steps):
    w = torch.nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=DOUBLE))
    optimizer = LARS([w], 1.0, weight_decay=decay)
    for lr, expected in zip((1.0, 0.5), steps, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        w.grad = torch.tensor([[0.0, 1.0]], dtype=DOUBLE)
        optimizer.step()
        torch.testing.assert_close(w.data, torch.tensor([expected], dtype=DOUBLE), atol=1e-7, rtol=0)


def test_lars_takes_plain_steps_on_biases_and_where_a_norm_is_zero():
    for w, expected in ((torch.tensor([3.0, 4.0]), [3.0, 3.0]), (torch.zeros(1, 2), [[0.0, -1.0]])):
        w = torch.nn.Parameter(w)
        w.grad = torch.tensor([0.0, 1.0]).view_as(w)
        LARS([w], 1.0, weight_decay=0.1).step()
        assert w.tolist() == expected


def test_lars_of_byol_keeps_the_learning_rate_outside():
    """v = m v + g, w -= lr v, with the ratio of the second step taken at the moved weight."""
    w = torch.nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=DOUBLE))
    optimizer = LARS([w], 1.0, lr_in_momentum=False)
    slow, v = w.detach().clone(), torch.zeros(1, 2, dtype=DOUBLE)
    g = torch.tensor([[0.0, 1.0]], dtype=DOUBLE)
    for lr in (1.0, 0.5, 2.0):
        optimizer.param_groups[0]["lr"] = lr
        w.grad = g.clone()
        optimizer.step()
        v = 0.9 * v + 1e-3 * slow.norm() / g.norm() * g
        slow = slow - lr * v
        torch.testing.assert_close(w.data, slow)


def test_schedule():
    total, warmup = 31279, 3127
    rate = lambda step: simclr.cosine_schedule(step, total, warmup, 4.8)  # noqa: E731
    assert rate(0) == 0 and rate(warmup) == 4.8 and rate(total) == 0
    assert rate(1000) == pytest.approx(1.535018, abs=1e-6)
    assert rate((total + warmup) / 2) == pytest.approx(2.4)
    assert simclr.cosine_schedule(10, 10, 0, 1.0, final=0.25) == 0.25
    assert simclr.cosine_schedule(976, 97657, 976, 1.0 * 512 / 256) == 2.0  # the CIFAR recipe


@pytest.mark.parametrize("scaling, peak", [("linear", 0.3 * 8 / 256), ("sqrt", 0.3 * 8**0.5)])
def test_learning_rates_of_a_run(folder, tmp_path, scaling, peak):
    args = tiny_args(
        "simclr", data=str(folder), base_lr=0.3, lr_scaling=scaling, run_dir=str(tmp_path), warmup_epochs=1.4
    )
    simclr.train(args)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["train/lr"] for line in lines] == [
        simclr.cosine_schedule(step, 20, 7, peak) for step in range(20)
    ]


@pytest.mark.parametrize("optimizer, side, radius", [("sgd", 32, 1), ("lars", 224, 11)])
def test_recipe_of_a_run(folder, tmp_path, monkeypatch, optimizer, side, radius):
    """Optimiser and its two groups, strength of the jitter, 3 taps of the blur at 32 px and 23 at 224."""
    built, drawn, radii, draw = [], [], [], simclr.draw_numbers

    class Stop(Exception):
        pass

    def spy(images, numbers, order, blur_radius):
        radii.append(blur_radius)
        if len(radii) == 2:  # the first one is for the picture of the views
            raise Stop
        return images / 255

    for place, name in ((torch.optim, "SGD"), (simclr, "LARS")):
        build = getattr(place, name)
        wrapped = lambda *a, build=build, **k: built.append(build(*a, **k)) or built[-1]  # noqa: E731
        monkeypatch.setattr(place, name, wrapped)
    monkeypatch.setattr(simclr, "draw_numbers", lambda *a: drawn.append(a) or draw(*a))
    monkeypatch.setattr(simclr, "augment", spy)
    flags = {"image_size": side, "jitter_strength": 0.5, "blur": 0.3, "solarize": 0.1, "weight_decay": 0.02}
    with pytest.raises(Stop):
        args = tiny_args("simclr", data=str(folder), optimizer=optimizer, **flags, run_dir=str(tmp_path))
        simclr.train(args)
    assert radii == [radius] * 2 and drawn[0][:4] == ((8, 2), [0.4, 0.4, 0.4, 0.1], 0.3, 0.1)
    groups = built[-1].param_groups
    assert type(built[-1]).__name__.lower() == optimizer
    assert [(group["momentum"], group["weight_decay"]) for group in groups] == [(0.9, 0.02), (0.9, 0.0)]
    own = {"sgd": {"nesterov": True}, "lars": {"lr_inside": True, "trust": 1e-3}}[optimizer]
    assert all(own.items() <= group.items() for group in groups)
    assert all(p.ndim > 1 for p in groups[0]["params"]) and all(p.ndim == 1 for p in groups[1]["params"])


@pytest.mark.parametrize("script", ["simclr", "byol", "moco_v3"])
def test_batch_norm_is_synchronised_on_several_gpus(folder, tmp_path, monkeypatch, script):
    """As far as the conversion, whose result, here None, is what train() goes on with."""
    module, sync = importlib.import_module(script), torch.nn.SyncBatchNorm
    monkeypatch.setattr(module, "start_processes", lambda *a: (0, 2, torch.device("cuda"), None))
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *a, **k: self)
    monkeypatch.setattr(sync, "convert_sync_batchnorm", lambda model: None)
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'parameters'"):
        module.train(tiny_args(script, data=str(folder), run_dir=str(tmp_path)))


# Model


@pytest.mark.parametrize("arch, entries, width", [("resnet18", 120, 512), ("resnet50", 318, 2048)])
def test_backbone_is_torchvision_s(arch, entries, width):
    net = getattr(torchvision.models, arch)()
    torch.manual_seed(0)
    model = SimCLR(arch)
    state = model.backbone.state_dict()
    assert len(state) == entries
    missing, unexpected = net.load_state_dict(state, strict=False)
    assert sorted(missing) == ["fc.bias", "fc.weight"] and not unexpected
    net.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model.eval().backbone(images), net.eval()(images))
    assert model(images, return_features=True)[1].shape == (2, width) and model(images).shape == (2, 128)


def test_cifar_stem():
    model = SimCLR("resnet18", stem="cifar")
    assert sum(p.numel() for p in model.backbone.parameters()) == 11_168_832
    assert model.backbone.conv1(torch.zeros(1, 3, 32, 32)).shape == (1, 64, 32, 32)
    sides = []
    for layer in (model.backbone.layer1, model.backbone.layer2, model.backbone.layer3, model.backbone.layer4):
        layer.register_forward_hook(lambda module, inputs, output: sides.append(output.shape[-1]))
    model.eval()(torch.zeros(2, 3, 32, 32))
    assert sides == [32, 16, 8, 4]
    fan_out = 64 * 9
    assert model.backbone.conv1.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)


@pytest.mark.parametrize(
    "depth, shapes", [(2, [(512, 512), (128, 512)]), (3, [(512, 512), (512, 512), (128, 512)])]
)
def test_projector(depth, shapes):
    state = SimCLR("resnet18", proj_layers=depth).projector.state_dict()
    assert [tuple(w.shape) for name, w in state.items() if w.ndim == 2] == shapes
    assert {int(name.split(".")[0]) for name in state} == {0, 1, 3, 4} | ({6, 7} if depth == 3 else set())
    assert not any(
        name.endswith("bias") and int(name.split(".")[0]) % 3 == 0 for name in state
    )  # linear: no bias
    projector = SimCLR("resnet18", proj_layers=depth).projector
    assert [layer.bias.requires_grad for layer in projector if hasattr(layer, "running_mean")] == [True] * (
        depth - 1
    ) + [False]


# Augmentation on the device = torchvision's, at equal factors


def augmented(images, order=(0, 1, 2, 3, 4), radius=0, **columns):
    """augment with all factors neutral but those given; back in [0, 1]."""
    names = ["brightness", "contrast", "saturation", "hue", "gray", "sigma", "solarize"]
    numbers = torch.tensor([1.0, 1, 1, 0, 0, 0, 0]).repeat(len(images), 1)
    for name, values in columns.items():
        numbers[:, names.index(name)] = values
    x = augment(images, numbers, order, radius)
    return x * torch.tensor(simclr.STD).view(3, 1, 1) + torch.tensor(simclr.MEAN).view(3, 1, 1)


@pytest.fixture(scope="module")
def images():
    images = torch.randint(
        0, 256, (12, 3, 40, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    images[0] = images[0, :1]  # gray, where hue has no meaning
    images[1] = 0
    return images


def each(function, images, values=None):
    values = [()] * len(images) if values is None else [(float(v),) for v in values]
    return torch.stack([function(image / 255, *value) for image, value in zip(images, values, strict=True)])


def assert_near(a, b):
    assert (a - b).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_colour_is_torchvision_s(images, name):
    values = torch.linspace(-0.5, 0.5, 12) if name == "hue" else torch.linspace(0, 2, 12)
    assert_near(augmented(images, **{name: values}), each(getattr(TF, f"adjust_{name}"), images, values))


def test_colours_in_any_order(images):
    factors = {"brightness": 1.4, "contrast": 0.6, "saturation": 1.7, "hue": 0.15}
    names = list(factors)
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]):
        expected = images / 255
        for i in order:
            expected = getattr(TF, f"adjust_{names[i]}")(expected, factors[names[i]])
        assert_near(augmented(images, order=order, **factors), expected)


def test_gray_blur_and_solarize_are_torchvision_s(images):
    assert_near(augmented(images, gray=1), TF.rgb_to_grayscale(images / 255, 3))
    assert_near(augmented(images, solarize=1), TF.solarize(images / 255, 0.5))
    sigmas = torch.linspace(0.1, 2, 12)
    blurred = each(lambda image, sigma: TF.gaussian_blur(image, [9, 9], [sigma, sigma]), images, sigmas)
    assert_near(augmented(images, radius=4, sigma=sigmas), blurred)
    assert_near(augmented(images, radius=4, sigma=0), images / 255)


def test_drawn_numbers_have_the_paper_s_distribution():
    draw = lambda seed, *p: simclr.draw_numbers((4000, 2), *p, torch.Generator().manual_seed(seed))  # noqa: E731
    half, none = (0.4, 0.4, 0.4, 0.1), (0.0, 0.0, 0.0, 0.0)
    numbers, order = draw(0, half, 0.5, 0.2)
    flat = numbers.flatten(0, 1)
    jittered = (flat[:, :4] != torch.tensor([1.0, 1, 1, 0])).all(1)
    assert jittered.float().mean().item() == pytest.approx(0.8, abs=0.02)
    low, high = flat[jittered].amin(0)[:4], flat[jittered].amax(0)[:4]
    torch.testing.assert_close(low, torch.tensor([0.6, 0.6, 0.6, -0.1]), atol=0.01, rtol=0)
    torch.testing.assert_close(high, torch.tensor([1.4, 1.4, 1.4, 0.1]), atol=0.01, rtol=0)
    gray, sigma, solarize = flat[:, 4], flat[:, 5], flat[:, 6]
    assert gray.mean().item() == pytest.approx(0.2, abs=0.02)
    assert gray[~jittered].mean().item() == pytest.approx(0.2, abs=0.04)  # drawn apart from the jitter
    assert (sigma > 0).float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert 0.1 <= sigma[sigma > 0].min() < 0.12 and 1.98 < sigma.max() <= 2
    assert solarize.mean().item() == pytest.approx(0.2, abs=0.02)
    orders = {tuple(draw(s, half, 0, 0)[1]) for s in range(200)}
    assert sorted(order[:4]) == [0, 1, 2, 3] and order[4] == 4 and len(orders) == 24
    again, _ = draw(0, half, 0.5, 0.2)
    assert torch.equal(numbers, again) and not torch.equal(numbers, draw(1, half, 0.5, 0.2)[0])
    off, _ = draw(0, none, 0.0, 0.0)
    assert (off[..., [0, 1, 2, 3, 5, 6]] == torch.tensor([1.0, 1, 1, 0, 0, 0])).all()
    full, _ = draw(0, (0.8, 0.8, 0.8, 0.2), 0.0, 0.0)
    assert full[..., :3].min() >= 0.2 and full[..., 3].abs().max() <= 0.2
    wide, _ = draw(0, (1.6, 1.6, 1.6, 0.4), 0.0, 0.0)
    assert 0 <= wide[..., :3].min() < 0.01 and wide[..., 3].min() < -0.39
    views, _ = draw(0, (0.4, 0.4, 0.2, 0.1), [1.0, 0.1], [0.0, 0.2])  # of each view its own
    assert (views[..., 5] > 0).float().mean(dim=0).tolist() == pytest.approx([1, 0.1], abs=0.02)
    assert views[..., 6].mean(dim=0).tolist() == pytest.approx([0, 0.2], abs=0.02)
    assert views[..., 2].max().item() == pytest.approx(1.2, abs=0.01)


def test_crop_of_a_tensor_is_that_of_the_image():
    """torchvision's crop of uint8 tensors resizes like PIL, to 2 of 255."""
    photo = simclr.demo_image(0)[0].resize((300, 200))
    crop = simclr.random_crop(64, 0.08)
    for seed in range(5):
        torch.manual_seed(seed)
        ours = crop(TF.pil_to_tensor(photo))
        torch.manual_seed(seed)
        expected = TF.pil_to_tensor(crop(photo))
        assert ours.shape == (3, 64, 64) and ours.dtype == torch.uint8
        assert (ours.int() - expected.int()).abs().max() <= 2


# The paper's command


def test_paper_command_is_the_sheet_s():
    command = re.search(r"torchrun --nproc-per-node 8 simclr\.py(.*?)(?<!\\)\n", simclr.__doc__, re.S)[1]
    args = tyro.cli(simclr.Args, args=command.replace("\\\n", " ").split())
    assert (args.image_size, args.arch, args.stem, args.epochs, args.batch_size) == (
        224,
        "resnet50",
        "imagenet",
        100,
        4096,
    )
    assert (args.optimizer, args.base_lr, args.lr_scaling, args.weight_decay) == ("lars", 0.3, "linear", 1e-6)
    assert (args.warmup_epochs, args.temperature, args.proj_layers, args.proj_dim) == (10, 0.1, 2, 128)
    assert (args.jitter_strength, args.min_scale, args.blur, args.solarize) == (1.0, 0.08, 0.5, 0.0)
