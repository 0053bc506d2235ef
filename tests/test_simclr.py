"""simclr.py against its fact sheet's oracles, slow versions written here, torchvision and lightly."""

import importlib
import math
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchvision
import tyro
from conftest import in_processes, load, metrics_of, tensors_of, tiny_args
from hypothesis import given, settings
from hypothesis import strategies as st
from lightly.loss import NTXentLoss
from torch import nn
from torchvision.transforms import functional as TF

import simclr
from simclr import LARS, SimCLR, augment, collapse_metrics, cosine_schedule, monitor, nt_xent

DOUBLE = torch.float64


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# Augmentation


def slow_augment(image, u, order, jitter, blur, radius, solarize, chance):
    """One image, by torchvision's functions and what the sheet says of their numbers."""
    x = image / 255
    for i in order:
        if i == 4:
            x = TF.rgb_to_grayscale(x, 3) if u[5] < 0.2 else x
        elif u[4] < chance:
            low, high = (-jitter[3], jitter[3]) if i == 3 else (max(0, 1 - jitter[i]), 1 + jitter[i])
            name = ("brightness", "contrast", "saturation", "hue")[i]
            x = getattr(TF, f"adjust_{name}")(x, low + (high - low) * u[i])
    if radius and u[6] < blur:
        x = TF.gaussian_blur(x, [2 * radius + 1] * 2, [0.1 + 1.9 * u[7]] * 2)
    return TF.solarize(x, 0.5) if u[8] < solarize else x


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (3, 1, 0, 2, 4), (2, 3, 1, 0, 4)])
def test_colours_gray_blur_and_solarize_are_torchvision_s(order, generator):
    """Also where they differ between the two views."""
    images = (256 * torch.rand(60, 3, 24, 24, generator=generator)).byte()
    images[0] = images[0, :1]  # gray, where hue has no meaning
    images[1] = 0
    u = torch.rand(60, 9, generator=generator)
    for_views = [torch.tensor(pair).repeat(30).view(-1, 1, 1, 1) for pair in ([1.0, 0.1], [0.0, 0.2])]
    for strength, blur, radius, solarize, chance in (
        (0.0, 0.0, 0, 0.0, 0.8),
        (0.5, 0.5, 4, 0.2, 0.3),
        (1.0, for_views[0], 4, for_views[1], 0.8),
        (2.0, 0.5, 0, 0.0, 0.8),  # no factor below 0
    ):
        jitter = [0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength]
        shares = [torch.as_tensor(share).flatten().expand(60).tolist() for share in (blur, solarize)]
        rows = zip(images, u.tolist(), *shares, strict=True)
        theirs = [slow_augment(x, v, order, jitter, b, radius, s, chance) for x, v, b, s in rows]
        ours = augment(images, u, order, jitter, blur, radius, solarize, chance)
        assert (ours - torch.stack(theirs)).abs().max() < 1e-4 and ours.min() >= 0 and ours.max() <= 1


def test_crop_of_a_tensor_is_that_of_the_image():
    """torchvision's crop of uint8 tensors resizes like PIL, to 2 of 255; half of the crops are mirrored."""
    photo = simclr.demo_image(0)[0].resize((300, 200))
    crop = simclr.random_crop(64, 0.08)
    assert crop.transforms[0].interpolation.value == "bicubic" and crop.transforms[1].p == 0.5
    for seed in range(5):
        torch.manual_seed(seed)
        ours = crop(TF.pil_to_tensor(photo))
        torch.manual_seed(seed)
        theirs = TF.pil_to_tensor(crop(photo))
        assert ours.shape == (3, 64, 64) and ours.dtype == torch.uint8
        assert (ours.int() - theirs.int()).abs().max() <= 2


# Model


def test_backbone_is_torchvision_s():
    with torch.device("meta"):
        for arch, entries, width in (("resnet18", 120, 512), ("resnet50", 318, 2048)):
            ours, theirs = SimCLR(arch), getattr(torchvision.models, arch)().state_dict()
            del theirs["fc.weight"], theirs["fc.bias"]
            shapes = [{k: v.shape for k, v in x.items()} for x in (ours.backbone.state_dict(), theirs)]
            assert shapes[0] == shapes[1] and len(theirs) == entries
            assert ours.projector[0].in_features == width

    net, model, images = torchvision.models.resnet18(), SimCLR().eval(), normal(2, 3, 64, 64)
    net.load_state_dict(model.backbone.state_dict(), strict=False)
    net.fc = nn.Identity()
    z, h = model(images)
    torch.testing.assert_close(h, net.eval()(images))
    torch.testing.assert_close(z, model.projector(h))


