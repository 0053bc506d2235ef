"""eval_linear.py: the oracles of methods/evaluation.md, slow versions, scikit-learn, timm, torchvision."""

import csv
import json
import math
import os
import re
import runpy
import shutil
import signal
import statistics
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
import tyro
from conftest import ROOT, Forked, in_processes, load, shaken, stopped
from PIL import Image, ImageOps
from torch import nn
from torch.testing import assert_close

import eval_linear
import simclr
from eval_linear import Args, Pictures, accuracy, evaluate, extract_features, knn, linear_probe, load_backbone

DOUBLE, CPU = torch.float64, torch.device("cpu")
SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 0}


def clusters(n, dim=8, classes=3, noise=0.3):
    """Features of well separated classes, of known accuracy; their labels; groups of one each."""
    labels, noise = torch.arange(n) % classes, noise * torch.randn(n, dim, generator=torch.manual_seed(0))
    return 3 * torch.eye(dim)[labels] + noise, labels, torch.arange(n)


def images(n, side=16):
    return torch.randint(0, 256, (n, 3, side, side), generator=torch.Generator().manual_seed(0)).byte()


def first_edition(folder, method, arch, state, side, **arch_args):
    """backbone.pt as the first edition wrote it: users still have such files."""
    os.mkdir(folder)
    info = {"method": method, "arch": arch, "arch_args": arch_args, "image_size": side}
    info |= {"mean": eval_linear.MEAN, "std": eval_linear.STD, "state_dict": state}
    torch.save(info, f"{folder}/backbone.pt")
    return f"{folder}/backbone.pt"


@pytest.fixture
def vit_file():
    torch.manual_seed(0)
    state = timm.models.VisionTransformer(**SMALL).state_dict()
    return first_edition("vit", "mae", "vit_nano", state, 16, patch_size=8, fixed_positions=True)


@pytest.fixture
def resnet_file():
    torch.manual_seed(0)
    state = simclr.resnet("resnet18", "imagenet")[0].state_dict()
    return first_edition("resnet", "simclr", "resnet18", state, 32, stem="imagenet")


def fill(*names):
    """Small images, each second one inverted: classes of even and odd numbers can be told apart."""
    for i, name in enumerate(map(Path, names)):
        name.parent.mkdir(parents=True, exist_ok=True)
        image = simclr.demo_image(i)[0].resize((16, 16))
        (ImageOps.invert(image) if i % 2 else image).save(name)


def class_folders(learn, test):
    """Flags of train/ and val/ with classes a and b."""
    splits = ["train"] * learn + ["val"] * test
    fill(*(f"data/{split}/{'ab'[i % 2]}/{i}.png" for i, split in enumerate(splits)))
    return {"data": "data", "workers": 0}


def flat(n):
    """Flags of a folder without classes and of a csv with a and b."""
    fill(*(f"flat/{i}.png" for i in range(n)))
    Path("two.csv").write_text("\n".join(f"{i}.png,{'ab'[i % 2]}" for i in range(n)))
    return {"data": "flat", "labels_csv": "two.csv", "workers": 0}


def refused(match, backbone="pixels", mode="linear", **flags):
    stopped(lambda: evaluate(Args(backbone, mode, **({"workers": 0} | flags))), match)


# k-NN: oracle 5


def test_knn_votes_with_the_temperature():
    bank = torch.tensor([[0.9, (1 - 0.81) ** 0.5], [0.8, 0.6], [0.79, (1 - 0.79**2) ** 0.5]])
    labels, query = torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.0]])
    cold, warm = (knn(bank, labels, query, (3,), 2, tau)[3][0] for tau in (0.07, 1.0))
    assert cold.argmax() == 0 and (cold[0] / cold[1]).item() == pytest.approx(2.235, abs=2e-3)
    assert warm.argmax() == 1 and (warm[0] / warm[1]).item() == pytest.approx(0.555, abs=1e-3)


def test_knn_is_brute_force_softmax_and_scikit_learn(generator):
    from sklearn.neighbors import KNeighborsClassifier

    bank, queries = (torch.randn(n, 16, generator=generator) for n in (200, 60))
    labels, before = torch.randint(0, 5, (200,), generator=generator), bank.clone()
    scores = knn(bank, labels, queries, (20,), 5)[20]
    assert torch.equal(bank, before)  # it is normalised in place, but not the caller's
    shares = scores / scores.sum(dim=1, keepdim=True)
    similarity, nearest = (F.normalize(queries) @ F.normalize(bank).T).topk(20, dim=1)
    votes = torch.softmax(similarity / 0.07, dim=1)  # DINOv2
    votes = torch.stack([(votes * (labels[nearest] == c)).sum(dim=1) for c in range(5)], dim=1)
    assert_close(shares, votes, atol=1e-5, rtol=1e-5)
    options = {"metric": "cosine", "weights": lambda d: torch.exp((1 - torch.tensor(d)) / 0.07).numpy()}
    theirs = KNeighborsClassifier(20, **options).fit(bank.numpy(), labels.numpy())
    assert (theirs.predict(queries.numpy()) == scores.argmax(dim=1).numpy()).all()

    for memory in (1, 4 * 200 * 7, 2**28):
        in_one_pass = knn(bank, labels, queries, (1, 20, 500), 5, memory=memory)
        assert_close(in_one_pass[20], scores)
        for k in (1, 500):  # more neighbours than rows, too
            assert_close(in_one_pass[k], knn(bank, labels, queries, (k,), 5)[k])
    assert accuracy(knn(bank, labels, bank, (1,), 5)[1], labels)["top1"] == 100
    assert knn(bank, labels, 1e3 * queries, (500,), 5)[500].isfinite().all()


# Logistic regression: oracle 8


def test_logreg_of_two_points():
    x, y = torch.tensor([[1.0], [-1.0]], dtype=DOUBLE), torch.tensor([1, 0])
    weight, bias = eval_linear.fit_logreg(x, y, 0.1, 2)
    assert_close(weight, torch.tensor([[-1.064017, 1.064017]], dtype=DOUBLE), atol=1e-5, rtol=0)
    loss = F.cross_entropy(x @ weight + bias, y).item()
    assert loss == pytest.approx(0.112499, abs=1e-5) and bias.abs().max() < 1e-6
    assert loss + 0.05 * weight.square().sum().item() == pytest.approx(0.225712, abs=1e-5)


