"""moco.py against its fact sheet's oracles, slow versions written here and lightly."""

import math
import os
import re
import sys
from collections import OrderedDict
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchvision
import tyro
from conftest import in_processes, load, metrics_of, stopped, tensors_of, tiny_args
from lightly.loss import NTXentLoss
from torch import nn

import moco
from moco import MoCo, SplitBatchNorm, collapse_metrics, enqueue, info_nce, momentum_update, monitor

DOUBLE = torch.float64


def unit(*shape, seed=0, dtype=torch.float32):
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return F.normalize(rows, dim=-1)


# Loss: oracles 1, 2 and 5


def test_loss_by_hand():
    """A queue that is orthogonal, in float32 of 65,537 terms, too; one that is all alike."""
    eye = torch.eye(2, dtype=DOUBLE)
    for size, tau, orthogonal, equal in (
        (4, 1, 0.904832, math.log(5)),
        (4, 0.2, 0.026595, math.log(5)),
        (4096, 0.1, 0.170551, 8.318010),
        (65536, 0.07, 0.0401355, 11.090370),
        (65536, 0.2, 6.092617, 11.090370),
    ):
        q, across, alike = eye[:1], eye[:, 1:].expand(2, size), eye[:, :1].expand(2, size)
        assert info_nce(q, q, across, tau).item() == pytest.approx(orthogonal, abs=1e-6)
        single = info_nce(q.float(), q.float(), across.float(), tau)
        assert single.item() == pytest.approx(orthogonal, abs=2e-4)
        assert info_nce(q.expand(3, 2), q.expand(3, 2), alike, tau).item() == pytest.approx(equal, abs=1e-6)


def slow_info_nce(q, k, queue, temperature):
    """Eq. 1, query by query."""
    losses = []
    for query, key in zip(q, k, strict=True):
        right = torch.exp(query @ key / temperature)
        others = sum(torch.exp(query @ old / temperature) for old in queue.T)
        losses.append(-torch.log(right / (right + others)))
    return sum(losses) / len(losses)


def test_loss_and_gradient_are_those_of_the_slow_version():
    """The gradient goes into q alone; half precision is computed in float32."""
    q, k = (unit(6, 16, seed=seed, dtype=DOUBLE).requires_grad_() for seed in (0, 1))
    queue = unit(40, 16, seed=2, dtype=DOUBLE).T.contiguous().requires_grad_()
    loss, slow = info_nce(q, k, queue, 0.07), slow_info_nce(q, k.detach(), queue.detach(), 0.07)
    torch.testing.assert_close(loss, slow)
    (expected,) = torch.autograd.grad(slow, q)
    loss.backward()
    torch.testing.assert_close(q.grad, expected)
    assert k.grad is None and queue.grad is None
    attraction = info_nce(q, k, queue, 0.07, negatives=False)
    torch.testing.assert_close(attraction, -(q * k).sum(dim=1).mean() / 0.07)
    half = q.bfloat16(), k.bfloat16(), queue.float()
    torch.testing.assert_close(info_nce(*half, 0.07), info_nce(*(x.float() for x in half), 0.07))


def test_loss_is_lightly_s_with_the_same_queue():
    theirs = NTXentLoss(temperature=0.2, memory_bank_size=(64, 16))
    bank, pointer = unit(64, 16, seed=5).T.contiguous(), torch.zeros(1, dtype=torch.long)
    theirs.memory_bank.bank, theirs.memory_bank.bank_ptr = bank.T.contiguous(), pointer.clone()
    for step in range(6):  # past the end of the queue
        rows, k = unit(16, 16, seed=10 + step).requires_grad_(), unit(16, 16, seed=20 + step)
        ours, expected = info_nce(F.normalize(rows, dim=1), k, bank, 0.2), theirs(rows, k)
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(torch.autograd.grad(ours, rows), torch.autograd.grad(expected, rows))
        enqueue(bank, pointer, k)
        torch.testing.assert_close(theirs.memory_bank.bank.T, bank)


