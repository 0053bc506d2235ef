"""pretext.py against methods/pretext.md and methods/collapse.md."""

import itertools
import json
import math
import re

import pytest
import torch
import tyro
from conftest import run_processes, tiny_args
from PIL import Image

import pretext
from pretext import (
    Args,
    Colorization,
    Jigsaw,
    Rotation,
    ab_gamut,
    annealed_mean,
    is_coloured,
    jigsaw_permutations,
    jigsaw_tiles,
    lab_to_rgb,
    rgb_to_lab,
    rotate_batch,
)

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def random_images(n, size, seed=0):
    return torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(seed)).byte()


# Rotation


def test_rotate_batch_is_exact_and_image_major():
    """Oracle 1; uint8 in, uint8 out."""
    images = random_images(3, 5)
    turned, labels = rotate_batch(images)
    assert turned.shape == (12, 3, 5, 5) and turned.dtype == torch.uint8
    assert labels.tolist() == [0, 1, 2, 3] * 3
    for image, k, x in zip(images.repeat_interleave(4, dim=0), labels.tolist(), turned, strict=True):
        slow = torch.empty_like(image)
        for row, column in itertools.product(range(5), repeat=2):
            r, c = row, column
            for _ in range(k):  # a quarter turn counter-clockwise takes (r, c) to (4 - c, r)
                r, c = 4 - c, r
            slow[:, r, c] = image[:, row, column]
        assert torch.equal(x, slow)
    again = images
    for _ in range(4):
        again = rotate_batch(again)[0][1::4]
    assert torch.equal(again, images)
    quarter = rotate_batch(torch.tensor([[[[0, 1, 2], [3, 4, 5], [6, 7, 8]]]]))[0][1, 0]
    assert quarter.tolist() == [[2, 5, 8], [1, 4, 7], [0, 3, 6]]


def test_a_flip_after_the_turn_would_make_two_answers_one():
    """flip(rot90) = rot270(flip): so random_crop flips before rotate_batch turns."""
    turned = rotate_batch(random_images(1, 6))[0]
    flipped = rotate_batch(random_images(1, 6).flip(3))[0]
    assert torch.equal(turned[1].flip(2), flipped[3])


def test_rotation_answers_all_turns_of_the_batch():
    task = Rotation(Args())
    inputs, targets = task.batch(random_images(5, 32), task.draw(5, None))
    assert inputs.shape == (5, 4, 3, 32, 32) and targets.tolist() == [[0, 1, 2, 3]] * 5
    logits, h = task.eval()(inputs)
    assert logits.shape == (20, 4) and h.shape == (20, 512)
    torch.testing.assert_close(logits[6], task(inputs[1:2])[0][2])
    assert task.answers(targets) == 20
    sure = 50 * torch.nn.functional.one_hot(targets.flatten(), 4)
    assert task.right(sure, targets).all() and task.loss(sure, targets)[0].sum() < 1e-6


# Jigsaw


def distances(permutations):
    different = (permutations[:, None] != permutations).sum(dim=2)
    return different[~torch.eye(len(permutations), dtype=bool)]


@pytest.mark.parametrize("n, least, mean", [(24, 7, 8.315), (64, 7, 8.12), (100, 6, 8.03)])
def test_jigsaw_permutations(n, least, mean):
    """Oracle 3 and the distances of the sheet's section 4; at most its upper bound of the mean."""
    permutations = jigsaw_permutations(n)
    assert permutations.shape == (n, 9) and (permutations.sort(dim=1).values == torch.arange(9)).all()
    assert len({tuple(row) for row in permutations.tolist()}) == n
    found = distances(permutations).float()
    q, r = divmod(n, 9)
    bound = 9 * (1 - (r * (q + 1) * q + (9 - r) * q * (q - 1)) / (n * (n - 1)))
    assert found.min() == least and mean <= found.mean().item() <= bound + 1e-4
    assert torch.equal(permutations, jigsaw_permutations(n))


