"""moco_v3.py against its fact sheet's oracles, timm and slow versions."""

import json
import math
import re
from pathlib import Path
from unittest import mock

import pytest
import timm
import torch
import torch.nn.functional as F
import tyro
from conftest import run_processes, tiny_args

import eval_linear
import moco_v3
from moco_v3 import (
    MoCoV3,
    MoCoViT,
    collapse_metrics,
    cosine_schedule,
    ctr,
    mlp_head,
    momentum_update,
    monitor,
)

DOUBLE = torch.float64


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def total(q0, q1, k0, k1, tau):
    return ctr(q0, k1, tau) + ctr(q1, k0, tau)


def seen(q, k, tau=0.2, first=None):
    """Metrics and problems of queries of both views, with features that have nothing wrong."""
    return monitor(q, q, k, rows(2 * len(q), 32), tau, first or {})


# Loss: oracles 1, 2 and 3


@pytest.mark.parametrize(
    "size, tau, expected",
    [(2, 0.2, 0.554518), (4, 0.2, 1.109035), (256, 0.2, 4.436142), (4, 1, 5.545177), (4096, 1, 33.271065)],
)
def test_all_alike(size, tau, expected):
    q = torch.ones(size, 3)
    assert total(q, q, q, q, tau).item() == pytest.approx(expected, abs=2e-5)
    assert ctr(q, q, tau, negatives=False).item() == pytest.approx(-2)
    metrics, _ = seen(q, q, tau)
    assert metrics["moco_v3/contrastive_accuracy"] == 0  # a tie is no success
    assert metrics["moco_v3/gap"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    "size, tau, expected", [(4, 0.2, 0.0160098), (4, 1, 2.974674), (2, 0.2, 0.00537228), (2, 1, 1.253047)]
)
def test_all_apart(size, tau, expected):
    q = torch.eye(size)
    assert total(q, q, q, q, tau).item() == pytest.approx(expected, rel=1e-4)
    metrics, _ = seen(q, q, tau)
    assert metrics["moco_v3/contrastive_accuracy"] == 1
    assert metrics["moco_v3/gap"] == pytest.approx(math.log(size) - expected / (4 * tau), abs=1e-5)


def slow_loss(q, k, tau):
    """One direction, image by image."""
    terms = []
    for i in range(len(q)):
        cosines = [q[i] @ key / (q[i].norm() * key.norm()) for key in k]
        exps = [torch.exp(cosine / tau) for cosine in cosines]
        terms.append(-torch.log(exps[i] / sum(exps)))
    return 2 * tau * sum(terms) / len(q)


@pytest.mark.parametrize("tau", [0.2, 1.0])
def test_loss_is_the_slow_one(tau):
    q, k = rows(6, 8).double().requires_grad_(), rows(6, 8, seed=1).double().requires_grad_()
    loss, expected = ctr(q, k, tau), slow_loss(q, k.detach(), tau)
    assert loss.dtype == DOUBLE and loss.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(torch.autograd.grad(loss, q)[0], torch.autograd.grad(expected, q)[0])
    ctr(q, k, tau).backward()
    assert k.grad is None
    attraction = ctr(q, k, tau, negatives=False)
    assert attraction.item() == pytest.approx(-2 * F.cosine_similarity(q, k).mean().item(), rel=1e-12)


def test_symmetry_and_lengths():
    q0, q1, k0, k1 = (rows(5, 7, seed=i) for i in range(4))
    loss = total(q0, q1, k0, k1, 0.2).item()
    assert total(q1, q0, k1, k0, 0.2).item() == pytest.approx(loss, rel=1e-6)
    lengths = torch.tensor([0.1, 1, 2, 30, 400])[:, None]
    assert total(lengths * q0, 5 * q1, 3 * k0, lengths * k1, 0.2).item() == pytest.approx(loss, rel=1e-5)
    low = [x.bfloat16() for x in (q0, q1, k0, k1)]
    assert total(*low, 0.2).dtype == torch.float32
    torch.testing.assert_close(total(*low, 0.2), total(*(x.float() for x in low), 0.2))


