"""byol.py against its fact sheet's oracles and lightly."""

import copy
import math
import re
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import tyro
from conftest import in_processes, load, metrics_of, tiny_args
from torch import nn

import byol
from byol import BYOL, LARS, byol_loss, collapse_metrics, momentum_update, monitor

DOUBLE = torch.float64


def rows(*values):
    return torch.tensor(values, dtype=torch.float32)


# Loss: oracles 1, 2 and 3


def test_loss_by_hand():
    p, z = rows([1.0, 2.0]), rows([2.0, 4.0])
    assert byol_loss(p, z).item() == pytest.approx(0, abs=1e-6)
    assert byol_loss(p, rows([-2.0, 1.0])).item() == pytest.approx(2)
    assert byol_loss(p, -z).item() == pytest.approx(4)
    p1, z2, p2, z1 = rows([1.0, 0.0]), rows([1.0, 1.0]), rows([0.0, 2.0]), rows([0.0, -1.0])
    whole = byol_loss(p1, z2) + byol_loss(p2, z1)
    assert whole.item() == pytest.approx(6 - 2**0.5, abs=1e-6)
    scaled = byol_loss(3 * p1, 5 * z2) + byol_loss(0.1 * p2, 7 * z1)
    assert scaled.item() == pytest.approx(whole.item(), abs=1e-6)


def test_gradient_of_the_loss():
    torch.manual_seed(0)
    p, z = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
    byol_loss(p, z).backward()
    unit_p, unit_z = F.normalize(p.detach(), dim=1), F.normalize(z, dim=1)
    cosine = (unit_p * unit_z).sum(dim=1, keepdim=True)
    expected = -(2 / 5) * (unit_z - cosine * unit_p) / p.detach().norm(dim=1, keepdim=True)
    torch.testing.assert_close(p.grad, expected, atol=1e-6, rtol=1e-5)
    assert (p.grad * p.detach()).sum(dim=1).abs().max() < 1e-6


def test_loss_is_lightly_s_up_to_its_factor():
    from lightly.loss import NegativeCosineSimilarity

    torch.manual_seed(0)
    p, z = torch.randn(16, 32), torch.randn(16, 32)
    assert byol_loss(p, z).item() == pytest.approx(2 + 2 * NegativeCosineSimilarity()(p, z).item(), abs=1e-6)


def test_loss_is_computed_in_float32_or_better():
    p, z = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    assert byol_loss(p, z).dtype == DOUBLE
    low = byol_loss(p.bfloat16(), z.bfloat16())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, byol_loss(p.bfloat16().float(), z.bfloat16().float()))


# Schedules and the moving average: oracles 4, 5 and 6


@pytest.mark.parametrize(
    "base, expected",
    [(0.996, [0.996, 0.99658579, 0.998, 0.99941421]), (0.99, [0.99, 0.99146447, 0.995, 0.99853553])],
)
def test_momentum_of_a_run(folder, tmp_path, monkeypatch, base, expected):
    """Of 8 steps; after them it would be 1."""
    momenta, update = [], byol.momentum_update
    monkeypatch.setattr(byol, "momentum_update", lambda *a: momenta.append(a[2]) or update(*a))
    flags = {"epochs": 1, "batch_size": 5, "momentum": base, "image_size": 16}
    metrics = byol.train(tiny_args("byol", data=str(folder), **flags, run_dir=str(tmp_path)))
    assert len(momenta) == 8 and momenta[::2] == pytest.approx(expected, abs=1e-8)
    assert metrics["byol/momentum"] == momenta[-1] == pytest.approx(1 - (1 - base) * 0.03806023, abs=1e-8)


def test_momentum_update():
    online, target = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    online.weight.data.fill_(3.0)
    target.weight.data.fill_(0.0)
    momentum_update(online, target, 0.9)
    assert target.weight.item() == pytest.approx(0.3)  # of the weights after the step
    for _ in range(4):
        momentum_update(online, target, 0.9)
    assert target.weight.item() == pytest.approx(3 * (1 - 0.9**5))  # dino's oracle 9: the gap goes by m^n
    before = target.weight.item()
    momentum_update(online, target, 1.0)
    assert target.weight.item() == before
    momentum_update(online, target, 0.0)
    assert target.weight.item() == 3.0