@pytest.mark.parametrize("size, cell, tile", [(32, 10, 8), (64, 21, 16), (96, 32, 24), (255, 85, 64)])
def test_sizes_of_tiles(size, cell, tile):
    task = Jigsaw(Args(task="jigsaw", image_size=size, permutations=4))
    assert (task.cell, task.tile) == (cell, tile)
    corners = task.draw(400, torch.Generator().manual_seed(0))[:, 2:]
    assert corners.min() == 0 and corners.max() == cell - tile  # both ends are reached, none passed


def test_jigsaw_tiles_are_cut_from_their_own_cell(generator):
    """Against loops; slot t shows tile perm[t], each channel at its own corner."""
    images = torch.rand(4, 3, 32, 32, generator=generator)
    permutations = torch.stack([torch.randperm(9, generator=generator) for _ in range(4)])
    corners = torch.randint(0, 3, (4, 9, 3, 2), generator=generator)
    tiles = jigsaw_tiles(images, permutations, corners, 8)
    for b, t, c in itertools.product(range(4), range(9), range(3)):
        row, column = divmod(permutations[b, t].item(), 3)
        y, x = (10 * torch.tensor([row, column]) + corners[b, t, c]).tolist()
        assert torch.equal(tiles[b, t, c], images[b, c, y : y + 8, x : x + 8])
    fixed = torch.zeros_like(corners)
    back = jigsaw_tiles(images, permutations, fixed, 8).gather(  # the inverse permutation restores
        1, permutations.argsort(dim=1)[:, :, None, None, None].expand_as(tiles)
    )
    assert torch.equal(back, jigsaw_tiles(images, torch.arange(9).expand(4, 9), fixed, 8))


def test_jigsaw_batch():
    """Oracle 4: tiles of mean 0 and deviation 1; gray images and shifted colours as the sheet has them."""
    task = Jigsaw(Args(task="jigsaw", image_size=64, permutations=30))
    images = random_images(300, 64)
    images[0, :, :21, :21] = 7  # a flat tile divides by 1, not by 0
    numbers = task.draw(300, torch.Generator().manual_seed(0))
    inputs, labels = task.batch(images, numbers)
    assert inputs.shape == (300, 9, 3, 16, 16) and set(labels.tolist()) == set(range(30))
    flat = inputs[0, task.permutations[labels[0]].argsort()[0]]
    assert torch.isfinite(inputs).all() and flat.abs().max() < 1e-3
    assert inputs[1:].mean(dim=(3, 4)).abs().max() < 1e-5
    assert (inputs[1:].std(dim=(3, 4)) - 1).abs().max() < 1e-3
    gray = numbers[:, 1] > 0
    assert 0.2 < gray.float().mean() < 0.4
    same = (inputs[:, :, 0] - inputs[:, :, 1]).abs().amax(dim=(1, 2, 3)) < 1e-4
    assert torch.equal(same, gray)
    corners = numbers[:, 2:].view(300, 9, 3, 2)
    assert not (corners[gray] != corners[gray][:, :, :1]).any()
    between = (corners[~gray][:, :, 0] - corners[~gray][:, :, 1]).abs()
    assert set(between.unique().tolist()) == {0, 1, 2, 3, 4}  # of two shifts of -2..2


def test_jigsaw_column_is_context_free(generator):
    """Oracle 10: permuting the tiles permutes the rows of h, each tile has the same network."""
    task = Jigsaw(Args(task="jigsaw", image_size=64, permutations=9)).eval()
    tiles, order = torch.rand(2, 9, 3, 16, 16, generator=generator), torch.randperm(9, generator=generator)
    logits, h = task(tiles)
    assert logits.shape == (2, 9) and h.shape == (18, 512)
    shuffled = task(tiles[:, order])[1]
    torch.testing.assert_close(shuffled.view(2, 9, -1), h.view(2, 9, -1)[:, order], atol=1e-5, rtol=1e-4)


