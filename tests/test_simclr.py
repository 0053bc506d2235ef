"""simclr.py against its fact sheet's oracles, slow versions written here, torchvision and lightly."""

import importlib
import json
import math
import re
from colorsys import rgb_to_hsv
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import torchvision
import tyro
from conftest import in_processes, metrics_of, tiny_args
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.transforms import functional as TF

import simclr
from simclr import LARS, SimCLR, augment, collapse_metrics, gaussian_blur, monitor, nt_xent

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


def logits_of(z0, z1, temperature):
    """What nt_xent hands to the cross-entropy: logits (2N, 2N) and the column of each row's partner."""
    with mock.patch("torch.nn.functional.cross_entropy") as cross_entropy:
        nt_xent(z0, z1, temperature)
    return cross_entropy.call_args.args


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
    logits, positive = logits_of(*z, 0.5)
    (grad,) = torch.autograd.grad(F.cross_entropy(logits[:1], positive[:1]), z)
    assert grad.norm(dim=-1).min() > 1e-3


@pytest.mark.parametrize("tau, expected", [(0.07, 2.516e-4), (0.2, 0.124017), (0.5, 0.702462)])
def test_the_fox_line_up(tau, expected):
    """One positive of cosine .85 against four negatives, found among the rows of the logits."""
    cosines = torch.tensor([0.85, 0.21, 0.18, 0.12, 0.15], dtype=DOUBLE)
    fox = torch.eye(6, dtype=DOUBLE)[0]
    others = torch.zeros(5, 6, dtype=DOUBLE)
    others[:, 0] = cosines
    others[torch.arange(5), torch.arange(1, 6)] = (1 - cosines**2).sqrt()
    z0, z1 = torch.stack([fox, others[1], others[2]]), torch.stack([others[0], others[3], others[4]])
    logits, positive = logits_of(z0, z1, tau)
    assert F.cross_entropy(logits[:1], positive[:1]).item() == pytest.approx(expected, rel=1e-3)


def test_a_batch_of_256_has_510_negatives():
    logits, positive = logits_of(*views(256, 8), 0.1)
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


# The monitor


def seen(z0, z1, tau=0.5, first=None):
    """Metrics and problems of two views (N, D), with features that have nothing wrong."""
    return monitor(torch.stack([z0, z1], dim=1), torch.randn(len(z0), 2, 32), tau, first or {})


def test_accuracy_is_strict_and_gap_is_from_equal_logits():
    z = torch.ones(4, 3)
    metrics, _ = seen(z, z)
    assert metrics["simclr/contrastive_accuracy"] == 0  # a tie is no success
    assert metrics["simclr/gap"] == pytest.approx(0, abs=1e-6)
    assert F.cross_entropy(torch.zeros(1, 7), torch.tensor([0])).item() == pytest.approx(1.945910, abs=1e-6)
    metrics, _ = seen(torch.eye(4), torch.eye(4))
    assert metrics["simclr/contrastive_accuracy"] == 1
    assert metrics["simclr/gap"] == pytest.approx(math.log(7) - 0.594438, abs=1e-5)
    metrics, _ = seen(torch.eye(4), torch.eye(4)[[0, 1, 3, 2]])  # two of four images find their partner
    assert metrics["simclr/contrastive_accuracy"] == 0.5
    metrics, _ = seen(torch.full((4, 3), math.nan), z)
    assert metrics["simclr/contrastive_accuracy"] == 0 and math.isnan(metrics["simclr/gap"])


def test_metrics_are_those_of_z_and_of_centred_h():
    z, h = torch.randn(2, 10, 2, 16, generator=torch.Generator().manual_seed(0))
    metrics, _ = monitor(z, h + 5, 0.1, {})
    of_z = [metrics[f"monitor/projection_{name}"] for name in ("std", "spread", "rank")]
    assert of_z == pytest.approx([*collapse_metrics(z.flatten(0, 1)).values()])
    for name, value in collapse_metrics(h.flatten(0, 1) + 5, center=True).items():
        assert metrics[f"monitor/{name}"] == pytest.approx(value)


