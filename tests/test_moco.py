"""moco.py against its fact sheet's oracles, slow versions written here and lightly."""

import json
import math
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import torchvision
import tyro
from conftest import run_processes, tiny_args

import moco
from moco import MoCo, SplitBatchNorm, collapse_metrics, enqueue, info_nce, momentum_update, monitor

DOUBLE = torch.float64


def unit(*shape, seed=0, dtype=torch.float32):
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return F.normalize(rows, dim=-1)


def logits_of(q, k, queue, temperature):
    """What info_nce hands to the cross-entropy: logits (B, 1 + K) and the right columns."""
    with mock.patch("torch.nn.functional.cross_entropy") as cross_entropy:
        info_nce(q, k, queue, temperature)
    return cross_entropy.call_args.args


# Loss: oracles 1, 2 and 5


ORTHOGONAL = [(4, 1, 0.904832), (4, 0.2, 0.026595), (4096, 0.1, 0.170551)]
ORTHOGONAL += [(65536, 0.07, 0.0401355), (65536, 0.2, 6.092617)]


@pytest.mark.parametrize("size, tau, expected", ORTHOGONAL)
def test_orthogonal_queue(size, tau, expected):
    q, queue = torch.eye(2)[:1], torch.zeros(2, size)
    queue[1] = 1
    assert info_nce(q, q, queue, tau).item() == pytest.approx(expected, abs=2e-4)  # float32, 65,537 terms
    exact = info_nce(q.double(), q.double(), queue.double(), tau)
    assert exact.dtype == DOUBLE and exact.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("size, expected", [(4096, 8.318010), (65536, 11.090370)])
def test_equal_similarities(size, expected):
    q = unit(3, 8)[:1].expand(3, 8)
    queue = q[:1].T.expand(8, size)
    logits, right = logits_of(q, q, queue, 0.2)
    assert logits.shape == (3, size + 1) and right.tolist() == [0, 0, 0]
    assert info_nce(q, q, queue, 0.2).item() == pytest.approx(expected, abs=1e-5)


def slow_info_nce(q, k, queue, temperature):
    """Eq. 1, query by query."""
    losses = []
    for query, key in zip(q, k, strict=True):
        right = torch.exp(query @ key / temperature)
        others = sum(torch.exp(query @ old / temperature) for old in queue.T)
        losses.append(-torch.log(right / (right + others)))
    return sum(losses) / len(losses)


def test_loss_and_gradient_are_those_of_the_slow_version():
    q = unit(6, 16, dtype=DOUBLE).requires_grad_()
    k = unit(6, 16, seed=1, dtype=DOUBLE).requires_grad_()
    queue = unit(40, 16, seed=2, dtype=DOUBLE).T.contiguous().requires_grad_()
    loss, slow = info_nce(q, k, queue, 0.07), slow_info_nce(q, k.detach(), queue.detach(), 0.07)
    torch.testing.assert_close(loss, slow)
    (expected,) = torch.autograd.grad(slow, q)
    loss.backward()
    torch.testing.assert_close(q.grad, expected)
    assert k.grad is None and queue.grad is None  # the gradient goes into q alone
    attraction = info_nce(q, k, queue, 0.07, negatives=False)
    torch.testing.assert_close(attraction, -(q * k).sum(dim=1).mean() / 0.07)


def test_loss_is_lightly_s_with_the_same_queue():
    from lightly.loss import NTXentLoss

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


def test_half_precision_is_computed_in_float32():
    q, k, queue = unit(8, 16).bfloat16(), unit(8, 16, seed=1).bfloat16(), unit(40, 16, seed=2).T
    assert info_nce(q, k, queue, 0.07).dtype == torch.float32
    torch.testing.assert_close(info_nce(q, k, queue, 0.07), info_nce(q.float(), k.float(), queue, 0.07))


# Queue: oracle 4


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