# Queue and moving average: oracles 4 and 3


def test_queue_order_and_wrap_around():
    queue, pointer = torch.zeros(2, 8), torch.zeros(1, dtype=torch.long)
    for step in (1.0, 2.0, 3.0):
        enqueue(queue, pointer, torch.full((4, 2), step))
    assert queue[0].tolist() == queue[1].tolist() == [3, 3, 3, 3, 2, 2, 2, 2] and pointer.tolist() == [4]
    enqueue(queue, pointer, torch.full((4, 2), 4.0))
    assert pointer.tolist() == [0] and pointer.dtype == torch.long
    enqueue(queue, pointer, torch.tensor([[1.0, 2], [3, 4]]))  # key i goes into column i
    assert queue[:, :2].tolist() == [[1, 3], [2, 4]]
    with pytest.raises(ValueError, match="8 is no multiple of 3"):
        enqueue(queue, pointer, torch.zeros(3, 2))


def test_moving_average_of_weights_but_not_of_statistics():
    q, k = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    q.weight.data.fill_(2.0)
    q(torch.randn(4, 1))
    values = []
    for _ in range(3):
        momentum_update(q, k, 0.9)
        values.append(k.weight.item())
    assert values == pytest.approx([1.1, 1.19, 1.271])
    assert k.running_mean.tolist() == [0] and k.num_batches_tracked == 0


# Model


def test_state_has_the_official_names_and_shapes():
    """Of the published ResNet-50 files, without their prefix `module.`; a queue of 32 MiB."""
    v1, v2 = nn.Linear(2048, 128), nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 128))
    net = torchvision.models.resnet50()
    for mlp, splits, entries in ((False, 1, 642), (True, 1, 646), (False, 8, 642), (True, 8, 646)):
        net.fc = v2 if mlp else v1
        state = {f"encoder_{i}.{name}": tensor for i in "qk" for name, tensor in net.state_dict().items()}
        state |= {"queue": torch.empty(128, 65536), "queue_ptr": torch.empty(1, dtype=torch.long)}
        with torch.device("meta"):
            ours = MoCo("resnet50", mlp=mlp, splits=splits).state_dict()
        facts = [{k: (v.shape, v.dtype) for k, v in tensors.items()} for tensors in (ours, state)]
        assert facts[0] == facts[1] and len(state) == entries


def test_encoders():
    """The key encoder is a copy, without gradient, split as the other; the body is torchvision's; columns of
    a new queue are of length 1."""
    torch.manual_seed(0)
    model, x = MoCo("resnet18", queue_size=512).eval(), torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(model.queue.norm(dim=0), torch.ones(512))
    assert not model.queue.requires_grad and model.queue.mean().abs() < 0.01
    q, h = model(x)
    torch.testing.assert_close(q, F.normalize(model.encoder_q(x), dim=1))
    net = torchvision.models.resnet18()
    net.load_state_dict(model.encoder_q.state_dict() | net.fc.state_dict(prefix="fc."), strict=False)
    net.fc = nn.Identity()
    torch.testing.assert_close(h, net.eval()(x))
    assert h.shape == (4, 512) and model.width == 512

    k, _ = model(x, keys=True)
    torch.testing.assert_close(k, q)
    info_nce(q, k, model.queue, 0.2).backward()
    assert all(p.grad is None and not p.requires_grad for p in model.encoder_k.parameters())
    assert all(p.grad is not None for p in model.encoder_q.parameters())
    model.encoder_k.fc[2].bias.fill_(9)
    assert not torch.allclose(model(x, keys=True)[0], k)
    torch.testing.assert_close(model(x)[0], q)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x)[0].dtype == torch.float32
    assert model.double()(x.double())[0].dtype == DOUBLE

    for splits, kind in ((1, nn.BatchNorm2d), (4, SplitBatchNorm)):
        for encoder in MoCo("resnet18", queue_size=8, splits=splits).children():
            norms = [layer for layer in encoder.modules() if isinstance(layer, nn.BatchNorm2d)]
            assert len(norms) == 20 and {type(layer) for layer in norms} == {kind}
            assert {getattr(layer, "splits", 1) for layer in norms} == {splits}


