"""eval_linear.py: the oracles of methods/evaluation.md, slow versions, scikit-learn, and 47 labels."""

import csv
import json
import math
import re
import shutil

import pytest
import timm
import torch
import torchvision
from conftest import run_processes, tiny_args

import eval_linear
import simclr
from eval_linear import Args, accuracy, evaluate, fit_logreg, knn, linear_probe, load_backbone, logreg

DOUBLE = torch.float64


def clusters(n, dim=8, classes=3, noise=0.3, seed=0):
    """Features of well separated classes: known features of known accuracy."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    return torch.eye(dim)[labels] * 3 + noise * torch.randn(n, dim, generator=generator), labels


def alone(labels):
    """Groups of one image each."""
    return torch.arange(len(labels))


def first_edition_file(folder, method, arch, width, weights, **arch_args):
    """backbone.pt as the first edition wrote it: users still have such files."""
    folder.mkdir()
    info = {"method": method, "arch": arch, "arch_args": arch_args, "image_size": 32, "feature_dim": width}
    info |= {"mean": eval_linear.MEAN, "std": eval_linear.STD, "state_dict": weights}
    torch.save(info, folder / "backbone.pt")
    return folder / "backbone.pt"


@pytest.fixture
def backbone_file(tmp_path):
    """An untrained ResNet-18 in a run folder."""
    torch.manual_seed(0)
    net, width = simclr.resnet("resnet18", "imagenet")
    weights = net.state_dict()
    return first_edition_file(tmp_path / "run", "simclr", "resnet18", width, weights, stem="imagenet")


# k-NN: oracle 5


def test_knn_votes_with_the_temperature():
    bank = torch.tensor([[0.9, (1 - 0.81) ** 0.5], [0.8, 0.6], [0.79, (1 - 0.79**2) ** 0.5]])
    labels, query = torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.0]])
    cold, warm = (knn(bank, labels, query, (3,), 2, tau)[3][0] for tau in (0.07, 1.0))
    assert cold.argmax() == 0 and (cold[0] / cold[1]).item() == pytest.approx(2.235, abs=2e-3)
    assert warm.argmax() == 1 and (warm[0] / warm[1]).item() == pytest.approx(0.555, abs=1e-3)


def test_knn_by_softmax_weights_is_the_same():
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(100, 16, generator=generator), torch.randn(30, 16, generator=generator)
    labels = torch.randint(0, 4, (100,), generator=generator)
    ours = knn(bank, labels, queries, (10,), 4)[10]
    normalize = torch.nn.functional.normalize
    similarity, nearest = (normalize(queries) @ normalize(bank).T).topk(10, dim=1)
    votes = torch.softmax(similarity / 0.07, dim=1)
    slow = torch.stack([(votes * (labels[nearest] == c)).sum(dim=1) for c in range(4)], dim=1)
    torch.testing.assert_close(ours / ours.sum(dim=1, keepdim=True), slow, atol=1e-5, rtol=1e-5)


def test_knn_is_brute_force_and_scikit_learn():
    from sklearn.neighbors import KNeighborsClassifier

    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(200, 16, generator=generator), torch.randn(60, 16, generator=generator)
    labels = torch.randint(0, 5, (200,), generator=generator)
    scores = knn(bank, labels, queries, (20,), 5)[20]
    for query, row in zip(queries, scores, strict=True):
        cosines = zip(torch.cosine_similarity(query[None], bank).tolist(), labels.tolist(), strict=True)
        votes = torch.zeros(5, dtype=DOUBLE)
        for cosine, label in sorted(cosines, reverse=True)[:20]:
            votes[label] += torch.tensor(cosine / 0.07, dtype=DOUBLE).exp()
        torch.testing.assert_close(row.double() / row.sum(), votes / votes.sum(), atol=1e-5, rtol=0)
    theirs = KNeighborsClassifier(
        20, metric="cosine", weights=lambda d: torch.exp((1 - torch.tensor(d)) / 0.07).numpy()
    )
    theirs.fit(bank.numpy(), labels.numpy())
    assert (theirs.predict(queries.numpy()) == scores.argmax(1).numpy()).all()
    before = bank.clone()
    for memory in (1, 4 * 200 * 7, 2**28):
        in_one_pass = knn(bank, labels, queries, (1, 20, 500), 5, memory=memory)
        torch.testing.assert_close(in_one_pass[20], scores)
        for k in (1, 500):  # more neighbours than rows, too
            torch.testing.assert_close(in_one_pass[k], knn(bank, labels, queries, (k,), 5)[k])
    assert torch.equal(bank, before)  # it is normalised in place, but not the caller's
    assert accuracy(knn(bank, labels, bank, (1,), 5)[1], labels)["top1"] == 100
    assert torch.isfinite(knn(bank, labels, 1e3 * queries, (500,), 5)[500]).all()


# Logistic regression: oracle 8


def test_logreg_of_two_points():
    x, y = torch.tensor([[1.0], [-1.0]], dtype=DOUBLE), torch.tensor([1, 0])
    weight, bias = fit_logreg(x, y, 0.1, 2)
    torch.testing.assert_close(weight, torch.tensor([[-1.064017, 1.064017]], dtype=DOUBLE), atol=1e-5, rtol=0)
    loss = torch.nn.functional.cross_entropy(x @ weight + bias, y).item()
    assert loss == pytest.approx(0.112499, abs=1e-5) and bias.abs().max() < 1e-6
    assert loss + 0.05 * weight.square().sum().item() == pytest.approx(0.225712, abs=1e-5)


def test_logreg_is_scikit_learn_s_optimum():
    from sklearn.linear_model import LogisticRegression

    features, labels = clusters(120, noise=2.0)
    for penalty in (1e-3, 1e-1):
        weight, bias = fit_logreg(features, labels, penalty, 3)
        theirs = LogisticRegression(C=1 / (120 * penalty), tol=1e-10, max_iter=10000).fit(
            features.double(), labels
        )
        torch.testing.assert_close(weight.T, torch.tensor(theirs.coef_), atol=1e-3, rtol=1e-3)
        ours = torch.softmax(features.double() @ weight + bias, dim=1)
        torch.testing.assert_close(
            ours, torch.tensor(theirs.predict_proba(features.double())), atol=1e-4, rtol=0
        )


def test_logreg_picks_a_penalty_for_noisy_features():
    features, labels = clusters(60, dim=200, noise=3.0)
    *_, chosen = logreg(features, labels, alone(labels), 3)
    assert chosen["penalty"] >= 0.01
    features, labels = clusters(300)
    weight, bias, _ = logreg(features, labels, alone(labels), 3)
    assert accuracy(features @ weight + bias, labels)["top1"] == 100


# Linear probe


def test_linear_probe_is_sgd_and_picks_its_rate():
    """One rate of the grid against torch.optim.SGD on the same batches."""
    features, labels = clusters(300, noise=1.0)
    weight, bias, chosen = linear_probe(
        features, labels, alone(labels), 3, Args(epochs=5, batch_size=64), seed=3
    )
    held = eval_linear.stratified_folds(labels, alone(labels), 10, 3) == 0
    train = (~held).nonzero()[:, 0]
    layer = torch.nn.Linear(8, 3)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    peak = chosen["rate"] * (len(train) / 5) / 256  # 5 batches of at most 64
    optimizer = torch.optim.SGD(layer.parameters(), peak, momentum=0.9, nesterov=True)
    generator, step, losses = torch.Generator().manual_seed(3), 0, []
    for _ in range(5):
        order = train[torch.randperm(len(train), generator=generator)]
        sizes = [len(train) // 5 + (i < len(train) % 5) for i in range(5)]
        for batch in order.split(sizes):
            optimizer.param_groups[0]["lr"] = simclr.cosine_schedule(step, 25, 0, peak)
            loss = torch.nn.functional.cross_entropy(layer(features[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            step += 1
    assert losses[0] == pytest.approx(torch.tensor(3.0).log().item(), abs=1e-6)  # oracle 1: ln C
    torch.testing.assert_close(weight, layer.weight.detach().T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(bias, layer.bias.detach(), atol=1e-4, rtol=1e-4)
    assert accuracy(features @ weight + bias, labels)["top1"] > 90


def test_batch_norm_becomes_part_of_the_layer():
    """Oracle 2: BatchNorm in eval mode and a linear layer are one. Features of wild scales are learnt."""
    features, labels = clusters(300, noise=0.5)
    features = features * torch.logspace(-3, 3, 8) + 5
    weight, bias, _ = linear_probe(
        features, labels, alone(labels), 3, Args(epochs=30, batch_size=64, probe_norm=True)
    )
    assert accuracy(features @ weight + bias, labels)["top1"] > 95
    # one full batch, one rate: the layer returned is that of BatchNorm and a linear layer trained by hand
    # (scales nearer to 1: means of 5 beside deviations of 1e-3 cost float32 four digits in the folded bias)
    features = clusters(300, noise=0.5)[0] * torch.logspace(-1, 1, 8) + 1
    args = Args(epochs=3, batch_size=300, rates=(0.5,), probe_norm=True, solver="sgd")
    weight, bias, _ = linear_probe(features, labels, alone(labels), 3, args)
    norm, layer = torch.nn.BatchNorm1d(8, eps=1e-6, momentum=None, affine=False), torch.nn.Linear(8, 3)
    torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(layer.parameters(), 0.5 * 300 / 256, momentum=0.9)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = simclr.cosine_schedule(step, 3, 0, 0.5 * 300 / 256)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(layer(norm(features)), labels).backward()
        optimizer.step()
    expected = layer(norm.eval()(features)).detach()
    torch.testing.assert_close(features @ weight + bias, expected, atol=1e-4, rtol=1e-4)


def test_held_out_labels_pick_the_rate(capsys):
    """One label a class cannot be held out; with few the cross-entropy decides among rates as good."""
    features, labels = clusters(10, dim=16, classes=10, noise=0.0)
    weight, bias, chosen = linear_probe(features, labels, alone(labels), 10, Args(epochs=30))
    assert accuracy(features @ weight + bias, labels)["top1"] == 100 and chosen["rate"] == pytest.approx(0.3)
    assert "too few labels to hold any out; the middle one, 0.3, is taken" in capsys.readouterr().out
    features, labels = clusters(200, noise=0.3)
    for rates in ((1e-6, 1.0), (1.0, 1e-6)):
        assert linear_probe(features, labels, alone(labels), 3, Args(epochs=10, rates=rates))[2] == {
            "rate": 1.0
        }
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    score = eval_linear.held_out_score
    assert score(3 * logits, torch.tensor([0, 1])) > score(logits, torch.tensor([0, 1])) > 1
    assert score(3 * logits, torch.tensor([0, 0])) < 1 < score(logits, torch.tensor([0, 1]))
    assert score(logits * math.nan, torch.tensor([0, 1])) == -1


def test_augmented_probe_sees_other_crops_in_each_epoch(vit_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys, extract = [], eval_linear.extract_features
    monkeypatch.setattr(
        eval_linear, "extract_features", lambda *a, **k: keys.append(k.get("key")) or extract(*a, **k)
    )
    evaluate(Args(str(vit_file), "linear", augment=True, epochs=3, labels=40, workers=0, seed=5))
    assert keys == [None, (5, 0), (5, 1), (5, 2)]
    crop = eval_linear.random_crop(32, 0.2)
    pictures = eval_linear.Pictures([0, 1], 32, crop, 0.2)
    first = pictures[0][1]
    torch.manual_seed(99)
    assert torch.equal(pictures[0][1], first)
    pictures.key = (0, 1)
    assert not torch.equal(pictures[0][1], first)


def test_linear_probe_with_one_rate_trains_on_every_label():
    """...and decays the weight, not the bias."""
    features, labels = clusters(60, noise=1.0)
    args = Args(epochs=4, batch_size=60, rates=(1.0,), solver="sgd", weight_decay=0.1)
    weight, bias, chosen = linear_probe(features, labels, alone(labels), 3, args)
    layer = torch.nn.Linear(8, 3)
    torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
    groups = [{"params": layer.weight, "weight_decay": 0.1}, {"params": layer.bias}]
    optimizer = torch.optim.SGD(groups, 1.0, momentum=0.9)
    for step in range(4):
        for group in optimizer.param_groups:
            group["lr"] = simclr.cosine_schedule(step, 4, 0, 60 / 256)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(layer(features), labels).backward()
        optimizer.step()
    assert chosen == {"rate": 1.0}
    torch.testing.assert_close(weight, layer.weight.detach().T, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(bias, layer.bias.detach(), atol=1e-6, rtol=1e-5)


def test_linear_probe_on_a_gpu_that_is_not_there():
    """Heads and batches are on the device, features stay: rows are the CPU's, and so is what comes back."""
    import pretend_gpu

    features, labels = clusters(60)
    args = Args(epochs=2, batch_size=20, rates=(0.1, 1.0), probe_norm=True)
    expected, devices, linear = (
        linear_probe(features, labels, alone(labels), 3, args),
        set(),
        torch.nn.Linear.forward,
    )
    with pretend_gpu.PretendGPU(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.nn.Linear, "forward", lambda self, x: devices.add(x.device.type) or linear(self, x)
        )
        weight, bias, chosen = linear_probe(
            features, labels, alone(labels), 3, args, device=torch.device("cuda")
        )
        assert weight.device.type == "cpu" and devices == {"cuda"}
    assert chosen == expected[2] and torch.equal(weight, expected[0]) and torch.equal(bias, expected[1])