def test_logreg_is_scikit_learn_s_optimum_and_choice():
    """On all rows or some, from float32 too; its penalty by five folds of standardised features."""
    from sklearn.linear_model import LogisticRegression

    features, labels, groups = clusters(60, noise=2.0)
    fold = eval_linear.stratified_folds(labels, groups, 5, 0)
    x = (features - features.mean(dim=0)) / features.std(dim=0)

    def theirs(rows, penalty):
        model = LogisticRegression(C=1 / (int(rows.sum()) * penalty), tol=1e-8, max_iter=10000)
        return torch.tensor(model.fit(x[rows], labels[rows]).predict_proba(x)).double().log()

    def score(penalty):
        held = [(theirs(fold != i, penalty)[fold == i], labels[fold == i]) for i in range(5)]
        return sum(eval_linear.held_out_score(*pair) for pair in held)

    for rows, penalty in ((fold >= 0, 1e-3), (fold > 0, 1e-1)):
        weight, bias = eval_linear.fit_logreg(x, labels, penalty, 3, rows.nonzero()[:, 0])
        ours = torch.log_softmax(x.double() @ weight + bias, dim=1)
        assert_close(ours, theirs(rows, penalty), atol=1e-3, rtol=1e-3)
    penalty = max((10.0**-i for i in range(-1, 6)), key=score)
    for scale in (torch.ones(8), torch.logspace(-2, 2, 8)):
        weight, bias, chosen = eval_linear.logreg(features * scale + 5, labels, groups, 3)
        assert chosen["penalty"] == pytest.approx(penalty)
        ours = torch.log_softmax((features * scale + 5) @ weight + bias, dim=1)
        assert_close(ours.double(), theirs(fold >= 0, penalty), atol=1e-2, rtol=1e-2)
    assert eval_linear.logreg(*clusters(60, dim=100, noise=3.0), 3)[2]["penalty"] >= 0.01


# Linear probe