def test_a_new_queue_has_columns_of_length_1_and_costs_32_mib():
    with torch.device("meta"):
        model = MoCo("resnet18")
    assert model.queue.shape == (128, 65536) and model.queue.numel() * 4 == 32 * 2**20
    queue = MoCo("resnet18", queue_size=512).queue
    torch.testing.assert_close(queue.norm(dim=0), torch.ones(512))
    assert not queue.requires_grad and queue.mean().abs() < 0.01


# Moving average: oracle 3


def test_momentum_update():
    q, k = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    q.weight.data.fill_(2.0)
    k.weight.data.fill_(1.0)
    values = []
    for _ in range(3):
        momentum_update(q, k, 0.9)
        values.append(k.weight.item())
    assert values == pytest.approx([1.1, 1.19, 1.271])


def test_statistics_of_batch_norm_are_not_averaged():
    q, k = torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3)
    q(torch.randn(4, 3, 2, 2))
    momentum_update(q, k, 0.5)
    assert k.running_mean.tolist() == [0, 0, 0] and k.num_batches_tracked == 0


# Model


def official_state(mlp):
    """Names and shapes of the published ResNet-50 files, without their prefix `module.`."""
    with torch.device("meta"):
        net = torchvision.models.resnet50().state_dict()
    state = {}
    for encoder in ("encoder_q", "encoder_k"):
        state |= {f"{encoder}.{name}": tensor for name, tensor in net.items() if name[:3] != "fc."}
        layers = {"fc.0": (2048, 2048), "fc.2": (128, 2048)} if mlp else {"fc": (128, 2048)}
        for name, shape in layers.items():
            state[f"{encoder}.{name}.weight"] = torch.empty(shape, device="meta")
            state[f"{encoder}.{name}.bias"] = torch.empty(shape[0], device="meta")
    state["queue"] = torch.empty(128, 65536, device="meta")
    state["queue_ptr"] = torch.empty(1, dtype=torch.long, device="meta")
    return state


@pytest.mark.parametrize("mlp, entries", [(False, 642), (True, 646)])
@pytest.mark.parametrize("splits", [1, 8])
def test_the_official_state_loads_strictly(mlp, entries, splits):
    state = official_state(mlp)
    assert len(state) == entries
    with torch.device("meta"):
        model = MoCo("resnet50", mlp=mlp, splits=splits)
    model.load_state_dict(state, strict=True, assign=True)
    for name in state:  # the right one could be lost, or of another type
        lost = {other: tensor for other, tensor in state.items() if other != name}
        if name.endswith((".bias", "queue_ptr")):
            with pytest.raises(RuntimeError, match=re.escape(name)):
                model.load_state_dict(lost, strict=True, assign=True)
    assert model.queue_ptr.shape == (1,) and model.queue_ptr.dtype == torch.long


def test_encoders():
    torch.manual_seed(0)
    model, x = MoCo("resnet18", queue_size=64).eval(), torch.randn(4, 3, 32, 32)
    q, h = model(x)
    torch.testing.assert_close(q, F.normalize(model.encoder_q(x), dim=1))
    torch.testing.assert_close(q.norm(dim=1), torch.ones(4))
    net = torchvision.models.resnet18()
    net.fc = torch.nn.Identity()
    weights = model.encoder_q.state_dict()
    net.load_state_dict({name: weights[name] for name in weights if name[:3] != "fc."})
    torch.testing.assert_close(h, net.eval()(x))
    assert h.shape == (4, 512) and model.width == 512

    k, _ = model(x, keys=True)
    torch.testing.assert_close(k, q)  # it starts as a copy
    info_nce(q, k, model.queue, 0.2).backward()
    assert all(p.grad is None and not p.requires_grad for p in model.encoder_k.parameters())
    assert all(p.grad is not None for p in model.encoder_q.parameters())
    with torch.no_grad():
        model.encoder_k.fc[2].bias.fill_(9)
    assert not torch.allclose(model(x, keys=True)[0], k)
    torch.testing.assert_close(model(x)[0], q)


def test_float64_stays_and_bfloat16_becomes_float32():
    model, x = MoCo("resnet18", queue_size=8).eval(), torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x)[0].dtype == torch.float32
    assert model.double()(x.double())[0].dtype == DOUBLE