def test_lars():
    """Oracle 7: lr 1, then 0.5, outside the momentum buffer."""
    for decay, expected in (
        (0, [(3, 3.995), (3, 3.990252)]),
        (0.1, [(2.99895235, 3.99511099), (2.99795757, 3.99046865)]),
    ):
        w = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        optimizer = LARS([w], 1.0, weight_decay=decay, lr_in_momentum=False)
        for lr, value in zip((1.0, 0.5), expected, strict=True):
            optimizer.param_groups[0]["lr"] = lr
            w.grad = torch.tensor([[0.0, 1.0]])
            optimizer.step()
            torch.testing.assert_close(w.detach(), torch.tensor([value]), atol=2e-6, rtol=0)
    w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    w.grad = torch.tensor([0.0, 1.0])
    LARS([w], 1.0, weight_decay=0.1, lr_in_momentum=False).step()
    torch.testing.assert_close(w.detach(), torch.tensor([3.0, 3.0]))


# The model


def test_heads_and_names():
    with torch.device("meta"):
        model = BYOL("resnet50")
    count = lambda net: sum(p.numel() for p in net.parameters())  # noqa: E731
    assert count(model.online.projector) == 9449472 and count(model.predictor) == 2109440
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    assert shapes["online.projector.0.weight"] == (4096, 2048) and shapes["predictor.0.weight"] == (4096, 256)
    assert shapes["online.projector.3.weight"] == shapes["target.projector.3.weight"] == (256, 4096)
    assert "online.projector.3.bias" not in shapes and shapes["online.projector.0.bias"] == (4096,)
    online = {name[7:] for name in shapes if name.startswith("online.")}
    assert online == {name[7:] for name in shapes if name.startswith("target.")}
    others = {name.split(".")[0] for name in shapes}
    assert others == {"online", "target", "predictor"}


def test_target_is_a_copy_without_gradient():
    torch.manual_seed(0)
    model, x = BYOL("resnet18", hidden_dim=64), torch.randn(8, 3, 32, 32)
    for p, q in zip(model.online.parameters(), model.target.parameters(), strict=True):
        assert torch.equal(p, q) and not q.requires_grad
    prediction, projection, feature = model(x)
    assert prediction.shape == projection.shape == (8, 256) and feature.shape == (8, 512)
    with torch.no_grad():
        target = model.target(x)
    torch.testing.assert_close(target, projection.detach())
    byol_loss(prediction, target.roll(1, 0)).backward()
    assert all(p.grad is None for p in model.target.parameters())
    assert all(p.grad is not None for p in [*model.online.parameters(), *model.predictor.parameters()])


# Training


PEAKS = [(0.2, 4096, 3.2), (0.3, 4096, 4.8), (0.45, 4096, 7.2), (0.4, 512, 0.8)]


@pytest.mark.parametrize("base_lr, batch_size, peak", PEAKS)
def test_optimiser_of_a_run(tmp_path, monkeypatch, base_lr, batch_size, peak):
    """Oracle 6: peaks of the learning rate; it stays outside the momentum; no decay of biases and norms."""
    built = []

    class Stop(Exception):
        pass

    def spy(*arguments, **options):
        built.append(LARS(*arguments, **options))
        raise Stop

    monkeypatch.setattr(byol, "LARS", spy)
    monkeypatch.setattr(byol, "Images", lambda *a: SimpleNamespace(items=range(4096)))
    flags = {"base_lr": base_lr, "batch_size": batch_size, "weight_decay": 0.02, "optimizer": "lars"}
    with pytest.raises(Stop):
        byol.train(tiny_args("byol", **flags, run_dir=str(tmp_path)))
    groups = built[0].param_groups
    assert [group["lr"] for group in groups] == pytest.approx([peak] * 2)
    assert [(group["weight_decay"], group["lr_inside"]) for group in groups] == [(0.02, False), (0.0, False)]
    assert all(p.ndim > 1 for p in groups[0]["params"]) and all(p.ndim == 1 for p in groups[1]["params"])


def test_schedule_of_a_run(folder, tmp_path):
    """Oracle 6: from 0 up in warmup_epochs, then half a cosine to 0 over the steps that are left."""
    flags = {"data": str(folder), "epochs": 5, "batch_size": 20, "warmup_epochs": 1.5, "base_lr": 0.1}
    byol.train(tiny_args("byol", **flags, run_dir=str(tmp_path)))
    peak = 0.1 * 20 / 256
    fall = [peak * (1 + math.cos(math.pi * i / 7)) / 2 for i in range(7)]
    found = [line["train/lr"] for line in metrics_of(tmp_path)]
    assert found == pytest.approx([0, peak / 3, peak * 2 / 3, *fall])


