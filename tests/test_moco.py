"""moco.py against its fact sheet's oracles and lightly."""

import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
import tyro
from conftest import run_processes, tiny_args

import moco
from moco import MoCo, SplitBatchNorm, enqueue, info_nce, moco_schedule, momentum_update, queue_logits


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


# Loss: oracles 1, 2 and 5


ORTHOGONAL = [(4, 1, 0.904832), (4, 0.2, 0.026595), (4096, 0.1, 0.170551)]
ORTHOGONAL += [(65536, 0.07, 0.0401355), (65536, 0.2, 6.092617)]


@pytest.mark.parametrize("size, tau, expected", ORTHOGONAL)
def test_orthogonal_queue(size, tau, expected):
    q, queue = torch.eye(2)[:1], torch.zeros(2, size)
    queue[1] = 1
    assert info_nce(q, q, queue, tau).item() == pytest.approx(expected, abs=2e-4)  # float32, 65,537 terms
    exact = queue_logits(q.double(), q.double(), queue.double()) / tau
    assert F.cross_entropy(exact, torch.tensor([0])).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("size, expected", [(4096, 8.318010), (65536, 11.090370)])
def test_equal_similarities(size, expected):
    q = unit(3, 8)[:1].expand(3, 8)
    logits = queue_logits(q, q, q[:1].T.expand(8, size))
    assert logits.shape == (3, size + 1)
    assert info_nce(q, q, q[:1].T.expand(8, size), 0.2).item() == pytest.approx(expected, abs=1e-5)


def plain_info_nce(query, positive, negatives, temperature):
    """query (B, D), positive (B, D), negatives (B, N, D); the positive stands at index 0."""
    logits = torch.stack([(query * positive).sum(dim=1), *(query[:, None] * negatives).sum(dim=2).T], dim=1)
    return torch.stack([-(row / temperature).log_softmax(dim=0)[0] for row in logits]).mean()


def test_loss_is_the_plain_one():
    q, k, queue = unit(6, 16).requires_grad_(), unit(6, 16, seed=1).requires_grad_(), unit(40, 16, seed=2).T
    loss = info_nce(q, k, queue, 0.07)
    expected = plain_info_nce(q, k.detach(), queue.T[None].expand(6, -1, -1), 0.07)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    theirs = torch.autograd.grad(expected, q)[0]
    loss.backward()
    torch.testing.assert_close(q.grad, theirs, atol=1e-6, rtol=1e-5)
    assert k.grad is None
    attraction = info_nce(q, k, queue, 0.07, negatives=False)
    assert attraction.item() == pytest.approx(-(q * k).sum(dim=1).mean().item() / 0.07, rel=1e-5)


def test_loss_is_lightly_s_with_the_same_queue():
    from lightly.loss import NTXentLoss

    theirs = NTXentLoss(temperature=0.2, memory_bank_size=(64, 16))
    bank, pointer = unit(64, 16, seed=5).T.contiguous(), torch.zeros(1, dtype=torch.long)
    theirs.memory_bank.bank, theirs.memory_bank.bank_ptr = bank.T.contiguous(), pointer.clone()
    for step in range(6):  # past the end of the queue
        q, k = unit(16, 16, seed=10 + step).requires_grad_(), unit(16, 16, seed=20 + step)
        expected = theirs(q, k)
        assert info_nce(q, k, bank, 0.2).item() == pytest.approx(expected.item(), rel=1e-5)
        enqueue(bank, pointer, k)
        torch.testing.assert_close(theirs.memory_bank.bank.T, bank)


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
    assert not queue.requires_grad


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


# Models


def test_official_names():
    heads = {False: ("fc.weight", "fc.bias"), True: ("fc.0.weight", "fc.0.bias", "fc.2.weight", "fc.2.bias")}
    for mlp, fc in heads.items():
        with torch.device("meta"):
            model = MoCo("resnet50", mlp=mlp)
        keys = set(model.state_dict())
        assert len(keys) == (646 if mlp else 642)  # those of the official files
        for encoder in ("encoder_q", "encoder_k"):
            some = *fc, "layer1.0.conv1.weight", "bn1.num_batches_tracked"
            assert {f"{encoder}.{name}" for name in some} < keys
        assert model.queue_ptr.shape == (1,) and model.queue_ptr.dtype == torch.long