def test_knn_and_logreg_on_a_gpu_that_is_not_there():
    """Banks, similarities, standardised features and L-BFGS are on the device; what comes back is not."""
    import pretend_gpu

    features, labels = clusters(90, noise=1.5)
    fit, products, matmul = eval_linear.fit_logreg, set(), torch.Tensor.__matmul__
    expected = knn(features, labels, features, (1, 5), 3), logreg(features, labels, alone(labels), 3)
    with pretend_gpu.PretendGPU(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.Tensor, "__matmul__", lambda self, x: products.add(x.device.type) or matmul(self, x)
        )
        cuda = torch.device("cuda")
        scores = knn(features, labels, features, (1, 5), 3, device=cuda)
        assert products == {"cuda"}
        patch.setattr(
            eval_linear, "fit_logreg", lambda x, y, *a, **k: products.add(y.device.type) or fit(x, y, *a, **k)
        )
        weight, bias, chosen = logreg(features, labels, alone(labels), 3, device=cuda)
        assert products == {"cuda"} and {weight.device.type, bias.device.type} == {"cpu"}
        assert all(scores[k].device.type == "cpu" for k in scores)
    assert chosen == expected[1][2] and all(torch.equal(scores[k], expected[0][k]) for k in (1, 5))
    torch.testing.assert_close((weight, bias), expected[1][:2])


def test_features_that_overflow_are_noticed(backbone_file):
    """Infinite ones, of float16, as well as NaN; of images that cannot be read NaN stays."""
    backbone = load_backbone(str(backbone_file))
    pictures = eval_linear.Pictures([0, "nowhere.png", 2], 32)
    assert eval_linear.extract_features(backbone, pictures).isnan().any(dim=1).tolist() == [
        False,
        True,
        False,
    ]
    for value in (math.inf, -math.inf, math.nan):
        with torch.no_grad():
            backbone.net.layer4[1].bn2.bias[0] = value
        if value == -math.inf:
            backbone.net.avgpool = torch.nn.Identity()
            backbone.net.layer4[1].relu = torch.nn.Identity()
        with pytest.raises(SystemExit, match="its features are not finite"):
            eval_linear.extract_features(backbone, eval_linear.Pictures([0], 32))


def test_schedule_of_maes_probe():
    """Oracle 4: peak 6.4, warm-up 10, 90 epochs."""
    rates = [eval_linear.cosine_schedule(epoch, 90, 10, 6.4) for epoch in (5, 10, 50, 90)]
    assert rates == pytest.approx([3.2, 6.4, 3.2, 0.0])
    assert eval_linear.cosine_schedule(45, 90, 0, 1.0) == pytest.approx(0.5)  # MoCo v3


# The ViT


NANO = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4, "num_classes": 0}


@pytest.fixture
def vit_file(tmp_path):
    """A vit_nano of 32 px and patch 8 in a run folder."""
    torch.manual_seed(0)
    weights = timm.models.VisionTransformer(**NANO).state_dict()
    options = {"patch_size": 8, "xavier": True, "fixed_positions": True}
    return first_edition_file(tmp_path / "vit", "mae", "vit_nano", 128, weights, **options)