@pytest.mark.parametrize(
    "side, radius, blurs", [(32, 1, (0.3, 0.6)), (224, 11, (1.0, 0.1)), (32, 0, (0.0, 0.0))]
)
def test_recipe_of_a_run(folder, tmp_path, monkeypatch, side, radius, blurs):
    """What augment gets: blur by each view's chance, 3 taps at 32 px and 23 at 224, solarization of the
    second view alone; and what the network gets: one view, normalised, channels last."""
    given = []

    class Stop(Exception):
        pass

    def spy(images, u, *recipe):
        given.append((u, *recipe))
        return torch.tensor([0.25, 0.5]).repeat(8).view(-1, 1, 1, 1).expand_as(images).float()

    def forward(self, images):
        given.append(images)
        raise Stop

    monkeypatch.setattr(byol, "augment", spy)
    monkeypatch.setattr(BYOL, "forward", forward)
    flags = {"image_size": side, "blurs": blurs, "solarize": 0.7, "jitter": (0.1, 0.2, 0.3, 0.4), "seed": 5}
    with pytest.raises(Stop):
        byol.train(tiny_args("byol", data=str(folder), **flags, run_dir=str(tmp_path)))
    (u, order, jitter, blur, blur_radius, solarize), images = given
    assert torch.equal(u, torch.rand(8, 2, 9, generator=byol.seeded(3, 5, 0)).flatten(0, 1))
    assert sorted(order[:4]) == [0, 1, 2, 3] and order[4:] == [4] and jitter == (0.1, 0.2, 0.3, 0.4)
    assert blur.shape == solarize.shape == (16, 1, 1, 1) and blur_radius == radius
    assert blur.flatten().tolist() == pytest.approx([*blurs] * 8)
    assert solarize.flatten().tolist() == pytest.approx([0, 0.7] * 8)
    assert images.shape == (8, 3, side, side) and images.is_contiguous(memory_format=torch.channels_last)
    normal = (0.25 - torch.tensor(byol.MEAN)) / torch.tensor(byol.STD)
    torch.testing.assert_close(images, normal.view(3, 1, 1).expand_as(images))


@pytest.mark.parametrize("stop_gradient", [True, False])
def test_order_of_the_step_and_statistics(folder, tmp_path, monkeypatch, stop_gradient):
    """Each loss is of a prediction and the target of the other view; without the stop-gradient of the other
    projection, with its gradient. The target moves after the step; its BatchNorm has its own statistics."""
    seen, named, steps = [], [], []
    augment, update, build, loss = byol.augment, byol.momentum_update, byol.BYOL, byol.byol_loss
    sgd = torch.optim.SGD.step
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (byol.MEAN, byol.STD))

    def spy_augment(*given):
        images = augment(*given)
        seen[:], named[:] = [((images - mean) / std)[i::2] for i in (0, 1)], []
        return images

    def view(images):
        return next(i for i in (0, 1) if torch.equal(images, seen[i]))

    def spy_model(*arguments):
        model = build(*arguments)
        names = "pz"  # of two outputs of the network
        model.register_forward_hook(
            lambda _, x, output: named.extend((output[i], f"{names[i]}{view(*x)}") for i in (0, 1))
        )
        model.target.register_forward_hook(lambda _, x, output: named.append((output, f"t{view(*x)}")))
        return model

    def spy_loss(*pair):
        assert pair[0].requires_grad and pair[1].requires_grad != stop_gradient

        def name_of(rows):  # at first the target gives what the online network does, without gradient
            candidates = [(x, name) for x, name in named if x.requires_grad == rows.requires_grad]
            return next(name for x, name in candidates if torch.equal(x, rows))

        steps.append(" ".join(map(name_of, pair)))
        return loss(*pair)

    def spy_update(online, target, m):
        steps.append("update")
        name = "backbone.conv1.weight"
        before = copy.deepcopy(target.state_dict()[name])
        update(online, target, m)
        expected = m * before + (1 - m) * online.state_dict()[name]
        torch.testing.assert_close(target.state_dict()[name], expected)

    monkeypatch.setattr(torch.optim.SGD, "step", lambda *a, **k: steps.append("step") or sgd(*a, **k))
    spies = {"augment": spy_augment, "BYOL": spy_model, "byol_loss": spy_loss, "momentum_update": spy_update}
    for name, spy in spies.items():
        monkeypatch.setattr(byol, name, spy)
    flags = {"data": str(folder), "hidden_dim": 32, "momentum": 0.9, "stop_gradient": stop_gradient}
    byol.train(tiny_args("byol", **flags, run_dir=str(tmp_path), epochs=2, warmup_epochs=0))
    pairs = ["p0 t1", "p1 t0"] if stop_gradient else ["p0 z1", "p1 z0"]
    assert steps == [*pairs, "step", "update"] * 10

    state = load(tmp_path / "checkpoint.pt")["model"]
    online, target = (state[f"{name}.backbone.bn1.running_mean"] for name in ("online", "target"))
    assert not torch.equal(online, target) and target.abs().max() > 0
    assert state["online.backbone.bn1.num_batches_tracked"] == 20  # one pass for each view
    assert state["target.backbone.bn1.num_batches_tracked"] == 20
    backbone = load(tmp_path / "backbone.pt")["state_dict"]
    assert all(torch.equal(tensor, state[f"online.backbone.{name}"]) for name, tensor in backbone.items())


