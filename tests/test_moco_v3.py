"""moco_v3.py against its fact sheet's oracles, timm and slow versions."""

import copy
import json
import math
import re

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
import tyro
from conftest import run_processes, tiny_args

import eval_linear
import moco_v3
from moco_v3 import (
    LARS,
    MoCoV3,
    MoCoViT,
    contrastive_metrics,
    cosine_schedule,
    ctr,
    key_logits,
    mlp_head,
    resize_positions,
)


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def total(q0, q1, k0, k1, tau):
    return ctr(q0, k1, tau) + ctr(q1, k0, tau)


# Loss: oracles 1, 2 and 3


@pytest.mark.parametrize(
    "size, tau, expected",
    [(2, 0.2, 0.554518), (4, 0.2, 1.109035), (256, 0.2, 4.436142), (4, 1, 5.545177), (4096, 1, 33.271065)],
)
def test_all_alike(size, tau, expected):
    q = torch.ones(size, 3)
    assert total(q, q, q, q, tau).item() == pytest.approx(expected, abs=2e-5)
    assert ctr(q, q, tau, negatives=False).item() == pytest.approx(-2)
    accuracy, gap = contrastive_metrics(*key_logits(q, q, tau))
    assert accuracy == 0 and gap.item() == pytest.approx(0, abs=1e-5)  # a tie is no success


@pytest.mark.parametrize(
    "size, tau, expected", [(4, 0.2, 0.0160098), (4, 1, 2.974674), (2, 0.2, 0.00537228), (2, 1, 1.253047)]
)
def test_all_apart(size, tau, expected):
    q = torch.eye(size)
    assert total(q, q, q, q, tau).item() == pytest.approx(expected, rel=1e-4)
    assert contrastive_metrics(*key_logits(q, q, tau))[0] == 1


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
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    torch.testing.assert_close(torch.autograd.grad(loss, q)[0], torch.autograd.grad(expected, q)[0])
    ctr(q, k, tau).backward()
    assert k.grad is None
    attraction = ctr(q, k, tau, negatives=False)
    assert attraction.item() == pytest.approx(-2 * F.cosine_similarity(q, k).mean().item(), rel=1e-6)


def test_symmetry_and_lengths():
    q0, q1, k0, k1 = (rows(5, 7, seed=i) for i in range(4))
    loss = total(q0, q1, k0, k1, 0.2).item()
    assert total(q1, q0, k1, k0, 0.2).item() == pytest.approx(loss, rel=1e-6)
    lengths = torch.tensor([0.1, 1, 2, 30, 400])[:, None]
    assert total(lengths * q0, 5 * q1, 3 * k0, lengths * k1, 0.2).item() == pytest.approx(loss, rel=1e-5)
    assert total(q0.bfloat16(), q1, k0, k1, 0.2).dtype == torch.float32


# Schedules: oracles 4 and 5


def test_momentum_and_learning_rate():
    momenta = [cosine_schedule(e, 300, 0, 0.99, 1.0) for e in (0, 75, 150, 225, 300)]
    assert momenta == pytest.approx([0.99, 0.99146447, 0.995, 0.99853553, 1.0], abs=1e-8)
    assert cosine_schedule(150, 300, 0, 0.996, 1.0) == pytest.approx(0.998)
    peak = 1.5e-4 * 4096 / 256
    rates = [cosine_schedule(e, 300, 40, peak) for e in (0, 20, 40, 170, 300)]
    assert rates == pytest.approx([0, 0.0012, 0.0024, 0.0012, 0], abs=1e-10)