# Split BatchNorm: oracle 7


def split(splits, channels=3):
    layer = torch.nn.BatchNorm2d(channels)
    with torch.no_grad():
        layer.weight.copy_(torch.rand(channels) + 0.5)
        layer.bias.copy_(torch.randn(channels))
    layer.__class__, layer.splits = SplitBatchNorm, splits
    return layer


def test_split_batch_norm():
    torch.manual_seed(0)
    x = torch.randn(8, 3, 5, 5) * torch.linspace(0.5, 2, 8).view(8, 1, 1, 1) + 1
    for splits in (1, 4):
        ours = split(splits)
        plain = torch.nn.BatchNorm2d(3)
        plain.load_state_dict(ours.state_dict())
        for layout in (torch.contiguous_format, torch.channels_last):
            y = ours(x.contiguous(memory_format=layout))
            for s in range(splits):
                part = torch.nn.BatchNorm2d(3)
                part.load_state_dict(plain.state_dict())
                torch.testing.assert_close(y[s::splits], part(x[s::splits]))

    ours, plain = split(4), torch.nn.BatchNorm2d(3)
    ours(x), plain(x)
    torch.testing.assert_close(ours.running_mean, plain.running_mean)
    assert not torch.allclose(ours.running_var, plain.running_var)
    variances = torch.stack([x[s::4].transpose(0, 1).flatten(1).var(dim=1) for s in range(4)])
    torch.testing.assert_close(ours.running_var, 0.9 + 0.1 * variances.mean(dim=0))
    assert ours.num_batches_tracked == 1
    whole, plain = split(1), torch.nn.BatchNorm2d(3)
    whole(x), plain(x)
    torch.testing.assert_close(whole.running_var, plain.running_var)
    ours.eval()
    assert ours(x[:3]).shape == (3, 3, 5, 5)  # eval takes any number