def test_without_predictor_the_projection_predicts():
    model = BYOL("resnet18", hidden_dim=8, predictor=False)
    prediction, z, _ = model(torch.randn(4, 3, 32, 32))
    assert prediction is z and not [name for name in model.state_dict() if name.startswith("predictor")]


def test_the_target_starts_as_the_online_network_of_init(folder, tmp_path):
    """Encoder of the file and projector; a run that goes on keeps its own target."""
    flags = {"data": str(folder), "epochs": 0, "batch_size": 20}
    byol.train(tiny_args("byol", **flags, seed=1, run_dir=str(tmp_path / "first")))
    path = tmp_path / "first/backbone.pt"
    byol.train(tiny_args("byol", **flags, init=str(path), run_dir=str(tmp_path / "second")))
    model = load(tmp_path / "second/checkpoint.pt")["model"]
    target = {name[7:]: tensor for name, tensor in model.items() if name.startswith("target.")}
    assert len(target) > 120 and all(torch.equal(model[f"online.{name}"], target[name]) for name in target)
    saved = load(path)["state_dict"]
    assert all(torch.equal(tensor, target[f"backbone.{name}"]) for name, tensor in saved.items())


# The monitor


def seen(z, target=None, first=None):
    """Metrics and problems of projections (N, 2, D), with features that have nothing wrong."""
    return monitor(z, z if target is None else target, torch.randn(len(z), 2, 32), first or {})


def test_metrics_are_those_of_projections_and_of_centred_h():
    z, target, h = torch.randn(3, 10, 2, 16, generator=torch.Generator().manual_seed(0))
    metrics, problems = monitor(z, target + 1, h + 5, {})
    of_z = [metrics[f"monitor/projection_{name}"] for name in ("std", "spread", "rank")]
    assert of_z == pytest.approx([*collapse_metrics(z.flatten(0, 1)).values()]) and not problems
    of_target = [metrics[f"monitor/target_{name}"] for name in ("std", "spread")]
    assert of_target == pytest.approx([*collapse_metrics(target.flatten(0, 1) + 1).values()][:2])
    for name, value in collapse_metrics(h.flatten(0, 1) + 5, center=True).items():
        assert metrics[f"monitor/{name}"] == pytest.approx(value)