# Schedules and the moving average: oracles 4 and 5


def test_momentum_and_learning_rate():
    momenta = [cosine_schedule(e, 300, 0, 0.99, 1.0) for e in (0, 75, 150, 225, 300)]
    assert momenta == pytest.approx([0.99, 0.99146447, 0.995, 0.99853553, 1.0], abs=1e-8)
    assert cosine_schedule(150, 300, 0, 0.996, 1.0) == pytest.approx(0.998)
    peak = 1.5e-4 * 4096 / 256
    rates = [cosine_schedule(e, 300, 40, peak) for e in (0, 20, 40, 170, 300)]
    assert rates == pytest.approx([0, 0.0012, 0.0024, 0.0012, 0], abs=1e-10)


def test_momentum_update_leaves_buffers():
    base, average = mlp_head(2, 3, 4), mlp_head(2, 3, 4)
    before = {name: tensor.clone() for name, tensor in average.state_dict().items()}
    base(rows(8, 2))
    momentum_update(base, average, 0.9)
    parameters = dict(average.named_parameters())
    for name, tensor in average.state_dict().items():
        expected = before[name]
        if name in parameters:
            expected = 0.9 * expected + 0.1 * base.state_dict()[name]
        torch.testing.assert_close(tensor, expected)
    assert len(parameters) == 4 and not torch.equal(base[1].running_mean, average[1].running_mean)


# The model: oracles 6, 7 and 8, official names


def test_positions(monkeypatch):
    monkeypatch.setitem(moco_v3.MOCO_VITS, "vit_small", (384, 0, 12))  # no need of blocks
    positions = MoCoViT("vit_small").pos_embed
    assert positions.shape == (1, 197, 384) and not positions.requires_grad
    assert positions[0, 0].eq(0).all()
    grid = positions[0, 1:].view(14, 14, 384)
    quarters = grid[0, 0].view(4, 96)
    assert all(quarter.eq(value).all() for quarter, value in zip(quarters, (0, 1, 0, 1), strict=True))
    assert grid[0, 1, ::96].tolist() == pytest.approx([0, 1, 0.841471, 0.540302], abs=1e-6)
    assert grid[1, 0, ::96].tolist() == pytest.approx([0.841471, 0.540302, 0, 1], abs=1e-6)
    r, c, i = 3, 5, 7
    angles = [position * 10000 ** (-i / 96) for position in (r, c)]
    expected = [math.sin(angles[0]), math.cos(angles[0]), math.sin(angles[1]), math.cos(angles[1])]
    assert grid[r, c, i::96].tolist() == pytest.approx(expected, abs=1e-6)


def test_initialisation(monkeypatch):
    torch.manual_seed(0)
    assert moco_v3.MOCO_VITS["vit_small"] == (384, 12, 12)
    for arch, sizes in {"vit_small": (384, 2, 12), "vit_base": (768, 0, 12)}.items():  # no need of all blocks
        monkeypatch.setitem(moco_v3.MOCO_VITS, arch, sizes)
    net, bounds = MoCoViT("vit_small"), {"attn.qkv": 0.0883883, "attn.proj": 0.0883883}
    bounds |= {"mlp.fc1": 0.0559017, "mlp.fc2": 0.0559017}
    bounds = {f"blocks.1.{name}": bound for name, bound in bounds.items()} | {"patch_embed.proj": 0.0721688}
    for name, bound in bounds.items():
        layer = net.get_submodule(name)
        assert bound * 0.999 < layer.weight.abs().max() <= bound * 1.000001
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)
        assert layer.bias.eq(0).all()
    assert net.norm.weight.eq(1).all() and net.cls_token.std().item() == pytest.approx(1e-6, rel=0.15)
    assert net.blocks[0].attn.heads == 12
    conv = MoCoViT("vit_base").patch_embed.proj.weight
    assert conv.abs().max().item() == pytest.approx(0.0625, rel=1e-3)
    head = mlp_head(384, 4096, 4096, 256)
    for i, bound in {0: 0.0510310, 3: 0.015625}.items():
        assert bound * 0.999 < head[i].weight.abs().max() <= bound * 1.000001