def test_split_batch_norm():
    """Oracle 7."""
    torch.manual_seed(0)
    x = torch.randn(8, 3, 5, 5) * torch.linspace(0.5, 2, 8).view(8, 1, 1, 1) + 1
    for splits in (1, 4):
        ours, plain = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        ours.load_state_dict(ours.state_dict() | {"weight": torch.rand(3) + 0.5, "bias": torch.randn(3)})
        plain.load_state_dict(ours.state_dict())
        ours.__class__, ours.splits = SplitBatchNorm, splits
        y = ours(x)
        for s in range(splits):
            part = nn.BatchNorm2d(3)
            part.load_state_dict(plain.state_dict())
            torch.testing.assert_close(y[s::splits], part(x[s::splits]))
        plain(x)
        torch.testing.assert_close(ours.running_mean, plain.running_mean)
        assert torch.allclose(ours.running_var, plain.running_var) == (splits == 1)
        variances = torch.stack([x[s::splits].transpose(0, 1).flatten(1).var(dim=1) for s in range(splits)])
        torch.testing.assert_close(ours.running_var, 0.9 + 0.1 * variances.mean(dim=0))
        assert ours.num_batches_tracked == 1
        torch.testing.assert_close(ours(x.contiguous(memory_format=torch.channels_last)), y)
    assert ours.eval()(x[:3]).shape == (3, 3, 5, 5)  # eval takes any number


# The monitor


def seen(q, k, queue, first=0.0, h=None):
    """Metrics and problems, with features that have nothing wrong."""
    h = torch.randn(len(q), 32) if h is None else h
    return monitor(q, k, h, queue, 0.2, {"monitor/projection_rank": first})


def test_metrics():
    """Accuracy is strict, the gap is from equal logits; room is that of q and of centred h."""
    axis, queue = torch.eye(4), torch.zeros(4, 7)
    queue[1] = 1
    q, easy, hard = axis[:1].expand(6, 4), math.log(1 + 7 * math.exp(-5)), math.log(1 + 7 * math.exp(5))
    half = torch.cat([q[:3], axis[1:2].expand(3, 4)])  # these three are near the queue, not their key
    for queries, columns, accuracy, loss in (
        (q, axis[:, :1].expand(4, 7), 0, math.log(8)),  # a tie is no success
        (q, queue, 1, easy),
        (half, queue, 0.5, (easy + hard) / 2),
        (q * math.nan, queue, 0, math.nan),
    ):
        metrics, _ = seen(queries, q, columns)
        assert metrics["moco/contrastive_accuracy"] == accuracy
        assert metrics["moco/gap"] == pytest.approx(math.log(8) - loss, abs=1e-5, nan_ok=True)

    q, k, queue, h = unit(10, 16), unit(10, 16, seed=1), unit(40, 16, seed=2).T, torch.randn(10, 24) + 5
    metrics, _ = seen(q, k, queue, h=h)
    of_q = [metrics[f"monitor/projection_{name}"] for name in ("std", "spread", "rank")]
    assert of_q == pytest.approx([*collapse_metrics(q).values()])
    for name, value in collapse_metrics(h, center=True).items():
        assert metrics[f"monitor/{name}"] == pytest.approx(value)