def slow_probe(features, labels, args, rate, train, seed):
    """One layer by torch.optim: logits of the features."""
    layer, norm, losses = nn.Linear(features.shape[1], 3), nn.Identity(), []
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    if args.probe_norm:
        norm = nn.BatchNorm1d(features.shape[1], eps=1e-6, momentum=None, affine=False)
    groups = [{"params": layer.weight, "weight_decay": args.weight_decay}, {"params": layer.bias}]
    sgd = partial(torch.optim.SGD, momentum=0.9, nesterov=args.solver == "nesterov", weight_decay=0)
    adamw = partial(torch.optim.AdamW, betas=(0.9, 0.999), weight_decay=0)
    optimizer = (adamw if args.solver == "adamw" else sgd)(groups)
    steps, generator = math.ceil(len(train) / args.batch_size), torch.Generator().manual_seed(seed)
    peak, total, warmup = rate * len(train) / steps / 256, args.epochs * steps, args.warmup_epochs * steps

    for _ in range(args.epochs):
        order = train[torch.randperm(len(train), generator=generator)]
        for batch in order.split([len(train) // steps + (i < len(train) % steps) for i in range(steps)]):
            falling = 0.5 + 0.5 * math.cos(math.pi * (len(losses) - warmup) / (total - warmup))
            for group in optimizer.param_groups:
                group["lr"] = peak * (len(losses) / warmup if len(losses) < warmup else falling)
            losses.append(F.cross_entropy(layer(norm(features[batch])), labels[batch]))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
    return layer(norm.eval()(features)).detach()


@pytest.mark.parametrize(
    "flags",
    [
        {"batch_size": 64, "epochs": 5},  # a grid of rates, on nine tenths of the labels
        {"rates": (1.0,), "solver": "sgd", "weight_decay": 0.1, "batch_size": 150, "epochs": 4},
        {"rates": (0.5,), "solver": "sgd", "probe_norm": True, "batch_size": 70, "warmup_epochs": 1.0},
        {"rates": (0.1,), "solver": "adamw", "weight_decay": 0.1, "batch_size": 40, "warmup_epochs": 1.5},
    ],
)
def test_linear_probe_is_a_plain_loop(flags, monkeypatch):
    """Oracles 1 and 2: the first loss is ln C; BatchNorm becomes part of the layer. With one rate it learns
    from every label; weights decay, biases do not."""
    args, (features, labels, groups) = Args(**{"epochs": 3} | flags), clusters(150, noise=1.0)
    features = features * torch.logspace(-1, 1, 8) + 1 if args.probe_norm else features
    losses, cross_entropy = [], F.cross_entropy
    with monkeypatch.context() as patch:
        patch.setattr(F, "cross_entropy", lambda *x: losses.append(cross_entropy(*x)) or losses[-1])
        weight, bias, chosen = linear_probe(features, labels, groups, 3, args, seed=3)
    held = eval_linear.stratified_folds(labels, groups, 10, 3) == 0
    train = groups if args.rates else groups[~held]
    logits = slow_probe(features, labels, args, chosen["rate"], train, 3)
    assert losses[0].item() == pytest.approx(math.log(3), abs=1e-6) and accuracy(logits, labels)["top1"] > 85
    assert_close(features @ weight + bias, logits, atol=1e-4, rtol=1e-4)


def test_held_out_labels_pick_the_rate(capsys):
    """One label a class cannot be held out; with few the cross-entropy decides among rates as good."""
    given = clusters(10, dim=16, classes=10, noise=0.0)
    weight, bias, chosen = linear_probe(*given, 10, Args(epochs=30))
    assert accuracy(given[0] @ weight + bias, given[1])["top1"] == 100
    assert chosen["rate"] == pytest.approx(0.3)
    assert "too few labels to hold any out; the middle one, 0.3, is taken" in capsys.readouterr().out
    for rates in ((1e-6, 1.0), (1.0, 1e-6)):
        assert linear_probe(*clusters(100), 3, Args(epochs=5, rates=rates))[2] == {"rate": 1.0}
    logits, right, score = 2 * torch.eye(2), torch.tensor([0, 1]), eval_linear.held_out_score
    assert score(3 * logits, right) > score(logits, right) > 1
    assert score(3 * logits, torch.tensor([0, 0])) < 1 and score(logits * math.nan, right) == -1


def test_augmented_probe_sees_other_crops_in_each_epoch(monkeypatch):
    keys, extract = [], extract_features
    watched = lambda *given, key=None: keys.append(key) or extract(*given, key=key)  # noqa: E731
    monkeypatch.setattr(eval_linear, "extract_features", watched)
    evaluate(Args("pixels", side=8, augment=True, epochs=3, seed=5, **class_folders(8, 2)))
    assert keys == [None, (5, 0), (5, 1), (5, 2)]
    pictures = Pictures([0, 0], 32, eval_linear.random_crop(32, 0.2), 0.2)
    first = pictures[0][1]
    torch.manual_seed(99)
    assert torch.equal(pictures[0][1], first) and not torch.equal(pictures[1][1], first)
    pictures.key = (0, 1)
    assert not torch.equal(pictures[0][1], first)


def test_schedule_of_maes_probe():
    """Oracle 4: peak 6.4, warm-up 10, 90 epochs."""
    rates = [eval_linear.cosine_schedule(epoch, 90, 10, 6.4) for epoch in (5, 10, 50, 90)]
    assert rates == pytest.approx([3.2, 6.4, 3.2, 0.0])
    assert eval_linear.cosine_schedule(45, 90, 0, 1.0) == pytest.approx(0.5)  # MoCo v3


def test_scores_on_a_gpu_that_is_not_there(monkeypatch):
    """Banks, batches, heads and L-BFGS are on the device; what comes back is not, and is the CPU's."""
    import pretend_gpu

    given, devices = clusters(12, dim=3, noise=1.5), {}
    args = Args(epochs=2, batch_size=20, rates=(0.1, 1.0), probe_norm=True)

    def scores(device):
        votes = knn(*given[:2], given[0], (1, 5), 3, device=device).values()
        probe = linear_probe(*given, 3, args, device=device)
        return [*votes, *probe, *eval_linear.logreg(*given, 3, device=device)]

    def watch(owner, name, place):
        call = getattr(owner, name)
        seen = lambda *given, **k: devices.setdefault(name, given[place].device.type) and call(*given, **k)  # noqa: E731
        monkeypatch.setattr(owner, name, seen)

    expected = scores(CPU)
    watch(torch.Tensor, "topk", 0), watch(nn.Linear, "forward", 1), watch(eval_linear, "fit_logreg", 0)
    with pretend_gpu.PretendGPU():
        found = scores(torch.device("cuda"))
        assert {x.device.type for x in found if isinstance(x, torch.Tensor)} == {"cpu"}
    assert devices == dict.fromkeys(("topk", "forward", "fit_logreg"), "cuda")
    assert_close(found, expected)


# Features and backbones


def test_pictures_without_augmentation():
    """Above 32 pixels the middle 87.5 % of each side, resized; at most 32 the whole."""
    image = Image.frombytes("RGB", (128, 160), torch.arange(128 * 160 * 3).byte().numpy().tobytes())
    image = image.resize((16, 20)).resize((128, 160))  # smooth
    image.save("a.png")
    for side, cut in ((64, 8), (32, 0)):
        box = cut, 16 + cut, 128 - cut, 144 - cut  # of the square in the middle
        slow = image.resize((side, side), Image.BICUBIC, box=box)
        found = Pictures(["a.png"], side)[0][1]
        assert torch.equal(found, torchvision.transforms.v2.functional.pil_to_tensor(slow))


def test_features_that_are_not_finite_are_refused(vit_file):
    """Infinite ones, of float16, as well as NaN; of images that cannot be read NaN stays."""
    backbone, data = load_backbone(vit_file), class_folders(8, 2)
    features = extract_features(backbone, Pictures([0, "nowhere.png", 2], 16))
    assert features.isnan().any(dim=1).tolist() == [False, True, False]
    for value in (math.inf, -math.inf, math.nan):
        backbone.net.norm.bias.data[0] = value
        stopped(lambda: extract_features(backbone, Pictures([0], 16)), "its features are not finite")
    torch.save(load(vit_file) | {"state_dict": backbone.net.state_dict()}, vit_file)
    for mode in ("knn", "logreg", "features"):
        refused("mae vit_nano cls: its features are not finite; give --amp off", vit_file, mode, **data)
    assert [path.name for path in Path("vit").iterdir()] == ["backbone.pt"]


def test_positions_of_another_size(vit_file):
    """Oracle 9: of the stored size they are the file's; constants stay, and [CLS] keeps its own."""
    file = load(vit_file)
    stored = file["state_dict"]["pos_embed"]
    assert torch.equal(load_backbone(vit_file).net.pos_embed, stored)
    larger = load_backbone(vit_file, side=24).net.pos_embed
    assert larger.shape == (1, 10, 32) and torch.equal(larger[:, 0], stored[:, 0])
    file["state_dict"]["pos_embed"] = torch.full_like(stored, 0.3)
    torch.save(file, vit_file)
    constant = load_backbone(vit_file, side=24).net.pos_embed
    assert_close(constant, torch.full_like(constant, 0.3))


GIANT = {"init_values": 1e-5, "mlp_ratio": 2.66667 * 2, "mlp_layer": "SwiGLUPacked", "act_layer": "silu"}
BEIT = {"global_pool": "token", "use_abs_pos_emb": False, "use_shared_rel_pos_bias": True, "init_values": 0.1}
CLIP = {"pre_norm": True, "act_layer": "quick_gelu", "norm_eps": 1e-5}
IJEPA = {"class_token": False, "global_pool": "avg", "fc_norm": False}
REGISTERS = {"init_values": 0.5, "reg_tokens": 4, "no_embed_class": True}
TABLE = {  # DESIGN 6: the exact calls
    "dino": ("timm.VisionTransformer", SMALL, "cls"),
    "ijepa": ("timm.VisionTransformer", SMALL | IJEPA, "mean"),
    "dinov2": ("timm.VisionTransformer", SMALL | {"init_values": 0.5}, "cls"),
    "registers": ("timm.VisionTransformer", SMALL | REGISTERS, "cls"),
    "clip": ("timm.VisionTransformer", SMALL | CLIP, "cls"),
    "giant": ("timm.VisionTransformer", SMALL | GIANT, "cls"),
    "beit": ("timm.Beit", SMALL | BEIT, "mean"),
    "resnet": ("torchvision.resnet", {"arch": "resnet18", "stem": "imagenet"}, "pooled"),
    "small stem": ("torchvision.resnet", {"arch": "resnet18", "stem": "cifar"}, "pooled"),
}


def network_file(name):
    """backbone.pt of a network of TABLE, in which every part counts; and the network."""
    builder, options, _ = TABLE[name]
    net = shaken(eval_linear.build_network(builder, options), torch.Generator().manual_seed(0), 0.02)
    file = {"method": name, "arch": "vit_nano", "image_size": 16, "mean": (0.1, 0.2, 0.3)}
    file |= {"std": (0.4, 0.5, 0.6), "builder": builder, "arch_args": options}
    torch.save(file | {"state_dict": net.state_dict()}, "new.pt")
    return net


@pytest.mark.parametrize("name", TABLE)
def test_features_of_each_kind_of_backbone_file(name):
    """[CLS], mean and both, of one block or several, at any side, by the library's own network of the same
    weights, loaded strictly; what does not fit is refused."""
    net, feature, inner = network_file(name), TABLE[name][2], []
    mean, std = (torch.tensor(load("new.pt")[name]).view(3, 1, 1) for name in ("mean", "std"))
    kinds = ["auto", "mean", "both"] if feature == "cls" else ["auto"]
    for block in (net.blocks[1], net.blocks[2]) if feature != "pooled" else ():
        block.register_forward_hook(lambda *given: inner.append(net.norm(given[2])))
    for side in (16, 24):
        if side == 24 and feature != "pooled":
            net.set_input_size(24)
        with torch.no_grad():
            inner.clear()
            pooled = net((images(2, side) / 255 - mean) / std)
            parts = [(x[:, 0], x[:, net.num_prefix_tokens :].mean(dim=1)) for x in inner]
            for kind in kinds:
                backbone = load_backbone("new.pt", 0, side, kind, (-1,) if feature == "pooled" else (1, -1))
                takes = {"cls": [0], "mean": [1], "both": [0, 1]}.get(backbone.feature)
                expected = torch.cat([part[i] for part in parts for i in takes], dim=1) if parts else pooled
                assert_close(backbone(images(2, side)), expected, atol=1e-4, rtol=1e-4)
                assert (backbone.side, backbone.dim) == (side, expected.shape[1])
        assert load_backbone("new.pt").feature == feature

    file = load("new.pt")
    last = [key for key in file["state_dict"] if key.endswith(".bias")][-1]
    some = {key: value for key, value in file["state_dict"].items() if key != last}
    for wrong in (some, file["state_dict"] | {f"{last}2": torch.ones(1)}):
        torch.save(file | {"state_dict": wrong}, "new.pt")
        stopped(lambda: load_backbone("new.pt"), f"cannot be loaded .*{last}")


def test_untrained_vits_start_as_in_timm(vit_file):
    """...but for MAE's xavier; sin-cos positions are a part of the network, and are not tuned either."""
    learnt, again = load_backbone(vit_file), load_backbone(f"random:{vit_file}", seed=1)
    assert torch.equal(learnt.net.pos_embed, again.net.pos_embed)
    for weight in (again.net.blocks[0].attn.qkv.weight, again.net.patch_embed.proj.weight.flatten(1)):
        bound = (6 / sum(weight.shape)) ** 0.5  # of the fused qkv, and of the patches as one matrix
        assert 0.98 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
    for name in ("dinov2", "clip", "beit"):
        network_file(name)
        found = load_backbone("random:new.pt", seed=3).net.state_dict()
        torch.manual_seed(3)
        assert_close(found, eval_linear.build_network(*TABLE[name][:2]).state_dict(), atol=0, rtol=0)
    for method in ("mae", "ijepa", "moco_v3", "dino"):
        torch.save(load(vit_file) | {"method": method}, "new.pt")
        tuned = load_backbone("new.pt", tunes=True).net
        assert tuned.pos_embed.requires_grad and tuned.blocks[0].attn.qkv.weight.requires_grad
        assert not load_backbone("new.pt").net.pos_embed.requires_grad or method == "dino"


def test_untrained_resnets_take_statistics_of_images_for_learning(resnet_file, monkeypatch):
    """BatchNorm's means and variances, of no test image; weights as drawn, and the usual momentum again."""
    backbone, fresh = (load_backbone(f"random:{resnet_file}", seed=2) for _ in range(2))
    eval_linear.settle_statistics(backbone, [*range(20)], "cpu")
    state, before = backbone.net.state_dict(), fresh.net.state_dict()
    for name, tensor in state.items():
        assert torch.equal(tensor, before[name]) != ("running" in name or "num_batches" in name), name
    pixels = torch.stack([image for _, image, _ in map(Pictures([*range(20)], 32).__getitem__, range(20))])
    with torch.no_grad():
        maps = backbone.net.conv1((pixels / 255 - backbone.mean) / backbone.std)
    assert_close(state["bn1.running_mean"], maps.mean(dim=(0, 2, 3)), atol=1e-4, rtol=1e-4)
    assert_close(state["bn1.running_var"], maps.var(dim=(0, 2, 3)), atol=1e-4, rtol=1e-4)
    assert backbone.net.bn1.momentum == 0.1

    seen, data = [], class_folders(16, 8)
    monkeypatch.setattr(eval_linear, "settle_statistics", lambda net, items, device: seen.append(items))
    for path in (f"random:{resnet_file}", resnet_file):  # of a trained one, nothing
        evaluate(Args(path, "knn", k=(1,), **data))
    assert len(seen) == 1 and len(seen[0]) == 16 and all("/train/" in item for item in seen[0])


def test_a_frozen_backbone_does_not_change_and_random_is_another(resnet_file):
    """Oracle 10: not a bit of buffers either; and where they do move it is noticed."""
    backbone, pictures = load_backbone(resnet_file), Pictures([*range(9)], 32)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    extract_features(backbone.train(), pictures)
    assert_close(backbone.state_dict(), before, atol=0, rtol=0)
    others = [load_backbone(f"random:{resnet_file}", seed) for seed in (1, 2)]
    assert len({eval_linear.fingerprint(net) for net in (backbone, *others)}) == 3
    backbone.eval = backbone.train
    with pytest.raises(RuntimeError, match="the frozen backbone has changed"):
        extract_features(backbone, pictures)


def test_published_networks_of_torchvision_and_timm(monkeypatch):
    """Their last linear layer is off, their side and statistics are their own; no download in this test."""
    get_model, create_model = torchvision.models.get_model, timm.create_model
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights: get_model(name))
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **k: create_model(name, **k))
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (eval_linear.MEAN, eval_linear.STD))
    for name, dim, layer in (("resnet18", 512, "fc"), ("mobilenet_v3_small", 1024, "classifier.3")):
        backbone = load_backbone(name)
        torch.manual_seed(0)
        theirs = get_model(name).eval()
        theirs.set_submodule(layer, nn.Identity())
        with torch.no_grad():
            expected = theirs((images(1, 224) / 255 - mean) / std)
            assert_close(backbone(images(1, 224)), expected, atol=1e-4, rtol=1e-4)
        assert (backbone.dim, backbone.side, backbone.name) == (dim, 224, name)
    backbone = load_backbone("timm:vit_tiny_patch16_224", side=64)
    assert (backbone.dim, backbone.side) == (192, 64) and backbone.mean.flatten().tolist() == [0.5] * 3
    for name in ("timm:vit_nonsense", "squeezenet1_0"):
        stopped(lambda name=name: load_backbone(name), f"--backbone {name}: cannot be loaded")
    assert load_backbone("pixels", side=8).dim == 192