def test_lars():
    """Oracle 9: lr 1, then 0.5, outside the momentum buffer."""
    w = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
    optimizer = LARS([w], 1.0, weight_decay=0.1, lr_in_momentum=False)
    for lr, value in ((1.0, (2.99895235, 3.99511099)), (0.5, (2.99795757, 3.99046865))):
        optimizer.param_groups[0]["lr"] = lr
        w.grad = torch.tensor([[0.0, 1.0]])
        optimizer.step()
        torch.testing.assert_close(w.detach(), torch.tensor([value]), atol=2e-6, rtol=0)
    w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    w.grad = torch.tensor([0.0, 1.0])
    LARS([w], 1.0, weight_decay=0.1, lr_in_momentum=False).step()
    torch.testing.assert_close(w.detach(), torch.tensor([3.0, 3.0]))


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
    head = mlp_head((384, 4096, 4096, 256))
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


def official_shapes(arch):
    """{name: shape} of the official files behind "module.", as far as the sheet gives them; all names."""
    if arch == "resnet50":
        with torch.device("meta"):
            net = torchvision.models.resnet50()
        encoder = {k: tuple(v.shape) for k, v in net.state_dict().items() if not k.startswith("fc.")}
        encoder |= {"fc.0.weight": (4096, 2048), "fc.3.weight": (256, 4096)}
        encoder |= {f"fc.1.{part}": (4096,) for part in NORM[:4]} | {"fc.1.num_batches_tracked": ()}
        encoder |= {f"fc.4.{part}": (256,) for part in NORM[2:4]} | {"fc.4.num_batches_tracked": ()}
    else:
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
    if arch != "resnet50":
        predictor |= {f"predictor.4.{p}": (256,) for p in NORM[2:4]} | {"predictor.4.num_batches_tracked": ()}
    both = {f"{net}_encoder.{k}": v for net in ("base", "momentum") for k, v in encoder.items()}
    return both | predictor


@pytest.mark.parametrize("arch, entries", [("resnet50", 663), ("vit_small", 342)])
def test_official_files_load_strictly(arch, entries):
    with torch.device("meta"):
        model = MoCoV3(arch)
        shapes = official_shapes(arch)
        file = {f"module.{name}": torch.empty(shape) for name, shape in shapes.items()}
        assert len(file) == entries
        model.load_state_dict(
            {k.removeprefix("module."): v for k, v in file.items()}, strict=True, assign=True
        )