def test_cifar_stem():
    net, sides = SimCLR("resnet18", stem="cifar").backbone.eval(), []
    assert sum(p.numel() for p in net.parameters()) == 11_168_832
    for layer in (net.conv1, net.layer1, net.layer2, net.layer3, net.layer4):
        layer.register_forward_hook(lambda module, inputs, output: sides.append(output.shape[-1]))
    net(torch.zeros(2, 3, 32, 32))
    assert sides == [32, 32, 16, 8, 4]
    assert net.conv1.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)  # fan out


def test_projector():
    """Linear layers without biases, a BatchNorm after each, the last of which only scales."""
    for depth, shapes in ((2, [(512, 512), (128, 512)]), (3, [(512, 512), (512, 512), (128, 512)])):
        projector = SimCLR("resnet18", proj_layers=depth).projector
        assert [type(layer) for layer in projector] == ([nn.Linear, nn.BatchNorm1d, nn.ReLU] * depth)[:-1]
        assert [(layer.weight.shape, layer.bias) for layer in projector[::3]] == [(s, None) for s in shapes]
        assert [layer.bias.requires_grad for layer in projector[1::3]] == [True] * (depth - 1) + [False]


# The loss: oracles 1 to 5


def test_loss_by_hand():
    for n, candidates in ((2, 1.098612), (4, 1.945910), (256, math.log(511))):  # all alike: 510 negatives
        z = torch.ones(n, 3, dtype=DOUBLE)
        assert nt_xent(z, z, 0.5).item() == pytest.approx(candidates, abs=1e-6)
    for n, tau, expected in ((2, 0.5, 0.239545), (2, 0.1, 9.0796e-5), (4, 0.5, 0.594438)):  # orthonormal
        z = torch.eye(n, dtype=DOUBLE)
        assert nt_xent(z, z, tau).item() == pytest.approx(expected, rel=1e-5)
    z = torch.eye(2, dtype=DOUBLE)
    assert nt_xent(z, z.flip(0), 0.5).item() == pytest.approx(2.239545, abs=1e-6)
    assert nt_xent(torch.randn(1, 5), torch.randn(1, 5), 0.1).item() == 0

    z1, scale = torch.tensor([[1, 1], [-1, 1]], dtype=DOUBLE), torch.tensor([[7], [0.01]], dtype=DOUBLE)
    for tau, expected in ((0.5, 0.535969), (1.0, 0.732602)):
        for pair in ((z, z1), (z * scale, z1), (z1, z), (z.flip(0), z1.flip(0))):
            assert nt_xent(*pair, tau).item() == pytest.approx(expected, abs=1e-6)


def slow_nt_xent(z0, z1, temperature):
    """Eq. 1 row by row."""
    z = torch.cat([z0, z1])
    z = z / z.norm(dim=1, keepdim=True)
    n, losses = len(z0), []
    for i in range(2 * n):
        exponentials = [torch.exp(z[i] @ z[j] / temperature) for j in range(2 * n)]
        others = sum(e for j, e in enumerate(exponentials) if j != i)
        losses.append(-torch.log(exponentials[(i + n) % (2 * n)] / others))
    return sum(losses) / (2 * n)


@settings(max_examples=15, deadline=None)
@given(n=st.integers(2, 5), dim=st.integers(2, 8), tau=st.floats(0.05, 2), seed=st.integers(0, 1000))
def test_loss_and_gradient_are_those_of_the_slow_version_and_of_lightly(n, dim, tau, seed):
    z = normal(2, n, dim, seed=seed, dtype=DOUBLE).requires_grad_()
    ours = nt_xent(*z, tau)
    (gradient,) = torch.autograd.grad(ours, z)
    assert (gradient * z).sum(-1).abs().max() < 1e-12 and gradient.norm(dim=-1).min() > 0
    for theirs, tolerance in ((slow_nt_xent(*z, tau), 1e-9), (NTXentLoss(temperature=tau)(*z), 1e-5)):
        near = {"atol": tolerance, "rtol": tolerance, "check_dtype": False}
        torch.testing.assert_close(ours, theirs, **near)
        torch.testing.assert_close(gradient, torch.autograd.grad(theirs, z)[0], **near)