def test_each_problem_appears_when_it_should():
    """And its tag is one of the metrics, by which the alarm sees whether it mends."""
    q, _, noise = unit(3, 64, 128)
    near, queue = F.normalize(q + 0.1 * noise, dim=1), unit(256, 128, seed=1).T
    turned = F.normalize(torch.ones(128) + 0.01 * q, dim=1)
    flat = torch.linalg.qr(torch.randn(128, 128, generator=torch.Generator().manual_seed(0)))[0]
    low = {rank: F.normalize(q[:, :rank] @ flat[:rank], dim=1) for rank in (2, 8)}
    few = {"q fills few directions": "monitor/projection_rank"}
    for queries, k, first, expected in (
        (q, near, 0.0, {}),
        (q, near, 60.0, {}),  # as at the first log
        (turned, turned, 0.0, {"all q point one way": "monitor/projection_spread"}),
        (low[2], low[2], 0.0, few),
        (low[8], low[8], 0.0, {}),  # enough of 128 directions, but not where there were 100
        (low[8], low[8], 100.0, few),
        (q, -q, 0.0, {"keys are found by chance": "moco/gap"}),
    ):
        metrics, problems = seen(queries, k, queue, first)
        assert set(problems.values()) <= set(metrics)
        found = {words.split(";")[0]: tag for words, tag in problems.items()}
        assert expected.items() <= found.items() and (queries is turned or found == expected), found


# The step


@pytest.fixture
def train(folder, monkeypatch):
    """train(run_dir, ...), with a moment's work in place of resnet, also on images of 8 x 8."""

    def resnet(arch, stem):
        layers = {"conv1": nn.Conv2d(3, 8, 5, 3), "bn1": nn.BatchNorm2d(8), "act": nn.Tanh()}
        layers |= {"pool": nn.AdaptiveAvgPool2d(2), "flat": nn.Flatten(), "fc": nn.Identity()}
        return nn.Sequential(OrderedDict(layers)), 32

    def train(run_dir="run", **flags):
        return moco.train(tiny_args("moco", data=str(folder), run_dir=run_dir, **flags))

    monkeypatch.setattr(moco, "resnet", resnet)
    return train


def test_order_of_a_step(train, monkeypatch):
    """Query, moving average, key, loss on the queue as it was, enqueue, and no key encoder in the update. The
    key encoder sees another order than the query encoder; the keys come back in the query's."""
    calls, queues, passes, views = [], [], [], []
    forward, update, loss, put = MoCo.forward, moco.momentum_update, moco.info_nce, moco.enqueue
    step, augment = torch.optim.SGD.step, moco.augment

    def spy_forward(self, images, keys=False):
        passes.append((self, images))
        calls.append("key" if keys else "query")
        assert self.training and torch.is_grad_enabled() != keys
        return forward(self, images, keys)

    def spy_update(q, k, m):
        calls.append(f"average {m}")
        before, weights = k.fc[2].weight.clone(), q.fc[2].weight.clone()
        update(q, k, m)
        torch.testing.assert_close(k.fc[2].weight, m * before + (1 - m) * weights)

    def spy_loss(q, k, queue, temperature, *negatives):
        if q.requires_grad:  # not the monitor's
            calls.append(f"loss {temperature}")
            queues.append((queue, k))
            assert torch.equal(queue, passes[-1][0].queue)
        return loss(q, k, queue, temperature, *negatives)

    monkeypatch.setattr(MoCo, "forward", spy_forward)
    monkeypatch.setattr(moco, "momentum_update", spy_update)
    monkeypatch.setattr(moco, "info_nce", spy_loss)
    monkeypatch.setattr(moco, "enqueue", lambda *a: calls.append(f"enqueue {len(a[2])}") or put(*a))
    monkeypatch.setattr(moco, "augment", lambda *a, **k: views.append(augment(*a, **k)) or views[-1])
    monkeypatch.setattr(torch.optim.SGD, "step", lambda *a, **k: calls.append("step") or step(*a, **k))
    train(bn_splits=2, queue_size=96, momentum=0.9, base_lr=0.3)
    assert calls == ["query", "average 0.9", "key", "loss 0.2", "enqueue 8", "step"] * 20

    state = load("run/checkpoint.pt")["model"]
    assert state["queue_ptr"].item() == 20 * 8 % 96
    torch.testing.assert_close(state["queue"].norm(dim=0), torch.ones(96))
    for number, ((old, keys), (new, _)) in enumerate(zip(queues[:-1], queues[1:], strict=True)):
        at = 8 * number % 96
        torch.testing.assert_close(new[:, at : at + 8], keys.T)
        others = [i for i in range(96) if not at <= i < at + 8]
        assert torch.equal(new[:, others], old[:, others])
    assert all(p.grad is None for p in passes[0][0].encoder_k.parameters())

    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (moco.MEAN, moco.STD))
    first, second = ((views[0] - mean) / std).unflatten(0, (-1, 2)).unbind(dim=1)
    torch.testing.assert_close(passes[0][1], first)
    order = [next(i for i in range(8) if torch.allclose(x, second[i])) for x in passes[1][1]]
    assert sorted(order) == list(range(8)) and order != list(range(8))
    torch.manual_seed(0)
    expected, _ = forward(MoCo("resnet18", queue_size=96, splits=2), second[order], keys=True)
    torch.testing.assert_close(queues[0][1], expected[torch.tensor(order).argsort()], atol=1e-5, rtol=1e-4)