def test_vit_is_timm_s_also_at_another_size():
    ours = MoCoViT("vit_nano", 32, 8).eval()
    with torch.no_grad():
        for name, p in ours.named_parameters():
            p += 0.05 * rows(*p.shape, seed=len(name)) * (name != "pos_embed")
        for size in ((32, 32), (16, 48)):
            options = {"embed_dim": 128, "depth": 6, "num_heads": 4, "num_classes": 0}
            theirs = timm.models.VisionTransformer(img_size=size, patch_size=8, **options).eval()
            grid = [side // 8 for side in size]
            theirs.load_state_dict(ours.state_dict() | {"pos_embed": resize_positions(ours.pos_embed, *grid)})
            x = rows(3, 3, *size)
            expected = theirs.forward_features(x)[:, 0]
            torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("arch, head, last", [("vit_nano", "head", True), ("resnet18", "fc", False)])
def test_queries_keys_and_gradients(arch, head, last):
    torch.manual_seed(0)
    model = MoCoV3(arch, 32, 8, dim=32, hidden_dim=64, zero_init=False)
    for p, k in zip(model.base_encoder.parameters(), model.momentum_encoder.parameters(), strict=True):
        assert torch.equal(p, k) and not k.requires_grad
    x = rows(16, 3, 32, 32)
    q, h = model(x)
    k, _ = model(x, keys=True)  # with gradient, were there any
    projector = model.base_encoder.get_submodule(head)
    torch.testing.assert_close(q, model.predictor(projector(h)))
    torch.testing.assert_close(k, projector(h))
    assert h.shape == (16, {"head": 128, "fc": 512}[head]) and q.shape == k.shape == (16, 32)
    torch.testing.assert_close(k.mean(dim=0), torch.zeros(32), atol=1e-5, rtol=0)  # BatchNorm at its end
    assert (q.mean(dim=0).abs().max() < 1e-5) == last
    assert all(layer.bias is None for net in (projector, model.predictor) for layer in (net[0], net[3]))
    total(q, q.flip(0), k, k.flip(0), 0.2).backward()
    assert all(p.grad is None for p in model.momentum_encoder.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    if head == "fc":
        model.base_encoder.fc = torch.nn.Identity()
        torch.testing.assert_close(model.base_encoder(x), h)


@pytest.mark.parametrize("arch, last", [("resnet18", "bn2"), ("resnet50", "bn3")])
def test_zero_init(arch, last):
    weights = MoCoV3(arch, hidden_dim=8).base_encoder.named_parameters()
    norms = {name: p for name, p in weights if f"{last}.weight" in name}
    assert len(norms) == {"resnet18": 8, "resnet50": 16}[arch] and all(p.eq(0).all() for p in norms.values())


# Training


@pytest.mark.parametrize("freeze", [True, False])
def test_steps_of_a_run(folder, tmp_path, monkeypatch, freeze):
    """Order of a step, what meets what in the loss, momenta, views, and oracle 10: what moves."""
    calls, views, outputs, models, momenta, numbers = [], [], [], [], [], []
    update, forward, augment = moco_v3.momentum_update, MoCoV3.forward, moco_v3.augment
    step, loss, build = torch.optim.AdamW.step, moco_v3.ctr, moco_v3.MoCoV3

    def spy_augment(images, drawn, *others):
        numbers.append(drawn)
        views.append(augment(images, drawn, *others))
        return views[-1]

    def spy_forward(self, images, keys=False):
        result = forward(self, images, keys)
        view = next(i for i in (0, 1) if torch.equal(images, views[len(views) - 2 + i]))
        calls.append(f"{'k' if keys else 'q'}{view}")
        outputs.append((result[0], calls[-1]))
        return result

    def spy_loss(q, k, temperature, negatives):
        names = [next(name for output, name in outputs if output is tensor) for tensor in (q, k)]
        calls.append(f"{' '.join(names)} {temperature}")
        return loss(q, k, temperature, negatives)

    def spy_update(base, average, m):
        calls.append("average")
        momenta.append(m)
        old, new = (net.state_dict()["head.0.weight"].clone() for net in (average, base))
        update(base, average, m)
        torch.testing.assert_close(average.state_dict()["head.0.weight"], m * old + (1 - m) * new)

    def spy_step(self, *arguments):
        calls.append("step")
        assert [group["weight_decay"] for group in self.param_groups] == [0.1]
        return step(self, *arguments)

    def spy_model(*arguments):
        models.append(build(*arguments))
        models.append(copy.deepcopy(models[0]).state_dict())
        return models[0]

    for name, spy in {"augment": spy_augment, "ctr": spy_loss, "momentum_update": spy_update}.items():
        monkeypatch.setattr(moco_v3, name, spy)
    monkeypatch.setattr(MoCoV3, "forward", spy_forward)
    monkeypatch.setattr(moco_v3, "MoCoV3", spy_model)
    monkeypatch.setattr(torch.optim.AdamW, "step", spy_step)
    flags = {"epochs": 2, "momentum": 0.9, "temperature": 0.2, "blurs": (1.0, 0.0), "solarize": 1.0}
    flags |= {"data": str(folder), "run_dir": str(tmp_path), "freeze_patch_embed": freeze}
    moco_v3.train(tiny_args("moco_v3", **flags, weight_decay=0.1))
    assert calls == ["average", "q0", "q1", "k0", "k1", "q0 k1 0.2", "q1 k0 0.2", "step"] * 10
    assert momenta == pytest.approx([1 - 0.1 * (math.cos(math.pi * k / 10) + 1) / 2 for k in range(10)])
    assert (numbers[0][:, 5] > 0).all() and (numbers[1][:, 5] == 0).all()
    assert (numbers[0][:, 6] == 0).all() and (numbers[1][:, 6] == 1).all()
    state, start = models[0].state_dict(), models[1]
    for name in ("pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "cls_token"):
        base, average = state[f"base_encoder.{name}"], state[f"momentum_encoder.{name}"]
        frozen = name == "pos_embed" or (freeze and name != "cls_token")
        assert torch.equal(base, start[f"base_encoder.{name}"]) == torch.equal(base, average) == frozen, name
    for name in ("base_encoder", "momentum_encoder"):
        assert state[f"{name}.head.1.num_batches_tracked"] == 20  # one pass a view
    statistics = (state[f"{name}_encoder.head.1.running_mean"] for name in ("base", "momentum"))
    assert not torch.equal(*statistics)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["moco_v3/momentum"] for line in lines] == momenta
    peak = moco_v3.Args.base_lr * 8 / 256
    assert [line["train/lr"] for line in lines] == [cosine_schedule(k, 10, 5, peak) for k in range(10)]


def test_optimisers_by_architecture(folder, tmp_path, monkeypatch):
    """ViTs get AdamW, ResNets LARS with the learning rate outside its momentum."""
    built = []
    monkeypatch.setattr(moco_v3, "LARS", lambda *a, **k: built.append(k) or LARS(*a, **k))
    flags = {"data": str(folder), "epochs": 1, "arch": "resnet18", "image_size": 16}
    rates = {"base_lr": 0.3, "weight_decay": 1e-6}
    moco_v3.train(tiny_args("moco_v3", **flags, **rates, run_dir=str(tmp_path / "a")))
    assert built == [{"weight_decay": 1e-6, "lr_in_momentum": False}]
    saved = torch.load(tmp_path / "a/backbone.pt", weights_only=True)
    assert saved["arch_args"] == {"stem": "imagenet"} and saved["feature_dim"] == 512
    missing, unexpected = torchvision.models.resnet18().load_state_dict(saved["state_dict"], strict=False)
    assert missing == ["fc.weight", "fc.bias"] and not unexpected
    init = str(tmp_path / "a/backbone.pt")
    moco_v3.train(tiny_args("moco_v3", **flags, init=init, run_dir=str(tmp_path / "b")))


def test_features_are_eval_linear_s(folder, tmp_path, monkeypatch):
    """Heads travel with the file; positions are kept where the network is untrained."""
    monkeypatch.setitem(moco_v3.MOCO_VITS, "vit_nano", (128, 2, 8))
    models, build = [], moco_v3.MoCoV3
    monkeypatch.setattr(moco_v3, "MoCoV3", lambda *a: models.append(build(*a)) or models[-1])
    moco_v3.train(tiny_args("moco_v3", data=str(folder), epochs=1, run_dir=str(tmp_path)))
    path, images = str(tmp_path / "backbone.pt"), torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    backbone = eval_linear.load_backbone(path).eval()
    expected = models[0].base_encoder.eval()((images.float() / 255 - backbone.mean) / backbone.std)
    torch.testing.assert_close(backbone(images), expected, atol=1e-5, rtol=1e-5)
    untrained = eval_linear.load_backbone(f"random:{path}")
    assert torch.equal(untrained.net.pos_embed, models[0].base_encoder.pos_embed)
    assert untrained.net.blocks[0].attn.num_heads == 8
    assert not torch.allclose(untrained(images), expected, atol=0.1)
    args = tiny_args("moco_v3", data=str(folder), epochs=1, init=path, run_dir=str(tmp_path / "b"))
    monkeypatch.setitem(moco_v3.MOCO_VITS, "vit_nano", (128, 2, 4))
    with pytest.raises(SystemExit, match="1 do not fit this encoder: 8 heads"):
        moco_v3.train(args)


def test_two_processes_are_one(tmp_path, monkeypatch):
    """Keys of both, loss and gradients of train(); BatchNorm in eval form, which one process sees as well."""
    code = """
import os
import torch
import moco_v3
def fixed(self, x):
    return x if self.weight is None else x * self.weight + self.bias
torch.nn.BatchNorm1d.forward = fixed
grads, step = [], torch.optim.AdamW.step
def spy(self, *arguments):
    grads.append([p.grad.clone() for p in self.param_groups[0]["params"]])
    return step(self, *arguments)
torch.optim.AdamW.step = spy
args = moco_v3.Args(
    data="photos", image_size=16, patch_size=8, batch_size=24, epochs=2, warmup_epochs=0.5, hidden_dim=64,
    workers=0, log_every=1, run_dir="run" + os.environ.get("WORLD_SIZE", "1"),
)
moco_v3.train(args)
torch.save(grads[0], f"{args.run_dir}-{os.environ.get('RANK', 0)}.pt")
"""
    (tmp_path / "photos").mkdir()
    for i in range(72):
        moco_v3.demo_image(i)[0].save(tmp_path / "photos" / f"{i:03d}.png")
    monkeypatch.chdir(tmp_path)
    for method in (torch.nn.BatchNorm1d, "forward"), (torch.optim.AdamW, "step"):
        monkeypatch.setattr(*method, getattr(*method))  # put back after the test
    exec(code, {})
    run_processes(tmp_path, code)
    logs = [(tmp_path / f"run{n}/metrics.jsonl").read_text().splitlines() for n in (1, 2)]
    assert len(logs[0]) == len(logs[1]) == 6
    for first, line in (map(json.loads, lines) for lines in zip(*logs, strict=True)):
        tags = "train/loss train/grad_norm moco_v3/gap monitor/projection_rank monitor/effective_rank"
        for tag in tags.split():
            assert line[tag] == pytest.approx(first[tag], rel=1e-3, abs=1e-5), tag
    one, two, other = (torch.load(tmp_path / name) for name in ("run1-0.pt", "run2-0.pt", "run2-1.pt"))
    assert len(one) == 86  # all but the frozen ones
    for a, b, c in zip(one, two, other, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
        assert torch.equal(b, c)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"image_size": 36}, "--image-size 36: give a multiple of --patch-size 8"),
        ({"batch_size": 1}, "--batch-size 1: give a multiple of 1, from 2 to 4096 images"),
        ({"momentum": 1.5}, "--momentum 1.5: must be 0 or more, at most 1"),
    ],
)
def test_bad_flags(tmp_path, flags, message):
    with pytest.raises(SystemExit) as stop:
        moco_v3.train(tiny_args("moco_v3", run_dir=str(tmp_path / "run"), **flags))
    assert message in str(stop.value) and not (tmp_path / "run").exists()


