"""moco_v3.py against its fact sheet's oracles, timm and slow versions."""

import math
import re
from itertools import pairwise
from unittest import mock

import pytest
import timm
import torch
import torch.nn.functional as F
import tyro
from conftest import features_of, in_processes, metrics_of, refused, shaken, tiny_args
from test_ijepa import assert_same_training, recorded

import eval_linear
import moco_v3
from moco_v3 import MoCoV3, MoCoViT, collapse_metrics, cosine_schedule, ctr, mlp_head, monitor


@pytest.fixture(scope="module", autouse=True)
def tiny_vit():
    """A vit_nano of two blocks."""
    with mock.patch.dict(moco_v3.MOCO_VITS, vit_nano=(32, 2, 8)):
        yield


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def total(q0, q1, k0, k1, tau):
    return ctr(q0, k1, tau) + ctr(q1, k0, tau)


def seen(q, k, tau=0.2, first=None):
    """Metrics and problems of queries of both views, with features that have nothing wrong."""
    return monitor(q, q, k, rows(2 * len(q), 32), tau, first or {})


# Loss: oracles 1, 2 and 3

ALIKE = [(2, 0.2, 0.554518), (4, 0.2, 1.109035), (256, 0.2, 4.436142), (4, 1, 5.545177), (4096, 1, 33.271065)]
APART = [(4, 0.2, 0.0160098), (4, 1, 2.974674), (2, 0.2, 0.00537228), (2, 1, 1.253047)]


def test_all_alike_and_all_apart():
    """A tie is no success; the gap is from equal logits."""
    cases = [(torch.ones(size, 3), 0.0, tau, expected) for size, tau, expected in ALIKE]
    cases += [(torch.eye(size), 1.0, tau, expected) for size, tau, expected in APART]
    for q, accuracy, tau, expected in cases:
        assert total(q, q, q, q, tau).item() == pytest.approx(expected, rel=1e-4 if accuracy else 4e-6)
        assert ctr(q, q, tau, negatives=False).item() == pytest.approx(-2)
        metrics, _ = seen(q, q, tau)
        assert metrics["moco_v3/contrastive_accuracy"] == accuracy
        gap = math.log(len(q)) - expected / (4 * tau)
        assert metrics["moco_v3/gap"] == pytest.approx(gap, abs=1e-5)


def test_loss_is_the_slow_one():
    q, k = (rows(6, 8, seed=i).double().requires_grad_() for i in (0, 1))
    for tau in (0.2, 1.0):
        slow = 0.0
        for i in range(6):  # image by image
            exps = [torch.exp(q[i] @ key / (q[i].norm() * key.norm()) / tau) for key in k.detach()]
            slow = slow - 2 * tau / 6 * torch.log(exps[i] / sum(exps))
        loss = ctr(q, k, tau)
        assert loss.dtype == torch.float64 and loss.item() == pytest.approx(slow.item(), rel=1e-12)
        of_q, of_k = torch.autograd.grad(loss, (q, k), allow_unused=True)
        torch.testing.assert_close(of_q, torch.autograd.grad(slow, q)[0])
        assert of_k is None
        attraction = ctr(q, k, tau, negatives=False).item()
        assert attraction == pytest.approx(-2 * F.cosine_similarity(q, k).mean().item(), rel=1e-12)


def test_symmetry_lengths_and_half_precision():
    q0, q1, k0, k1 = (rows(5, 7, seed=i) for i in range(4))
    loss = total(q0, q1, k0, k1, 0.2).item()
    assert total(q1, q0, k1, k0, 0.2).item() == pytest.approx(loss, rel=1e-6)
    lengths = torch.tensor([0.1, 1, 2, 30, 400])[:, None]
    assert total(lengths * q0, 5 * q1, 3 * k0, lengths * k1, 0.2).item() == pytest.approx(loss, rel=1e-5)
    low = [x.bfloat16() for x in (q0, q1, k0, k1)]
    assert total(*low, 0.2).dtype == torch.float32
    torch.testing.assert_close(total(*low, 0.2), total(*(x.float() for x in low), 0.2))