def test_loss_in_half_precision_and_without_negatives():
    half = normal(2, 8, 16, dtype=torch.bfloat16)
    assert nt_xent(*half, 0.05).dtype == torch.float32
    torch.testing.assert_close(nt_xent(*half, 0.05), nt_xent(*half.float(), 0.05))
    z = normal(2, 4, 6)
    attraction = -F.cosine_similarity(*z, dim=1).mean() / 0.5
    torch.testing.assert_close(nt_xent(*z, 0.5, negatives=False), attraction)


# Optimiser and schedule: oracles 7 and 8


def test_lars():
    """Of the sheet; plain steps on biases, and where a norm is 0; BYOL's, v = m v + g, w -= lr v."""
    for w, options, expected in (
        ([[3.0, 4.0]], {}, [3, 3.995, 3, 3.988002]),
        ([[3.0, 4.0]], {"weight_decay": 0.1}, [2.99895235, 3.99511099, 2.99748613, 3.98826859]),
        ([3.0, 4.0], {"weight_decay": 0.1}, [3, 3, 3, 1.6]),
        ([[0.0, 0.0]], {"weight_decay": 0.1}, [0, -1, 0, -1.9005]),
        ([[0.0, 5.0]], {"lr_in_momentum": False}, [0, 4.995, 0, 4.9902525]),
    ):
        w, path = nn.Parameter(torch.tensor(w, dtype=DOUBLE)), []
        optimizer = LARS([w], 1.0, **options)
        for lr in (1.0, 0.5):
            optimizer.param_groups[0]["lr"] = lr
            w.grad = torch.tensor([0.0, 1.0], dtype=DOUBLE).view_as(w)
            optimizer.step()
            path += w.flatten().tolist()
        assert path == pytest.approx(expected, abs=1e-7)


def test_schedule():
    total, warmup = 31279, 3127
    steps = (0, warmup, total, 1000, (total + warmup) / 2)
    rates = [cosine_schedule(step, total, warmup, 4.8) for step in steps]
    assert rates == pytest.approx([0, 4.8, 0, 1.535018, 2.4], abs=1e-6)
    assert cosine_schedule(10, 10, 0, 1.0, final=0.25) == 0.25
    assert cosine_schedule(976, 97657, 976, 1.0 * 512 / 256) == 2.0  # the CIFAR recipe


# The monitor


def seen(z0, z1, first=0.0):
    """Metrics and problems of two views (N, D), with features that have nothing wrong."""
    h = normal(len(z0), 2, 32, seed=1)
    return monitor(torch.stack([z0, z1], dim=1), h, 0.5, {"monitor/projection_rank": first})


def test_accuracy_is_strict_and_gap_is_from_equal_logits():
    same, apart = torch.ones(4, 3), torch.eye(4)
    for z0, z1, accuracy, gap in (
        (same, same, 0, 0),  # a tie is no success
        (apart, apart, 1, math.log(7) - 0.594438),
        (apart, apart[[0, 1, 3, 2]], 0.5, math.log(7) - 0.594438 - 1),  # two of four find their partner
        (same * math.nan, same, 0, math.nan),
    ):
        metrics, _ = seen(z0, z1)
        assert metrics["simclr/contrastive_accuracy"] == accuracy
        assert metrics["simclr/gap"] == pytest.approx(gap, abs=1e-5, nan_ok=True)


def test_metrics_are_those_of_2048_rows_of_z_and_of_centred_h():
    z, h = normal(2, 1500, 2, 16)
    z[1024:], h[1024:] = 1, 2
    metrics, _ = monitor(z, h + 5, 0.1, {})
    of_z = [metrics[f"monitor/projection_{name}"] for name in ("std", "spread", "rank")]
    assert of_z == pytest.approx([*collapse_metrics(z[:1024].flatten(0, 1)).values()])
    for name, value in collapse_metrics(h[:1024].flatten(0, 1) + 5, center=True).items():
        assert metrics[f"monitor/{name}"] == pytest.approx(value)
    assert of_z != pytest.approx([*collapse_metrics(z[:1000].flatten(0, 1)).values()])