def test_the_first_key_encoder_is_the_query_encoder(train, monkeypatch):
    """Also where --init gives the weights; of step 1 the average is no change, up to rounding."""
    train("a", epochs=0, seed=1)
    given, update = load("a/backbone.pt")["state_dict"], moco.momentum_update

    def spy(q, k, m):
        weights = {name: tensor.clone() for name, tensor in k.state_dict().items()}
        update(q, k, m)
        for name, tensor in k.state_dict().items():
            torch.testing.assert_close(tensor, weights[name], atol=1e-6, rtol=1e-6)
            assert name.startswith("fc.") or torch.equal(weights[name], given[name])
        assert all(torch.equal(weights[name], q.state_dict()[name]) for name in weights if "fc." in name)
        sys.exit("seen")

    monkeypatch.setattr(moco, "momentum_update", spy)
    # statistics of the query encoder have moved by its forward; the key encoder's have not
    stopped(lambda: train("b", epochs=1, seed=2, init="a/backbone.pt"), "seen")


@pytest.mark.parametrize(
    "schedule, warmup, splits, side, blur, radius, epochs",
    [
        ("cosine", 0, 1, 32, 0.3, 1, 200),
        ("cosine", 10, 2, 8, 0.0, 0, 200),
        ("steps", 0, 2, 8, 0.0, 0, 200),
        ("steps", 10, 1, 8, 0.0, 0, 200),
        ("steps", 0, 1, 224, 0.5, 11, 1),
    ],
)
def test_recipe_of_a_run(train, monkeypatch, schedule, warmup, splits, side, blur, radius, epochs):
    """Oracle 8: 200 epochs, here of one step of all 40 images, at a peak of 0.03. Each step draws its own
    numbers, uniform, for each view its own, of (seed, step) alone; in all 24 orders of the colours, gray
    last; and shuffles its keys anew. 3 taps of the blur at 32 px and 23 at 224. The network gets what is
    normalised, channels last, but not where BatchNorm is split; SGD decays all weights of its encoder."""
    drawn, places, seen, built, forward, sgd = [], [], [], [], MoCo.forward, torch.optim.SGD

    def loader(data, batch_sampler, **_):
        return ((*torch.zeros(2, 40, 3, side, side), 0) for _ in batch_sampler)

    def spy(images, u, order, *recipe, **more):
        drawn.append((u, order))
        assert recipe == ((0.4, 0.4, 0.4, 0.1), blur, radius) and more == {"chance": 0.7}
        return images + torch.arange(40.0).repeat_interleave(2).view(-1, 1, 1, 1)  # which image it is of

    def spy_forward(self, images, keys=False):
        if keys:
            places.append(images[:, 0, 0, 0].argsort().argsort())
        seen.append((self, images))
        return forward(self, images, keys)

    monkeypatch.setattr(moco, "DataLoader", loader)
    monkeypatch.setattr(moco, "augment", spy)
    monkeypatch.setattr(MoCo, "forward", spy_forward)
    monkeypatch.setattr(torch.optim, "SGD", lambda *a, **k: built.append(sgd(*a, **k)) or built[-1])
    flags = {"base_lr": 0.03 * 256 / 40, "warmup_epochs": warmup, "schedule": schedule, "seed": warmup}
    flags |= {"image_size": side, "blur": blur, "bn_splits": splits, "jitter_chance": 0.7}
    train(epochs=epochs, batch_size=40, weight_decay=0.02, **flags)
    rates = [line["train/lr"] for line in metrics_of("run")]
    expected = [moco.cosine_schedule(i, 200, warmup, 0.03) for i in range(200)]
    assert expected[100 + warmup // 2] == pytest.approx(0.03 / 2, rel=0.02)
    if schedule == "steps":
        expected[warmup:] = [0.03] * (120 - warmup) + [0.003] * 40 + [0.0003] * 40
    expected[:warmup] = [0.03 * step / 10 for step in range(warmup)]
    assert rates == pytest.approx(expected[:epochs])

    for step, ((u, order), place) in enumerate(zip(drawn, places, strict=True)):
        generator = moco.seeded(3, warmup, step)
        assert torch.equal(u, torch.rand(40, 2, 9, generator=generator).flatten(0, 1))
        assert order == [*torch.randperm(4, generator=generator).tolist(), 4]
        assert torch.equal(place, torch.randperm(40, generator=generator))
    assert len({tuple(order) for _, order in drawn}) == min(24, epochs)
    assert len({tuple(place.tolist()) for place in places}) == epochs

    model, images = seen[0]
    layout = torch.channels_last if splits == 1 else torch.contiguous_format
    assert images.is_contiguous(memory_format=layout)
    normal = (3.0 - torch.tensor(moco.MEAN)) / torch.tensor(moco.STD)
    torch.testing.assert_close(images[3], normal.view(3, 1, 1).expand(3, side, side))
    (group,) = built[0].param_groups
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 0.02, False)
    trained, own = ({id(p) for p in params} for params in (group["params"], model.encoder_q.parameters()))
    assert trained == own