def test_each_problem_appears_when_it_should():
    """And its tag is one of the metrics, by which the alarm sees whether it mends."""
    generator = torch.Generator().manual_seed(0)
    z, other, noise = torch.randn(3, 64, 128, generator=generator)
    near = z + 0.1 * noise
    turned = torch.ones(128) + 0.01 * z
    flat = torch.linalg.qr(torch.randn(128, 128, generator=generator))[0]
    low = {rank: [rows[:, :rank] @ flat[:rank] for rows in (z, near)] for rank in (2, 8)}
    cases = {
        "healthy": (z, near, {}, {}),
        "as at the first log": (z, near, {"monitor/projection_rank": 60.0}, {}),
        "one way": (turned, turned.roll(1, 0), {}, {"all z point one way": "monitor/projection_spread"}),
        "rank 2": (*low[2], {}, {"z fills few directions": "monitor/projection_rank"}),
        "random": (z, other, {}, {"partners are found by chance": "simclr/gap"}),
    }
    for name, (z0, z1, first, expected) in cases.items():
        metrics, problems = seen(z0, z1, 0.1, first)
        assert set(problems.values()) <= set(metrics), name
        found = {words.split(";")[0]: tag for words, tag in problems.items()}
        assert expected.items() <= found.items(), (name, found)
        assert name == "one way" or found == expected, (name, found)

    assert not seen(*low[8], 0.1)[1]  # enough of 128 directions, but not where there were 100
    (tag,) = seen(*low[8], 0.1, {"monitor/projection_rank": 100.0})[1].values()
    assert tag == "monitor/projection_rank"


def test_collapse_metrics_look_at_2048_rows():
    rows = torch.randn(3000, 16, generator=torch.Generator().manual_seed(0))
    rows[2048:] = torch.eye(16)[0]
    for center in (False, True):
        assert collapse_metrics(rows, center) == collapse_metrics(rows[:2048], center)
        assert collapse_metrics(rows, center) != collapse_metrics(rows[:2047], center)


# Several processes: oracle 6, and chunks


def one_step(data, run_dir, micro, dtype):
    """train() for one step of 24 images, without BatchNorm's coupling and with the simplest augmentation.
    Returns the images of each pass through the network."""
    passes = []

    class Fixed(SimCLR):
        def __init__(self, *shape):
            super().__init__(*shape)
            self.to(dtype).eval()
            for module in self.modules():
                if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                    module.running_var.fill_(4.0)

        def forward(self, images):
            passes.append(images)
            return super().forward(images)

    def darker(images, u, *_):
        return images.to(dtype) / 255 * u[:, :1, None, None]

    with mock.patch("simclr.SimCLR", Fixed), mock.patch("simclr.augment", darker):
        flags = {"batch_size": 24, "epochs": 1, "image_size": 16, "weight_decay": 0.0}
        flags |= {"micro_batch_size": micro, "data": str(data), "run_dir": str(run_dir)}
        simclr.train(tiny_args("simclr", **flags))
    return passes


def saved(run_dir):
    """Weights, gradient, which is the first momentum, and metrics that one_step left."""
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    gradients = [buffer["momentum_buffer"] for buffer in state["optimizer"]["state"].values()]
    return state["model"], gradients, state["recent"][0]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 3e-6), (DOUBLE, 1e-12)])
