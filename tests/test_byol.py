"""byol.py against its fact sheet's oracles and lightly."""

import copy
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import tyro
from conftest import ROOT, run_processes, tiny_args

import byol
from byol import BYOL, LARS, byol_loss, cosine_schedule, momentum_update


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


# Schedules and the moving average: oracles 4, 5 and 6


def test_momentum_and_learning_rate():
    momenta = [cosine_schedule(step, 8, 0, 0.996, 1.0) for step in range(0, 9, 2)]
    assert momenta == pytest.approx([0.996, 0.99658579, 0.998, 0.99941421, 1.0], abs=1e-8)
    momenta = [cosine_schedule(step, 8, 0, 0.99, 1.0) for step in range(0, 9, 2)]
    assert momenta == pytest.approx([0.99, 0.99146447, 0.995, 0.99853553, 1.0], abs=1e-8)
    total, warmup = 312784, 3127  # of the official code; ours drops each epoch's rest
    assert cosine_schedule(0, total, warmup, 3.2) == 0 and cosine_schedule(warmup, total, warmup, 3.2) == 3.2


def test_momentum_update():
    online, target = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    online.weight.data.fill_(3.0)
    target.weight.data.fill_(0.0)
    momentum_update(online, target, 0.9)
    assert target.weight.item() == pytest.approx(0.3)  # of the weights after the step
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


@pytest.mark.parametrize("arch, last", [("resnet18", "bn2"), ("resnet50", "bn3")])
def test_zero_init(arch, last):
    weights = BYOL(arch, hidden_dim=8).online.named_parameters()
    norms = {name: p for name, p in weights if f"{last}.weight" in name}
    assert len(norms) == {"resnet18": 8, "resnet50": 16}[arch] and all(p.eq(0).all() for p in norms.values())
    plain = BYOL(arch, hidden_dim=8, zero_init=False).state_dict()
    assert all(plain[f"online.{name}"].eq(1).all() for name in norms)


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


def test_views_order_of_the_step_and_statistics(folder, tmp_path, monkeypatch):
    """Views by blur and solarization, and in the loss; target after the step, its BatchNorm statistics."""
    numbers, views, augment, momenta, update = [], [], byol.augment, [], byol.momentum_update
    steps, sgd, named, build, loss = [], torch.optim.SGD.step, [], byol.BYOL, byol.byol_loss
    monkeypatch.setattr(torch.optim.SGD, "step", lambda *a, **k: steps.append("step") or sgd(*a, **k))

    def spy_augment(images, drawn, *others):
        numbers.append(drawn)
        views.append(augment(images, drawn, *others))
        return views[-1]

    def view(images):
        return next(i for i in (0, 1) if torch.equal(images, views[len(views) - 2 + i]))

    def spy_model(*arguments):
        model = build(*arguments)
        model.register_forward_hook(lambda _, x, output: named.append((output[0], f"p{view(*x)}")))
        model.target.register_forward_hook(lambda _, x, output: named.append((output, f"t{view(*x)}")))
        return model

    def spy_loss(*pair):
        steps.append(" ".join(next(name for output, name in named if output is tensor) for tensor in pair))
        return loss(*pair)

    def spy(online, target, m):
        steps.append("update")
        momenta.append(m)
        before = copy.deepcopy(target.state_dict())
        update(online, target, m)
        name = "backbone.conv1.weight"
        expected = m * before[name] + (1 - m) * online.state_dict()[name]
        torch.testing.assert_close(target.state_dict()[name], expected)

    for name, double in {"augment": spy_augment, "BYOL": spy_model, "byol_loss": spy_loss}.items():
        monkeypatch.setattr(byol, name, double)
    monkeypatch.setattr(byol, "momentum_update", spy)
    flags = {"data": str(folder), "blurs": (1.0, 0.0), "solarize": 1.0, "hidden_dim": 32, "momentum": 0.9}
    byol.train(tiny_args("byol", **flags, run_dir=str(tmp_path), zero_init=False))
    first, second = numbers[:2]
    assert (first[:, 5] > 0).all() and (second[:, 5] == 0).all()
    assert (first[:, 6] == 0).all() and (second[:, 6] == 1).all()
    assert steps == ["p0 t1", "p1 t0", "step", "update"] * 20
    assert momenta == pytest.approx([1 - 0.1 * (math.cos(math.pi * k / 20) + 1) / 2 for k in range(20)])
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    online, target = (state[f"{name}.backbone.bn1.running_mean"] for name in ("online", "target"))
    assert not torch.equal(online, target) and target.abs().max() > 0
    assert state["online.backbone.bn1.num_batches_tracked"] == 40  # one pass for each view
    assert state["target.backbone.bn1.num_batches_tracked"] == 40
    backbone = torch.load(tmp_path / "backbone.pt", weights_only=True)["state_dict"]
    assert all(torch.equal(tensor, state[f"online.backbone.{name}"]) for name, tensor in backbone.items())