# Fine-tuning: oracle 3


def test_tuned_vits_pool_as_timm(vit_file):
    """MAE: the mean of the patch tokens, with a norm of its own; drop path rises to the last block."""
    backbone = load_backbone(vit_file, tunes=True, drop_path=0.1)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in backbone.net.blocks]
    assert rates == pytest.approx([0, 0.05, 0.1])
    theirs = timm.models.VisionTransformer(**SMALL | {"global_pool": "avg"}).eval()
    missing, unexpected = theirs.load_state_dict(load(vit_file)["state_dict"], strict=False)
    assert missing == ["fc_norm.weight", "fc_norm.bias"] and unexpected == ["norm.weight", "norm.bias"]
    with torch.no_grad():
        expected = theirs((images(4) / 255 - backbone.mean) / backbone.std)
        assert_close(backbone(images(4)), expected, atol=1e-5, rtol=1e-5)
    assert load_backbone(vit_file, tunes=True, feature="cls").net.global_pool == "token"
    stopped(lambda: load_backbone(vit_file, tunes=True, feature="both"), "--feature both")


def classifier(net):
    return eval_linear.Classifier(eval_linear.Backbone(net, 64, (0.5,) * 3, (0.5,) * 3, "net"), 2)


@pytest.mark.parametrize("decay, lowest", [(0.75, 0.0237573), (0.65, 0.0036972)])
def test_layer_decay_of_a_vit(decay, lowest):
    net = timm.models.VisionTransformer(img_size=64, patch_size=32, embed_dim=8, num_heads=2, num_classes=0)
    model = classifier(net)
    groups = eval_linear.layer_groups(model, 0.05, decay)
    params = [p for group in groups for p in group["params"]]
    assert len(groups) == 28 and len(params) == len({id(p) for p in params}) == len([*model.parameters()])
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    for at_input in (net.pos_embed, net.cls_token, net.patch_embed.proj.weight):
        assert scale[id(at_input)] == pytest.approx(lowest, rel=1e-5)
    assert scale[id(net.blocks[0].attn.qkv.weight)] == pytest.approx(lowest / decay, rel=1e-5)
    assert scale[id(net.blocks[11].attn.qkv.weight)] == pytest.approx(decay)
    assert scale[id(net.norm.weight)] == scale[id(model.head.weight)] == 1
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert id(net.blocks[0].mlp.fc1.weight) in decayed and id(net.patch_embed.proj.weight) in decayed
    assert not {id(net.pos_embed), id(net.cls_token), id(net.blocks[0].mlp.fc1.bias)} & decayed