def test_paper_commands_are_the_sheet_s():
    commands = re.findall(
        r"torchrun --nnodes \d --nproc-per-node 8 moco_v3\.py(.*?)(?<!\\)\n", moco_v3.__doc__, re.S
    )
    vit, resnet = (tyro.cli(moco_v3.Args, args=words.replace("\\\n", " ").split()) for words in commands)
    assert (vit.arch, vit.patch_size, vit.epochs, vit.warmup_epochs) == ("vit_small", 16, 300, 40)
    assert (vit.base_lr, vit.weight_decay, vit.temperature, vit.min_scale) == (1.5e-4, 0.1, 0.2, 0.08)
    assert (resnet.arch, resnet.stem, resnet.zero_init) == ("resnet50", "imagenet", True)
    assert (resnet.epochs, resnet.warmup_epochs, resnet.min_scale) == (100, 10, 0.2)
    assert (resnet.base_lr, resnet.weight_decay, resnet.temperature) == (0.6, 1e-6, 1.0)
    for args in (vit, resnet):
        assert (args.image_size, args.batch_size, args.momentum) == (224, 4096, 0.99)
        assert (args.hidden_dim, args.proj_dim, args.freeze_patch_embed) == (4096, 256, True)
        assert (args.jitter, args.blurs, args.solarize) == ((0.4, 0.4, 0.2, 0.1), (1.0, 0.1), 0.2)