# Several processes, and flags


def test_two_processes_are_one(train, monkeypatch):
    """6 steps of 24 images in float64, BatchNorm in eval mode and with the simplest augmentation: images,
    keys, queue, loss, gradients, weights; keys shuffled across processes."""
    passes, keys, losses, put, loss, build = [], [], [], moco.enqueue, moco.info_nce, MoCo

    def fixed(*shape):
        model = build(*shape).to(DOUBLE).eval()
        for encoder in (model.encoder_q, model.encoder_k):
            encoder.bn1.running_var.fill_(4.0)
        model.register_forward_pre_hook(lambda model, given: passes.append(given[0].clone()))
        return model

    def spy_loss(q, *rest):
        value = loss(q, *rest)
        losses.extend([value.item()] if q.requires_grad else [])
        return value

    monkeypatch.setattr(moco, "MoCo", fixed)
    monkeypatch.setattr(moco, "augment", lambda x, u, *_, **__: x.to(DOUBLE) / 255 * u[:, :1, None, None])
    monkeypatch.setattr(moco, "enqueue", lambda *a: keys.append(a[2].clone()) or put(*a))
    monkeypatch.setattr(moco, "info_nce", spy_loss)

    def fixed_run(rank, run_dir="two"):
        flags = {"batch_size": 24, "epochs": 6, "image_size": 16, "queue_size": 96, "base_lr": 0.3}
        train(run_dir, bn_splits=2, **flags)
        return passes, keys, losses

    (passes0, keys0, losses0), (passes1, keys1, losses1) = in_processes(fixed_run)
    fixed_run(0, "one")
    assert len(passes) == 12 and len(keys) == 6 and keys[0].shape == (24, 128)
    for images, *parts in zip(passes, passes0, passes1, strict=True):
        torch.testing.assert_close(torch.cat(parts), images, atol=1e-12, rtol=0)
    # the second pass is that of keys, in the same shuffled order
    assert all(any(torch.equal(image, x) for x in passes[1][:12]) for image in passes0[1])
    for i, every_k in enumerate(keys):
        assert torch.equal(keys0[i], keys1[i])
        torch.testing.assert_close(keys0[i], every_k, atol=1e-11, rtol=0)
        assert (losses0[i] + losses1[i]) / 2 == pytest.approx(losses[i], abs=1e-10)
    assert abs(losses0[0] - losses1[0]) > 1e-6  # each has the loss of its own queries

    one, two = (load(f"{name}/checkpoint.pt") for name in ("one", "two"))
    tensors, wanted = tensors_of(two), tensors_of(one)
    assert wanted["/model/queue_ptr"].item() == 6 * 24 % 96 and len(wanted) > 20
    for name in wanted:
        torch.testing.assert_close(tensors[name], wanted[name], atol=1e-10, rtol=1e-10, msg=name)
    moved = wanted["/model/encoder_k.conv1.weight"] - wanted["/model/encoder_q.conv1.weight"]
    assert moved.abs().max() > 1e-7  # weights have moved, or nothing was compared
    for line, expected in zip(metrics_of("two"), metrics_of("one"), strict=True):
        assert line == pytest.approx(expected, abs=1e-6)