def test_layer_decay_without_cls():
    """I-JEPA's ViT begins with its positions, a table that only fine-tuning moves."""
    shape = {"img_size": 64, "patch_size": 8, "embed_dim": 8, "depth": 3, "num_heads": 2, "num_classes": 0}
    model = classifier(timm.models.VisionTransformer(**shape, class_token=False, global_pool="avg"))
    groups = eval_linear.layer_groups(model, 0.05, 0.5)
    (lowest,) = [
        group["lr_scale"] for group in groups for p in group["params"] if p is model.backbone.net.pos_embed
    ]
    assert lowest == 0.5**4


def test_layer_decay_of_a_resnet_and_of_networks_without_layers():
    net, _ = simclr.resnet("resnet18", "imagenet")
    groups = eval_linear.layer_groups(classifier(net), 0.0, 0.5)
    assert sorted({group["lr_scale"] for group in groups}) == [0.5**i for i in range(5, -1, -1)]
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert scale[id(net.conv1.weight)] == 0.5**5 and scale[id(net.layer4[0].bn1.weight)] == 0.5
    # the latter has stages, but a stem of another name
    for net in (nn.Sequential(nn.Flatten(), nn.Linear(3 * 64**2, 2)), timm.create_model("test_convnext")):
        model = classifier(net)
        stopped(lambda model=model: eval_linear.layer_groups(model, 0.0, 0.7), "--layer-decay 0.7: finds no")
        assert {group["lr_scale"] for group in eval_linear.layer_groups(model, 0.0, 1.0)} == {1.0}


class Seen(Pictures):
    """Pictures without crops, which hang on nothing else, and with what key each was asked for."""

    keys = []

    def __getitem__(self, index):
        self.keys.append(self.key)
        return super().__getitem__(index)


TUNING = {"solver": "sgd", "base_lr": 1.0, "weight_decay": 0.3, "layer_decay": 0.5, "warmup_epochs": 1.0}
TUNING |= {"label_smoothing": 0.1, "batch_size": 8, "epochs": 4, "workers": 0}


def test_finetune_is_a_plain_loop(vit_file, monkeypatch):
    """Warm-up, cosine, rates by layer, decay of matrices alone and smoothing, by hand; mostly in float64."""
    labels, rates, sgd, pictures = torch.arange(24) % 2, [], torch.optim.SGD.step, Seen([*range(24)], 16)

    def watched(self, *rest):
        rates.append([group["lr"] for group in self.param_groups])
        return sgd(self, *rest)

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    torch.set_default_dtype(DOUBLE)
    try:
        backbone, slow = (load_backbone(vit_file, tunes=True) for _ in range(2))
        head = eval_linear.finetune(backbone, pictures, labels, 2, Args(**TUNING), CPU)
        torch.manual_seed(hash((0, 0)) % 2**32)
        layer = nn.Linear(32, 2)
        nn.init.trunc_normal_(layer.weight, std=2e-5), nn.init.zeros_(layer.bias)
    finally:
        torch.set_default_dtype(torch.float32)
    assert pictures.keys == [(0, epoch) for epoch in range(4) for _ in range(24)]  # of their crops

    named = [(name, p) for name, p in slow.net.named_parameters() if p.requires_grad]
    named += [("head.weight", layer.weight), ("head.bias", layer.bias)]
    sampler = torch.utils.data.distributed.DistributedSampler(labels, 1, 0, seed=0)
    pixels, momentum, step = torch.stack([row for _, row, _ in pictures]), Counter(), 0
    for epoch in range(4):
        sampler.set_epoch(epoch)
        for batch in torch.tensor(list(sampler)).split(8):
            lr = 8 / 256 * (step / 3 if step < 3 else 0.5 + 0.5 * math.cos(math.pi * (step - 3) / 9))
            log_p = torch.log_softmax(layer(slow(pixels[batch])), dim=1)
            target = 0.05 + 0.9 * torch.eye(2)[labels[batch]]
            grads = torch.autograd.grad(-(target * log_p).sum(dim=1).mean(), [p for _, p in named])
            step += 1
            for (name, p), grad in zip(named, grads, strict=True):
                place = re.match(r"blocks\.(\d)|patch|cls|pos", name)  # of 3 blocks; norm and head: 4
                depth = 4 if not place else int(place[1]) + 1 if place[1] else 0
                decays = p.ndim > 1 and name not in ("cls_token", "pos_embed")
                momentum[name] = 0.9 * momentum[name] + grad + 0.3 * decays * p.detach()
                p.data -= lr * 0.5 ** (4 - depth) * momentum[name]

    found = [p for p in backbone.net.parameters() if p.requires_grad] + [head[0].T, head[1]]
    for (name, expected), p in zip(named, found, strict=True):
        assert_close(p, expected.detach(), atol=1e-7, rtol=1e-5, msg=name)
    ratios = torch.tensor(rates[1:]) / torch.tensor(rates[1:]).amax(dim=1, keepdim=True)
    assert rates[0] == [0.0] * len(rates[0]) and torch.allclose(ratios, ratios[:1]) and len(rates) == 12
    assert_close(ratios[0].unique(), torch.tensor([0.0625, 0.125, 0.25, 0.5, 1]))
    assert not torch.equal(backbone.net.pos_embed.float(), load(vit_file)["state_dict"]["pos_embed"])