def test_jigsaw_picture_solves_the_puzzle():
    task = Jigsaw(Args(task="jigsaw", image_size=32, permutations=9, gray=1.0))
    inputs, labels = task.batch(random_images(4, 32), task.draw(4, torch.Generator().manual_seed(1)))
    columns = task.columns(inputs, labels, torch.nn.functional.one_hot(labels, 9).float())
    assert torch.equal(columns["as answered"], columns["right"])
    assert not torch.equal(columns["shuffled"], columns["right"])
    in_order = inputs[torch.arange(4), task.permutations[labels].argsort(dim=1)[:, 0]]  # the first tile
    torch.testing.assert_close(columns["right"][:, :, 1:9, 1:9], in_order / 5 + 0.5)


# Colorization


def plane(colours):
    return torch.tensor(colours, dtype=DOUBLE).view(-1, 3, 1, 1)


def test_rgb_to_lab():
    """Oracle 5."""
    rgb = plane([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 1, 1], [0, 0, 0], [128 / 255] * 3])
    lab = plane(
        [
            [53.2406, 80.0923, 67.2028],
            [87.7351, -86.1830, 83.1797],
            [32.2957, 79.1856, -107.8573],
            [97.1395, -21.5547, 94.4781],
            [100, -0.0025, 0.0047],
            [0, 0, 0],
            [53.5850, -0.0015, 0.0028],
        ]
    )
    torch.testing.assert_close(rgb_to_lab(rgb), lab, atol=1e-4, rtol=0)
    random = torch.rand(8, 3, 20, 20, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    assert (lab_to_rgb(rgb_to_lab(random)) - random).abs().max() < 1e-12
    assert (lab_to_rgb(rgb_to_lab(random.float())) - random.float()).abs().max() < 1e-4
    wild = lab_to_rgb(plane([[50, 300, -300], [120, 0, 0], [-20, 5, 5]]))
    assert torch.isfinite(wild).all() and 0 <= wild.min() and wild.max() <= 1


def test_ab_gamut():
    """Oracle 6, and the rows of the sheet's table."""
    bins = ab_gamut()
    assert bins.shape == (313, 2) and bins.sum(dim=0).tolist() == [4910, 2090]
    assert bins[0].tolist() == [-90, 50] and bins[-1].tolist() == [100, 0] and not bins[120].any()
    rows = [5, 8, 10, 12, 14, 15, 16, 16, 17, 18, 18, 18, 19, 20, 19, 20, 20, 19, 19, 10]
    assert bins[:, 0].unique(return_counts=True)[1].tolist() == rows
    assert bins.tolist() == sorted(bins.tolist())
    limits = {-90: (50, 90), -40: (-40, 100), 0: (-70, 100), 50: (-100, 80), 100: (-90, 0)}
    for a, (low, high) in limits.items():
        b = bins[bins[:, 0] == a, 1]
        assert (b.min(), b.max()) == (low, high) and len(b) == (high - low) / 10 + 1
    colours = rgb_to_lab(torch.cartesian_prod(*[torch.linspace(0, 1, 18)] * 3).T[:, :, None])[1:, :, 0].T
    assert torch.cdist(colours, bins).amin(dim=1).max() < 7.072


def task_of(**flags):
    return Colorization(Args(task="colorization", **flags))


def test_soft_targets():
    """Oracle 7."""
    for k, centre in ((5, 0.6488), (10, 0.6192)):
        task = task_of(neighbors=k)
        index, share = task.encode(torch.zeros(1, 2, 1, 1))
        assert index[0, 0, 0, 0] == 120 and share[0, 0, 0, 0] == pytest.approx(centre, abs=1e-4)
    index, share = task_of().encode(torch.tensor([[0.0, 3], [0, 4]]).view(2, 2, 1, 1).transpose(0, 1))
    share = share.flatten(0, 2)
    assert share[0].tolist() == pytest.approx([0.6488] + [0.0878] * 4, abs=1e-4)
    assert share[1].tolist() == pytest.approx([0.4062, 0.2723, 0.1825, 0.1224, 0.0166], abs=1e-4)
    torch.testing.assert_close(share.sum(dim=1), torch.ones(2))
    names = {(1, 0, 0): (80, 70), (0, 1, 0): (-90, 80), (0, 0, 1): (80, -110)}
    for rgb, nearest in names.items():
        index = task_of().encode(rgb_to_lab(plane([rgb]).float())[:, 1:])[0]
        assert tuple(ab_gamut()[index[0, 0, 0, 0]].tolist()) == nearest


def test_annealed_mean():
    """Oracle 9."""
    bins = torch.tensor([[0.0, 0], [40, 40]])
    logits = torch.tensor([0.6, 0.4]).log().view(1, 2, 1, 1)
    for temperature, value in ((1, 16), (0.38, 10.239), (0.01, 0)):
        ab = annealed_mean(logits, bins, temperature)
        assert ab.flatten().tolist() == pytest.approx([value] * 2, abs=1e-3)
    assert torch.equal(annealed_mean(logits, bins), annealed_mean(logits, bins, 0.38))


def colour_files(tmp_path, gray, n=30):
    """n files of random colours, the first `gray` of them without."""
    (tmp_path / "photos").mkdir()
    for i in range(n):
        image = Image.fromarray(random_images(1, 6, i)[0].permute(1, 2, 0).numpy()).resize((40, 40))
        image.convert("L" if i < gray else "RGB").save(tmp_path / "photos" / f"{i:03d}.png")


def prepared(tmp_path, **flags):
    task, args = task_of(**flags), Args(image_size=16)
    crop = (pretext.random_crop(16, 0.3),)
    data = pretext.Images(str(tmp_path / "photos"), crop, 0, args.image_size, 0.3, 0)
    task.prepare(data, 0)
    return task, torch.stack([data[i][0] for i in range(len(data.items))])


def slow_soft_targets(ab, bins):
    """(pixels, 313) of ab (B, 2, h, w), one at a time, and the nearest bin."""
    soft, nearest = torch.zeros(0, 313), []
    for pixel in ab.movedim(1, 3).reshape(-1, 2):
        distance = (bins - pixel).square().sum(dim=1).sqrt()
        chosen = distance.argsort()[:5]
        z = torch.zeros(313)
        z[chosen] = torch.exp(-distance[chosen].square() / 50)
        soft = torch.cat([soft, (z / z.sum())[None]])
        nearest.append(chosen[0])
    return soft, torch.stack(nearest)


def test_weights_and_constant_answer(tmp_path):
    """Oracle 8, and both against slow versions; gray images are left out."""
    colour_files(tmp_path, gray=10)
    task, images = prepared(tmp_path)
    ab = task.batch(images, None)[1]
    assert ab.shape == (30, 2, 4, 4) and is_coloured(ab).sum() == 20
    soft, nearest = slow_soft_targets(ab[is_coloured(ab)], task.bins)
    p = soft.mean(dim=0)
    weights = 1 / (0.5 * p + 0.5 / 313)
    weights /= (p * weights).sum()
    torch.testing.assert_close(task.weights, weights, atol=1e-4, rtol=1e-4)
    assert (p * task.weights).sum().item() == pytest.approx(1, abs=1e-4) and p.min() == 0
    ratio = task.weights.max() / task.weights.min()
    assert ratio.item() == pytest.approx(1 + 313 * p.max().item(), rel=1e-3)
    best = (weights[nearest][:, None] * soft).mean(dim=0)
    torch.testing.assert_close(task.constant.flatten().softmax(dim=0), best / best.sum(), atol=1e-4, rtol=0)
    even = prepared(tmp_path, rebalance=1.0)[0]
    torch.testing.assert_close(even.weights, torch.ones(313))


def test_colorization_loss(tmp_path, generator):
    """Against a loop over the pixels; a gray image counts nothing and gets no gradient (oracle 10)."""
    colour_files(tmp_path, gray=2, n=6)
    task, images = prepared(tmp_path)
    inputs, ab = task.batch(images, None)
    assert torch.equal(ab, rgb_to_lab(images / 255)[:, 1:, ::4, ::4]) and not is_coloured(ab)[:2].any()
    logits = torch.randn(6, 313, 4, 4, generator=generator, requires_grad=True)
    weighted, plain = task.loss(logits, ab)
    soft, nearest = slow_soft_targets(ab, task.bins)
    slow = -(soft * logits.log_softmax(dim=1).movedim(1, 3).reshape(-1, 313)).sum(dim=1)
    slow = slow * (torch.arange(6) >= 2).repeat_interleave(16)
    torch.testing.assert_close(plain.flatten(), slow, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(weighted.flatten(), slow * task.weights[nearest], atol=1e-4, rtol=1e-4)
    weighted.sum().backward()
    assert not logits.grad[:2].any() and logits.grad[2:].abs().amin(dim=1).min() > 0
    assert task.answers(ab) == 4 * 16
    sure = torch.nn.functional.one_hot(nearest.view(6, 4, 4), 313).movedim(3, 1)
    assert task.right(sure, ab).sum() == 4 * 16


def test_colorization_sees_lightness_alone():
    task = task_of().eval()
    lab = task.batch(random_images(2, 32), None)[0]
    logits, h = task(lab)
    assert logits.shape == (2, 313, 8, 8) and h.shape == (2, 512)
    other = task(lab * torch.tensor([1, -1, 0.5]).view(3, 1, 1))
    assert torch.equal(other[0], logits) and torch.equal(other[1], h)
    light = lab[:, :1].expand(-1, 3, -1, -1) / 100
    normal = pretext.v2.functional.normalize(light, pretext.MEAN, pretext.STD)
    torch.testing.assert_close(task.backbone(normal), h)  # h is what torchvision's network gives
    assert task_of(stem="cifar")(lab)[0].shape == (2, 313, 8, 8)
    columns = task.columns(lab, None, logits)
    torch.testing.assert_close(columns["original"], random_images(2, 32) / 255, atol=1e-3, rtol=0)
    gray = columns["lightness"]
    assert (gray.amax(dim=1) - gray.amin(dim=1)).max() < 1e-3


def test_gray_data_is_an_error(tmp_path):
    colour_files(tmp_path, gray=29)
    flags = {"data": str(tmp_path / "photos"), "task": "colorization", "run_dir": "run"}
    with pytest.raises(SystemExit, match="29 of 30 images are gray.*rotation"):
        pretext.train(tiny_args("pretext", **flags))
    assert not (tmp_path / "run").exists()
    pretext.train(tiny_args("pretext", **(flags | {"task": "rotation"}), epochs=1))


# All tasks


def test_wide_photos_do_not_tell_the_turn():
    """All crops are of the central square, so none is squeezed by more than chance: a disc stays one."""
    y, x = torch.meshgrid(torch.arange(90), torch.arange(160), indexing="ij")
    disc = ((y - 45) ** 2 + (x - 80) ** 2 < 30**2).expand(3, -1, -1).byte() * 255
    assert torch.equal(pretext.central_square(disc), disc[:, :, 35:125])
    assert pretext.central_square(disc.mT).shape == (3, 90, 90)

    def stretch(*crops):
        view = pretext.v2.Compose([*crops, pretext.random_crop(48, 0.6)])
        discs = [view(disc)[0] > 127 for _ in range(300)]
        return sum(math.log(d.any(dim=0).sum() / d.any(dim=1).sum()) for d in discs) / 300

    assert abs(stretch(pretext.central_square)) < 0.04 < 0.1 < abs(stretch())


@pytest.mark.parametrize(
    "flags, floor",
    [
        ({}, 1.3863),
        ({"task": "jigsaw", "permutations": 100}, 4.6052),
        ({"task": "jigsaw", "permutations": 1000}, 6.9078),
        ({"task": "colorization"}, 5.7462),
    ],
)
def test_cross_entropy_of_equal_logits(flags, floor, monkeypatch):
    """Oracle 2, also of the constant answer."""
    monkeypatch.setattr(pretext, "jigsaw_permutations", lambda n: torch.arange(9).repeat(n, 1))
    task = pretext.TASKS[flags.get("task", "rotation")](Args(image_size=48, **flags))
    inputs, targets = task.batch(random_images(4, 48), task.draw(4, torch.Generator().manual_seed(0)))
    logits = task(inputs)[0].detach()
    for equal in (0 * logits, task.constant.expand_as(logits)):
        assert task.loss(equal, targets)[1].mean().item() == pytest.approx(floor, abs=1e-4)


def test_training_is_the_same_in_chunks_and_in_processes(tmp_path):
    """A network without BatchNorm: 1 process = chunks = 2 processes in chunks, for all three tasks, with
    a third of the images gray, so that the processes have unequal numbers of coloured pixels."""
    code = """
import pretext
import torch.distributed as dist
from torch import nn
start = dist.init_process_group  # once for the three runs
dist.init_process_group = lambda backend: dist.is_initialized() or start(backend)
dist.destroy_process_group = lambda: None
class Scale1d(nn.BatchNorm1d):
    def forward(self, x):
        return x * self.weight + self.bias
class Scale2d(nn.BatchNorm2d):
    def forward(self, x):
        return x * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)
nn.BatchNorm1d, nn.BatchNorm2d = Scale1d, Scale2d
for task in pretext.TASKS:
    pretext.train(pretext.Args(
        task=task, data="photos", image_size=24, batch_size=24, epochs=1, warmup_epochs=0.01, workers=0,
        permutations=10, log_every=1, micro_batch_size=MICRO, base_lr=0.005, run_dir="RUN-" + task,
    ))
"""
    (tmp_path / "photos").mkdir()
    for i in range(72):
        image = pretext.demo_image(i)[0]
        image.convert("L" if i % 3 == 0 else "RGB").save(tmp_path / "photos" / f"{i:03d}.png")
    first = {}
    for n, micro in ((1, 0), (1, 5), (2, 5)):
        name = f"run{n}{micro}"
        run_processes(tmp_path, code.replace("MICRO", str(micro)).replace("RUN", name), n)
        for task in pretext.TASKS:
            text = (tmp_path / f"{name}-{task}" / "metrics.jsonl").read_text()
            lines = [json.loads(line) for line in text.splitlines()]
            assert len(lines) == 3
            for line, expected in zip(lines, first.setdefault(task, lines), strict=True):
                for tag in ("train/loss", "train/grad_norm", "pretext/accuracy", "pretext/gain"):
                    assert line[tag] == pytest.approx(expected[tag], rel=1e-4, abs=1e-5), (name, task, tag)
            assert lines[0]["train/loss"] != pytest.approx(lines[-1]["train/loss"], rel=1e-4)


def test_a_shortcut_is_said(folder, capsys, monkeypatch):
    """Answers that are right at once, in the first epoch: said once."""
    monkeypatch.setattr(pretext.Rotation, "right", lambda self, logits, targets: targets.flatten() >= 0)
    pretext.train(tiny_args("pretext", data=str(folder), epochs=2, run_dir="run"))
    assert capsys.readouterr().out.count("100% in the first epoch: a shortcut?") == 1


@pytest.mark.parametrize("task, words", [("jigsaw", "accuracy"), ("colorization", "constant answer")])
def test_random_labels_ring_the_alarm(task, words, folder, capsys, monkeypatch):
    """The control of rotation is in test_contract.py; targets of other images are random ones."""
    kind = pretext.TASKS[task]
    batch = kind.batch

    def shuffled(self, images, numbers):
        inputs, targets = batch(self, images, numbers)
        return inputs, targets[torch.randperm(len(targets))]

    flags = {"data": str(folder), "task": task, "epochs": 12, "log_every": 3, "permutations": 12}
    monkeypatch.setattr(kind, "batch", shuffled)
    pretext.train(tiny_args("pretext", **flags, warmup_epochs=0.1, run_dir="run"))
    lines = [json.loads(line) for line in open("run/metrics.jsonl")]
    assert lines[-1]["monitor/alarm"] == 1
    assert re.search(f"COLLAPSE at step .*{words}", capsys.readouterr().out)


def test_the_permutations_are_kept_with_the_run(folder):
    flags = {"data": str(folder), "task": "jigsaw", "permutations": 7, "epochs": 1}
    pretext.train(tiny_args("pretext", **flags, run_dir="run"))
    state = torch.load("run/checkpoint.pt", weights_only=True)["model"]
    assert torch.equal(state["permutations"], jigsaw_permutations(7))


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"task": "jigsaw", "image_size": 16}, "--image-size 16: jigsaw needs tiles"),
        ({"permutations": 6000}, "--permutations 6000: must be above 0, at most 5000"),
        ({"gray": 1.5}, "--gray 1.5: must be 0 or more, at most 1"),
        ({"rebalance": 0.0}, "--rebalance 0.0: must be above 0, at most 1"),
        ({"task": "colorization", "micro_batch_size": 7}, "--micro-batch-size 7: leaves one image alone"),
        ({"neighbors": 400}, "--neighbors 400: must be above 0, at most 313"),
    ],
)
def test_bad_flags(tmp_path, flags, message):
    with pytest.raises(SystemExit) as stop:
        pretext.train(tiny_args("pretext", run_dir="run", **flags))
    assert message in str(stop.value) and not (tmp_path / "run").exists()