def test_features_are_timms(vit_file):
    """[CLS], mean and both, of one block or several, by timm's own network of the same weights."""
    theirs = timm.models.VisionTransformer(**NANO).eval()
    theirs.load_state_dict(torch.load(vit_file, weights_only=True)["state_dict"])
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    pixels = (images / 255 - torch.tensor(eval_linear.MEAN).view(3, 1, 1)) / torch.tensor(
        eval_linear.STD
    ).view(3, 1, 1)
    inner = []
    hooks = [
        theirs.blocks[i].register_forward_hook(lambda *a: inner.append(theirs.norm(a[2]))) for i in (1, 5)
    ]
    with torch.no_grad():
        expected = theirs(pixels)
        for hook in hooks:
            hook.remove()
        torch.testing.assert_close(load_backbone(str(vit_file))(images), expected, atol=1e-5, rtol=1e-5)
        both = load_backbone(str(vit_file), layers=(1, -1), feature="both")
        parts = [part for tokens in inner for part in (tokens[:, 0], tokens[:, 1:].mean(dim=1))]
        assert both.dim == 512
        torch.testing.assert_close(both(images), torch.cat(parts, dim=1), atol=1e-5, rtol=1e-5)
        mean = load_backbone(str(vit_file), layers=(5,), feature="mean")
        torch.testing.assert_close(mean(images), parts[3], atol=1e-5, rtol=1e-5)


def test_positions_of_another_size(vit_file):
    """Oracle 9: of the stored size they are the file's; constants stay, and [CLS] keeps its own."""
    file = torch.load(vit_file, weights_only=True)
    stored = file["state_dict"]["pos_embed"]
    assert torch.equal(load_backbone(str(vit_file)).net.pos_embed, stored)
    larger = load_backbone(str(vit_file), side=48).net.pos_embed
    assert larger.shape == (1, 37, 128) and torch.equal(larger[:, 0], stored[:, 0])
    file["state_dict"]["pos_embed"] = torch.full_like(stored, 0.3)
    torch.save(file, vit_file)
    constant = load_backbone(str(vit_file), side=48).net.pos_embed
    torch.testing.assert_close(constant, torch.full_like(constant, 0.3))