def test_encoders():
    torch.manual_seed(0)
    model, x = MoCo("resnet18", queue_size=64).eval(), torch.randn(4, 3, 32, 32)
    q, h = model(x)
    torch.testing.assert_close(q, F.normalize(model.encoder_q(x), dim=1))
    torch.testing.assert_close(q.norm(dim=1), torch.ones(4))
    assert h.shape == (4, 512)
    k, _ = model(x, keys=True)
    torch.testing.assert_close(k, q)  # it starts as a copy
    info_nce(q, k, model.queue, 0.2).backward()
    assert all(p.grad is None and not p.requires_grad for p in model.encoder_k.parameters())
    assert all(p.grad is not None for p in model.encoder_q.parameters())


# Split BatchNorm and shuffling: oracles 6 and 7


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
    assert ours.num_batches_tracked == 1
    whole, plain = split(1), torch.nn.BatchNorm2d(3)
    whole(x), plain(x)
    torch.testing.assert_close(whole.running_var, plain.running_var)
    ours.eval()
    assert ours(x[:3]).shape == (3, 3, 5, 5)  # eval takes any number


def test_keys_are_shuffled_and_put_back(folder, tmp_path, monkeypatch):
    """The key encoder sees another order than the query encoder; the keys come back in the query's."""
    seen, forward = [], moco.MoCo.forward

    def spy(self, images, keys=False):
        seen.append((images.detach().clone(), keys, self.training))
        return forward(self, images, keys)

    losses, loss = [], moco.info_nce
    monkeypatch.setattr(moco.MoCo, "forward", spy)
    monkeypatch.setattr(moco, "info_nce", lambda *a: losses.append(a[:3]) or loss(*a))
    views, augment = [], moco.augment
    monkeypatch.setattr(moco, "augment", lambda *a: views.append(augment(*a)) or views[-1])
    flags = {"data": str(folder), "epochs": 1, "bn_splits": 2, "queue_size": 32}
    moco.train(tiny_args("moco", **flags, run_dir=str(tmp_path / "a")))
    (query, is_key, _), (key, was_key, training) = seen[:2]
    assert (is_key, was_key, training) == (False, True, True)
    torch.testing.assert_close(query, views[0])
    order = [next(i for i in range(8) if torch.equal(image, views[1][i])) for image in key]
    assert sorted(order) == list(range(8)) and order != list(range(8))
    torch.manual_seed(0)
    model = MoCo("resnet18", queue_size=32, splits=2)
    expected, _ = model(views[1][order], keys=True)
    torch.testing.assert_close(losses[0][1], expected[torch.tensor(order).argsort()], atol=1e-5, rtol=1e-4)
    seen.clear(), views.clear()
    moco.train(tiny_args("moco", **flags, shuffle=False, run_dir=str(tmp_path / "b")))
    assert torch.equal(seen[1][0], views[1])


# Training


def test_schedules():
    """Oracle 8."""
    steps = [moco_schedule(epoch, 200, 0.03, "steps") for epoch in (0, 119, 120, 159, 160, 199)]
    assert steps == pytest.approx([0.03, 0.03, 0.003, 0.003, 0.0003, 0.0003])
    assert moco_schedule(100, 200, 0.03, "cosine") == pytest.approx(0.015)
    assert moco_schedule(0, 200, 0.03, "cosine") == 0.03