def test_each_problem_appears_when_it_should():
    """And its tag is one of the metrics, by which the alarm sees whether it mends."""
    z, other, noise = normal(3, 64, 128)
    near, turned = z + 0.1 * noise, torch.ones(128) + 0.01 * z
    flat = torch.linalg.qr(normal(128, 128, seed=1))[0]
    low = {rank: [rows[:, :rank] @ flat[:rank] for rows in (z, near)] for rank in (2, 8)}
    few = {"z fills few directions": "monitor/projection_rank"}
    for z0, z1, first, expected in (
        (z, near, 0.0, {}),
        (z, near, 60.0, {}),  # as at the first log
        (turned, turned.roll(1, 0), 0.0, {"all z point one way": "monitor/projection_spread"}),
        (*low[2], 0.0, few),
        (*low[8], 0.0, {}),  # enough of 128 directions, but not where there were 100
        (*low[8], 100.0, few),
        (z, other, 0.0, {"partners are found by chance": "simclr/gap"}),
    ):
        metrics, problems = seen(z0, z1, first)
        assert set(problems.values()) <= set(metrics)
        found = {words.split(";")[0]: tag for words, tag in problems.items()}
        assert expected.items() <= found.items() and (z0 is turned or found == expected), found


# Several processes: oracle 6, and chunks


def small(arch, stem):
    layers = nn.Conv2d(3, 8, 5, 3), nn.BatchNorm2d(8), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    return nn.Sequential(*layers), 32


def test_training_is_the_same_in_chunks_and_in_processes(folder, monkeypatch):
    """The first gradient, at the learning rate 0, is that of the whole batch; and after six steps metrics,
    weights and momentum of 1 process = chunks = 2 processes = 2 in chunks, without BatchNorm's coupling."""
    passes, forward = [], SimCLR.forward
    monkeypatch.setattr(SimCLR, "forward", lambda self, x: passes.append(x) or forward(self, x))
    monkeypatch.setattr(simclr, "SimCLR", lambda *sizes: SimCLR(*sizes).double().eval())
    monkeypatch.setattr(simclr, "resnet", small)
    monkeypatch.setattr(simclr, "augment", lambda x, u, *_: x.double() / 255 * u[:, :1, None, None])
    flags = {"data": str(folder), "batch_size": 24, "image_size": 16, "weight_decay": 0.0, "base_lr": 1.0}

    def end(rank, run_dir, micro=0, epochs=6):
        passes.clear()
        options = {"run_dir": run_dir, "micro_batch_size": micro, "epochs": epochs}
        metrics = simclr.train(tiny_args("simclr", **flags, **options))
        return [len(images) for images in passes], metrics["train/loss"]

    _, first = end(0, "first", epochs=1)
    state, model = load("first/checkpoint.pt"), simclr.SimCLR()
    model.load_state_dict(state["model"])
    z, _ = model(passes[0])
    loss = nt_xent(z[::2], z[1::2], 0.1)
    assert first == pytest.approx(loss.item(), rel=1e-12)
    trained = sorted((p for p in model.parameters() if p.requires_grad), key=lambda p: p.ndim <= 1)
    momentum = [buffers["momentum_buffer"] for buffers in state["optimizer"]["state"].values()]
    for buffer, gradient in zip(momentum, torch.autograd.grad(loss, trained), strict=True):
        assert gradient.abs().max() > 1e-5 and (buffer - gradient).abs().max() < 1e-12

    for n, micro, sizes in ((1, 0, [48]), (1, 8, [16] * 6), (2, 0, [24]), (2, 4, [8] * 6)):
        ends = in_processes(partial(end, run_dir=f"{n}-{micro}", micro=micro), n)
        assert ends == [(sizes * 6, ends[0][1])] * n  # each has the loss of the whole batch
        for line, expected in zip(metrics_of(f"{n}-{micro}"), metrics_of("1-0"), strict=True):
            assert line == pytest.approx(expected, rel=1e-6, abs=1e-7)
        tensors, whole = (tensors_of(load(f"{name}/checkpoint.pt")) for name in (f"{n}-{micro}", "1-0"))
        for name in whole:
            torch.testing.assert_close(tensors[name], whole[name], rtol=1e-9, atol=1e-11)
    assert ends[0][1] < first - 0.01