def new_form(file, builder, arch_args, **more):
    """A backbone.pt with the weights of a network that this builds."""
    net = eval_linear.build_network(builder, arch_args)
    with torch.no_grad():
        for tensor in net.state_dict().values():
            if tensor.is_floating_point():  # every part counts
                tensor.add_(0.1 * torch.rand_like(tensor))
    info = {"method": "dino", "arch": "vit_nano", "image_size": 32, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    info |= {"builder": builder, "arch_args": arch_args, "state_dict": net.state_dict()} | more
    torch.save(info, file)
    return net.eval()


TABLE = {  # DESIGN 6: the exact calls
    "dino": ("VisionTransformer", {}, "cls"),
    "ijepa": ("VisionTransformer", {"class_token": False, "global_pool": "avg", "fc_norm": False}, "mean"),
    "dinov2": ("VisionTransformer", {"init_values": 0.5}, "cls"),
    "registers": ("VisionTransformer", {"init_values": 0.5, "reg_tokens": 4, "no_embed_class": True}, "cls"),
    "clip": ("VisionTransformer", {"pre_norm": True, "act_layer": "quick_gelu", "norm_eps": 1e-5}, "cls"),
    "giant": (
        "VisionTransformer",
        {"init_values": 1e-5, "mlp_ratio": 2.66667 * 2, "mlp_layer": "SwiGLUPacked", "act_layer": "silu"},
        "cls",
    ),
    "beit": (
        "Beit",
        {
            "global_pool": "token",
            "use_abs_pos_emb": False,
            "use_shared_rel_pos_bias": True,
            "init_values": 0.1,
        },
        "mean",
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_new_backbone_files(tmp_path, name):
    """Each call of DESIGN 6, strictly; other sizes are timm's; what does not fit is refused."""
    kind, options, feature = TABLE[name]
    path, method = str(tmp_path / "backbone.pt"), name if name in ("beit", "ijepa") else "dino"
    net = new_form(path, f"timm.{kind}", NANO | options, method=method)
    for side in (32, 48):
        backbone = load_backbone(path, side=side)
        assert (backbone.side, backbone.feature) == (side, feature)
        if side == 48:
            net.set_input_size(48)
        images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
        with torch.no_grad():
            tokens = net.forward_features(images / 127.5 - 1)
            pooled = tokens[:, 0] if feature == "cls" else tokens[:, net.num_prefix_tokens :].mean(dim=1)
            torch.testing.assert_close(backbone(images), pooled, atol=1e-5, rtol=1e-4)
    state = torch.load(path, weights_only=True)
    some = {key: value for key, value in state["state_dict"].items() if key != "blocks.3.norm2.bias"}
    for wrong in (some, state["state_dict"] | {"blocks.3.norm3.bias": torch.ones(1)}):
        torch.save(state | {"state_dict": wrong}, path)
        with pytest.raises(SystemExit, match="cannot be loaded .*blocks.3.norm"):
            load_backbone(path)


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_new_backbone_files_of_resnets(tmp_path, stem):
    path, args = str(tmp_path / "backbone.pt"), {"arch": "resnet18", "stem": stem}
    net = new_form(path, "torchvision.resnet", args, method="simclr", arch="resnet18")
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(load_backbone(path)(images), net(images / 127.5 - 1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stem, epochs", [("imagenet", 2), ("cifar", 0)])
def test_what_training_saved_gives_the_features_of_its_model(folder, tmp_path, stem, epochs):
    """backbone.pt and the model's own weights in checkpoint.pt, of a run and of --epochs 0."""
    flags = {"data": str(folder), "stem": stem, "epochs": epochs}
    simclr.train(tiny_args("simclr", run_dir=str(tmp_path), **flags))
    model = simclr.SimCLR("resnet18", stem).eval()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"])
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (simclr.MEAN, simclr.STD))
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    backbone = load_backbone(str(tmp_path / "backbone.pt"))
    assert (backbone.dim, backbone.side) == (512, 32)
    with torch.no_grad():
        expected = model((images / 255 - mean) / std)[1]
        torch.testing.assert_close(backbone(images), expected, atol=1e-5, rtol=1e-5)
    moved = not torch.equal(model.backbone.bn1.running_mean, start["backbone.bn1.running_mean"])
    assert moved == (epochs > 0)  # statistics of a training are a part of the features


def test_untrained_vits_start_as_in_timm(vit_file, tmp_path):
    """...but for MAE's xavier; sin-cos positions are a part of the network, and are not tuned either."""
    learnt, again = load_backbone(str(vit_file)), load_backbone(f"random:{vit_file}", seed=1)
    assert torch.equal(learnt.net.pos_embed, again.net.pos_embed)
    assert not torch.equal(learnt.net.blocks[0].attn.qkv.weight, again.net.blocks[0].attn.qkv.weight)
    for weight in (again.net.blocks[0].attn.qkv.weight, again.net.patch_embed.proj.weight.flatten(1)):
        bound = (6 / sum(weight.shape)) ** 0.5  # of the fused qkv, and of the patches as one matrix
        assert 0.98 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
    path = str(tmp_path / "new.pt")
    for name in ("dinov2", "clip", "beit"):
        kind, options, _ = TABLE[name]
        new_form(path, f"timm.{kind}", NANO | options, method=name)
        found = load_backbone(f"random:{path}", seed=3).net.state_dict()
        torch.manual_seed(3)
        expected = eval_linear.build_network(f"timm.{kind}", NANO | options).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)
    for method, fixed in (("mae", True), ("ijepa", True), ("moco_v3", True), ("dino", False)):
        state = torch.load(vit_file, weights_only=True)
        torch.save(state | {"method": method}, path)
        tuned = load_backbone(path, tunes=True).net
        assert tuned.pos_embed.requires_grad != fixed and tuned.blocks[0].attn.qkv.weight.requires_grad


def test_untrained_resnets_take_statistics(backbone_file):
    """BatchNorm's means and variances of the images, the weights as drawn, and the usual momentum again."""
    items = list(range(40))
    backbone, fresh = (load_backbone(f"random:{backbone_file}", seed=2) for _ in range(2))
    eval_linear.settle_statistics(backbone, items, "cpu")
    state, before = backbone.net.state_dict(), fresh.net.state_dict()
    for name, tensor in state.items():
        moved = "running" in name or "num_batches" in name
        assert torch.equal(tensor, before[name]) != moved, name
    images = torch.stack([eval_linear.Pictures(items, 32)[i][1] for i in items])
    with torch.no_grad():
        maps = backbone.net.conv1((images / 255 - backbone.mean) / backbone.std)
    torch.testing.assert_close(state["bn1.running_mean"], maps.mean(dim=(0, 2, 3)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(state["bn1.running_var"], maps.var(dim=(0, 2, 3)), atol=1e-4, rtol=1e-4)
    assert backbone.net.bn1.momentum == 0.1
    learnt = load_backbone(str(backbone_file))
    mark = eval_linear.fingerprint(learnt)
    eval_linear.settle_statistics(learnt, [], "cpu")  # of a trained one, nothing
    assert eval_linear.fingerprint(learnt) == mark


def test_statistics_never_see_a_test_image(tmp_path, backbone_file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen, settle = [], eval_linear.settle_statistics
    monkeypatch.setattr(
        eval_linear, "settle_statistics", lambda b, items, d: seen.append(items) or settle(b, items, d)
    )
    for i in range(24):
        path = tmp_path / "data" / ("train" if i < 16 else "val") / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        simclr.demo_image(i)[0].save(path)
    for path in (f"random:{backbone_file}", str(backbone_file)):
        evaluate(Args(path, "knn", data="data", k=(1,), workers=0))
    assert len(seen) == 1 and len(seen[0]) == 16 and all("/train/" in item for item in seen[0])


def test_protocols_in_the_results_parse():
    """RESULTS.md: each paper's flags are flags, with the sheet's numbers."""
    import tyro
    from conftest import ROOT

    rows = re.findall(r"^\| (.+?) \| `(--mode .+?)`", (ROOT / "RESULTS.md").read_text(), re.M)
    found = {name: tyro.cli(Args, args=flags.split()) for name, flags in rows}
    assert len(found) == 9
    assert found["MoCo v1, v2, linear"].rates == (30.0,) and found["MoCo v1, v2, linear"].solver == "sgd"
    dino = found["DINO, linear, ViT-S"]
    assert (dino.layers, dino.epochs, dino.rates, dino.augment) == ((-4, -3, -2, -1), 100, (0.001,), True)
    assert found["BYOL, linear (C.1)"].rates == (0.4, 0.3, 0.2, 0.1, 0.05)
    assert found["SimCLR, linear (B.6)"].batch_size == 4096
    probe = found["MAE, linear (Table 10)"]
    assert (probe.probe_norm, probe.warmup_epochs, probe.epochs, probe.solver) == (True, 10.0, 90, "sgd")
    mae = found["MAE, fine-tuned, ViT-B"]
    assert (mae.base_lr, mae.layer_decay, mae.warmup_epochs, mae.epochs) == (5e-4, 0.65, 5.0, 100)
    assert (mae.drop_path, mae.mixup, mae.cutmix, mae.label_smoothing) == (0.1, 0.8, 1.0, 0.1)
    assert (mae.weight_decay, mae.batch_size, mae.feature, mae.solver) == (0.05, 1024, "mean", "adamw")


def test_tuned_vits_pool_as_timm(vit_file):
    """MAE: the mean of the patch tokens, with a norm of its own; drop path rises to the last block."""
    backbone = load_backbone(str(vit_file), tunes=True, drop_path=0.1)
    net, state = backbone.net, torch.load(vit_file, weights_only=True)["state_dict"]
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in net.blocks]
    assert [round(rate, 2) for rate in rates] == [0, 0.02, 0.04, 0.06, 0.08, 0.1]
    theirs = timm.models.VisionTransformer(**NANO | {"global_pool": "avg"}).eval()
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert missing == ["fc_norm.weight", "fc_norm.bias"] and unexpected == ["norm.weight", "norm.bias"]
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        expected = theirs((images / 255 - backbone.mean) / backbone.std)
        torch.testing.assert_close(backbone.eval()(images), expected, atol=1e-5, rtol=1e-5)
        assert not torch.equal(backbone.train()(images), backbone.eval()(images))
    assert load_backbone(str(vit_file), tunes=True, feature="cls").net.global_pool == "token"
    with pytest.raises(SystemExit, match="--feature both"):
        load_backbone(str(vit_file), tunes=True, feature="both")


@pytest.mark.parametrize("mode", ["knn", "linear", "finetune"])
def test_vit_in_every_kind_of_mode(vit_file, mode, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"labels": 100, "epochs": 2, "workers": 0, "batch_size": 50}
    options |= {"drop_path": 0.1} if mode == "finetune" else {"layers": (-2, -1)}
    result = evaluate(Args(str(vit_file), mode, **options))
    assert (
        result["n"] == 2048 and result["network"] == f"mae vit_nano {'mean' if mode == 'finetune' else 'cls'}"
    )
    if mode == "finetune":
        (tmp_path / "photos").mkdir()
        for i in range(3):
            simclr.demo_image(i)[0].save(tmp_path / f"photos/{i}.png")
        used = evaluate(Args(str(vit_file), "predict", data="photos", workers=0))
        assert used == {"n": 3, "unreadable": 0}


# Fine-tuning: oracle 3


@pytest.mark.parametrize("decay, lowest", [(0.75, 0.0237573), (0.65, 0.0036972)])
def test_layer_decay_of_a_vit(decay, lowest):
    net = timm.models.VisionTransformer(img_size=16, patch_size=8, embed_dim=8, num_heads=2, num_classes=0)
    backbone = eval_linear.Backbone(net, 16, (0.5,) * 3, (0.5,) * 3, "ViT")
    model = eval_linear.Classifier(backbone, 2)
    groups = eval_linear.layer_groups(model, 0.05, decay)
    assert len(groups) == 28
    params = [p for group in groups for p in group["params"]]
    assert len(params) == len({id(p) for p in params}) == len([*model.parameters()])
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    for at_input in (net.pos_embed, net.cls_token, net.patch_embed.proj.weight):
        assert scale[id(at_input)] == pytest.approx(lowest, rel=1e-5)
    assert scale[id(net.blocks[0].attn.qkv.weight)] == pytest.approx(lowest / decay, rel=1e-5)
    assert scale[id(net.blocks[11].attn.qkv.weight)] == pytest.approx(decay)
    assert scale[id(net.norm.weight)] == scale[id(model.head.weight)] == 1
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert id(net.blocks[0].mlp.fc1.weight) in decayed and id(net.patch_embed.proj.weight) in decayed
    assert not {id(net.pos_embed), id(net.cls_token), id(net.blocks[0].mlp.fc1.bias)} & decayed


def test_layer_decay_of_a_resnet():
    net, _ = simclr.resnet("resnet18", "imagenet")
    model = eval_linear.Classifier(eval_linear.Backbone(net, 32, (0.5,) * 3, (0.5,) * 3, "ResNet"), 2)
    groups = eval_linear.layer_groups(model, 0.0, 0.5)
    assert sorted({group["lr_scale"] for group in groups}) == [0.5**5, 0.5**4, 0.5**3, 0.5**2, 0.5, 1.0]
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert scale[id(net.conv1.weight)] == 0.5**5 and scale[id(net.layer4[0].bn1.weight)] == 0.5


class Rows(torch.utils.data.Dataset):
    """(index, row) of known images, which, as Pictures without augmentation, hang on nothing else."""

    def __init__(self, images):
        self.images, self.items, self.crop, self.key = images, range(len(images)), None, (0, 0)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return index, self.images[index], True


TUNING = {"solver": "sgd", "base_lr": 1.0, "weight_decay": 0.3, "layer_decay": 0.5, "warmup_epochs": 1.0}
TUNING |= {"label_smoothing": 0.1, "batch_size": 8, "epochs": 4, "workers": 0}


def test_finetune_is_a_plain_loop(vit_file, monkeypatch):
    """Warm-up, cosine, rates by layer, decay of matrices alone and smoothing, by hand; mostly in float64."""
    images = torch.randint(0, 256, (24, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    labels, rates, sgd = torch.arange(24) % 2, [], torch.optim.SGD.step

    def watched(self, *rest):
        rates.append([group["lr"] for group in self.param_groups])
        return sgd(self, *rest)

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    torch.set_default_dtype(DOUBLE)
    try:
        backbone, slow = (load_backbone(str(vit_file), tunes=True) for _ in range(2))
        head = eval_linear.finetune(backbone, Rows(images), labels, 2, Args(**TUNING), torch.device("cpu"))
        torch.manual_seed(hash((0, 0)) % 2**32)
        layer = torch.nn.Linear(128, 2)
        torch.nn.init.trunc_normal_(layer.weight, std=2e-5)
        torch.nn.init.zeros_(layer.bias)
    finally:
        torch.set_default_dtype(torch.float32)
    named = [(name, p) for name, p in slow.net.named_parameters() if p.requires_grad]
    named += [("head.weight", layer.weight), ("head.bias", layer.bias)]
    sampler = torch.utils.data.distributed.DistributedSampler(Rows(images), 1, 0, seed=0)
    momentum, step = {name: torch.zeros_like(p) for name, p in named}, 0
    for epoch in range(4):
        sampler.set_epoch(epoch)
        for batch in torch.tensor(list(sampler)).split(8):
            lr = 8 / 256 * (step / 3 if step < 3 else 0.5 + 0.5 * math.cos(math.pi * (step - 3) / 9))
            log_p = torch.log_softmax(layer(slow(images[batch])), dim=1)
            target = 0.05 + 0.9 * torch.eye(2)[labels[batch]]
            grads = torch.autograd.grad(-(target * log_p).sum(dim=1).mean(), [p for _, p in named])
            step += 1
            for (name, p), grad in zip(named, grads, strict=True):
                place = re.match(r"blocks\.(\d)|patch|cls", name)  # of 6 blocks; norm and head: 7
                depth = 7 if not place else int(place[1]) + 1 if place[1] else 0
                decays = p.ndim > 1 and name != "cls_token"
                momentum[name] = 0.9 * momentum[name] + grad + 0.3 * decays * p.detach()
                p.data -= lr * 0.5 ** (7 - depth) * momentum[name]
    found = [p for p in backbone.net.parameters() if p.requires_grad] + [head[0].T, head[1]]
    for (name, expected), p in zip(named, found, strict=True):
        torch.testing.assert_close(p, expected.detach(), atol=1e-7, rtol=1e-5, msg=name)
    ratios = torch.tensor(rates[1:], dtype=DOUBLE) / torch.tensor(rates[1:]).amax(dim=1, keepdim=True)
    assert rates[0] == [0.0] * len(rates[0]) and torch.allclose(ratios, ratios[:1]) and len(rates) == 12
    assert sorted({round(ratio, 6) for ratio in ratios[0].tolist()}) == [
        round(0.5**i, 6) for i in range(7, -1, -1)
    ]
    fixed = torch.load(vit_file, weights_only=True)["state_dict"]["pos_embed"]
    assert torch.equal(backbone.net.pos_embed.float(), fixed)


def test_finetune_hangs_on_no_worker(vit_file):
    """Mixing and drop path draw the same, whoever has read the images."""
    labels, found = torch.arange(16) % 2, []
    for workers in (0, 1):
        args = Args(
            **TUNING | {"mixup": 0.8, "cutmix": 1.0, "drop_path": 0.5, "workers": workers, "epochs": 1}
        )
        backbone = load_backbone(str(vit_file), tunes=True)
        pictures = eval_linear.Pictures(list(range(16)), 32, eval_linear.random_crop(32, 0.5))
        found.append(eval_linear.finetune(backbone, pictures, labels, 2, args, torch.device("cpu"))[0])
    assert torch.equal(*found)


def test_mixing_is_timms(vit_file, monkeypatch):
    """Targets of timm's Mixup, smoothed by the loss as timm smooths them; drawn anew in each step."""
    seen, cross_entropy = [], torch.nn.functional.cross_entropy
    monkeypatch.setattr(
        eval_linear.F, "cross_entropy", lambda x, y, **k: seen.append(y) or cross_entropy(x, y, **k)
    )
    images = torch.randint(0, 256, (8, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    for mixing in ({"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}):
        args, seen[:] = Args(**TUNING | {"epochs": 3} | mixing), []
        backbone = load_backbone(str(vit_file), tunes=True)
        eval_linear.finetune(backbone, Rows(images), torch.arange(8) % 2, 2, args, torch.device("cpu"))
        shares = [targets.amax(dim=1).min().item() for targets in seen]
        assert len(seen) == 3 and len(set(shares)) == 3 and all(t.shape == (8, 2) for t in seen)
        assert all(torch.allclose(t.sum(dim=1), torch.ones(8)) for t in seen)
    smooth = timm.data.mixup.mixup_target(torch.tensor([0, 1]), 2, 0.7, 0.1)
    plain = timm.data.mixup.mixup_target(torch.tensor([0, 1]), 2, 0.7, 0.0)
    logits = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    torch.testing.assert_close(
        cross_entropy(logits, plain, label_smoothing=0.1), cross_entropy(logits, smooth), rtol=1e-6, atol=0
    )


def test_batches_too_small(vit_file, monkeypatch):
    net, device = simclr.resnet("resnet18", "imagenet")[0], torch.device("cpu")
    backbone = eval_linear.Backbone(net, 32, eval_linear.MEAN, eval_linear.STD, "simclr resnet18")
    with pytest.raises(SystemExit, match="--batch-size 1: 1 of 4 images .* too few for this network"):
        pictures = Rows(torch.zeros(4, 3, 32, 32))
        eval_linear.finetune(backbone, pictures, torch.arange(4) % 2, 2, Args(batch_size=1), device)
    features, labels = clusters(9)
    for batch_size in (1, 2):  # of 9 images the fifth batch of 2 has one
        with pytest.raises(SystemExit, match=f"--batch-size {batch_size}: with --probe-norm no batch may"):
            linear_probe(
                features, labels, alone(labels), 3, Args(batch_size=batch_size, probe_norm=True, rates=(1.0,))
            )
    monkeypatch.setattr(eval_linear, "processes", lambda: (0, 8))
    with pytest.raises(SystemExit, match="--batch-size 256: 0 of 4 images for each process"):
        backbone = load_backbone(str(vit_file), tunes=True)
        eval_linear.finetune(backbone, pictures, torch.arange(4) % 2, 2, Args(), device)


# Counting: oracles 6 and 7, and labels


def test_accuracy_counts():
    labels = torch.tensor([0] * 9 + [1])
    result = accuracy(torch.tensor([[1.0, 0.0]]).repeat(10, 1), labels)
    assert result == {"top1": 90.0, "top5": 100.0, "mean_per_class": 50.0, "n": 10}
    scores = torch.arange(10.0).repeat(10, 1)
    result = accuracy(scores, torch.arange(10))
    assert (result["top1"], result["top5"], result["n"]) == (10.0, 50.0, 10)


def test_features_in_two_processes_count_every_image_once(tmp_path, backbone_file):
    run_processes(
        tmp_path,
        f"""
import torch, torch.distributed as dist, eval_linear
backbone = eval_linear.load_backbone({str(backbone_file)!r})
pictures = eval_linear.Pictures(list(range(11)), 32)
alone = eval_linear.extract_features(backbone, pictures, 4)
dist.init_process_group("gloo")
both = eval_linear.extract_features(backbone, pictures, 4)
assert both.shape == (11, 512) and (both - alone).abs().max() < 1e-5 and alone.norm(dim=1).min() > 0.1
dist.destroy_process_group()
""",
    )


def test_finetune_in_two_processes_is_finetune_in_one(tmp_path, vit_file):
    """The same crops, batches and so weights: random numbers hang on seed, epoch and image alone."""
    run_processes(
        tmp_path,
        f"""
import torch, torch.distributed as dist, eval_linear
args = eval_linear.Args({str(vit_file)!r}, "finetune", workers=0, batch_size=8, base_lr=1.0, epochs=1)
items, labels = list(range(40)), torch.arange(40) % 2
def tuned():
    backbone = eval_linear.load_backbone(args.backbone, tunes=True)
    pictures = eval_linear.Pictures(items, 32, eval_linear.random_crop(32, 0.5))
    weight, bias, _ = eval_linear.finetune(backbone, pictures, labels, 2, args, torch.device("cpu"))
    return torch.cat([p.detach().flatten() for p in (*backbone.parameters(), weight.T, bias)])
sampler = eval_linear.DistributedSampler
class Whole(sampler):
    def __iter__(self):  # the batches that two processes see together
        parts = [list(sampler(self.dataset, 2, rank, seed=self.seed, drop_last=True)) for rank in (0, 1)]
        return iter([i for k in range(0, 20, 4) for part in parts for i in part[k : k + 4]])
eval_linear.DistributedSampler = Whole
torch.manual_seed(0)
alone = tuned()
eval_linear.DistributedSampler = sampler
dist.init_process_group("gloo")
both = tuned()
assert (both - alone).abs().max() < 1e-5, (both - alone).abs().max()
start = eval_linear.load_backbone(args.backbone, tunes=True)
assert (torch.cat([p.detach().flatten() for p in start.parameters()]) - both[: -258]).abs().max() > 1e-4
dist.destroy_process_group()
""",
    )


MODES = ("knn", "linear", "logreg")


def test_two_processes_write_what_one_writes(tmp_path, backbone_file, monkeypatch):
    (tmp_path / "photos").mkdir()
    for i in range(5):
        simclr.demo_image(i)[0].save(tmp_path / f"photos/{i}.png")
    for i in range(80):
        folder = tmp_path / "data" / ("train" if i < 60 else "val") / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        simclr.demo_image(i)[0].save(folder / f"{i}.png")
    code = f"""
import os, torch.distributed as dist, eval_linear
if os.environ["WORLD_SIZE"] != "1":  # one group for all of it: a second one finds no free port
    dist.init_process_group("gloo")
    dist.init_process_group = dist.destroy_process_group = lambda *_: None
def do(mode, data, **flags):
    flags |= {{"workers": 0, "device": "cpu", "k": (5,), "epochs": 2}}
    eval_linear.evaluate(eval_linear.Args({str(backbone_file)!r}, mode, data=data, **flags))
for mode in ("knn", "linear", "logreg", "features"):
    do(mode, "data")
do("predict", "photos")
do("knn", "demo", labels=40)
"""
    written = []
    for n in (1, 2):
        printed = run_processes(tmp_path, code, n).stdout
        assert printed.count("60 labels, 20 test images, 1 repetitions") == 3
        assert printed.count("5 images, 0 of them cannot be read; by ") == 1
        found = [json.loads((backbone_file.parent / f"eval-{mode}-data.json").read_text()) for mode in MODES]
        found = [(result["top1"], result["n"]) for result in found]
        features = torch.load(backbone_file.parent / "features-data.pt")["features"]
        predictions = (backbone_file.parent / "predictions-photos.csv").read_text()
        written.append((found, predictions, features))
    assert written[0][:2] == written[1][:2]
    torch.testing.assert_close(written[0][2], written[1][2], atol=1e-5, rtol=1e-5)


def test_a_backbone_that_changes_is_noticed(backbone_file):
    """Oracle 10, the other way: BatchNorm's buffers that move."""
    backbone = load_backbone(str(backbone_file))
    backbone.eval = backbone.train
    with pytest.raises(RuntimeError, match="the frozen backbone has changed"):
        eval_linear.extract_features(backbone, eval_linear.Pictures(list(range(9)), 32))


def test_subsets_and_folds_are_stratified():
    labels = torch.arange(1000) % 10
    chosen = eval_linear.stratified_subset(labels, 47, 0)
    counts = labels[chosen].bincount(minlength=10)
    assert len(chosen.unique()) == 47 and sorted(counts.tolist()) == [4] * 3 + [5] * 7
    assert not torch.equal(chosen, eval_linear.stratified_subset(labels, 47, 1))
    fold = eval_linear.stratified_folds(labels[chosen], alone(chosen), 5, 0)
    assert max(fold.bincount()) - min(fold.bincount()) <= 1
    assert all(max(fold[labels[chosen] == c].bincount(minlength=5)) == 1 for c in range(10))


# Backbones


def test_backbone_is_frozen_and_random_is_another(backbone_file):
    backbone = load_backbone(str(backbone_file))
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    mark = eval_linear.fingerprint(backbone)
    eval_linear.extract_features(backbone.train(), eval_linear.Pictures(list(range(20)), 32))
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.state_dict().items())
    assert eval_linear.fingerprint(backbone) == mark
    backbone.train()(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))  # moves BatchNorm's buffers
    assert eval_linear.fingerprint(backbone) != mark
    marks = {eval_linear.fingerprint(load_backbone(f"random:{backbone_file}", seed)) for seed in (1, 2)}
    assert len(marks | {mark}) == 3
    pixels = load_backbone("pixels", side=8)
    assert pixels(torch.full((2, 3, 8, 8), 255, dtype=torch.uint8)).shape == (2, 192)


# The user's story, and what goes wrong


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["path", "label"], *rows])


def test_47_labels_for_a_flat_folder(photos, tmp_path, backbone_file, monkeypatch):
    """A flat copy of 400 photos, 47 labels in a csv, logreg in 5 folds, then predictions for all of them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flat").mkdir()
    truth = {}
    for name in ("airplane", "frog"):
        for file in sorted((photos / "train" / name).iterdir())[:200]:
            shutil.copy(file, tmp_path / "flat" / f"{name[0]}{file.name}")
            truth[f"{name[0]}{file.name}"] = name
    rows = sorted(truth.items(), key=lambda row: row[0][1:])[:47]
    write_csv("labels.csv", rows)
    options = {"backbone": str(backbone_file), "data": "flat", "workers": 0}
    result = evaluate(Args(mode="logreg", labels_csv="labels.csv", **options))
    assert result["top1"] > 65 and result["n"] == 47 and len(result["results"][0]["choice"]) == 5
    evaluate(Args(mode="predict", **options))
    with open(backbone_file.parent / "predictions-flat.csv", newline="") as file:
        predictions = list(csv.DictReader(file))
    held_back = [row for row in predictions if row["path"] not in dict(rows)]
    assert len(predictions) == 400 and len(held_back) == 353
    assert sum(row["class"] == truth[row["path"]] for row in held_back) / 353 > 0.65
    assert all(0.5 <= float(row["probability"]) <= 1 for row in predictions)


@pytest.mark.parametrize("mode", ["knn", "logreg", "linear", "features", "finetune"])
def test_every_mode_on_class_folders(photos, tmp_path, backbone_file, mode, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split, count in (("train", 30), ("val", 10)):
        for name in ("airplane", "frog"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for file in sorted((photos / split / name).iterdir())[:count]:
                shutil.copy(file, tmp_path / "data" / split / name)
    options = {
        "backbone": str(backbone_file),
        "data": "data",
        "mode": mode,
        "workers": 0,
        "epochs": 3,
        "k": (5,),
    }
    result = evaluate(Args(**options, seeds=2, labels=40, batch_size=16))
    if mode == "features":
        features = torch.load(backbone_file.parent / "features-data.pt")["features"]
        assert features.shape == (80, 512)
        return
    assert result["n"] == 20 and result["labels"] == 40 and result["top1"] >= 50 and result["top5"] == 100
    written = json.loads((backbone_file.parent / f"eval-{mode}-data.json").read_text())
    keys = {"mode", "top1", "top5", "mean_per_class", "n", "feature", "labels", "seeds", "backbone"}
    assert keys < set(written) and written["top1"] == result["top1"]
    if mode == "knn":  # two k: the first is reported, whichever is better
        both = evaluate(Args(**(options | {"k": (5, 1)})))
        assert both["top1"] == both["results"][0]["top1"] and len(both["results"]) == 2
    if mode != "knn":
        monkeypatch.chdir(backbone_file.parent)
        evaluate(Args(backbone="backbone.pt", data="../data", mode="predict", workers=0))
        assert len((backbone_file.parent / "predictions-data.csv").read_text().splitlines()) == 81


def test_every_option_of_finetune_together(tmp_path, backbone_file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"solver": "adamw", "base_lr": 1e-3, "layer_decay": 0.75, "mixup": 0.8, "cutmix": 1.0}
    options |= {"label_smoothing": 0.1, "rand_augment": True, "warmup_epochs": 1.0, "weight_decay": 0.05}
    result = evaluate(
        Args(str(backbone_file), "finetune", labels=64, epochs=2, batch_size=16, workers=0, **options)
    )
    assert result["labels"] == 64 and result["n"] == 2048


def test_finetune_starts_each_fold_from_the_backbone(tmp_path, backbone_file, monkeypatch):
    """What a fold has seen must not reach the next one, which is tested on it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flat").mkdir()
    for i in range(15):
        simclr.demo_image(i)[0].save(tmp_path / f"flat/{i}.png")
    write_csv("two.csv", [(f"{i}.png", "ab"[i % 2]) for i in range(15)])
    started, tune = [], eval_linear.finetune

    def watched(backbone, *rest):
        started.append(eval_linear.fingerprint(backbone))
        return tune(backbone, *rest)

    monkeypatch.setattr(eval_linear, "finetune", watched)
    options = {"data": "flat", "labels_csv": "two.csv", "epochs": 1, "workers": 0}
    result = evaluate(Args(str(backbone_file), "finetune", **options))
    assert result["n"] == 15 and len(started) == 6 and len(set(started)) == 1


def test_watch_follows_a_run(tmp_path, backbone_file):
    """k-NN of each backbone.pt that appears, also when the file is replaced while it is read."""
    import signal
    import subprocess
    import sys
    import time

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = backbone_file.parent
    words = [sys.executable, eval_linear.__file__, "--watch", str(run), "--labels", "50", "--workers", "0"]
    listening = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # in the background too
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(words, text=True, **pipes, **listening)

    def steps():
        board = EventAccumulator(str(run)).Reload()
        return [event.step for event in board.Scalars("eval/knn_top1")] if board.Tags()["scalars"] else []

    def wait_for(expected):
        start = time.time()
        while steps() != expected:
            assert process.poll() is None and time.time() - start < 120, steps()
            time.sleep(0.5)

    try:
        wait_for([0])  # no metrics.jsonl yet
        (run / "metrics.jsonl").write_text('{"step": 5}\n{"step": 10}\n')
        state = torch.load(backbone_file, weights_only=True)
        simclr.save_checkpoint(backbone_file, **state)
        wait_for([0, 10])
    finally:
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in output, output


def test_watch_ends_as_quietly_while_it_measures(tmp_path, monkeypatch, backbone_file):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(eval_linear, "extract_features", interrupted)
    assert evaluate(Args(watch=str(backbone_file.parent), labels=50, workers=0)) == {}


def flat(tmp_path, n):
    (tmp_path / "flat").mkdir()
    for i in range(n):
        simclr.demo_image(i)[0].save(tmp_path / f"flat/{i}.png")
    write_csv(tmp_path / "two.csv", [(f"{i}.png", "ab"[i % 2]) for i in range(n)])
    return {"data": str(tmp_path / "flat"), "labels_csv": str(tmp_path / "two.csv"), "workers": 0}


def test_rows_are_by_the_k_asked_for(tmp_path, monkeypatch, capsys):
    """Also where folds have fewer labels, each another number of them; the labels are those of a fold."""
    monkeypatch.chdir(tmp_path)
    result = evaluate(Args("pixels", "knn", side=8, k=(20, 200, 20), **flat(tmp_path, 12)))
    assert len(result["results"]) == 2 and result["n"] == 12 and result["labels"] == 10
    assert [choice["used"] for choice in result["results"][0]["choice"]] == [9, 9, 10, 10, 10]
    assert result["top1"] == result["results"][0]["top1"] and result["results"][0]["row"] == "k 20"
    printed = capsys.readouterr().out
    assert "10 labels, 12 test images" in printed and printed.count("+-") == 2


@pytest.mark.parametrize("how", [{"labels": 6}, {}])
def test_the_head_learns_from_as_many_labels_as_the_folds(tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    learnt, fit = [], eval_linear.logreg
    monkeypatch.setattr(eval_linear, "logreg", lambda x, *rest: learnt.append(len(x)) or fit(x, *rest))
    result = evaluate(Args("pixels", "logreg", side=8, **how, **flat(tmp_path, 15)))
    assert learnt == ([6] * 6 if "labels" in how else [12] * 5 + [15]) and result["labels"] == learnt[0]
    written = json.loads(next((tmp_path / "runs/pixels").glob("eval-logreg-*flat*two.json")).read_text())
    assert written["labels"] == learnt[0] and not list(tmp_path.rglob("*.tmp"))


def test_features_that_are_not_finite(backbone_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = torch.load(backbone_file, weights_only=True)
    state["state_dict"]["conv1.weight"][0] = math.nan
    torch.save(state, backbone_file)
    for mode in ("knn", "logreg", "features"):
        data = flat(tmp_path / mode, 10) if (tmp_path / mode).mkdir() is None else {}
        with pytest.raises(SystemExit, match="simclr resnet18: its features are not finite; give --amp off"):
            evaluate(Args(str(backbone_file), mode, **data))
    assert not list(backbone_file.parent.glob("eval-*"))


def test_flags_without_effect(backbone_file, vit_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in (("layers", (-4, -1)), ("feature", "mean"), ("drop_path", 0.1)):
        flag = name.replace("_", "-")
        for path in (str(backbone_file), "pixels"):
            refused(
                f"--{flag}: has no effect on .*leave it out", backbone=path, mode="finetune", **{name: value}
            )
    refused("--drop-path: is for --mode finetune", backbone=str(vit_file), mode="knn", drop_path=0.1)
    refused("--layers: has no effect", backbone=str(vit_file), mode="finetune", layers=(1,))
    net = torchvision.models.get_model("squeezenet1_0", num_classes=2)
    model = eval_linear.Classifier(eval_linear.Backbone(net, 64, (0.5,) * 3, (0.5,) * 3, "net"), 2)
    with pytest.raises(SystemExit, match="--layer-decay 0.7: finds no layers"):
        eval_linear.layer_groups(model, 0.0, 0.7)
    assert {group["lr_scale"] for group in eval_linear.layer_groups(model, 0.0, 1.0)} == {1.0}
    net = timm.create_model("test_convnext", num_classes=0)  # has stages, but a stem of another name
    model = eval_linear.Classifier(eval_linear.Backbone(net, 64, (0.5,) * 3, (0.5,) * 3, "net"), 2)
    with pytest.raises(SystemExit, match="--layer-decay 0.7: finds no layers"):
        eval_linear.layer_groups(model, 0.0, 0.7)


class Kept(torch.utils.data.Dataset):
    """A torchvision data set that keeps its labels and counts the images decoded."""

    decoded = 0

    def __init__(self, root, download, train):
        self.classes, self.n = ["a", "b"], 12 if train else 6

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        type(self).decoded += 1
        return simclr.demo_image(index)[0], index % 2


@pytest.mark.parametrize("name", ["targets", "labels", "_labels", ""])
def test_labels_of_a_torchvision_set(tmp_path, monkeypatch, name):
    """Where it keeps them no image is decoded; features.pt says which image a row is of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torchvision.datasets, "Kept", Kept, raising=False)
    monkeypatch.setattr(Kept, name or "other", property(lambda self: [i % 2 for i in range(self.n)]), False)
    monkeypatch.setattr(Kept, "decoded", 0)
    _, labels, classes, _, is_test = eval_linear.read_labels("Kept")
    assert labels.tolist() == [0, 1] * 9 and labels.dtype == torch.int64 and is_test.sum() == 6
    assert classes == ["a", "b"] and Kept.decoded == (0 if name else 18)
    evaluate(Args("pixels", "features", data="Kept", side=8, workers=0))
    items = torch.load(tmp_path / "runs/pixels/features-Kept.pt", weights_only=True)["items"]
    assert items == [str(i) for i in [*range(12), *range(6)]]


def test_why_a_data_set_cannot_be_had(monkeypatch):
    """The reason of the try that had the right keywords."""

    class Offline:
        def __init__(self, root, download, train):
            raise RuntimeError("no network here")

    monkeypatch.setattr(torchvision.datasets, "Offline", Offline, raising=False)
    with pytest.raises(SystemExit, match="--data Offline: no folder, no download .no network here."):
        eval_linear.read_labels("Offline")
    with pytest.raises(SystemExit, match="torchvision has no data set of this name"):
        eval_linear.read_labels("Nonsense")


def test_one_process_downloads(tmp_path):
    run_processes(
        tmp_path,
        """
import os, time, torchvision, torch.distributed as dist, eval_linear
class Slow:
    classes, targets = ["a", "b"], [0, 1]
    def __init__(self, root, download, train):
        if dist.get_rank():
            assert os.path.exists("there")
        time.sleep(0.5)
        open("there", "w").close()
    def __len__(self):
        return 2
torchvision.datasets.Slow = Slow
dist.init_process_group("gloo")
assert len(eval_linear.read_labels("Slow").items) == 4
try:
    eval_linear.evaluate(eval_linear.Args(watch=".", device="cpu", labels=0))
except (SystemExit, ValueError) as error:
    assert "--watch .: works without torchrun" in str(error) or "twice" in str(error), error
dist.destroy_process_group()
""",
    )


def test_pictures_without_augmentation(tmp_path):
    """Above 32 pixels the middle 87.5 % of each side, resized; at most 32 the whole."""
    from PIL import Image

    image = Image.frombytes("RGB", (128, 160), torch.arange(128 * 160 * 3).byte().numpy().tobytes())
    image = image.resize((16, 20)).resize((128, 160))  # smooth
    image.save(tmp_path / "a.png")
    for side, cut in ((64, 8), (32, 0)):
        box = cut, 16 + cut, 128 - cut, 144 - cut  # of the square in the middle
        slow = image.resize((side, side), Image.BICUBIC, box=box)
        found = eval_linear.Pictures([str(tmp_path / "a.png")], side)[0][1]
        assert torch.equal(found, torchvision.transforms.v2.functional.pil_to_tensor(slow))


def refused(match, **options):
    with pytest.raises(SystemExit, match=match) as stop:
        evaluate(Args(workers=0, **options))
    assert "\n" not in str(stop.value)


def test_bad_input_for_a_vit(vit_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused("--layers .*give some of -6 .. 5", backbone=str(vit_file), layers=(99,))
    refused("--side 50: must be a multiple of the patches' 8 pixels", backbone=str(vit_file), side=50)
    options = {"labels": 40, "epochs": 2, "batch_size": 20}
    diverges = {"backbone": str(vit_file), "mode": "finetune", "base_lr": 1e12}
    refused("--mode finetune: the loss is .* in epoch .*; lower --base-lr", **diverges, **options)
    monkeypatch.setattr(eval_linear, "check_flags", lambda *_: None)  # which refuses such rates
    diverges = {"backbone": str(vit_file), "rates": (1e38,)}
    refused("--mode linear: weights are not finite; lower --rates", **diverges, **options)
    assert not (vit_file.parent / "head.pt").exists()


def test_untrained_weights_keep_their_seed_for_predict(tmp_path, backbone_file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    simclr.demo_image(3)[0].save(tmp_path / "photos/a.png")
    backbone = f"random:{backbone_file}"
    evaluate(Args(backbone, "logreg", labels=30, seeds=2, workers=0))
    assert evaluate(Args(backbone, "predict", data="photos", workers=0))["n"] == 1
    assert (backbone_file.parent / "random-predictions-photos.csv").exists()


def test_bad_input(tmp_path, backbone_file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flat").mkdir()
    for i in range(8):
        simclr.demo_image(i)[0].save(tmp_path / "flat" / f"{i}.png")
    good = {"backbone": str(backbone_file), "data": "flat"}
    write_csv("missing.csv", [("0.png", "a"), ("nine.png", "b")])
    refused("missing.csv: names 1 missing files, first flat/nine.png", **good, labels_csv="missing.csv")
    write_csv("one.csv", [("0.png", "a"), ("1.png", "a")])
    refused(r"one.csv: has one class \(a 2\), two or more are needed", **good, labels_csv="one.csv")
    write_csv("few.csv", [(f"{i}.png", f"class{i}") for i in range(5)])
    refused("few.csv: each class has one image or group: none can", **good, labels_csv="few.csv", mode="knn")
    write_csv("four.csv", [(f"{i}.png", "ab"[i % 2]) for i in range(4)])
    refused("4 images or groups are too few for 5 folds", **good, labels_csv="four.csv", mode="knn")
    refused("nowhere.csv: .*No such file", **good, labels_csv="nowhere.csv")
    refused("--data flat: no class folder around flat/0.png; give --labels-csv", **good)
    refused("no folder, no download", backbone=str(backbone_file), data="nowhere")
    refused("no such file, nor a network of torchvision; python simclr.py trains one", backbone="nothing.pt")
    (tmp_path / "bad.pt").write_text("no weights")
    refused("bad.pt: cannot be loaded", backbone="bad.pt")
    refused(
        "--head run/head.pt: missing or damaged; --mode logreg",
        **good | {"backbone": "run/backbone.pt"},
        mode="predict",
    )
    refused("--layer-decay 2.0: must be above 0 and at most 1", **good, layer_decay=2.0)
    flags = {"backbone": "pixels", "labels": 9999, "mode": "knn"}
    refused("--labels 9999: must be 10, one of each class, to all 4096", **flags)
    refused("--k .*must be above 0", backbone="pixels", k=(0,))
    refused(
        "--warmup-epochs 9.0: must be at least 0 and at most 3",
        backbone="pixels",
        warmup_epochs=9.0,
        epochs=3,
    )
    refused("--warmup-epochs 31.0: .*at most 30", backbone="pixels", warmup_epochs=31.0, mode="finetune")
    refused("--warmup-epochs 101.0: .*at most 100", backbone="pixels", warmup_epochs=101.0)
    refused("--watch run/nowhere: no such folder", backbone="pixels", watch="run/nowhere")
    assert not (tmp_path / "run/nowhere").exists()
    (tmp_path / "long.csv").write_text("0.png," + 2**18 * "a")
    refused("long.csv: field larger than field limit", **good, labels_csv="long.csv")
    state = torch.load(backbone_file, weights_only=True)
    weights = {f"module.{name}": tensor for name, tensor in state["state_dict"].items()}
    torch.save(state | {"state_dict": weights}, "prefix.pt")
    refused("prefix.pt: cannot be loaded", backbone="prefix.pt", mode="knn")
    (tmp_path / "empty").mkdir()
    refused("empty: no images found", backbone=str(backbone_file), data="empty", mode="features")
    refused("empty: no images found", backbone=str(backbone_file), data="empty", mode="knn")
    torch.save({"model": {}}, "official.pt")
    refused("official.pt: cannot be loaded", backbone="official.pt")
    write_csv("two.csv", [(f"{i}.png", "ab"[i % 2]) for i in range(8)])
    evaluate(Args(**good, labels_csv="two.csv", mode="logreg", workers=0))
    refused(
        "was trained on another backbone",
        backbone="pixels",
        data="flat",
        mode="predict",
        head="run/head-logreg-flat-two.pt",
    )


def test_published_networks_of_torchvision_and_timm(monkeypatch):
    """Their last linear layer is off, their side and statistics are their own; no download in this test."""
    get_model, create_model = torchvision.models.get_model, timm.create_model
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights: get_model(name))
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **k: create_model(name, **k))
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    for name, dim, layer in (("resnet18", 512, "fc"), ("vit_b_32", 768, "heads"), ("squeezenet1_0", 0, "")):
        torch.manual_seed(0)
        if not dim:
            with pytest.raises(SystemExit, match="--backbone squeezenet1_0: cannot be loaded"):
                load_backbone(name)
            continue
        backbone = load_backbone(name).eval()
        torch.manual_seed(0)
        theirs = get_model(name).eval()
        setattr(theirs, layer, torch.nn.Identity())
        with torch.no_grad():
            pixels = (images / 255 - torch.tensor(eval_linear.MEAN).view(3, 1, 1)) / backbone.std
            torch.testing.assert_close(backbone(images), theirs(pixels), atol=1e-4, rtol=1e-4)
        assert (backbone.dim, backbone.side, backbone.name) == (dim, 224, name)
    backbone = load_backbone("timm:vit_tiny_patch16_224", side=64).eval()
    assert backbone(images[..., :64, :64]).shape == (2, 192) and backbone.side == 64
    assert backbone.mean.flatten().tolist() == [0.5] * 3
    with pytest.raises(SystemExit, match="--backbone timm:vit_nonsense: cannot be loaded"):
        load_backbone("timm:vit_nonsense")