def test_momentum_and_learning_rate():
    """Oracles 4 and 5."""
    momenta = [cosine_schedule(e, 300, 0, 0.99, 1.0) for e in (0, 75, 150, 225, 300)]
    assert momenta == pytest.approx([0.99, 0.99146447, 0.995, 0.99853553, 1.0], abs=1e-8)
    assert cosine_schedule(150, 300, 0, 0.996, 1.0) == pytest.approx(0.998)
    rates = [cosine_schedule(e, 300, 40, 1.5e-4 * 4096 / 256) for e in (0, 20, 40, 170, 300)]
    assert rates == pytest.approx([0, 0.0012, 0.0024, 0.0012, 0], abs=1e-10)


# The model: oracles 6, 7 and 8, official names


def test_positions_and_initialisation(monkeypatch):
    monkeypatch.setitem(moco_v3.MOCO_VITS, "vit_small", (384, 1, 12))  # no need of all blocks
    monkeypatch.setitem(moco_v3.MOCO_VITS, "vit_base", (768, 0, 12))
    net, base, head = MoCoViT("vit_small"), MoCoViT("vit_base"), mlp_head(384, 4096, 4096, 256)
    assert net.pos_embed.shape == (1, 197, 384) and net.pos_embed[0, 0].eq(0).all()
    grid, r, c, i = net.pos_embed[0, 1:].view(14, 14, 384), 3, 5, 7
    assert torch.equal(grid[0, 0], torch.tensor([0.0, 1, 0, 1]).repeat_interleave(96))
    assert grid[0, 1, ::96].tolist() == pytest.approx([0, 1, 0.841471, 0.540302], abs=1e-6)
    assert grid[1, 0, ::96].tolist() == pytest.approx([0.841471, 0.540302, 0, 1], abs=1e-6)
    angles = [position * 10000 ** (-i / 96) for position in (r, c)]
    expected = [wave(angle) for angle in angles for wave in (math.sin, math.cos)]
    assert grid[r, c, i::96].tolist() == pytest.approx(expected, abs=1e-6)

    block, bounds = net.blocks[0], {net.patch_embed.proj: 0.0721688, base.patch_embed.proj: 0.0625}
    bounds |= {block.attn.qkv: 0.0883883, block.attn.proj: 0.0883883}
    bounds |= {block.mlp.fc1: 0.0559017, block.mlp.fc2: 0.0559017, head[0]: 0.0510310, head[3]: 0.015625}
    for layer, bound in bounds.items():
        assert bound * 0.999 < layer.weight.abs().max() <= bound * 1.000001
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)
        assert layer.bias is None or layer.bias.eq(0).all()
    assert net.norm.weight.eq(1).all() and net.cls_token.std().item() == pytest.approx(1e-6, rel=0.15)


def shapes(net):
    return {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}