@pytest.mark.parametrize("script", ["simclr", "byol", "moco_v3"])
def test_batch_norm_is_synchronised_on_several_gpus(folder, monkeypatch, script):
    """As far as the conversion, whose result, here None, is what train() goes on with."""
    module = importlib.import_module(script)
    monkeypatch.setattr(module, "start_processes", lambda *a: (0, 2, torch.device("cuda"), None))
    monkeypatch.setattr(nn.Module, "to", lambda self, *a, **k: self)
    monkeypatch.setattr(nn.SyncBatchNorm, "convert_sync_batchnorm", lambda model: None)
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'parameters'"):
        module.train(tiny_args(script, data=str(folder)))


# A run


@pytest.mark.parametrize(
    "optimizer, seed, side, radius, epochs", [("sgd", 0, 32, 1, 30), ("lars", 1, 224, 11, 1)]
)
def test_recipe_of_a_run(folder, monkeypatch, optimizer, seed, side, radius, epochs):
    """Rates; uniform numbers of (seed, step) alone; all orders of the colours, gray last; strength of the
    jitter, 3 taps of the blur at 32 px and 23 at 224; normalised images, channels last; groups."""
    drawn, given = [], []

    def dull(images, u, order, *recipe):
        drawn.append((u, order, recipe))
        return torch.full_like(images, 0.5, dtype=torch.float32)

    monkeypatch.setattr(simclr, "augment", dull)
    monkeypatch.setattr(simclr, "resnet", small)
    monkeypatch.setattr(
        SimCLR, "forward", lambda self, x, call=SimCLR.forward: given.append(x) or call(self, x)
    )
    flags = {"image_size": side, "jitter_strength": 0.5, "blur": 0.3, "weight_decay": 0.02, "base_lr": 0.3}
    flags |= {"data": str(folder), "epochs": epochs, "warmup_epochs": 1.4, "run_dir": "run", "seed": seed}
    simclr.train(tiny_args("simclr", **flags, optimizer=optimizer))
    total = 5 * epochs
    rates = [cosine_schedule(step, total, min(7, total), 0.3 * 8 / 256) for step in range(total)]
    assert [line["train/lr"] for line in metrics_of("run")] == rates and len(drawn) == total

    for step, (u, order, recipe) in enumerate(drawn):
        expected = torch.rand(8, 2, 9, generator=simclr.seeded(3, seed, step))
        assert torch.equal(u, expected.flatten(0, 1)) and recipe == ([0.4, 0.4, 0.4, 0.1], 0.3, radius)
        assert order[4] == 4 and sorted(order) == [0, 1, 2, 3, 4]
    assert len({tuple(order) for _, order, _ in drawn}) == min(24, total)
    assert len(torch.stack([u for u, *_ in drawn]).unique()) > 0.99 * total * 16 * 9
    color = (0.5 - torch.tensor(simclr.MEAN)) / torch.tensor(simclr.STD)
    torch.testing.assert_close(given[0], color.view(3, 1, 1).expand(16, 3, side, side))
    assert given[0].is_contiguous(memory_format=torch.channels_last)

    state = load("run/checkpoint.pt")["optimizer"]
    own = {"sgd": {"nesterov": True}, "lars": {"lr_inside": True, "trust": 1e-3}}[optimizer]
    for group, decay in zip(state["param_groups"], (0.02, 0.0), strict=True):
        assert (own | {"momentum": 0.9, "weight_decay": decay}).items() <= group.items()
        assert {state["state"][i]["momentum_buffer"].ndim > 1 for i in group["params"]} == {decay > 0}


def test_paper_command_is_the_sheet_s():
    command = re.search(r"torchrun --nproc-per-node 8 simclr\.py(.*?)(?<!\\)\n", simclr.__doc__, re.S)[1]
    args = tyro.cli(simclr.Args, args=command.replace("\\\n", " ").split())
    assert (args.image_size, args.arch, args.stem, args.epochs) == (224, "resnet50", "imagenet", 100)
    assert (args.batch_size, args.optimizer, args.base_lr, args.weight_decay) == (4096, "lars", 0.3, 1e-6)
    assert (args.warmup_epochs, args.temperature, args.proj_layers, args.proj_dim) == (10, 0.1, 2, 128)
    assert (args.jitter_strength, args.min_scale, args.blur, args.negatives) == (1.0, 0.08, 0.5, True)