def test_both_encoders_are_split():
    for splits, kind in ((1, torch.nn.BatchNorm2d), (4, SplitBatchNorm)):
        model = MoCo("resnet18", queue_size=8, splits=splits)
        for encoder in (model.encoder_q, model.encoder_k):
            norms = [layer for layer in encoder.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
            assert len(norms) == 20 and all(type(layer) is kind for layer in norms)
            assert splits == 1 or all(layer.splits == 4 for layer in norms)


# The monitor


def seen(q, k, queue, tau=0.2, first=None):
    """Metrics and problems, with features that have nothing wrong."""
    return monitor(q, k, torch.randn(len(q), 32), queue, tau, first or {})


def test_accuracy_is_strict_and_gap_is_from_equal_logits():
    q, same = torch.eye(4)[:1].expand(6, 4), torch.eye(4)[:, :1].expand(4, 7)
    metrics, _ = seen(q, q, same)
    assert metrics["moco/contrastive_accuracy"] == 0  # a tie is no success
    assert metrics["moco/gap"] == pytest.approx(0, abs=1e-6)
    queue = torch.zeros(4, 7)
    queue[1] = 1
    metrics, _ = seen(q, q, queue)
    assert metrics["moco/contrastive_accuracy"] == 1
    assert metrics["moco/gap"] == pytest.approx(math.log(8) - math.log(1 + 7 * math.exp(-5)), abs=1e-5)
    half = torch.cat([q[:3], torch.eye(4)[1:2].expand(3, 4)])  # these three are near the queue, not their key
    metrics, _ = seen(half, q, queue)
    assert metrics["moco/contrastive_accuracy"] == 0.5
    metrics, _ = seen(torch.full((6, 4), math.nan), q, queue)
    assert metrics["moco/contrastive_accuracy"] == 0 and math.isnan(metrics["moco/gap"])


def test_metrics_are_those_of_q_and_of_centred_h():
    q, k, queue, h = unit(10, 16), unit(10, 16, seed=1), unit(40, 16, seed=2).T, torch.randn(10, 24) + 5
    metrics, _ = monitor(q, k, h, queue, 0.2, {})
    of_q = [metrics[f"monitor/projection_{name}"] for name in ("std", "spread", "rank")]
    assert of_q == pytest.approx([*collapse_metrics(q).values()])
    for name, value in collapse_metrics(h, center=True).items():
        assert metrics[f"monitor/{name}"] == pytest.approx(value)


def test_each_problem_appears_when_it_should():
    """And its tag is one of the metrics, by which the alarm sees whether it mends."""
    q, other, noise = unit(3, 64, 128)
    near, queue = F.normalize(q + 0.1 * noise, dim=1), unit(256, 128, seed=1).T
    turned = F.normalize(torch.ones(128) + 0.01 * q, dim=1)
    flat = torch.linalg.qr(torch.randn(128, 128, generator=torch.Generator().manual_seed(0)))[0]
    low = {rank: F.normalize(q[:, :rank] @ flat[:rank], dim=1) for rank in (2, 8)}
    cases = {
        "healthy": (q, near, queue, {}, {}),
        "as at the first log": (q, near, queue, {"monitor/projection_rank": 60.0}, {}),
        "one way": (turned, turned, queue, {}, {"all q point one way": "monitor/projection_spread"}),
        "rank 2": (low[2], low[2], queue, {}, {"q fills few directions": "monitor/projection_rank"}),
        "random": (q, -q, queue, {}, {"keys are found by chance": "moco/gap"}),
    }
    for name, (q_, k, queue, first, expected) in cases.items():
        metrics, problems = seen(q_, k, queue, 0.2, first)
        assert set(problems.values()) <= set(metrics), name
        found = {words.split(";")[0]: tag for words, tag in problems.items()}
        assert expected.items() <= found.items(), (name, found)
        assert name == "one way" or found == expected, (name, found)

    assert not seen(low[8], low[8], queue)[1]  # enough of 128 directions, but not where there were 100
    (tag,) = seen(low[8], low[8], queue, first={"monitor/projection_rank": 100.0})[1].values()
    assert tag == "monitor/projection_rank"


# The step


class Stop(Exception):
    pass


def small_resnet(arch, stem):
    """In place of resnet: a network of a moment's work on images of 8 x 8."""
    layers = {"flat": torch.nn.Flatten(), "body": torch.nn.Linear(3 * 8 * 8, 8), "fc": torch.nn.Identity()}
    net = torch.nn.Module()
    for name, layer in layers.items():
        net.add_module(name, layer)
    return net, 8


def test_keys_are_shuffled_and_put_back(folder, tmp_path, monkeypatch):
    """The key encoder sees another order than the query encoder; the keys come back in the query's."""
    passes, forward = [], MoCo.forward

    def spy(self, images, keys=False):
        passes.append((images.detach().clone(), keys, self.training))
        return forward(self, images, keys)

    losses, loss, views, augment = [], moco.info_nce, [], moco.augment
    monkeypatch.setattr(MoCo, "forward", spy)
    monkeypatch.setattr(moco, "info_nce", lambda *a: losses.append(a[:3]) or loss(*a))
    monkeypatch.setattr(moco, "augment", lambda *a, **k: views.append(augment(*a, **k)) or views[-1])
    flags = {"data": str(folder), "epochs": 1, "bn_splits": 2, "queue_size": 32}
    moco.train(tiny_args("moco", **flags, run_dir=str(tmp_path / "a")))

    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (moco.MEAN, moco.STD))
    first, second = ((views[0] - mean) / std).unflatten(0, (-1, 2)).unbind(dim=1)
    (query, is_key, _), (key, was_key, training) = passes[:2]
    assert (is_key, was_key, training) == (False, True, True)
    torch.testing.assert_close(query, first)
    order = [next(i for i in range(8) if torch.allclose(image, second[i])) for image in key]
    assert sorted(order) == list(range(8)) and order != list(range(8))

    torch.manual_seed(0)
    model = MoCo("resnet18", queue_size=32, splits=2)
    expected, _ = model(second[order], keys=True)
    torch.testing.assert_close(losses[0][1], expected[torch.tensor(order).argsort()], atol=1e-5, rtol=1e-4)