@pytest.mark.parametrize("symmetric", [False, True])
def test_order_of_a_step(folder, tmp_path, monkeypatch, symmetric):
    """Moving average, keys, loss on the queue as it was, one enqueue; queue and learning rates of a run."""
    calls, queues, update, loss, put = [], [], moco.momentum_update, moco.info_nce, moco.enqueue

    def spy_loss(q, k, queue, temperature, negatives):
        calls.append(f"loss {temperature}")
        queues.append((queue, k))
        return loss(q, k, queue, temperature, negatives)

    monkeypatch.setattr(moco, "momentum_update", lambda *a: calls.append("average") or update(*a))
    monkeypatch.setattr(moco, "info_nce", spy_loss)
    monkeypatch.setattr(moco, "enqueue", lambda *a: calls.append(f"enqueue {len(a[2])}") or put(*a))
    flags = {"data": str(folder), "bn_splits": 2, "queue_size": 96, "symmetric": symmetric, "recipe": "v1"}
    moco.train(tiny_args("moco", **flags, run_dir=str(tmp_path), warmup_epochs=1.0 * symmetric, base_lr=0.3))
    step = ["average", *["loss 0.07"] * (1 + symmetric), f"enqueue {16 if symmetric else 8}"]
    assert calls == step * 20
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    assert state["queue_ptr"].item() == {False: 64, True: 32}[symmetric]
    torch.testing.assert_close(state["queue"].norm(dim=0), torch.ones(96))
    if symmetric:
        assert queues[0][0] is queues[1][0]  # both losses before the enqueue
        (old, k2), (_, k1), (new, _) = queues[:3]
        torch.testing.assert_close(new[:, :16], torch.cat([k1, k2]).T)
    else:
        torch.testing.assert_close(queues[1][0][:, :8], queues[0][1].T)
        assert torch.equal(queues[1][0][:, 8:], queues[0][0][:, 8:])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    lr = 0.3 * 8 / 256
    rates = [lr] * 15 + [lr / 10] * 5  # 4 epochs
    if symmetric:  # with an epoch of warm-up
        rates[:5] = [lr * k / 5 for k in range(5)]
    assert [line["train/lr"] for line in lines] == pytest.approx(rates)


def test_recipes(folder, tmp_path, monkeypatch):
    seen, schedules, temperatures, schedule = [], [], [], moco.moco_schedule

    class Stop(Exception):
        pass

    def spy(images, numbers, order, radius):
        seen.append((numbers, order))
        return images[:, :, :8, :8] / 255

    def spy_loss(q, k, queue, temperature, negatives):
        temperatures.append(temperature)
        raise Stop

    monkeypatch.setattr(moco, "augment", spy)
    monkeypatch.setattr(moco, "info_nce", spy_loss)
    monkeypatch.setattr(moco, "moco_schedule", lambda *a: schedules.append(a[3]) or schedule(*a))
    others = {"mlp": "on", "colours": "v2", "schedule": "cosine", "temperature": 0.3}
    for recipe, flags in (("v1", {}), ("v2", {}), ("v1", others)):
        built = []
        model = moco.MoCo
        monkeypatch.setattr(moco, "MoCo", lambda *a, model=model, built=built: built.append(a) or model(*a))
        with pytest.raises(Stop):
            sizes = {"batch_size": 40, "queue_size": 80, "run_dir": str(tmp_path), "restart": True}
            moco.train(tiny_args("moco", data=str(folder), recipe=recipe, **sizes, **flags))
        monkeypatch.setattr(moco, "MoCo", model)
        numbers, order = seen[-1]
        jittered = (numbers[:, :4] != torch.tensor([1.0, 1, 1, 0])).any(dim=1).float().mean()
        second = recipe == "v2" or flags
        assert built[0][4] == bool(second) and order.index(4) == (4 if second else 0)
        assert (jittered < 1) == bool(second) and (numbers[:, 3].abs().max() <= 0.1) == bool(second)
    assert schedules == ["steps", "cosine", "cosine"] and temperatures == [0.07, 0.2, 0.3]