def count(parameters, trained=False):
    return sum(p.numel() for p in parameters if p.requires_grad or not trained)


def test_parameter_counts():
    with torch.device("meta"):
        small, model, base = MoCoViT("vit_small"), MoCoV3("vit_small"), MoCoViT("vit_base")
    assert count(small.parameters()) == 21665664 and count(small.parameters(), True) == 21294720
    assert count(base.parameters()) == 85798656
    assert count(model.base_encoder.head.parameters()) == 19415040
    assert count(model.predictor.parameters()) == 2105344
    assert count(model.momentum_encoder.parameters(), True) == 0
    frozen = [n for n, p in MoCoViT("vit_nano", 32, 8).named_parameters() if not p.requires_grad]
    assert frozen == ["pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]


NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def official_shapes():
    """{name: shape} of the official ViT-S behind "module.", as the sheet gives them."""
    encoder = {"cls_token": (1, 1, 384), "pos_embed": (1, 197, 384)}
    encoder |= {"patch_embed.proj.weight": (384, 3, 16, 16), "patch_embed.proj.bias": (384,)}
    layers = {"attn.qkv": (1152, 384), "attn.proj": (384, 384), "mlp.fc1": (1536, 384)}
    for i in range(12):
        for name, shape in (layers | {"mlp.fc2": (384, 1536)}).items():
            encoder |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        encoder |= {f"blocks.{i}.norm{n}.{part}": (384,) for n in (1, 2) for part in NORM[:2]}
    encoder |= {"norm.weight": (384,), "norm.bias": (384,)}
    encoder |= {f"head.{i}.weight": s for i, s in ((0, (4096, 384)), (3, (4096, 4096)), (6, (256, 4096)))}
    for i in (1, 4):
        encoder |= {f"head.{i}.{p}": (4096,) for p in NORM[:4]} | {f"head.{i}.num_batches_tracked": ()}
    encoder |= {f"head.7.{part}": (256,) for part in NORM[2:4]} | {"head.7.num_batches_tracked": ()}
    predictor = {"predictor.0.weight": (4096, 256), "predictor.3.weight": (256, 4096)}
    predictor |= {f"predictor.1.{p}": (4096,) for p in NORM[:4]} | {"predictor.1.num_batches_tracked": ()}
    predictor |= {f"predictor.4.{p}": (256,) for p in NORM[2:4]} | {"predictor.4.num_batches_tracked": ()}
    both = {f"{net}_encoder.{k}": v for net in ("base", "momentum") for k, v in encoder.items()}
    return both | predictor


def test_official_files_load_strictly():
    with torch.device("meta"):
        model = MoCoV3("vit_small")
        file = {f"module.{name}": torch.empty(shape) for name, shape in official_shapes().items()}
        assert len(file) == 342
        model.load_state_dict(
            {k.removeprefix("module."): v for k, v in file.items()}, strict=True, assign=True
        )


@pytest.mark.parametrize("size, patch_size", [(32, 8), (48, 16)])
def test_vit_is_timm_s(size, patch_size):
    ours = MoCoViT("vit_nano", size, patch_size).eval()
    options = {"embed_dim": 128, "depth": 6, "num_heads": 4, "num_classes": 0}
    theirs = timm.models.VisionTransformer(img_size=size, patch_size=patch_size, **options).eval()
    with torch.no_grad():
        for name, p in ours.named_parameters():
            p += 0.05 * rows(*p.shape, seed=len(name)) * (name != "pos_embed")
        theirs.load_state_dict(ours.state_dict())
        x = rows(3, 3, size, size)
        expected = theirs.forward_features(x)[:, 0]
        torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=1e-5)