def test_paper_command_is_the_sheet_s():
    command = re.search(r"torchrun --nproc-per-node 4 pretext\.py(.*?)(?<!\\)\n", pretext.__doc__, re.S)[1]
    args = tyro.cli(Args, args=command.replace("\\\n", " ").split())
    assert (args.task, args.data, args.stem, args.epochs, args.batch_size) == (
        "rotation",
        "CIFAR10",
        "cifar",
        200,
        128,
    )
    assert args.base_lr * args.batch_size / 256 == pytest.approx(0.1) and args.weight_decay == 5e-4
    assert (Args.gray, Args.neighbors, Args.rebalance) == (0.3, 5, 0.5)


@pytest.mark.parametrize("task", ["jigsaw", "colorization"])
def test_resume_is_exact(task, folder, tmp_path, monkeypatch, capsys):
    """Stopped in step 8 of 10, continued from step 5: the metrics of a run that nothing stopped."""
    flags = {"data": str(folder), "task": task, "permutations": 7, "epochs": 2, "checkpoint_every": 5}
    pretext.train(tiny_args("pretext", **flags, run_dir="whole"))
    calls, metrics = [], pretext.collapse_metrics

    def stop(*args, **options):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return metrics(*args, **options)

    monkeypatch.setattr(pretext, "collapse_metrics", stop)
    with pytest.raises(SystemExit, match="step 8"):
        pretext.train(tiny_args("pretext", **flags, run_dir="run"))
    pretext.train(tiny_args("pretext", **flags, run_dir="run"))
    assert "step 5 of 10" in capsys.readouterr().out
    whole, resumed = (
        [
            {k: v for k, v in json.loads(line).items() if k[:4] != "perf"}
            for line in open(f"{name}/metrics.jsonl")
        ]
        for name in ("whole", "run")
    )
    assert whole == resumed and len(whole) == 10