def test_order_of_a_step(folder, tmp_path, monkeypatch):
    """Query, moving average, key, loss on the queue as it was, enqueue, and no key encoder in the update."""
    calls, queues, models = [], [], []
    forward, update, loss, put = MoCo.forward, moco.momentum_update, moco.info_nce, moco.enqueue
    step = torch.optim.SGD.step

    def spy_forward(self, images, keys=False):
        models.append(self)
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
            assert torch.equal(queue, models[-1].queue)
        return loss(q, k, queue, temperature, *negatives)

    monkeypatch.setattr(MoCo, "forward", spy_forward)
    monkeypatch.setattr(moco, "momentum_update", spy_update)
    monkeypatch.setattr(moco, "info_nce", spy_loss)
    monkeypatch.setattr(moco, "enqueue", lambda *a: calls.append(f"enqueue {len(a[2])}") or put(*a))
    monkeypatch.setattr(torch.optim.SGD, "step", lambda *a, **k: calls.append("step") or step(*a, **k))
    flags = {"data": str(folder), "bn_splits": 2, "queue_size": 96, "momentum": 0.9, "base_lr": 0.3}
    moco.train(tiny_args("moco", **flags, run_dir=str(tmp_path)))
    assert calls == ["query", "average 0.9", "key", "loss 0.2", "enqueue 8", "step"] * 20

    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    assert state["queue_ptr"].item() == 20 * 8 % 96
    torch.testing.assert_close(state["queue"].norm(dim=0), torch.ones(96))
    for number, ((old, keys), (new, _)) in enumerate(zip(queues[:-1], queues[1:], strict=True)):
        at = 8 * number % 96
        torch.testing.assert_close(new[:, at : at + 8], keys.T)
        others = [i for i in range(96) if not at <= i < at + 8]
        assert torch.equal(new[:, others], old[:, others])
    assert all(p.grad is None for p in models[0].encoder_k.parameters())


def test_the_first_key_encoder_is_the_query_encoder(folder, tmp_path, monkeypatch):
    """Also where --init gives the weights; of step 1 the average is no change, up to rounding."""
    flags = {"data": str(folder), "epochs": 0, "run_dir": str(tmp_path / "a"), "seed": 1}
    moco.train(tiny_args("moco", **flags))
    given = torch.load(tmp_path / "a/backbone.pt", weights_only=True)["state_dict"]

    def spy(q, k, m):
        weights = {name: tensor.clone() for name, tensor in k.state_dict().items()}
        update(q, k, m)
        for name, tensor in k.state_dict().items():
            torch.testing.assert_close(tensor, weights[name], atol=1e-6, rtol=1e-6)
            assert name.startswith("fc.") or torch.equal(weights[name], given[name])
        assert all(torch.equal(weights[name], q.state_dict()[name]) for name in weights if "fc." in name)
        raise Stop

    update = moco.momentum_update
    monkeypatch.setattr(moco, "momentum_update", spy)
    more = {"epochs": 1, "seed": 2, "init": str(tmp_path / "a/backbone.pt"), "run_dir": str(tmp_path / "b")}
    # statistics of the query encoder have moved by its forward; the key encoder's have not
    with pytest.raises(Stop):
        moco.train(tiny_args("moco", **flags | more))