def test_gradient_in_chunks_is_that_of_the_batch(folder, tmp_path, dtype, tolerance):
    """Of train() itself, the weights still at their start: the learning rate of its first step is 0."""
    for micro, sizes in ((0, [24]), (8, [8] * 6)):
        passes = one_step(folder, tmp_path / str(micro), micro, dtype)
        assert [len(images) // 2 for images in passes] == sizes
        weights, gradients, metrics = saved(tmp_path / str(micro))
        model = SimCLR().to(dtype).eval()
        model.load_state_dict(weights)
        z, _ = model(torch.cat(passes[: 24 // micro if micro else 1]))
        loss = nt_xent(z[::2], z[1::2], 0.1)
        multiplied = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
        added = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
        expected = torch.autograd.grad(loss, multiplied + added)
        scale = max(g.abs().max() for g in expected)
        assert scale > 1e-3 and metrics["train/loss"] == pytest.approx(loss.item(), rel=tolerance)
        assert max((a - b).abs().max() for a, b in zip(gradients, expected, strict=True)) < tolerance * scale


@pytest.mark.parametrize("micro", [0, 4])
def test_two_processes_are_one(folder, tmp_path, monkeypatch, micro):
    """Loss, gradient and metrics of train() under DDP, in one pass and in chunks of a ResNet with BatchNorm
    in eval mode; both processes have the loss of the whole batch."""
    losses = []
    monkeypatch.setattr(simclr, "nt_xent", lambda *a: losses.append(nt_xent(*a)) or losses[-1])

    def two(rank):
        passes = one_step(folder, tmp_path / "two", micro, DOUBLE)
        return [len(images) for images in passes], losses[0].item()

    (sizes, first), (_, second) = in_processes(two)
    assert sizes == ([8] * 6 if micro else [24]) and first == second
    one_step(folder, tmp_path / "one", 0, DOUBLE)
    assert losses[0].item() == pytest.approx(first, abs=1e-12)
    (weights, two, metrics), (initial, one, expected) = saved(tmp_path / "two"), saved(tmp_path / "one")
    assert metrics["train/loss"] == pytest.approx(first, abs=1e-12)
    assert all(torch.equal(weights[name], initial[name]) for name in initial)
    assert max((a - b).abs().max() for a, b in zip(two, one, strict=True)) < 1e-12
    assert max(g.abs().max() for g in one) > 1e-3
    for tag in expected:
        if tag != "perf/images_per_second":
            assert metrics[tag] == pytest.approx(expected[tag], abs=1e-6), tag


class Scale(nn.BatchNorm1d):
    def forward(self, x):
        return x * self.weight + self.bias


@pytest.mark.parametrize("optimizer", ["sgd", pytest.param("lars", marks=pytest.mark.slow)])
def test_training_is_the_same_in_chunks_and_in_processes(tmp_path, monkeypatch, optimizer):
    """train() itself, with a network without BatchNorm: 1 process = chunks = 2 processes = 2 in chunks."""

    def small(arch, stem):
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 32), nn.Tanh()), 32

    monkeypatch.setattr(simclr, "resnet", small)
    monkeypatch.setattr(nn, "BatchNorm1d", Scale)
    flags = {"image_size": 16, "batch_size": 24, "epochs": 1, "warmup_epochs": 0.01, "blur": 0.5}
    flags |= {"proj_layers": 3, "optimizer": optimizer, "base_lr": 1.0, "data": "photos"}
    (tmp_path / "photos").mkdir()
    for i in range(144):
        simclr.demo_image(i)[0].save(tmp_path / "photos" / f"{i:03d}.png")
    curves = {}
    for n, micro in ((1, 0), (1, 4), (2, 0), (2, 3)):
        name = f"run{n}{micro}"
        args = tiny_args("simclr", **flags, micro_batch_size=micro, run_dir=name)
        in_processes(lambda rank, args=args: simclr.train(args), n)
        lines = metrics_of(name)
        curves[name] = lines
        assert len(lines) == 6
        for line, first in zip(lines, curves["run10"], strict=True):
            for tag in ("train/loss", "train/lr", "monitor/projection_rank"):
                assert line[tag] == pytest.approx(first[tag], rel=2e-5), (name, tag)
            accuracy = [run["simclr/contrastive_accuracy"] for run in (line, first)]
            assert abs(accuracy[0] - accuracy[1]) < 1.1 / 24, name  # a rounding turns one image, no more
    assert lines[0]["train/loss"] != pytest.approx(lines[-1]["train/loss"], rel=1e-4)


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


def test_learning_rates_of_a_run(folder, tmp_path):
    args = tiny_args("simclr", data=str(folder), base_lr=0.3, run_dir=str(tmp_path), warmup_epochs=1.4)
    simclr.train(args)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    peak = 0.3 * 8 / 256
    assert [line["train/lr"] for line in lines] == [
        simclr.cosine_schedule(step, 20, 7, peak) for step in range(20)
    ]


@pytest.mark.parametrize("optimizer, side, radius", [("sgd", 32, 1), ("lars", 224, 11)])
def test_recipe_of_a_run(folder, tmp_path, monkeypatch, optimizer, side, radius):
    """Optimiser and its two groups, strength of the jitter, 3 taps of the blur at 32 px and 23 at 224, and
    what the network gets: normalised, channels last."""
    built, given = [], []

    class Stop(Exception):
        pass

    def spy(images, u, order, *recipe, **more):
        given.append((tuple(u.shape), sorted(order[:4]), order[4:], *recipe, more))
        return torch.full_like(images, 0.5, dtype=torch.float32)

    def forward(self, images):
        given.append(images)
        raise Stop

    for place, name in ((torch.optim, "SGD"), (simclr, "LARS")):
        build = getattr(place, name)
        wrapped = lambda *a, build=build, **k: built.append(build(*a, **k)) or built[-1]  # noqa: E731
        monkeypatch.setattr(place, name, wrapped)
    monkeypatch.setattr(simclr, "augment", spy)
    monkeypatch.setattr(SimCLR, "forward", forward)
    flags = {"image_size": side, "jitter_strength": 0.5, "blur": 0.3, "weight_decay": 0.02}
    with pytest.raises(Stop):
        args = tiny_args("simclr", data=str(folder), optimizer=optimizer, **flags, run_dir=str(tmp_path))
        simclr.train(args)
    looked, images = given
    assert looked == ((16, 9), [0, 1, 2, 3], [4], [0.4, 0.4, 0.4, 0.1], 0.3, radius, {})
    assert images.shape == (16, 3, side, side) and images.is_contiguous(memory_format=torch.channels_last)
    normal = (0.5 - torch.tensor(simclr.MEAN)) / torch.tensor(simclr.STD)
    torch.testing.assert_close(images, normal.view(3, 1, 1).expand_as(images))
    groups = built[-1].param_groups
    assert type(built[-1]).__name__.lower() == optimizer
    assert [(group["momentum"], group["weight_decay"]) for group in groups] == [(0.9, 0.02), (0.9, 0.0)]
    own = {"sgd": {"nesterov": True}, "lars": {"lr_inside": True, "trust": 1e-3}}[optimizer]
    assert all(own.items() <= group.items() for group in groups)
    assert all(p.ndim > 1 for p in groups[0]["params"]) and all(p.ndim == 1 for p in groups[1]["params"])


def test_each_step_draws_its_own_numbers_and_order(folder, tmp_path, monkeypatch):
    """Uniform, for each view its own, of (seed, step) alone; all 24 orders of the colours, gray last."""
    drawn, augment = [], simclr.augment

    def spy(images, u, order, *recipe):
        drawn.append((u, order))
        return augment(images, u, order, *recipe)

    def small(arch, stem):
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 8)), 8

    monkeypatch.setattr(simclr, "augment", spy)
    monkeypatch.setattr(simclr, "resnet", small)
    for seed, epochs in ((0, 30), (1, 1)):
        flags = {"image_size": 8, "epochs": epochs, "log_every": 1000, "run_dir": str(tmp_path / str(seed))}
        simclr.train(tiny_args("simclr", data=str(folder), seed=seed, **flags))
    assert len(drawn) == 155
    for i, (u, _) in enumerate(drawn):
        expected = torch.rand(8, 2, 9, generator=simclr.seeded(3, i // 150, i % 150))
        assert torch.equal(u, expected.flatten(0, 1))
    numbers = torch.stack([u for u, _ in drawn])
    assert len(numbers.unique()) > 0.99 * numbers.numel()
    orders = [tuple(order) for _, order in drawn]
    assert len(set(orders)) == 24 and orders[:5] != orders[150:]
    assert all(order[4] == 4 and sorted(order) == [0, 1, 2, 3, 4] for order in orders)


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
    z, h = model(images)
    torch.testing.assert_close(h, net(images))
    torch.testing.assert_close(z, model.projector(h))
    assert z.shape == (2, 128) and h.shape == (2, width)


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


JITTER = (1.0, 1.0, 1.0, 0.5)  # so brightness, contrast, saturation are 2 u, and the turn of the hue u - 0.5


def augmented(images, order=(0, 1, 2, 3, 4), radius=0, **factors):
    """augment by numbers u that give these factors, all others neutral."""
    columns = {"brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 0.5, "jitter": 0.0}
    columns |= {"gray": 0.9, "blur": 0.9, "sigma": 0.5, "solarize": 0.9}
    number_of = {"hue": lambda turns: turns + 0.5, "sigma": lambda sigma: (sigma - 0.1) / 1.9}
    for name, value in factors.items():
        yes = (
            0.1 if value is True else value / 2 if name in ("brightness", "contrast", "saturation") else value
        )
        columns[name] = number_of.get(name, lambda _, yes=yes: yes)(value)
    u = torch.stack([torch.as_tensor(column).expand(len(images)) for column in columns.values()], dim=1)
    return augment(images, u, order, JITTER, blur=0.5, blur_radius=radius, solarize=0.5)


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


def test_gray_and_solarize_are_torchvision_s(images):
    assert_near(augmented(images, gray=True), TF.rgb_to_grayscale(images / 255, 3))
    assert_near(augmented(images, solarize=True), TF.solarize(images / 255, 0.5))
    assert_near(augmented(images, jitter=0.9, brightness=2.0, hue=0.3), images / 255)  # not to be jittered


def test_blur_is_torchvision_s(images):
    sigmas = torch.linspace(0.1, 2, 12)
    theirs = each(lambda image, sigma: TF.gaussian_blur(image, [9, 9], [sigma, sigma]), images, sigmas)
    assert_near(augmented(images, radius=4, blur=True, sigma=sigmas), theirs)
    assert_near(augmented(images, radius=4, sigma=sigmas), images / 255)
    constant = torch.full((12, 3, 20, 20), 0.3)
    torch.testing.assert_close(gaussian_blur(constant, sigmas.view(-1, 1, 1, 1), 11), constant)


def random_numbers(n, seed=0):
    return torch.rand(n, 9, generator=torch.Generator().manual_seed(seed))


def factors_of(u, jitter, **more):
    """What augment makes of u, measured on images where one operation at a time shows its factor."""
    n = len(u)

    def look(pixels, *order):
        image = torch.tensor(pixels, dtype=torch.uint8).T.reshape(1, 3, 1, -1)
        return augment(image.expand(n, -1, -1, -1), u, order, jitter, **more)[:, :, 0]

    bright = look([[51] * 3], 0)[:, 0, 0] / 0.2
    stretched = look([[110] * 3, [130] * 3], 1)[:, 0]
    contrast = (stretched[:, 1] - stretched[:, 0]) * 255 / 20
    coloured = look([[130, 110, 110]], 2)
    saturation = (coloured[:, 0] - coloured[:, 1])[:, 0] * 255 / 20
    hues = [rgb_to_hsv(*pixel)[0] for pixel in look([[200, 100, 100]], 3)[:, :, 0].tolist()]
    turns = (torch.tensor(hues) + 0.5) % 1 - 0.5
    gray = look([[200, 100, 100]], 4)[:, :, 0]
    return torch.stack([bright, contrast, saturation, turns], dim=1), gray[:, 0] == gray[:, 1]


def test_numbers_give_the_paper_s_distribution():
    half, none = (0.4, 0.4, 0.4, 0.1), (0.0, 0.0, 0.0, 0.0)
    neutral = torch.tensor([1.0, 1, 1, 0])
    u = random_numbers(8000)
    factors, gray = factors_of(u, half)
    jittered = ((factors - neutral).abs() > 1e-5).any(1)
    assert jittered.float().mean().item() == pytest.approx(0.8, abs=0.02)
    low, high = factors[jittered].amin(0), factors[jittered].amax(0)
    torch.testing.assert_close(low, torch.tensor([0.6, 0.6, 0.6, -0.1]), atol=0.01, rtol=0)
    torch.testing.assert_close(high, torch.tensor([1.4, 1.4, 1.4, 0.1]), atol=0.01, rtol=0)
    torch.testing.assert_close(factors[jittered].mean(0), neutral, atol=0.02, rtol=0)
    assert factors[jittered].T.corrcoef().fill_diagonal_(0).abs().max() < 0.05  # each factor its own
    assert gray.float().mean().item() == pytest.approx(0.2, abs=0.02)
    assert gray[~jittered].float().mean().item() == pytest.approx(0.2, abs=0.04)  # apart from the jitter
    off, gray_again = factors_of(u, none)
    torch.testing.assert_close(off, neutral.expand_as(off), atol=1e-5, rtol=0)
    assert torch.equal(gray_again, gray)
    full, _ = factors_of(u, (0.8, 0.8, 0.8, 0.2))
    assert full[:, :3].min() >= 0.2 - 1e-5 and 0.19 < full[:, 3].abs().max() <= 0.2 + 1e-5
    wide, _ = factors_of(u, (1.6, 1.6, 1.6, 0.4))
    assert 0 <= wide[:, :3].min() < 0.01 and wide[:, 3].min() < -0.39
    seldom, _ = factors_of(u, half, chance=0.3)
    assert ((seldom - neutral).abs() > 1e-5).any(1).float().mean().item() == pytest.approx(0.3, abs=0.02)


def test_blur_and_solarize_by_chance_for_all_or_for_each_image(monkeypatch):
    sigmas = []
    monkeypatch.setattr(simclr, "gaussian_blur", lambda x, sigma, radius: sigmas.append(sigma.flatten()) or x)
    u, images = random_numbers(8000), torch.full((8000, 3, 1, 1), 200, dtype=torch.uint8)

    def look(blur, solarize, radius=1):
        x = augment(images, u, (), (0, 0, 0, 0), blur, radius, solarize)
        return x[:, 0, 0, 0] < 0.5

    solarized, sigma = look(0.5, 0.2), sigmas.pop()
    assert solarized.float().mean().item() == pytest.approx(0.2, abs=0.02)
    assert (sigma > 0).float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert 0.1 <= sigma[sigma > 0].min() < 0.12 and 1.98 < sigma.max() <= 2
    assert solarized[sigma > 0].float().mean().item() == pytest.approx(0.2, abs=0.03)  # apart from the blur
    assert not look(0.0, 0.0).any() and not sigmas.pop().any()
    assert not look(1.0, 0.0, radius=0).any() and not sigmas

    def for_views(first, second):
        return torch.tensor([first, second]).repeat(4000).view(-1, 1, 1, 1)

    solarized = look(for_views(1.0, 0.1), for_views(0.0, 0.2)).unflatten(0, (-1, 2))
    blurred = sigmas.pop().unflatten(0, (-1, 2)) > 0
    assert blurred.float().mean(dim=0).tolist() == pytest.approx([1, 0.1], abs=0.02)
    assert solarized.float().mean(dim=0).tolist() == pytest.approx([0, 0.2], abs=0.02)


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
    assert (args.optimizer, args.base_lr, args.weight_decay) == ("lars", 0.3, 1e-6)
    assert (args.warmup_epochs, args.temperature, args.proj_layers, args.proj_dim) == (10, 0.1, 2, 128)
    assert (args.jitter_strength, args.min_scale, args.blur, args.negatives) == (1.0, 0.08, 0.5, True)