def test_queries_keys_and_gradients():
    torch.manual_seed(0)
    model = MoCoV3("vit_nano", 32, 8, hidden_dim=64, dim=32)
    for p, k in zip(model.base_encoder.parameters(), model.momentum_encoder.parameters(), strict=True):
        assert torch.equal(p, k) and not k.requires_grad
    x = rows(16, 3, 32, 32)
    q, h = model(x)
    k, _ = model(x, keys=True)  # with gradient, were there any
    projector = model.base_encoder.head
    torch.testing.assert_close(q, model.predictor(projector(h)))
    torch.testing.assert_close(k, projector(h))
    assert h.shape == (16, 128) and q.shape == k.shape == (16, 32)
    for z in (q, k):  # BatchNorm at the end of both
        torch.testing.assert_close(z.mean(dim=0), torch.zeros(32), atol=1e-5, rtol=0)
        torch.testing.assert_close(z.var(dim=0, correction=0), torch.ones(32), atol=1e-2, rtol=0)
    layers = {net: [type(layer).__name__ for layer in net] for net in (projector, model.predictor)}
    hidden, last = ["Linear", "BatchNorm1d", "ReLU"], ["Linear", "BatchNorm1d"]
    assert layers == {projector: [*hidden, *hidden, *last], model.predictor: [*hidden, *last]}
    assert all(layer.bias is None for net in layers for layer in net if isinstance(layer, torch.nn.Linear))

    total(q, q.flip(0), k, k.flip(0), 0.2).backward()
    assert all(p.grad is None for p in model.momentum_encoder.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 86 and all(p.grad is not None and p.grad.isfinite().all() for p in trained)


def test_queries_are_float32_where_autocast_is_not():
    """Processes add up their gradient."""
    model, x = MoCoV3("vit_nano", 32, 8, hidden_dim=16), rows(4, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x)[0].dtype == model(x, keys=True)[0].dtype == torch.float32
    assert model.double()(x.double())[0].dtype == DOUBLE


# Training


@pytest.mark.parametrize(
    "side, patch, radius, blurs",
    [(32, 8, 5, (0.3, 0.6)), (224, 16, 5, (1.0, 0.1)), (4, 2, 3, (0.0, 0.5)), (32, 8, 0, (0.0, 0.0))],
)
def test_recipe_of_a_run(folder, tmp_path, monkeypatch, side, patch, radius, blurs):
    """What augment gets: blur by each view's chance, of 2.5 sigma, solarization of the second view alone; and
    what the network gets: one view, normalised."""
    given = []

    class Stop(Exception):
        pass

    def spy(images, u, *recipe):
        given.append((u, *recipe))
        return torch.tensor([0.25, 0.5]).repeat(8).view(-1, 1, 1, 1).expand_as(images).float()

    def forward(self, images):
        given.append(images)
        raise Stop

    monkeypatch.setattr(moco_v3, "augment", spy)
    monkeypatch.setattr(MoCoV3, "forward", forward)
    flags = {"image_size": side, "patch_size": patch, "blurs": blurs, "solarize": 0.7, "seed": 5}
    flags |= {"jitter": (0.1, 0.2, 0.3, 0.4)}
    with pytest.raises(Stop):
        moco_v3.train(tiny_args("moco_v3", data=str(folder), **flags, run_dir=str(tmp_path)))
    (u, order, jitter, blur, blur_radius, solarize), images = given
    assert torch.equal(u, torch.rand(8, 2, 9, generator=moco_v3.seeded(3, 5, 0)).flatten(0, 1))
    assert sorted(order[:4]) == [0, 1, 2, 3] and order[4:] == [4] and jitter == (0.1, 0.2, 0.3, 0.4)
    assert blur.shape == solarize.shape == (16, 1, 1, 1) and blur_radius == radius
    assert blur.flatten().tolist() == pytest.approx([*blurs] * 8)
    assert solarize.flatten().tolist() == pytest.approx([0, 0.7] * 8)
    normal = (0.25 - torch.tensor(moco_v3.MEAN)) / torch.tensor(moco_v3.STD)
    torch.testing.assert_close(images, normal.view(3, 1, 1).expand(8, 3, side, side))


def test_steps_of_a_run(folder, tmp_path, monkeypatch):
    """Order of a step, what meets what in the loss, momenta, rates, decay; and oracle 10: what moves."""
    calls, views, outputs, features, models, starts = [], [], [], [], [], []
    momenta, rates, firsts = [], [], []
    update, forward, augment = moco_v3.momentum_update, MoCoV3.forward, moco_v3.augment
    step, loss, build = torch.optim.AdamW.step, moco_v3.ctr, moco_v3.MoCoV3
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (moco_v3.MEAN, moco_v3.STD))

    def spy_augment(*given):
        images = augment(*given)
        views[:] = [((images - mean) / std)[i::2] for i in (0, 1)]
        outputs.clear()
        return images

    def spy_forward(self, images, keys=False):
        result = forward(self, images, keys)
        assert keys != torch.is_grad_enabled()
        view = next(i for i in (0, 1) if torch.equal(images, views[i]))
        calls.append(f"{'k' if keys else 'q'}{view}")
        outputs.append((result[0], calls[-1]))
        features.append(result[1])
        return result

    def spy_loss(q, k, temperature, negatives=True):
        names = [next(name for output, name in outputs if output is tensor) for tensor in (q, k)]
        calls.append(f"{' '.join(names)} {temperature} {negatives}")
        return loss(q, k, temperature, negatives)

    def spy_update(base, average, m):
        calls.append("average")
        momenta.append(m)
        old, new = (net.state_dict()["head.0.weight"].clone() for net in (average, base))
        update(base, average, m)
        torch.testing.assert_close(average.state_dict()["head.0.weight"], m * old + (1 - m) * new)

    def spy_step(self, *arguments):
        calls.append("step")
        [group] = self.param_groups  # biases, norms and [CLS] decay too, as in the official code
        assert (group["weight_decay"], group["betas"], group["eps"]) == (0.1, (0.9, 0.999), 1e-8)
        assert len(group["params"]) == 86
        rates.append(group["lr"])
        return step(self, *arguments)

    def spy_model(*arguments):
        models.append(build(*arguments))
        starts.append({name: tensor.clone() for name, tensor in models[0].state_dict().items()})
        return models[0]

    def spy_monitor(q0, q1, k1, h, temperature, first):  # its own calls of the loss are none of the step
        names = [next(name for output, name in outputs if output is tensor) for tensor in (q0, q1, k1)]
        assert (*names, temperature) == ("q0", "q1", "k1", 0.3)
        assert torch.equal(h, torch.cat(features[-4:-2])) and not h.requires_grad
        firsts.append(dict(first))
        return {"moco_v3/gap": float(len(firsts))}, {}

    monkeypatch.setattr(moco_v3, "monitor", spy_monitor)
    for name, spy in {"augment": spy_augment, "ctr": spy_loss, "momentum_update": spy_update}.items():
        monkeypatch.setattr(moco_v3, name, spy)
    monkeypatch.setattr(MoCoV3, "forward", spy_forward)
    monkeypatch.setattr(moco_v3, "MoCoV3", spy_model)
    monkeypatch.setattr(torch.optim.AdamW, "step", spy_step)
    flags = {"epochs": 2, "momentum": 0.9, "temperature": 0.3, "negatives": False, "weight_decay": 0.1}
    moco_v3.train(tiny_args("moco_v3", data=str(folder), run_dir=str(tmp_path), **flags))
    pairs = ["q0 k1 0.3 False", "q1 k0 0.3 False"]
    assert calls == ["average", "q0", "q1", "k0", "k1", *pairs, "step"] * 10
    assert momenta == pytest.approx([1 - 0.1 * (math.cos(math.pi * k / 10) + 1) / 2 for k in range(10)])

    state, [start] = models[0].state_dict(), starts
    for name in ("pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "cls_token"):
        base, average = state[f"base_encoder.{name}"], state[f"momentum_encoder.{name}"]
        frozen = name != "cls_token"
        assert torch.equal(base, start[f"base_encoder.{name}"]) == torch.equal(base, average) == frozen, name
    for name in ("base_encoder", "momentum_encoder"):
        assert state[f"{name}.head.1.num_batches_tracked"] == 20  # one pass a view
    statistics = (state[f"{name}_encoder.head.1.running_mean"] for name in ("base", "momentum"))
    assert not torch.equal(*statistics)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    peak = moco_v3.Args.base_lr * 8 / 256
    assert firsts[0] == {} and [first["moco_v3/gap"] for first in firsts[1:]] == [1.0] * 9
    assert rates == [cosine_schedule(k, 10, 5, peak) for k in range(10)]
    assert [line["train/lr"] for line in lines] == rates


def test_the_momentum_encoder_starts_as_the_base_encoder_of_init(folder, tmp_path, monkeypatch):
    """ViT of the file and projector; a run that goes on keeps its own."""
    flags = {"data": str(folder), "batch_size": 20}
    moco_v3.train(tiny_args("moco_v3", **flags, epochs=0, seed=1, run_dir=str(tmp_path / "first")))
    path = tmp_path / "first/backbone.pt"
    args = tiny_args("moco_v3", **flags, epochs=0, init=str(path), run_dir=str(tmp_path / "second"))
    moco_v3.train(args)
    model = torch.load(tmp_path / "second/checkpoint.pt", weights_only=True)["model"]
    momentum = {name[17:]: tensor for name, tensor in model.items() if name.startswith("momentum_encoder.")}
    assert len(momentum) == 94
    assert all(torch.equal(model[f"base_encoder.{name}"], momentum[name]) for name in momentum)
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert all(torch.equal(tensor, momentum[name]) for name, tensor in saved.items())

    path, opened, open_run = tmp_path / "second/checkpoint.pt", [], moco_v3.open_run
    state = torch.load(path, weights_only=True)
    changed = {name: 2 * tensor for name, tensor in state["model"].items()}
    torch.save(state | {"model": changed}, path)

    def spy(args, method, parts, *rest):
        opened.append(parts["model"])
        return open_run(args, method, parts, *rest)

    monkeypatch.setattr(moco_v3, "open_run", spy)
    moco_v3.train(args)
    assert all(torch.equal(tensor, changed[name]) for name, tensor in opened[0].state_dict().items())


def test_features_are_eval_linear_s(folder, tmp_path, monkeypatch):
    """Heads travel with the file; positions are kept where the network is untrained."""
    monkeypatch.setitem(moco_v3.MOCO_VITS, "vit_nano", (128, 2, 8))
    models, build = [], moco_v3.MoCoV3
    monkeypatch.setattr(moco_v3, "MoCoV3", lambda *a: models.append(build(*a)) or models[-1])
    moco_v3.train(tiny_args("moco_v3", data=str(folder), epochs=1, run_dir=str(tmp_path)))
    path, images = str(tmp_path / "backbone.pt"), torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    saved = torch.load(path, weights_only=True)
    shape = {"img_size": 32, "patch_size": 8, "num_classes": 0, "embed_dim": 128, "depth": 2, "num_heads": 8}
    assert (saved["builder"], saved["arch_args"]) == ("timm.VisionTransformer", shape)
    backbone = eval_linear.load_backbone(path).eval()
    expected = models[0].base_encoder.eval()((images.float() / 255 - backbone.mean) / backbone.std)
    torch.testing.assert_close(backbone(images), expected, atol=1e-5, rtol=1e-5)
    untrained = eval_linear.load_backbone(f"random:{path}")
    assert torch.equal(untrained.net.pos_embed, models[0].base_encoder.pos_embed)
    assert untrained.net.blocks[0].attn.num_heads == 8
    assert not torch.allclose(untrained(images), expected, atol=0.1)


# The monitor


def test_metrics_are_those_of_queries_and_of_centred_h():
    q0, q1, k1 = rows(3, 10, 16)
    h = rows(20, 12, seed=1) + 5
    metrics, problems = monitor(q0, q1, k1, h, 0.3, {})
    std, _, rank = collapse_metrics(torch.cat([q0, q1])).values()
    assert metrics["monitor/projection_std"] == pytest.approx(std)
    assert metrics["monitor/projection_rank"] == pytest.approx(rank)
    for name, value in collapse_metrics(h, center=True).items():
        assert metrics[f"monitor/{name}"] == pytest.approx(value)
    cosines = F.cosine_similarity(q0[:, None], k1[None], dim=2)
    hits = (cosines.argmax(dim=1) == torch.arange(10)).float().mean()
    assert metrics["moco_v3/contrastive_accuracy"] == pytest.approx(hits.item())
    entropy = -(cosines / 0.3).log_softmax(dim=1).diagonal().mean()
    assert metrics["moco_v3/gap"] == pytest.approx(math.log(10) - entropy.item(), abs=1e-6)


def test_each_problem_appears_when_it_should():
    """And its tag is one of the metrics, by which the alarm sees whether it mends."""
    q, other = rows(64, 128), rows(64, 128, seed=1)
    flat = torch.linalg.qr(rows(128, 128, seed=2))[0]
    low = {rank: q[:, :rank] @ flat[:rank] for rank in (2, 8)}
    twins = q[:32].repeat_interleave(2, dim=0) + 0.1 * other
    swapped = twins.view(32, 2, 128).flip(1).reshape(64, 128)
    few, chance = {"q fills few directions"}, {"keys are found by chance"}
    cases = {
        "healthy": (q, q, {}, set()),
        "by chance": (q, -q, {}, chance),
        "unrelated": (q, other, {}, chance),
        "rank 2": (low[2], low[2], {}, few),
        "rank 8 of 128": (low[8], low[8], {}, set()),
        "rank 8, and 100 at first": (low[8], low[8], {"monitor/projection_rank": 100.0}, few),
        "as at first": (q, q, {"monitor/projection_rank": 60.0}, set()),
        "the nearest key is a twin's": (twins, swapped, {}, set()),
        "nearly alike, and told apart": (1 + 0.01 * q, 1 + 0.01 * q, {}, few),
        "all alike": (torch.ones(64, 128), torch.ones(64, 128), {}, few | chance),
    }
    for name, (query, key, first, expected) in cases.items():
        metrics, problems = seen(query, key, first=first)
        assert set(problems.values()) <= set(metrics), name
        assert {words.split(";")[0] for words in problems} == expected, (name, problems)


# Several processes


def one_step(data, run_dir):
    """train() for one step of 24 images, in float64, without BatchNorm's coupling and with the simplest
    augmentation."""

    class Fixed(MoCoV3):
        def __init__(self, *shape):
            super().__init__(*shape)
            self.to(DOUBLE).eval()
            for module in self.modules():
                if isinstance(module, torch.nn.BatchNorm1d):
                    module.running_var.fill_(0.25)

    def darker(images, u, *_):
        return images.to(DOUBLE) / 255 * u[:, :1, None, None]

    with mock.patch("moco_v3.MoCoV3", Fixed), mock.patch("moco_v3.augment", darker):
        flags = {"batch_size": 24, "epochs": 1, "image_size": 16, "hidden_dim": 32}
        moco_v3.train(tiny_args("moco_v3", data=str(data), run_dir=str(run_dir), **flags))


def saved(run_dir):
    """Weights, gradients, which are ten times AdamW's first means, and metrics that one_step left."""
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    gradients = [10 * moments["exp_avg"] for moments in state["optimizer"]["state"].values()]
    return state["model"], gradients, state["recent"][0]


def test_two_processes_are_one(folder, tmp_path):
    """Loss, gradient and metrics of train() under DDP, with BatchNorm in eval mode: keys of both are
    candidates, and each process has the loss of the whole batch."""
    code = f"""
import os, torch, moco_v3
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_moco_v3 import one_step
losses, ctr = [], moco_v3.ctr
moco_v3.ctr = lambda *a: losses.append((ctr(*a), len(a[0]), len(a[1]))) or losses[-1][0]
one_step({str(folder)!r}, "two")
torch.save([(loss.item(), *sizes) for loss, *sizes in losses], "loss" + os.environ["RANK"] + ".pt")
"""
    run_processes(tmp_path, code)
    one_step(folder, tmp_path / "one")
    (weights, two, metrics), (initial, one, expected) = saved(tmp_path / "two"), saved(tmp_path / "one")
    losses = [torch.load(tmp_path / f"loss{rank}.pt") for rank in (0, 1)]
    assert losses[0] == losses[1] and all(sizes == [24, 24] for _, *sizes in losses[0])
    assert sum(loss for loss, *_ in losses[0][:2]) == pytest.approx(expected["train/loss"], abs=1e-12)
    assert all(torch.equal(weights[name], initial[name]) for name in initial)
    assert max((a - b).abs().max() for a, b in zip(two, one, strict=True)) < 1e-12
    assert len(one) == 86 and max(g.abs().max() for g in one) > 1e-3
    for tag in expected:
        if tag != "perf/images_per_second":
            assert metrics[tag] == pytest.approx(expected[tag], abs=1e-6), tag


def test_training_is_the_same_in_processes(tmp_path):
    """train() itself for six steps, without BatchNorm's coupling and with all of the augmentation."""
    code = """
import sys, torch, moco_v3
from torch import nn
class Scale(nn.BatchNorm1d):
    def forward(self, x):
        return x if self.weight is None else x * self.weight + self.bias
moco_v3.nn.BatchNorm1d = Scale
args = moco_v3.Args(
    data="photos", image_size=16, batch_size=24, epochs=1, warmup_epochs=0.01, workers=0, log_every=1,
    blurs=(0.9, 0.5), solarize=0.5, base_lr=1e-2, momentum=0.5, hidden_dim=64, run_dir="RUN",
)
moco_v3.train(args)
"""
    (tmp_path / "photos").mkdir()
    for i in range(144):
        moco_v3.demo_image(i)[0].save(tmp_path / "photos" / f"{i:03d}.png")
    curves = {}
    for n in (1, 2):
        run_processes(tmp_path, code.replace("RUN", f"run{n}"), n)
        lines = (tmp_path / f"run{n}/metrics.jsonl").read_text().splitlines()
        curves[n] = [json.loads(line) for line in lines]
    assert len(curves[1]) == len(curves[2]) == 6
    for line, first in zip(curves[2], curves[1], strict=True):
        tags = "train/loss train/lr train/grad_norm moco_v3/gap monitor/projection_rank monitor/feature_std"
        for tag in tags.split():
            assert line[tag] == pytest.approx(first[tag], rel=1e-3, abs=1e-5), tag
    losses = [line["train/loss"] for line in curves[1]]
    assert losses[0] != pytest.approx(losses[-1], rel=1e-2)


# Flags and commands


def test_patches_must_fit(tmp_path):
    with pytest.raises(SystemExit) as stop:
        moco_v3.train(tiny_args("moco_v3", run_dir=str(tmp_path / "run"), image_size=36))
    assert stop.value.code == "--image-size 36: give a multiple of --patch-size 8"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", [{"momentum": 1.5}, {"solarize": 1.5}, {"blurs": (0.5, 2.0)}])
def test_chances_are_at_most_1(tmp_path, flags):
    with pytest.raises(SystemExit, match=rf"^--{[*flags][0]} .*: must be at least 0 and at most 1$"):
        moco_v3.train(tiny_args("moco_v3", run_dir=str(tmp_path / "run"), **flags))


def test_paper_command_is_the_sheet_s():
    [command] = re.findall(
        r"torchrun --nnodes 4 --nproc-per-node 8 moco_v3\.py(.*?)(?<!\\)\n", moco_v3.__doc__, re.S
    )
    args = tyro.cli(moco_v3.Args, args=command.replace("\\\n", " ").split())
    assert (args.arch, args.patch_size, args.epochs, args.warmup_epochs) == ("vit_small", 16, 300, 40)
    assert (args.base_lr, args.weight_decay, args.temperature, args.min_scale) == (1.5e-4, 0.1, 0.2, 0.08)
    assert (args.image_size, args.batch_size, args.momentum) == (224, 4096, 0.99)
    assert (args.hidden_dim, args.negatives) == (4096, True)
    assert (args.jitter, args.blurs, args.solarize) == ((0.4, 0.4, 0.2, 0.1), (1.0, 0.1), 0.2)
    with torch.device("meta"):
        model = MoCoV3(args.arch, args.image_size, args.patch_size, args.hidden_dim)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == official_shapes()