@pytest.mark.parametrize("splits, side, blur, radius", [(1, 32, 0.3, 1), (2, 32, 0.0, 0), (1, 224, 0.5, 11)])
def test_recipe_of_a_run(folder, tmp_path, monkeypatch, splits, side, blur, radius):
    """Colours, 3 taps of the blur at 32 px and 23 at 224; what the network gets: normalised and channels
    last, but not where BatchNorm is split; SGD with decay of all parameters of the query encoder."""
    built, given, sgd = [], [], torch.optim.SGD

    def spy(images, u, order, *recipe, **more):
        given.append((tuple(u.shape), sorted(order[:4]), order[4:], *recipe, more))
        return torch.full_like(images, 0.5, dtype=torch.float32)

    def forward(self, images, keys=False):
        given.append(images)
        built.append(self)
        raise Stop

    monkeypatch.setattr(torch.optim, "SGD", lambda *a, **k: built.append(sgd(*a, **k)) or built[-1])
    monkeypatch.setattr(moco, "augment", spy)
    monkeypatch.setattr(MoCo, "forward", forward)
    flags = {"image_size": side, "jitter_chance": 0.7, "blur": blur, "weight_decay": 0.02}
    with pytest.raises(Stop):
        moco.train(tiny_args("moco", data=str(folder), bn_splits=splits, **flags, run_dir=str(tmp_path)))
    looked, images = given
    assert looked == ((16, 9), [0, 1, 2, 3], [4], (0.4, 0.4, 0.4, 0.1), blur, radius, {"chance": 0.7})
    layout = torch.channels_last if splits == 1 else torch.contiguous_format
    assert images.shape == (8, 3, side, side) and images.is_contiguous(memory_format=layout)
    normal = (0.5 - torch.tensor(moco.MEAN)) / torch.tensor(moco.STD)
    torch.testing.assert_close(images, normal.view(3, 1, 1).expand_as(images))
    optimizer, model = built
    (group,) = optimizer.param_groups
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 0.02, False)
    assert {id(p) for p in group["params"]} == {id(p) for p in model.encoder_q.parameters()}