def test_two_processes_are_one(tmp_path):
    """Loss and gradients; BatchNorm with its running statistics."""
    code = """
import torch, torch.distributed as dist
import byol
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
model = byol.BYOL("resnet18", hidden_dim=32, proj_dim=16, zero_init=False).double().eval()
views = torch.randn(2, 8, 3, 32, 32).double().chunk(world, dim=1)[rank]
net = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
(p0, z0, _), (p1, _, _) = net(views[0]), net(views[1])
with torch.no_grad():
    t0, t1 = model.target(views[0]), model.target(views[1])
loss = byol.byol_loss(p0.double(), t1) + byol.byol_loss(p1, t0)
loss.backward()
mean = byol.gather(loss.detach()[None]).mean()
metrics = byol.collapse_metrics(z0)
if rank == 0:
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.save({"loss": mean, "grads": grads, "metrics": metrics}, f"result{world}.pt")
"""
    for n in (1, 2):
        run_processes(tmp_path, code, n)
    one, two = (torch.load(tmp_path / f"result{n}.pt", weights_only=True) for n in (1, 2))
    assert one["loss"].item() == pytest.approx(two["loss"].item(), rel=1e-6)
    assert len(one["grads"]) > 60
    for name, grad in one["grads"].items():
        torch.testing.assert_close(two["grads"][name], grad, atol=1e-6, rtol=1e-5)
    assert two["metrics"] == pytest.approx(one["metrics"], abs=1e-6)


@pytest.mark.slow
def test_training_in_two_processes(folder, tmp_path):
    """DDP with two passes before one gradient; the target is the same in both processes."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from conftest import tiny_args
import torch, torch.distributed as dist
import byol
update = byol.momentum_update
def spy(online, target, m):
    update(online, target, m)
    mine = torch.cat([p.flatten() for p in target.parameters()])
    both = byol.gather(mine[None])
    assert torch.equal(both[0], both[1])
byol.momentum_update = spy
if __name__ == "__main__":
    byol.train(tiny_args("byol", data={str(folder)!r}, run_dir="run", epochs=1, hidden_dim=32))
"""
    run_processes(tmp_path, code)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 5 and all(0 < line["train/loss"] < 8 for line in lines)


def test_paper_command_is_the_sheet_s():
    command = re.search(r"torchrun --nnodes 4 --nproc-per-node 8 byol\.py(.*?)(?<!\\)\n", byol.__doc__, re.S)[
        1
    ]
    args = tyro.cli(byol.Args, args=command.replace("\\\n", " ").split())
    assert (args.image_size, args.arch, args.stem) == (224, "resnet50", "imagenet")
    assert (args.epochs, args.batch_size, args.optimizer, args.base_lr) == (1000, 4096, "lars", 0.2)
    assert (args.weight_decay, args.warmup_epochs, args.momentum) == (1.5e-6, 10, 0.996)
    assert (args.min_scale, args.jitter) == (0.08, (0.4, 0.4, 0.2, 0.1))
    assert (args.blurs, args.solarize) == ((1.0, 0.1), 0.2)
    assert (args.hidden_dim, args.proj_dim, args.zero_init) == (4096, 256, True)
    assert args.base_lr * args.batch_size / 256 == pytest.approx(3.2)