def test_bn_splits_are_those_of_the_whole_batch(train, monkeypatch):
    """Two processes take half of them, five at least one each."""
    for world, splits in ((1, 4), (2, 2), (4, 1), (5, 1)):
        start = (0, world, torch.device("cpu"), None)
        monkeypatch.setattr(moco, "start_processes", lambda *a, start=start: start)
        monkeypatch.setattr(moco, "MoCo", lambda *shape: sys.exit(f"{shape[-1]} splits"))
        stopped(lambda: train(batch_size=40, bn_splits=4), f"^{splits} splits")


def test_bad_flags(train):
    for flags, message in (
        ({"queue_size": 30}, "--queue-size 30: give a multiple of --batch-size 8"),
        ({"bn_splits": 8}, "--bn-splits 8: give what cuts 8 images into parts of 2 or more"),
        ({"bn_splits": 3}, "--bn-splits 3: give what cuts 8 images into parts of 2 or more"),
        ({"momentum": 1.5}, "--momentum 1.5: must be at least 0 and at most 1"),
        ({"jitter_chance": 80.0}, "--jitter-chance 80.0: must be at least 0 and at most 1"),
    ):
        assert stopped(partial(train, **flags), message) == message
        assert not os.path.exists("run")


def test_paper_commands_are_the_sheet_s():
    """Of v2, and the docstring's line of flags of v1 after it."""
    pattern = r"torchrun --nproc-per-node 8 moco\.py(.*?)(?<!\\)\nv1: +the same with (.*?)(?<!\\)\n"
    found = re.search(pattern, moco.__doc__, re.S)
    paper, more = (words.replace("\\\n", " ").split() for words in found.groups())
    v2, v1 = (vars(tyro.cli(moco.Args, args=words)) for words in (paper, paper + more))
    expected = {"image_size": 224, "arch": "resnet50", "stem": "imagenet", "epochs": 200, "min_scale": 0.2}
    expected |= {"batch_size": 256, "base_lr": 0.03, "weight_decay": 1e-4, "warmup_epochs": 0, "blur": 0.5}
    expected |= {"momentum": 0.999, "queue_size": 65536, "temperature": 0.2, "dim": 128, "mlp": True}
    expected |= {"schedule": "cosine", "jitter": (0.4, 0.4, 0.4, 0.1), "jitter_chance": 0.8}
    expected |= {"bn_splits": 8, "negatives": True}
    assert expected.items() <= v2.items()
    other = {"mlp": False, "temperature": 0.07, "schedule": "steps", "blur": 0.0, "jitter_chance": 1.0}
    assert v1 == v2 | other | {"jitter": (0.4, 0.4, 0.4, 0.4)}