def test_each_step_draws_its_own_numbers_and_orders(folder, tmp_path, monkeypatch):
    """Uniform, for each view its own, of (seed, step) alone; all 24 orders of the colours, gray last; and
    each step shuffles its keys anew."""
    drawn, places, augment, forward = [], [], moco.augment, MoCo.forward

    def spy(images, u, order, *recipe, **more):
        drawn.append((u, order))
        x = augment(images, u, order, *recipe, **more)
        return x + torch.arange(8).repeat_interleave(2).view(16, 1, 1, 1)  # which image it is of

    def spy_forward(self, images, keys=False):
        if keys:
            numbers = (images * torch.tensor(moco.STD).view(3, 1, 1)).mean(dim=(1, 2, 3)).argsort().argsort()
            places.append(tuple(numbers.tolist()))
        return forward(self, images, keys)

    monkeypatch.setattr(moco, "augment", spy)
    monkeypatch.setattr(moco, "resnet", small_resnet)
    monkeypatch.setattr(MoCo, "forward", spy_forward)
    for seed, epochs in ((0, 30), (1, 1)):
        flags = {"image_size": 8, "epochs": epochs, "log_every": 1000, "run_dir": str(tmp_path / str(seed))}
        moco.train(tiny_args("moco", data=str(folder), seed=seed, **flags))
    assert len(drawn) == len(places) == 155
    for i, (u, order) in enumerate(drawn):
        generator = moco.seeded(3, i // 150, i % 150)
        expected = torch.rand(8, 2, 9, generator=generator)
        assert torch.equal(u, expected.flatten(0, 1))
        assert order == [*torch.randperm(4, generator=generator).tolist(), 4]
        assert list(places[i]) == torch.randperm(8, generator=generator).tolist()
    orders = [tuple(order) for _, order in drawn]
    assert len(set(orders)) == 24 and len(set(places)) > 140
    assert orders[:5] != orders[150:] and places[:5] != places[150:]


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("schedule", ["cosine", "steps"])
def test_learning_rates_of_a_run(folder, tmp_path, monkeypatch, schedule, warmup):
    """Oracle 8: 200 epochs, here of one step of all 40 images, at a peak of 0.03."""
    monkeypatch.setattr(moco, "resnet", small_resnet)
    flags = {"data": str(folder), "image_size": 8, "epochs": 200, "batch_size": 40, "log_every": 1}
    flags |= {"base_lr": 0.03 * 256 / 40, "warmup_epochs": warmup, "schedule": schedule}
    moco.train(tiny_args("moco", **flags, run_dir=str(tmp_path), save_minutes=60.0))
    rates = [json.loads(line)["train/lr"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rates[:warmup] == pytest.approx([0.03 * step / 10 for step in range(warmup)])
    if schedule == "steps":
        assert rates[warmup:120] == pytest.approx([0.03] * (120 - warmup))
        assert rates[120:160] == pytest.approx([0.003] * 40) and rates[160:] == pytest.approx([0.0003] * 40)
    else:
        assert rates[100 + warmup // 2] == pytest.approx(0.03 / 2, rel=0.02) and rates[warmup] == 0.03
        assert rates[warmup:] == [
            moco.cosine_schedule(step, 200, warmup, 0.03) for step in range(warmup, 200)
        ]


# Several processes


def fixed_run(data, run_dir):
    """train() for 6 steps of 24 images in float64, BatchNorm in eval mode and with the simplest augmentation;
    returns the images that each pass got, all keys, and the losses here."""
    passes, all_keys, losses, put, loss = [], [], [], moco.enqueue, moco.info_nce

    class Fixed(MoCo):
        def __init__(self, *shape):
            super().__init__(*shape)
            self.to(DOUBLE).eval()
            for module in self.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.running_var.fill_(4.0)

        def forward(self, images, keys=False):
            passes.append(images.clone())
            return super().forward(images, keys)

    def darker(images, u, *_, **__):
        return images.to(DOUBLE) / 255 * u[:, :1, None, None]

    def spy_loss(q, *rest):
        value = loss(q, *rest)
        losses.extend([value.item()] if q.requires_grad else [])
        return value

    with (
        mock.patch("moco.MoCo", Fixed),
        mock.patch("moco.augment", darker),
        mock.patch("moco.enqueue", lambda *a: all_keys.append(a[2].clone()) or put(*a)),
        mock.patch("moco.info_nce", spy_loss),
    ):
        flags = {"batch_size": 24, "epochs": 6, "image_size": 16, "queue_size": 96, "base_lr": 0.3}
        moco.train(tiny_args("moco", data=str(data), bn_splits=2, run_dir=str(run_dir), **flags))
    return passes, all_keys, losses


def test_two_processes_are_one(folder, tmp_path):
    """train() under DDP: images, keys, queue, loss, gradients, weights; keys shuffled across processes."""
    code = f"""
import os, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_moco import fixed_run
torch.save(fixed_run({str(folder)!r}, "two"), "seen" + os.environ["RANK"] + ".pt")
"""
    run_processes(tmp_path, code)
    passes, keys, losses = fixed_run(folder, tmp_path / "one")
    assert len(passes) == 12 and len(keys) == len(losses) == 6 and keys[0].shape == (24, 128)
    parts = [torch.load(tmp_path / f"seen{rank}.pt", weights_only=True) for rank in (0, 1)]
    for i, images in enumerate(passes):
        torch.testing.assert_close(torch.cat([part[0][i] for part in parts]), images, atol=1e-12, rtol=0)
    strangers = [image for image in parts[0][0][1] if not any(torch.equal(image, x) for x in passes[1][:12])]
    assert not strangers  # the second pass is that of keys, in the same shuffled order
    for i, every_k in enumerate(keys):
        assert torch.equal(parts[0][1][i], parts[1][1][i])
        torch.testing.assert_close(parts[0][1][i], every_k, atol=1e-11, rtol=0)
        assert (parts[0][2][i] + parts[1][2][i]) / 2 == pytest.approx(losses[i], abs=1e-10)
    assert abs(parts[0][2][0] - parts[1][2][0]) > 1e-6  # each has the loss of its own queries

    one, two = (torch.load(tmp_path / f"{name}/checkpoint.pt", weights_only=True) for name in ("one", "two"))
    assert two["model"]["queue_ptr"].item() == 6 * 24 % 96
    for name, tensor in one["model"].items():
        torch.testing.assert_close(two["model"][name], tensor, atol=1e-10, rtol=1e-10, msg=name)
    for name, state in one["optimizer"]["state"].items():
        buffer = two["optimizer"]["state"][name]["momentum_buffer"]
        torch.testing.assert_close(buffer, state["momentum_buffer"], atol=1e-10, rtol=1e-10)
    start = MoCo("resnet18").encoder_k.conv1.weight.std()
    moved = one["model"]["encoder_k.conv1.weight"] - one["model"]["encoder_q.conv1.weight"]
    assert moved.abs().max() > 1e-6 * start  # weights have moved, or nothing was compared
    for line, expected in zip(two["recent"], one["recent"], strict=True):
        for tag in expected:
            if tag != "perf/images_per_second":
                assert line[tag] == pytest.approx(expected[tag], abs=1e-6), tag


# Flags


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"queue_size": 30}, "--queue-size 30: give a multiple of --batch-size 8"),
        ({"bn_splits": 8}, "--bn-splits 8: give what cuts 8 images into parts of 2 or more"),
        ({"bn_splits": 3}, "--bn-splits 3: give what cuts 8 images into parts of 2 or more"),
        ({"momentum": 1.5}, "--momentum 1.5: must be at least 0 and at most 1"),
        ({"jitter_chance": 80.0}, "--jitter-chance 80.0: must be at least 0 and at most 1"),
    ],
)
def test_bad_flags(tmp_path, flags, message):
    with pytest.raises(SystemExit) as stop:
        moco.train(tiny_args("moco", run_dir=str(tmp_path / "run"), **flags))
    assert message == stop.value.code and not (tmp_path / "run").exists()