def test_each_problem_appears_when_it_should():
    """And its tag is one of the metrics, by which the alarm sees whether it mends."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(64, 2, 128, generator=generator)
    alike = torch.ones(128) + 0.01 * z
    flat = torch.linalg.qr(torch.randn(128, 128, generator=generator))[0]
    low = {rank: z[..., :rank] @ flat[:rank] for rank in (2, 8)}
    one_way, few = {"all projections point one way"}, {"projections fill few directions"}
    cases = {
        "healthy": (z, z, {}, set()),
        "one way": (alike, z, {}, one_way | few),
        "one way, the target": (z, alike, {}, {"all targets point one way"}),
        "rank 2": (low[2], z, {}, few),
        "rank 8 of 128": (low[8], z, {}, set()),
        "rank 8, and 100 at first": (low[8], z, {"monitor/projection_rank": 100.0}, few),
        "as at first": (z, z, {"monitor/projection_rank": 100.0}, set()),
    }
    for name, (online, target, first, expected) in cases.items():
        metrics, problems = seen(online, target, first)
        assert set(problems.values()) <= set(metrics), name
        assert {words.split(";")[0] for words in problems} == expected, (name, problems)


# Several processes: oracle 8


def one_step(data, run_dir):
    """train() for one step of 24 images, in float64, without BatchNorm's coupling and with the simplest
    augmentation."""

    class Fixed(BYOL):
        def __init__(self, *shape):
            super().__init__(*shape)
            self.to(DOUBLE).eval()
            for module in self.modules():
                if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                    module.running_var.fill_(4.0)

    def darker(images, u, *_):
        return images.to(DOUBLE) / 255 * u[:, :1, None, None]

    with mock.patch("byol.BYOL", Fixed), mock.patch("byol.augment", darker):
        flags = {"batch_size": 24, "epochs": 1, "image_size": 16, "weight_decay": 0.0, "hidden_dim": 32}
        byol.train(tiny_args("byol", data=str(data), run_dir=str(run_dir), **flags))


def saved(run_dir):
    """Weights, gradient, which is the first momentum, and metrics that one_step left."""
    state = load(run_dir / "checkpoint.pt")
    gradients = [buffer["momentum_buffer"] for buffer in state["optimizer"]["state"].values()]
    return state["model"], gradients, state["recent"][0]


def test_two_processes_are_one(folder, tmp_path, monkeypatch):
    """Loss, gradient and metrics of train() under DDP, of a ResNet with BatchNorm in eval mode: each process
    has the loss of its own rows, and train/loss is the mean of both."""
    found = []
    monkeypatch.setattr(byol, "byol_loss", lambda *a: found.append(byol_loss(*a)) or found[-1])

    def two(rank):
        one_step(folder, tmp_path / "two")
        return sum(found).item()

    losses = in_processes(two)
    one_step(folder, tmp_path / "one")
    (weights, two, metrics), (initial, one, expected) = saved(tmp_path / "two"), saved(tmp_path / "one")
    assert losses[0] != losses[1] and sum(losses) / 2 == pytest.approx(expected["train/loss"], abs=1e-12)
    assert all(torch.equal(weights[name], initial[name]) for name in initial)
    assert max((a - b).abs().max() for a, b in zip(two, one, strict=True)) < 1e-12
    assert len(one) > 60 and max(g.abs().max() for g in one) > 1e-3
    for tag in expected:
        if tag != "perf/images_per_second":
            assert metrics[tag] == pytest.approx(expected[tag], abs=1e-6), tag


class Scale(nn.BatchNorm1d):
    def forward(self, x):
        return x * self.weight + self.bias


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_training_is_the_same_in_processes(tmp_path, monkeypatch, optimizer):
    """train() itself for six steps, with a network without BatchNorm and all of the augmentation."""

    def small(arch, stem):
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 32), nn.Tanh()), 32

    monkeypatch.setattr(byol, "resnet", small)
    monkeypatch.setattr(nn, "BatchNorm1d", Scale)
    flags = {"image_size": 16, "batch_size": 24, "epochs": 1, "warmup_epochs": 0.01, "blurs": (0.9, 0.5)}
    flags |= {"solarize": 0.5, "optimizer": optimizer, "base_lr": 1.0, "momentum": 0.5, "data": "photos"}
    (tmp_path / "photos").mkdir()
    for i in range(144):
        byol.demo_image(i)[0].save(tmp_path / "photos" / f"{i:03d}.png")
    for n in (1, 2):
        in_processes(lambda rank, n=n: byol.train(tiny_args("byol", **flags, run_dir=f"run{n}")), n)

    one, two = metrics_of("run1"), metrics_of("run2")
    assert len(one) == 6 and one[0]["train/loss"] != pytest.approx(one[-1]["train/loss"], rel=1e-3)
    for line, first in zip(two, one, strict=True):
        for tag in ("train/loss", "train/lr", "train/grad_norm", "byol/momentum", "monitor/target_std"):
            assert line[tag] == pytest.approx(first[tag], rel=2e-5), tag


# The paper's command


def test_paper_command_is_the_sheet_s():
    command = re.search(r"torchrun --nnodes 4 .*HOST:29500 .\n +byol\.py(.*?)(?<!\\)\n", byol.__doc__, re.S)[
        1
    ]
    args = tyro.cli(byol.Args, args=command.replace("\\\n", " ").split())
    assert (args.image_size, args.arch, args.stem) == (224, "resnet50", "imagenet")
    assert (args.epochs, args.batch_size, args.optimizer, args.base_lr) == (1000, 4096, "lars", 0.2)
    assert (args.weight_decay, args.warmup_epochs, args.momentum) == (1.5e-6, 10, 0.996)
    assert (args.min_scale, args.jitter) == (0.08, (0.4, 0.4, 0.2, 0.1))
    assert (args.blurs, args.solarize) == ((1.0, 0.1), 0.2)
    assert (args.hidden_dim, args.proj_dim, args.predictor, args.stop_gradient) == (4096, 256, True, True)
    assert args.base_lr * args.batch_size / 256 == pytest.approx(3.2)