def test_two_processes_are_one(tmp_path):
    """Keys, queue, loss and gradients; BatchNorm in eval form; keys are shuffled across both processes."""
    code = """
import os
import torch
import moco
moco.SplitBatchNorm.forward = lambda self, x: torch.nn.functional.batch_norm(
    x, self.running_mean, self.running_var, self.weight, self.bias, False)
keys, put = [], moco.enqueue
moco.enqueue = lambda queue, pointer, k: keys.append(k.clone()) or put(queue, pointer, k)
args = moco.Args(
    data="photos", batch_size=24, bn_splits=2, epochs=2, workers=0, log_every=1, run_dir="RUN", queue_size=96,
    base_lr=0.3,
)
moco.train(args)
torch.save(keys, f"RUN-{os.environ['RANK']}.pt")
"""
    (tmp_path / "photos").mkdir()
    for i in range(72):
        moco.demo_image(i)[0].save(tmp_path / "photos" / f"{i:03d}.png")
    runs = []
    for n in (1, 2):
        run_processes(tmp_path, code.replace("RUN", f"run{n}"), n)
        lines = (tmp_path / f"run{n}" / "metrics.jsonl").read_text().splitlines()
        runs.append([json.loads(line) for line in lines])
    one, two, other = (
        torch.load(tmp_path / name, weights_only=True) for name in ("run1-0.pt", "run2-0.pt", "run2-1.pt")
    )
    for a, b, c in zip(one, two, other, strict=True):
        assert a.shape == (24, 128)
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
        assert torch.equal(b, c)
    for line, first in zip(runs[1], runs[0], strict=True):
        for tag in ("train/loss", "train/grad_norm", "moco/gap", "monitor/projection_rank"):
            assert line[tag] == pytest.approx(first[tag], rel=2e-3, abs=1e-4), tag
    one, two = (torch.load(tmp_path / f"run{n}/checkpoint.pt", weights_only=True)["model"] for n in (1, 2))
    torch.testing.assert_close(one["queue"], two["queue"], atol=1e-3, rtol=1e-3)
    assert torch.equal(one["queue_ptr"], two["queue_ptr"])


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"queue_size": 30}, "--queue-size 30: give a multiple of 8, the keys of a step"),
        ({"queue_size": 40, "symmetric": True}, "--queue-size 40: give a multiple of 16, the keys of a step"),
        ({"bn_splits": 8}, "--batch-size 8: give a multiple of 16, at most 4096 images"),
        ({"momentum": 1.5}, "--momentum 1.5: must be 0 or more, at most 1"),
    ],
)
def test_bad_flags(tmp_path, flags, message):
    with pytest.raises(SystemExit) as stop:
        moco.train(tiny_args("moco", run_dir=str(tmp_path / "run"), **flags))
    assert message in str(stop.value) and not (tmp_path / "run").exists()


def test_a_queue_over_half_of_the_data_is_said(folder, tmp_path, capsys):
    flags = {"data": str(folder), "epochs": 1, "bn_splits": 2}
    for size, symmetric, said in ((24, False, True), (16, False, False), (32, True, False), (48, True, True)):
        run = str(tmp_path / f"{size}{symmetric}")
        moco.train(tiny_args("moco", **flags, queue_size=size, symmetric=symmetric, run_dir=run))
        words = f"--queue-size {size} is over half of an epoch"
        assert (words in capsys.readouterr().out) == said


def test_paper_command_is_the_sheet_s():
    command = re.search(r"torchrun --nproc-per-node 8 moco\.py(.*?)(?<!\\)\n", moco.__doc__, re.S)[1]
    args = tyro.cli(moco.Args, args=command.replace("\\\n", " ").split())
    assert (args.image_size, args.arch, args.epochs, args.batch_size) == (224, "resnet50", 200, 256)
    assert (args.base_lr, args.weight_decay, args.momentum, args.queue_size) == (0.03, 1e-4, 0.999, 65536)
    assert (args.recipe, args.blur, args.min_scale, args.bn_splits, args.proj_dim) == ("v2", 0.5, 0.2, 8, 128)
    assert math.isclose(args.base_lr * args.batch_size / 256, 0.03) and args.warmup_epochs == 0