def test_bn_splits_are_those_of_the_whole_batch(folder, tmp_path, monkeypatch):
    """Two processes take half of them, nine at least one each."""
    built = []

    def build(*shape):
        built.append(shape[-1])
        raise Stop

    monkeypatch.setattr(moco, "MoCo", build)
    monkeypatch.setattr(moco, "images_per_pass", lambda args, images, world: 40 // world)
    for world in (1, 2, 4, 5):
        monkeypatch.setattr(moco, "start_processes", lambda *a, n=world: (0, n, torch.device("cpu"), None))
        with pytest.raises(Stop):
            flags = {"batch_size": 40, "bn_splits": 4, "run_dir": str(tmp_path)}
            moco.train(tiny_args("moco", data=str(folder), **flags))
    assert built == [4, 2, 1, 1]


def paper_command():
    words = re.search(r"torchrun --nproc-per-node 8 moco\.py(.*?)(?<!\\)\n", moco.__doc__, re.S)[1]
    return words.replace("\\\n", " ").split()


def test_paper_command_is_the_sheet_s():
    args = tyro.cli(moco.Args, args=paper_command())
    assert (args.image_size, args.arch, args.stem, args.epochs) == (224, "resnet50", "imagenet", 200)
    assert (args.batch_size, args.base_lr, args.weight_decay) == (256, 0.03, 1e-4)
    assert (args.momentum, args.queue_size, args.temperature, args.dim) == (0.999, 65536, 0.2, 128)
    assert (args.mlp, args.schedule, args.blur, args.min_scale) == (True, "cosine", 0.5, 0.2)
    assert (args.jitter, args.jitter_chance) == ((0.4, 0.4, 0.4, 0.1), 0.8)
    assert (args.bn_splits, args.negatives, args.warmup_epochs) == (8, True, 0)
    assert math.isclose(args.base_lr * args.batch_size / 256, 0.03)


def test_v1_is_the_sheet_s():
    """The docstring's line of flags after the paper's command."""
    words = re.search(r"^v1: +the same with (.*?)(?<!\\)\n", moco.__doc__, re.S | re.M)[1]
    v1 = tyro.cli(moco.Args, args=paper_command() + words.replace("\\\n", " ").split())
    v2 = tyro.cli(moco.Args, args=paper_command())
    assert (v1.mlp, v1.temperature, v1.schedule, v1.blur) == (False, 0.07, "steps", 0.0)
    assert (v1.jitter, v1.jitter_chance) == ((0.4, 0.4, 0.4, 0.4), 1.0)
    differ = {name for name, value in vars(v1).items() if value != getattr(v2, name)}
    assert differ == {"mlp", "temperature", "schedule", "blur", "jitter", "jitter_chance"}