def test_mixing_is_timms_and_hangs_on_no_worker(vit_file, monkeypatch):
    """Targets of timm's Mixup, smoothed by the loss as timm smooths them; drawn anew in each step, as drop
    path is, whoever has read the images."""
    seen, found, cross_entropy = [], [], F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda x, y, **k: seen.append(y) or cross_entropy(x, y, **k))
    both = {"mixup": 0.8, "cutmix": 1.0}
    for mixing, workers in (({"mixup": 0.8}, 0), ({"cutmix": 1.0}, 0), (both, 0), (both, 1)):
        args, seen[:] = Args(**TUNING | {"epochs": 3, "workers": workers} | mixing), []
        backbone = load_backbone(vit_file, tunes=True, drop_path=0.5)
        pictures = Pictures([*range(8)], 16, eval_linear.random_crop(16, 0.5))
        found.append(eval_linear.finetune(backbone, pictures, torch.arange(8) % 2, 2, args, CPU)[0])
        shares = [targets.amax(dim=1).min().item() for targets in seen]
        assert len(seen) == 3 and len(set(shares)) == 3 and all(t.shape == (8, 2) for t in seen)
        assert all(torch.allclose(t.sum(dim=1), torch.ones(8)) for t in seen)
        assert torch.stack(seen).max() == 1  # two of one class: not smoothed yet
    assert torch.equal(*found[2:])
    smooth, plain = (timm.data.mixup.mixup_target(torch.tensor([0, 1]), 2, 0.7, s) for s in (0.1, 0.0))
    logits = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    ours = cross_entropy(logits, plain, label_smoothing=0.1)
    assert_close(ours, cross_entropy(logits, smooth), rtol=1e-6, atol=0)


def test_batches_too_small_for_batch_norm_are_refused(monkeypatch):
    net, labels = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten()), torch.arange(9) % 3
    backbone = eval_linear.Backbone(net, 16, (0.5,) * 3, (0.5,) * 3, "net")

    def tune(size):
        args = Args(batch_size=size, epochs=1, workers=0)
        eval_linear.finetune(backbone, Pictures([*range(4)], 16), labels, 3, args, CPU)

    stopped(lambda: tune(1), "--batch-size 1: 1 of 4 images .* too few for this network")
    tune(2)
    assert net[0].num_batches_tracked == 2  # BatchNorm is in train mode
    args = Args(batch_size=2, probe_norm=True, rates=(1.0,))  # of 9 images the fifth batch has one
    stopped(lambda: linear_probe(*clusters(9), 3, args), "--batch-size 2: with --probe-norm no batch may")
    monkeypatch.setattr(eval_linear, "processes", lambda: (0, 8))
    stopped(lambda: tune(256), "--batch-size 256: 0 of 4 images for each process")


# Counting, labels and processes: oracles 6 and 7


def test_accuracy_counts():
    labels = torch.tensor([0] * 9 + [1])
    expected = {"top1": 90.0, "top5": 100.0, "mean_per_class": 50.0, "n": 10}
    for classes in (2, 3):  # of a third class nothing is known
        assert accuracy(torch.eye(classes)[[0] * 10], labels) == expected
    result = accuracy(torch.arange(10.0).repeat(10, 1), torch.arange(10))
    assert (result["top1"], result["top5"], result["n"]) == (10.0, 50.0, 10)


def test_subsets_and_folds_are_stratified():
    labels = torch.arange(1000) % 10
    chosen = eval_linear.stratified_subset(labels, 47, 0)
    counts = labels[chosen].bincount(minlength=10)
    assert len(chosen.unique()) == 47 and sorted(counts.tolist()) == [4] * 3 + [5] * 7
    assert not torch.equal(chosen, eval_linear.stratified_subset(labels, 47, 1))
    fold = eval_linear.stratified_folds(labels[chosen], torch.arange(47), 5, 0)
    assert max(fold.bincount()) - min(fold.bincount()) <= 1
    assert all(max(fold[labels[chosen] == c].bincount(minlength=5)) == 1 for c in range(10))


def in_two(function):
    """What function() returns in each of two processes of one group."""
    return in_processes(lambda rank: (eval_linear.start_processes("cpu", "off"), function())[1])


def test_finetune_in_two_processes_is_finetune_in_one(vit_file, monkeypatch):
    """The same crops, batches and so weights: random numbers hang on seed, epoch and image alone."""
    args, sampler = Args(workers=0, batch_size=8, base_lr=1.0, epochs=1), eval_linear.DistributedSampler

    class Whole(sampler):
        def __iter__(self):  # the batches that two processes see together
            parts = [list(sampler(self.dataset, 2, rank, seed=self.seed, drop_last=True)) for rank in (0, 1)]
            return iter([i for k in range(0, 20, 4) for part in parts for i in part[k : k + 4]])

    def tuned():
        backbone = load_backbone(vit_file, tunes=True)
        pictures = Pictures([*range(40)], 16, eval_linear.random_crop(16, 0.5))
        weight, bias, _ = eval_linear.finetune(backbone, pictures, torch.arange(40) % 2, 2, args, CPU)
        return torch.cat([p.detach().flatten() for p in (*backbone.parameters(), weight.T, bias)])

    found = in_two(tuned)
    monkeypatch.setattr(eval_linear, "DistributedSampler", Whole)
    expected = tuned()
    start = torch.cat([p.flatten() for p in load_backbone(vit_file, tunes=True).parameters()])
    assert (start - expected[: len(start)]).abs().max() > 1e-4
    for weights in found:
        assert_close(weights, expected, atol=1e-5, rtol=0)


def test_two_processes_write_what_one_writes(vit_file):
    data, written = class_folders(60, 21), []  # features of an odd number

    def measure(rank):
        if "RANK" in os.environ:  # one group for all of it: a second one finds no free port
            dist.init_process_group("gloo")
            dist.init_process_group = dist.destroy_process_group = lambda *_: None
        for mode in ("knn", "linear", "logreg", "features", "predict"):
            own = {"k": (5,)} if mode == "knn" else {}
            evaluate(Args(vit_file, mode, **data, device="cpu", epochs=2, **own))

    for n in (1, 2):
        first, *others = Forked(measure, n).end()
        assert first.returncode == 0 and not any(end.returncode or end.stdout for end in others), first.stderr
        assert first.stdout.count("60 labels, 21 test images, 1 repetitions") == 3
        files = [f"vit/eval-{mode}-data.json" for mode in ("knn", "linear", "logreg")]
        top1 = [json.loads(Path(file).read_text())["top1"] for file in files]
        written.append((top1, Path("vit/predictions-data.csv").read_text(), load("vit/features-data.pt")))
    assert written[0][:2] == written[1][:2]
    assert_close(written[0][2]["features"], written[1][2]["features"], atol=1e-5, rtol=1e-5)


class Kept(torch.utils.data.Dataset):
    classes, decoded = ["a", "b"], []

    def __init__(self, root, download, train):
        self.n = 12 if train else 6
        if dist.is_initialized():
            time.sleep(0.2 * (dist.get_rank() == 0))
            assert dist.get_rank() == 0 or os.path.exists("there")
            Path("there").touch()

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        self.decoded.append(index)
        return simclr.demo_image(index)[0], index % 2