def official_shapes():
    """{name: shape} of the official ViT-S without "module.": timm's, projectors, predictor."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")

    def head(name, *widths):
        state = {f"{name}.{3 * i}.weight": shape[::-1] for i, shape in enumerate(pairwise(widths))}
        for i, out in enumerate(widths[1:]):
            parts = norm if out == 4096 else norm[2:]  # no weights in the last
            state |= {f"{name}.{3 * i + 1}.{part}": (out,) * (part != norm[4]) for part in parts}
        return state

    encoder = shapes(timm.models.VisionTransformer(embed_dim=384, depth=12, num_classes=0))
    encoder |= head("head", 384, 4096, 4096, 256)
    both = {f"{net}_encoder.{name}": encoder[name] for net in ("base", "momentum") for name in encoder}
    return both | head("predictor", 256, 4096, 256)


def count(net, trained=True):
    return sum(p.numel() for p in net.parameters() if p.requires_grad or not trained)


def test_the_paper_s_command_and_its_network_are_the_sheet_s():
    """Official files load strictly; 12 heads, not the 6 of others."""
    words = r"torchrun --nnodes 4 .*HOST:29500 .\n +moco_v3\.py(.*?)(?<!\\)\n"
    command = re.search(words, moco_v3.__doc__, re.S)[1]
    args = tyro.cli(moco_v3.Args, args=command.replace("\\\n", " ").split())
    expected = {"arch": "vit_small", "patch_size": 16, "epochs": 300, "warmup_epochs": 40, "base_lr": 1.5e-4}
    expected |= {"weight_decay": 0.1, "temperature": 0.2, "min_scale": 0.08, "image_size": 224}
    expected |= {"batch_size": 4096, "momentum": 0.99, "hidden_dim": 4096, "negatives": True}
    expected |= {"jitter": (0.4, 0.4, 0.2, 0.1), "blurs": (1.0, 0.1), "solarize": 0.2}
    assert vars(args) | expected == vars(args)

    with torch.device("meta"):
        model = MoCoV3(args.arch, args.image_size, args.patch_size, args.hidden_dim)
        expected, small, base = official_shapes(), MoCoViT("vit_small"), MoCoViT("vit_base")
    assert shapes(model) == expected and len(expected) == 342
    assert (count(small, trained=False), count(small)) == (21665664, 21294720)
    assert count(base, trained=False) == 85798656 and count(model.base_encoder.head) == 19415040
    assert count(model.predictor) == 2105344 and count(model.momentum_encoder) == 0
    assert small.blocks[0].attn.heads == base.blocks[11].attn.heads == 12
    frozen = [name for name, p in small.named_parameters() if not p.requires_grad]
    assert frozen == ["pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]


@pytest.mark.parametrize("size, patch_size", [(32, 8), (48, 16)])
def test_vit_is_timm_s(generator, size, patch_size):
    ours = shaken(MoCoViT("vit_nano", size, patch_size), generator)
    options = {"embed_dim": 32, "depth": 2, "num_heads": 8, "num_classes": 0}
    theirs = timm.models.VisionTransformer(img_size=size, patch_size=patch_size, **options).eval()
    theirs.load_state_dict(ours.state_dict())
    x = rows(3, 3, size, size)
    with torch.no_grad():
        expected = theirs.forward_features(x)[:, 0]
        torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=1e-5)


def test_queries_keys_and_gradients(generator):
    """Both end in BatchNorm, and are float32 or better where autocast is not."""
    model, x = MoCoV3("vit_nano", 32, 8, hidden_dim=64, dim=32), rows(16, 3, 32, 32)
    base, average = model.base_encoder, model.momentum_encoder
    for p, k in zip(base.parameters(), average.parameters(), strict=True):
        assert torch.equal(p, k) and not k.requires_grad
    shaken(average, generator).train()
    (q, h), (k, _) = model(x), model(x, keys=True)
    torch.testing.assert_close(q, model.predictor(base.head(h)))
    torch.testing.assert_close(k, average.head(average(x)))
    for z in (q, k):
        torch.testing.assert_close(z.mean(dim=0), torch.zeros(32), atol=1e-5, rtol=0)
        torch.testing.assert_close(z.var(dim=0, correction=0), torch.ones(32), atol=1e-2, rtol=0)
    layers = [[type(layer).__name__ for layer in net] for net in (base.head, model.predictor)]
    hidden, last = ["Linear", "BatchNorm1d", "ReLU"], ["Linear", "BatchNorm1d"]
    assert layers == [[*hidden, *hidden, *last], [*hidden, *last]]

    total(q, q.flip(0), k, k.flip(0), 0.2).backward()
    assert all(p.grad is None for p in average.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 38 and all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x)[0].dtype == model(x, keys=True)[0].dtype == torch.float32
    assert model.double()(x.double())[0].dtype == torch.float64


# The monitor


def test_metrics_are_those_of_queries_and_of_centred_h():
    q0, q1, noise = rows(3, 10, 16, seed=4)
    k1, h = q0 + 2 * noise, rows(20, 12, seed=1) + 5
    metrics, _ = monitor(q0, q1, k1, h, 0.3, {})
    std, _, rank = collapse_metrics(torch.cat([q0, q1])).values()
    cosines = F.cosine_similarity(q0[:, None], k1[None], dim=2)
    hits = (cosines.argmax(dim=1) == torch.arange(10)).float().mean().item()
    entropy = -(cosines / 0.3).log_softmax(dim=1).diagonal().mean().item()
    expected = {"moco_v3/contrastive_accuracy": hits, "moco_v3/gap": math.log(10) - entropy}
    expected |= {"monitor/projection_std": std, "monitor/projection_rank": rank}
    of_h = collapse_metrics(h, center=True)
    assert metrics == pytest.approx(expected | {f"monitor/{tag}": value for tag, value in of_h.items()})


def test_each_problem_appears_when_it_should():
    """And its tag is one of the metrics, by which the alarm sees whether it mends."""
    q, other = rows(64, 128), rows(64, 128, seed=1)
    flat = torch.linalg.qr(rows(128, 128, seed=2))[0]
    two, eight = (q[:, :rank] @ flat[:rank] for rank in (2, 8))
    alike = q[:4].repeat_interleave(16, dim=0) + 0.1 * other
    swapped = alike.view(4, 16, 128).roll(1, dims=1).reshape(64, 128)
    few, chance = {"q fills few directions"}, {"keys are found by chance"}
    cases = {
        "healthy": (q, q, {}, set()),
        "by chance": (q, -q, {}, chance),
        "rank 2": (two, two, {}, few),
        "rank 8 of 128": (eight, eight, {}, set()),
        "rank 8, and 100 at first": (eight, eight, {"monitor/projection_rank": 100.0}, few),
        "as at first": (q, q, {"monitor/projection_rank": 60.0}, set()),
        "the nearest key is of a similar image": (alike, swapped, {}, set()),
        "nearly alike, and told apart": (1 + 0.01 * q, 1 + 0.01 * q, {}, few),
        "all alike": (torch.ones(64, 128), torch.ones(64, 128), {}, few | chance),
    }
    for name, (query, key, first, expected) in cases.items():
        metrics, problems = seen(query, key, first=first)
        assert set(problems.values()) <= set(metrics), name
        assert {words.split(";")[0] for words in problems} == expected, (name, problems)


# Training


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """Ten steps; with the modes in which the network ran."""
    flags = {"data": str(folder), "epochs": 2, "blurs": (0.3, 0.6), "solarize": 0.7, "warmup_epochs": 1.4}
    flags |= {"jitter": (0.1, 0.2, 0.3, 0.4), "momentum": 0.9, "temperature": 0.3, "min_scale": 0.6}
    flags |= {"weight_decay": 0.2, "negatives": False}
    modes, names, forward = [], ("augment", "random_crop", "ctr", "monitor"), MoCoV3.forward

    def spy(self, *given, **named):
        modes.append(torch.is_grad_enabled())
        return forward(self, *given, **named)

    with mock.patch.object(MoCoV3, "forward", spy):
        run = recorded("moco_v3", tmp_path_factory.mktemp("runs"), names, **flags)
    run.modes = modes
    return run


def test_recipe_of_a_run(trained):
    """Numbers of seed and step alone, an order of the colours for the batch, gray last; blur by each view's
    chance, solarization of the second view alone."""
    for step, (_, u, order, jitter, blur, radius, solarize) in enumerate(trained.augment):
        generator = moco_v3.seeded(3, 5, step)
        assert torch.equal(u, torch.rand(8, 2, 9, generator=generator).flatten(0, 1))
        assert order == [*torch.randperm(4, generator=generator).tolist(), 4]
        assert jitter == (0.1, 0.2, 0.3, 0.4) and blur.shape == solarize.shape == (16, 1, 1, 1)
        assert blur.flatten().tolist() == pytest.approx([0.3, 0.6] * 8) and radius == 5
        assert solarize.flatten().tolist() == pytest.approx([0, 0.7] * 8)
    assert len(trained.augment) == 10 and trained.random_crop[-1:] == [(32, 0.6)]


def test_radius_of_the_blur(folder):
    """2.5 sigma, within small images."""
    for side, blurs, radius in ((224, (1.0, 0.1), 5), (4, (0.0, 0.5), 3), (32, (0.0, 0.0), 0)):
        flags = {"image_size": side, "patch_size": side // 4, "blurs": blurs, "run_dir": f"run{side}"}
        args = tiny_args("moco_v3", data=str(folder), **flags)
        with mock.patch("moco_v3.augment", side_effect=KeyboardInterrupt) as look, pytest.raises(SystemExit):
            moco_v3.train(args)
        assert look.call_args.args[5] == radius


def test_steps_of_a_run(trained):
    """Views pass one by one; first the average moves, to the weights before the step, then it makes keys;
    which query meets which key, the gradient, and what the monitor gets."""
    model, states = MoCoV3("vit_nano", 32, 8, 64), [state["model"] for state in trained.states]
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (moco_v3.MEAN, moco_v3.STD))
    averaged, gap = [name for name, _ in model.momentum_encoder.named_parameters()], "moco_v3/gap"
    assert trained.modes == [True, True, False, False] * 10
    for k in range(1, 10):
        m, expected = 1 - 0.1 * (math.cos(math.pi * k / 10) + 1) / 2, dict(states[k - 1])
        for name in averaged:
            base, average = (states[k - 1][f"{net}_encoder.{name}"] for net in ("base", "momentum"))
            expected[f"momentum_encoder.{name}"] = average = m * average + (1 - m) * base
            torch.testing.assert_close(states[k][f"momentum_encoder.{name}"], average, atol=1e-7, rtol=1e-6)
        model.load_state_dict(expected)
        views = (moco_v3.augment(*trained.augment[k]) - mean) / std
        (q0, h0), (q1, h1) = (model(view) for view in (views[::2], views[1::2]))
        (k0, _), (k1, _) = (model(view, keys=True) for view in (views[::2], views[1::2]))
        for given, wanted in zip(trained.ctr[3 * k : 3 * k + 2], ((q0, k1), (q1, k0)), strict=True):
            torch.testing.assert_close(given[:2], wanted, atol=1e-4, rtol=1e-4)
            assert given[2:] == (0.3, False) and [z.requires_grad for z in given[:2]] == [True, False]
        *given, temperature, first = trained.monitor[k]
        torch.testing.assert_close(given, [q0, q1, k1, torch.cat([h0, h1])], atol=1e-4, rtol=1e-4)
        assert temperature == 0.3 and first[gap] == metrics_of(trained.folder)[0][gap]
        loss = ctr(q0, k1, 0.3, False) + ctr(q1, k0, 0.3, False)
        gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
        moments = [state["optimizer"]["state"] for state in trained.states[k - 1 : k + 1]]
        for i, gradient in enumerate(gradients):
            before, after = (held[i]["exp_avg"] for held in moments)
            torch.testing.assert_close(after, 0.9 * before + 0.1 * gradient, atol=1e-5, rtol=1e-3)
        for name, tensor in model.state_dict().items():  # statistics of BatchNorm, each view apart
            if "running" in name or "tracked" in name:
                torch.testing.assert_close(states[k][name], tensor)


def test_rates_and_decay_of_a_run(trained):
    """Of all that learns: biases, norms and [CLS] decay, too, as in the official code."""
    rates = [cosine_schedule(k, 10, 7, 4e-3 * 8 / 256) for k in range(10)]
    for rate, state in zip(rates, trained.states, strict=True):
        [group] = state["optimizer"]["param_groups"]
        assert (group["lr"], group["weight_decay"]) == (rate, 0.2) and len(group["params"]) == 38
        assert (group["betas"], group["eps"]) == ((0.9, 0.999), 1e-8)
    assert [line["train/lr"] for line in metrics_of(trained.folder)] == rates


def test_both_encoders_start_from_init_and_patches_and_positions_stay(trained):
    """Oracle 10. A run that goes on keeps its own weights."""
    first, last = (trained.states[i]["model"] for i in (0, -1))  # the rate of the first step is 0
    for net in ("base_encoder", "momentum_encoder"):
        assert all(torch.equal(first[f"{net}.{name}"], tensor) for name, tensor in trained.init.items())
        assert torch.equal(first[f"{net}.head.0.weight"], first["base_encoder.head.0.weight"])
        same = {name for name, tensor in trained.init.items() if torch.equal(last[f"{net}.{name}"], tensor)}
        assert same == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    with mock.patch("moco_v3.open_run", wraps=moco_v3.open_run) as opened:
        moco_v3.train(trained.args)
    model = opened.call_args.args[2]["model"].state_dict()
    assert all(torch.equal(tensor, model[name]) for name, tensor in last.items())


def test_features_are_eval_linear_s(trained):
    """Heads travel with the file; positions are kept where the network is untrained."""
    path, x, model = str(trained.folder / "backbone.pt"), rows(4, 3, 32, 32), MoCoV3("vit_nano", 32, 8, 64)
    model.load_state_dict(trained.states[-1]["model"])
    backbone, untrained = (eval_linear.load_backbone(start + path).eval() for start in ("", "random:"))
    torch.testing.assert_close(features_of(backbone, x), model.base_encoder(x), atol=1e-5, rtol=1e-5)
    assert torch.equal(untrained.net.pos_embed, model.base_encoder.pos_embed)
    assert untrained.net.blocks[0].attn.num_heads == 8


class Scale(torch.nn.BatchNorm1d):
    def forward(self, x):
        return x if self.weight is None else x * self.weight + self.bias


def test_two_processes_are_one(folder, monkeypatch):
    """train() in float64 over five steps, with all of the augmentation, without BatchNorm's coupling: both
    have loss and metrics of the whole batch."""
    augment = moco_v3.augment
    monkeypatch.setattr(moco_v3, "augment", lambda *given: augment(*given).double())
    monkeypatch.setattr(moco_v3, "MoCoV3", lambda *shape: MoCoV3(*shape).double())
    monkeypatch.setattr(moco_v3.nn, "BatchNorm1d", Scale)
    flags = {"data": str(folder), "image_size": 16, "epochs": 1, "warmup_epochs": 0.01, "base_lr": 1e-2}
    flags |= {"blurs": (0.9, 0.5), "solarize": 0.5, "momentum": 0.5}

    def train(n):
        with mock.patch("moco_v3.ctr", wraps=moco_v3.ctr) as loss:
            metrics = moco_v3.train(tiny_args("moco_v3", **flags, run_dir=str(n)))
        assert {len(rows) for call in loss.call_args_list for rows in call.args[:2]} == {8}
        return {tag: value for tag, value in metrics.items() if tag != "perf/images_per_second"}

    in_processes(lambda rank: train(1), 1)
    first, second = in_processes(lambda rank: train(2))
    assert first == second
    assert_same_training("2", "1", 5, 38, 1e-6)


def test_bad_flags(tmp_path):
    refused("moco_v3", "^--image-size 36: give a multiple of --patch-size 8$", image_size=36, epochs=0)
    for name, value in {"momentum": 1.5, "solarize": 1.5, "blurs": (0.5, 2.0)}.items():
        refused("moco_v3", rf"^--{name} .*: must be at least 0 and at most 1$", **{name: value}, epochs=0)
    assert not list(tmp_path.iterdir())