def test_labels_of_torchvision_sets(monkeypatch):
    """Where it keeps them no image is decoded; features.pt says which image a row is of; one process
    downloads; the reason why it cannot be had is of the try that had the right keywords."""
    monkeypatch.setattr(torchvision.datasets, "Kept", Kept, raising=False)
    for name in ("targets", "labels", "_labels", "other"):
        with monkeypatch.context() as patch:
            patch.setattr(Kept, name, property(lambda self: [i % 2 for i in range(self.n)]), raising=False)
            _, labels, classes, _, is_test = eval_linear.read_labels("Kept")
        assert labels.tolist() == [0, 1] * 9 and labels.dtype == torch.int64 and classes == ["a", "b"]
        assert is_test.tolist() == [False] * 12 + [True] * 6 and len(Kept.decoded) == 18 * (name == "other")
    monkeypatch.setattr(Kept, "targets", [[0, 7]], raising=False)  # QMNIST's are rows
    assert eval_linear.read_labels("Kept").labels.tolist() == [0, 1] * 9

    def pets(root, download, split):
        return Kept(root, download, {"trainval": True, "test": False}[split])

    monkeypatch.setattr(torchvision.datasets, "Pets", pets, raising=False)
    assert eval_linear.read_labels("Pets").is_test.sum() == 6
    evaluate(Args("pixels", "features", data="Kept", side=8, workers=0))
    assert load("runs/pixels/features-Kept.pt")["items"] == [str(i) for i in [*range(12), *range(6)]]
    assert in_two(lambda: len(eval_linear.read_labels("Kept").items)) == [18, 18]

    def offline(root, download, train):
        raise RuntimeError("no network here")

    monkeypatch.setattr(torchvision.datasets, "Offline", offline, raising=False)
    refused("--data Offline: no folder, no download .no network here.", data="Offline")
    refused("torchvision has no data set of this name", data="Nonsense")


# The user's story, and what goes wrong


def test_47_labels_for_a_flat_folder(photos, resnet_file):
    """A flat copy of photos, 47 labels in a csv, logreg in 5 folds, then predictions for all of them."""
    os.mkdir("flat")
    for name in ("airplane", "frog"):
        for file in sorted((photos / "train" / name).iterdir())[:80]:
            shutil.copy(file, f"flat/{file.stem}-{name}.png")
    names = sorted(os.listdir("flat"))
    truth = {name: name.split("-")[-1][:-4] for name in names}
    Path("labels.csv").write_text("\n".join(f"{name},{truth[name]}" for name in names[:47]))
    result = evaluate(Args(resnet_file, "logreg", data="flat", labels_csv="labels.csv", workers=0))
    assert result["top1"] > 65 and result["n"] == 47 and len(result["results"][0]["choice"]) == 5
    evaluate(Args(resnet_file, "predict", data="flat", workers=0))
    with open("resnet/predictions-flat.csv", newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: row["path"])
    assert [row["path"] for row in rows] == names
    assert sum(row["class"] == truth[row["path"]] for row in rows[47:]) / 113 > 0.65
    assert all(0.5 <= float(row["probability"]) <= 1 for row in rows)


FINETUNE = {"solver": "adamw", "base_lr": 1e-2, "layer_decay": 0.75, "mixup": 0.8, "cutmix": 1.0}
FINETUNE |= {"label_smoothing": 0.1, "rand_augment": True, "weight_decay": 0.05, "drop_path": 0.1}


def test_every_mode_on_class_folders_in_repetitions(vit_file):
    """Mean and sample deviation of repetitions, the first k of k-NN; a head that predicts; every option."""
    deviations, data = [], class_folders(32, 20)
    options = {"knn": {"k": (5, 1)}, "logreg": {"layers": (-2, -1)}, "linear": {}, "finetune": FINETUNE}
    for mode, flags in options.items():
        args = {"backbone": vit_file, "mode": mode, "labels": 16, "epochs": 2, "batch_size": 8} | data | flags
        result = evaluate(Args(**args, seed=3, seeds=2))
        assert json.loads(Path(f"vit/eval-{mode}-data.json").read_text()) == json.loads(json.dumps(result))
        rows = [row for row in result["results"] if row["row"] == ("k 5" if mode == "knn" else mode)]
        assert len(result["results"]) == (4 if mode == "knn" else 2) and result["top5"] == 100
        top1 = [row["top1"] for row in rows]
        deviations.append(result["top1_std"])
        assert (result["n"], result["labels"], result["top1"]) == (20, 16, pytest.approx(sum(top1) / 2))
        assert result["top1_std"] == pytest.approx(statistics.stdev(top1), abs=1e-4)
        assert result["network"] == f"mae vit_nano {'mean' if mode == 'finetune' else 'cls'}"
        if mode == "logreg":
            assert evaluate(Args(**args, seed=4))["results"] == rows[1:]
        if mode != "knn":
            assert evaluate(Args(vit_file, "predict", **data)) == {"n": 52, "unreadable": 0}
    assert max(deviations) > 0
    evaluate(Args(f"random:{vit_file}", "logreg", seeds=2, **data))  # untrained weights keep their seed
    assert evaluate(Args(f"random:{vit_file}", "predict", **data))["n"] == 52
    assert Path("vit/random-predictions-data.csv").exists()


def test_watch_follows_a_run(vit_file, monkeypatch):
    """The command: k-NN of each backbone.pt that appears, also when it is replaced; Ctrl-C ends it quietly,
    also while it measures."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def wait_for(expected):
        steps, start = [], time.time()
        while steps != expected:
            assert time.time() - start < 90, steps
            time.sleep(0.5)
            board = EventAccumulator("vit").Reload()
            tags = board.Tags()["scalars"]
            steps = [event.step for event in board.Scalars("eval/knn_top1")] if tags else []

    class_folders(8, 4)
    monkeypatch.setattr(sys, "argv", "eval_linear.py --watch vit --data data --workers 0".split())
    command = Forked(lambda rank: len(runpy.run_path(eval_linear.__file__, run_name="__main__")))
    try:
        wait_for([0])  # a file of convert.py has no step
        simclr.save_checkpoint(vit_file, **load(vit_file) | {"step": 10})
        wait_for([0, 10])
    finally:
        os.kill(command.pids[0], signal.SIGINT)
    (end,) = command.end()
    assert end.returncode == 0 and "Traceback" not in end.stdout + end.stderr
    monkeypatch.setattr(eval_linear, "extract_features", mock.Mock(side_effect=KeyboardInterrupt))
    assert evaluate(Args(watch="vit", data="data", workers=0)) == {}
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    stopped(lambda: eval_linear.follow(Args(watch="vit"), CPU, None), "--watch vit: works without torchrun")


def test_five_folds(vit_file, monkeypatch, capsys):
    """Rows are by the k asked for, also where folds have fewer labels; the head learns from as many labels as
    the folds; fine-tuning starts each fold from the backbone, not from what has seen its test images."""
    started, learnt, tune = set(), [], eval_linear.finetune
    result = evaluate(Args("pixels", "knn", side=2, k=(20, 200, 20), **flat(12)))
    assert len(result["results"]) == 2 and result["n"] == 12 and result["labels"] == 10
    assert [choice["used"] for choice in result["results"][0]["choice"]] == [9, 9, 10, 10, 10]
    assert result["top1"] == result["results"][0]["top1"] and result["results"][0]["row"] == "k 20"
    printed = capsys.readouterr().out
    assert "10 labels, 12 test images" in printed and printed.count("+-") == 2

    def watched(net, pictures, *rest):
        started.add(eval_linear.fingerprint(net))
        learnt.append(len(pictures))
        return tune(net, pictures, *rest)

    monkeypatch.setattr(eval_linear, "finetune", watched)
    head = torch.zeros(32, 2), torch.zeros(2), {}
    monkeypatch.setattr(eval_linear, "logreg", lambda x, *rest: learnt.append(len(x)) or head)
    for mode, flags in (("logreg", {"labels": 6}), ("logreg", {}), ("finetune", {"epochs": 1})):
        learnt.clear()
        result = evaluate(Args(vit_file, mode, **flags, **flat(15)))
        assert learnt == ([6] * 6 if "labels" in flags else [12] * 5 + [15])
        assert result["labels"] == learnt[0] and result["n"] == 15 and not [*Path().rglob("*.tmp")]
    assert len(started) == 1


def test_protocols_in_the_results_parse():
    """RESULTS.md: each paper's flags are flags, with the sheet's numbers."""
    rows = re.findall(r"^\| (.+?) \| `(--mode .+?)`", (ROOT / "RESULTS.md").read_text(), re.M)
    found = {name: tyro.cli(Args, args=flags.split()) for name, flags in rows}
    assert len(found) == 9 and found["SimCLR, linear (B.6)"].batch_size == 4096
    assert found["BYOL, linear (C.1)"].rates == (0.4, 0.3, 0.2, 0.1, 0.05)
    moco, dino = found["MoCo v1, v2, linear"], found["DINO, linear, ViT-S"]
    assert (moco.rates, moco.solver) == ((30.0,), "sgd")
    assert (dino.layers, dino.epochs, dino.rates, dino.augment) == ((-4, -3, -2, -1), 100, (0.001,), True)
    probe, mae = found["MAE, linear (Table 10)"], found["MAE, fine-tuned, ViT-B"]
    assert (probe.probe_norm, probe.warmup_epochs, probe.epochs, probe.solver) == (True, 10.0, 90, "sgd")
    assert (mae.base_lr, mae.layer_decay, mae.warmup_epochs, mae.epochs) == (5e-4, 0.65, 5.0, 100)
    assert (mae.drop_path, mae.mixup, mae.cutmix, mae.label_smoothing) == (0.1, 0.8, 1.0, 0.1)
    assert (mae.weight_decay, mae.batch_size, mae.feature, mae.solver) == (0.05, 1024, "mean", "adamw")


def test_bad_flags_and_files(vit_file, resnet_file, monkeypatch):
    data, head = flat(8), "vit/head-logreg-flat-two.pt"
    Path("bad.pt").write_text("no weights")
    torch.save({"model": {}}, "official.pt")
    for name in ("bad.pt", "official.pt"):
        refused(f"{name}: cannot be loaded", name, **data)
    refused("no such file, nor a network of torchvision; python simclr.py trains one", "nothing.pt", **data)
    refused("--head vit/head.pt: missing or damaged; --mode logreg", vit_file, "predict", data="flat")
    evaluate(Args(vit_file, "logreg", **data))
    refused("was trained on another backbone", "pixels", "predict", data="flat", head=head)
    torch.save(load(head) | {"choice": ("an", "older", "edition")}, "old.pt")
    refused("--head old.pt: missing or damaged", vit_file, "predict", data="flat", head="old.pt")
    data = class_folders(8, 4)
    for match, path, mode, flags in (
        ("--labels 9: must be 2, one of each class, to all 8", "pixels", "knn", {"labels": 9}),
        ("--k .*must be above 0", "pixels", "knn", {"k": (0,)}),
        ("--layer-decay 2.0: must be above 0 and at most 1", vit_file, "finetune", {"layer_decay": 2.0}),
        ("--warmup-epochs 4.0: .* at most 3", "pixels", "linear", {"warmup_epochs": 4.0, "epochs": 3}),
        ("--warmup-epochs 31.0: .*at most 30", vit_file, "finetune", {"warmup_epochs": 31.0}),
        ("--watch nowhere: no such folder", "pixels", "linear", {"watch": "nowhere"}),
        ("--layers: has no effect on .*leave it out", resnet_file, "knn", {"layers": (-4, -1)}),
        ("--layers: has no effect", vit_file, "finetune", {"layers": (1,)}),
        ("--feature: has no effect on .*leave it out", "pixels", "knn", {"feature": "mean"}),
        ("--drop-path: has no effect on .*leave it out", resnet_file, "finetune", {"drop_path": 0.1}),
        ("--layers .*give some of -3 .. 2", vit_file, "knn", {"layers": (99,)}),
        ("--side 50: must be a multiple of the patches' 8 pixels", vit_file, "knn", {"side": 50}),
        ("--base-lr: is for --mode finetune, not linear; leave it", "pixels", "linear", {"base_lr": 0.1}),
        ("--rates: is for --mode linear, not logreg", "pixels", "logreg", {"rates": (0.1,)}),
        ("--head: is for --mode predict, not knn", "pixels", "knn", {"head": "x.pt"}),
        (
            "--weight-decay: is for --mode linear, finetune, not logreg",
            "pixels",
            "logreg",
            {"weight_decay": 0.1},
        ),
        ("--seeds: is for --mode linear, .*, not predict", "pixels", "predict", {"seeds": 2}),
        ("--k: is for --mode knn, not logreg", "pixels", "logreg", {"k": (5,)}),
        ("--k: give a number, or more", "pixels", "knn", {"k": ()}),
        ("--side: is for --mode linear, .*, not predict", "pixels", "predict", {"side": 2}),
        ("--mixup: is for --mode finetune, not knn", "pixels", "finetune", {"watch": "vit", "mixup": 0.5}),
        ("the loss is .* in epoch .*; lower --base-lr", vit_file, "finetune", {"base_lr": 1e12}),
    ):
        refused(match, path, mode, **{"batch_size": 4} | data | flags)
    monkeypatch.setattr(eval_linear, "check_flags", lambda *_: None)  # which refuses such rates
    refused("--mode linear: weights are not finite; lower --rates", vit_file, rates=(5e39,), epochs=9, **data)
    assert [str(path) for path in Path("vit").glob("head*")] == [head]
