"""pretext.py against methods/pretext.md, methods/collapse.md, slow versions written here, and PyTorch."""

import ast
import itertools
import math
import multiprocessing
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
import tyro
from conftest import ROOT, at_each_step, in_processes, load, metrics_of, refused, stopped, tiny_args
from PIL import Image
from torch import nn

import pretext
from pretext import Args, ab_gamut, colour_weights, cross_entropy, lab_to_rgb, rgb_to_lab, soft_bins

DOUBLE = torch.float64
normal = pretext.v2.Normalize(pretext.MEAN, pretext.STD)


@pytest.fixture(autouse=True, scope="module")
def hundred():
    """Permutations of jigsaw, found once: as each depends on those before it alone, 100 begin with those of
    fewer. And a smaller network."""
    found = pretext.jigsaw_permutations(100)
    block = torchvision.models.resnet.BasicBlock
    assert torch.equal(pretext.jigsaw_permutations(9), found[:9])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.models, "resnet18", lambda: torchvision.models.ResNet(block, [1, 1, 1, 1]))
        patch.setattr(pretext, "jigsaw_permutations", lambda n: found[:n])
        yield found


def random_images(n, size):
    return torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(0)).byte()


def colourful(gray, n=30):
    """n images of random colours, the first `gray` of them without."""
    images = F.interpolate(random_images(n, 6).float(), 16, mode="bilinear")
    images[:gray] = images[:gray].mean(dim=1, keepdim=True)
    return images.byte()


class Photos(list):
    """A data set as colour_weights reads it."""

    items = property(lambda self: range(len(self)))

    def __getitem__(self, index):
        return super().__getitem__(index), index


def task_of(name, data=(), **flags):
    """A task; colorization's frequencies of colours are those of some random images."""
    return pretext.TASKS[name](Args(task=name, workers=0, **flags), Photos([*data] or random_images(4, 16)))


def numbers_for(task, n):
    return torch.rand(n, task.random_numbers, generator=torch.Generator().manual_seed(0))


def write(images):
    Path("photos").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(f"photos/{i:03d}.png")


def test_the_tasks_stand_side_by_side():
    """Three classes with the same methods in the same order; train() asks for none by name."""
    tree = {getattr(node, "name", ""): node for node in ast.parse((ROOT / "pretext.py").read_text()).body}
    for kind in pretext.TASKS.values():
        methods = [node.name for node in tree[kind.__name__].body if isinstance(node, ast.FunctionDef)]
        assert methods == ["__init__", "make", "forward", "score", "picture"]
    for node in ast.walk(tree["train"]):
        assert not (isinstance(node, ast.Constant) and node.value in pretext.TASKS)
        assert not (isinstance(node, (ast.Compare, ast.Match)) and "task" in ast.unparse(node))


# Rotation


def test_rotation_asks_for_all_exact_turns_of_a_batch():
    """Oracle 1; uint8 in, uint8 out. A flip after the turn would make two answers one. The picture turns back
    as answered."""
    images = random_images(3, 5)
    turned, labels = pretext.rotate_batch(images)
    assert turned.dtype == torch.uint8 and labels.tolist() == [0, 1, 2, 3] * 3
    slow = images
    for k in range(5):
        assert torch.equal(slow, turned[k % 4 :: 4])
        slow = slow.mT.flip(2)  # a quarter turn counter-clockwise
    quarter = pretext.rotate_batch(torch.arange(9).view(1, 1, 3, 3))[0][1, 0]
    assert quarter.tolist() == [[2, 5, 8], [1, 4, 7], [0, 3, 6]]
    assert torch.equal(turned[1::4].flip(3), pretext.rotate_batch(images.flip(3))[0][3::4])

    task, images = task_of("rotation").eval(), random_images(5, 32) / 255
    inputs, targets = task.make(images, None)
    assert torch.equal(inputs[::4], images) and targets.tolist() == [0, 1, 2, 3] * 5
    logits, h = task(inputs)
    torch.testing.assert_close(h, task.backbone(normal(inputs)))
    torch.testing.assert_close(logits, task.head(h))
    sure = 50.0 * F.one_hot(targets, 4)
    errors, weights, right = task.score(sure, targets)
    assert right.all() and errors.max() < 1e-6 and (weights == 1).all() and not task.constant.any()
    assert not task.score(sure, (targets + 1) % 4)[2].any()
    turned, back = task.picture(inputs, targets, sure)
    assert torch.equal(turned, inputs[:16]) and torch.equal(back, images[:4].repeat_interleave(4, dim=0))
    wrong = task.picture(inputs, targets, sure.roll(1, dims=1))[1]
    assert torch.equal(wrong, torch.rot90(back, -1, (2, 3)))


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


# Jigsaw


def test_jigsaw_permutations(hundred):
    """Oracle 3 and the distances of the sheet's section 4; at most its upper bound of the mean."""
    assert (hundred.sort(dim=1).values == torch.arange(9)).all()
    for n, least, mean in ((24, 7, 8.315), (64, 7, 8.12), (100, 6, 8.03)):
        different = (hundred[:n, None] != hundred[:n]).sum(dim=2)
        found = different[~torch.eye(n, dtype=bool)].float()
        q, r = divmod(n, 9)
        bound = 9 * (1 - (r * (q + 1) * q + (9 - r) * q * (q - 1)) / (n * (n - 1)))
        assert found.min() == least and mean <= found.mean().item() <= bound + 1e-4


@pytest.mark.parametrize("size, cell, tile", [(32, 10, 8), (64, 21, 16), (96, 32, 24), (255, 85, 64)])
def test_sizes_of_tiles(size, cell, tile, monkeypatch, hundred):
    """255 are those of the authors' code. Corners reach both ends and pass none; colours are up to 2 apart,
    as there, in small images 1; in gray images they are one."""
    seen = []
    monkeypatch.setattr(pretext, "jigsaw_tiles", lambda *a: seen.append(a[1:]) or torch.rand(400, 9, 3, 2, 2))
    task = task_of("jigsaw", image_size=size, permutations=4)
    u, most = numbers_for(task, 400), 2 if size > 48 else 1
    _, labels = task.make(torch.zeros(400, 3, 1, 1), u)
    [(permutations, corners, side)] = seen
    assert side == task.tile == tile and (corners.min(), corners.max()) == (0, cell - tile)
    gray = u[:, 1] < 0.3
    apart = corners.amax(dim=2) - corners.amin(dim=2)
    assert not apart[gray].any() and apart[~gray].unique().tolist() == [*range(most + 1)]
    shifts = corners[~gray] - (u[~gray, 2:20].view(-1, 9, 1, 2) * (cell - tile + 1 - most)).long()
    assert shifts.unique().tolist() == [*range(most + 1)]
    assert torch.equal(permutations, hundred[labels]) and labels.bincount(minlength=4).min() > 60
    n = torch.arange(1, 5001)  # no number below 1 asks for a permutation too many
    assert torch.equal((torch.tensor(1 - 2.0**-24) * n).long(), n - 1)


def test_jigsaw_tiles_are_cut_from_their_own_cell(generator):
    """Against loops; slot t shows tile perm[t], each channel at its own corner."""
    images = torch.rand(4, 3, 32, 32, generator=generator)
    permutations = torch.rand(4, 9, generator=generator).argsort(dim=1)
    corners = torch.randint(0, 3, (4, 9, 3, 2), generator=generator)
    tiles = pretext.jigsaw_tiles(images, permutations, corners, 8)
    for b, t, c in itertools.product(range(4), range(9), range(3)):
        row, column = divmod(permutations[b, t].item(), 3)
        y, x = 10 * row + corners[b, t, c, 0], 10 * column + corners[b, t, c, 1]
        assert torch.equal(tiles[b, t, c], images[b, c, y : y + 8, x : x + 8])


def test_jigsaw_inputs():
    """Oracle 4: tiles of mean 0 and deviation 1; gray images and shifted colours as the sheet has them."""
    task, images = task_of("jigsaw", permutations=30), random_images(300, 32) / 255
    images[0, :, :10, :10] = 7 / 255  # a flat tile divides by 1, not by 0
    u = numbers_for(task, 300)
    inputs, labels = task.make(images, u)
    assert inputs.shape == (300, 9, 3, 8, 8) and set(labels.tolist()) == set(range(30))
    flat = inputs[0, task.permutations[labels[0]].argsort()[0]]
    assert torch.isfinite(inputs).all() and flat.abs().max() < 1e-3
    assert inputs[1:].mean(dim=(3, 4)).abs().max() < 1e-5
    assert (inputs[1:].std(dim=(3, 4)) - 1).abs().max() < 1e-3
    gray = u[:, 1] < 0.3
    same = (inputs[:, :, 0] - inputs[:, :, 1]).abs().amax(dim=(1, 2, 3)) < 1e-4
    assert torch.equal(same, gray) and 0.2 < gray.float().mean() < 0.4
    coloured = task_of("jigsaw", permutations=30, gray=0.0).make(images, u)[0]
    assert torch.equal(coloured[~gray], inputs[~gray]) and not torch.equal(coloured[gray], inputs[gray])


def test_jigsaw_column_is_context_free_and_the_picture_solves_the_puzzle(generator):
    """Oracles 10 and 3: permuting the tiles permutes the rows of h; the inverse permutation restores them."""
    task = task_of("jigsaw", permutations=9).eval()
    tiles, order = torch.rand(2, 9, 3, 8, 8, generator=generator), torch.randperm(9, generator=generator)
    (logits, h), (_, shuffled) = task(tiles), task(tiles[:, order])
    assert logits.shape == (2, 9) and h.shape == (18, 512)
    torch.testing.assert_close(shuffled.view(2, 9, -1), h.view(2, 9, -1)[:, order], atol=1e-5, rtol=1e-4)
    errors, weights, right = task.score(torch.tensor([[50.0] + [0] * 8] * 2), torch.tensor([0, 3]))
    assert right.tolist() == [True, False] and errors.tolist() == pytest.approx([0, 50])
    assert weights.tolist() == [1, 1] and not task.constant.any()

    inputs, labels = task.make(random_images(4, 32) / 255, numbers_for(task, 4))
    sure = F.one_hot(labels, 9).float()
    shuffled, answered, right = task.picture(inputs, labels, sure)
    assert torch.equal(answered, right) and not torch.equal(shuffled, right)
    wrong = task.picture(inputs, labels, sure.roll(1, dims=1))
    assert torch.equal(wrong[2], right) and not torch.equal(wrong[1], right)
    for b, t in itertools.product(range(4), range(9)):
        row, column = divmod(task.permutations[labels[b], t].item(), 3)
        tile = right[b, :, 10 * row + 1 : 10 * row + 9, 10 * column + 1 : 10 * column + 9]
        torch.testing.assert_close(tile, inputs[b, t] / 5 + 0.5)


# Colorization


def test_rgb_to_lab():
    """Oracle 5."""
    rgb = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 1, 1], [0, 0, 0], [128 / 255] * 3]
    lab = [[53.2406, 80.0923, 67.2028], [87.7351, -86.1830, 83.1797], [32.2957, 79.1856, -107.8573]]
    lab += [[97.1395, -21.5547, 94.4781], [100, -0.0025, 0.0047], [0, 0, 0], [53.5850, -0.0015, 0.0028]]
    wild = [[50, 300, -300], [120, 0, 0], [-20, 5, 5], [50, 0, 200]]
    rgb, lab, wild = (torch.tensor(colours, dtype=DOUBLE)[:, :, None, None] for colours in (rgb, lab, wild))
    torch.testing.assert_close(rgb_to_lab(rgb), lab, atol=1e-4, rtol=0)
    random = torch.rand(8, 3, 20, 20, dtype=DOUBLE)
    assert (lab_to_rgb(rgb_to_lab(random)) - random).abs().max() < 1e-12
    assert (lab_to_rgb(rgb_to_lab(random.float())) - random.float()).abs().max() < 1e-4
    clipped = lab_to_rgb(wild)
    assert torch.isfinite(clipped).all() and 0 <= clipped.min() and clipped.max() <= 1
    assert clipped[3].flatten().tolist() == pytest.approx([0.578282, 0.455390, 0], abs=1e-6)


def test_ab_gamut():
    """Oracle 6 and the sheet's rule: multiples of 10 in the convex hull of all sRGB colours, 233, and their
    eight neighbours. From a point inside no half of the directions is empty of colours."""
    cube = torch.cartesian_prod(*[torch.arange(6, dtype=DOUBLE) / 5] * 3)
    colours = rgb_to_lab(cube.T[:, :, None])[1:, :, 0].T
    grid = torch.cartesian_prod(*[torch.arange(-120, 121, 10, dtype=DOUBLE)] * 2)
    angles = torch.atan2(*(colours - grid[:, None]).unbind(dim=2)).sort(dim=1).values
    inside = torch.cat([angles, angles[:, :1] + 2 * math.pi], dim=1).diff(dim=1).amax(dim=1) < math.pi
    near = F.max_pool2d(inside.view(1, 25, 25).double(), 3, stride=1, padding=1).flatten() > 0
    bins = ab_gamut()
    assert inside.sum() == 233 and torch.equal(bins.double(), grid[near])
    assert bins.shape == (313, 2) and bins.sum(dim=0).tolist() == [4910, 2090]
    assert bins[[0, 120, -1]].tolist() == [[-90, 50], [0, 0], [100, 0]]
    rows = [5, 8, 10, 12, 14, 15, 16, 16, 17, 18, 18, 18, 19, 20, 19, 20, 20, 19, 19, 10]
    assert bins[:, 0].unique(return_counts=True)[1].tolist() == rows
    assert torch.cdist(colours, bins.double()).amin(dim=1).max() < 7.072


def test_soft_targets_and_annealed_mean():
    """Oracles 7 and 9. One value above 5 is enough for an image to have a colour."""
    bins = ab_gamut()
    index, share, _ = soft_bins(torch.zeros(1, 2, 1, 1), bins, 10)
    assert index[0, 0, 0, 0] == 120 and share[0, 0, 0, 0] == pytest.approx(0.6192, abs=1e-4)
    index, share, _ = soft_bins(torch.tensor([[0.0, 0], [3, 4]])[:, :, None, None], bins, 5)
    assert index[0, 0, 0, 0] == 120 and share.shape == (2, 1, 1, 5)
    assert share[0].flatten().tolist() == pytest.approx([0.6488] + [0.0878] * 4, abs=1e-4)
    expected = [0.4062, 0.2723, 0.1825, 0.1224, 0.0166]
    assert share[1].flatten().tolist() == pytest.approx(expected, abs=1e-4)
    index, _, coloured = soft_bins(rgb_to_lab(torch.eye(3)[:, :, None, None])[:, 1:], bins, 5)
    assert bins[index[:, 0, 0, 0]].tolist() == [[80, 70], [-90, 80], [80, -110]] and coloured.all()
    ab = torch.zeros(4, 2, 3, 3)
    ab[1, 1, 2, 0], ab[2, 0, 1, 1], ab[3] = -5.01, 5.01, 5.0
    assert soft_bins(ab, bins, 5)[2].flatten().tolist() == [False, True, True, False]

    bins, logits = torch.tensor([[0.0, 0], [40, 40]]), torch.tensor([0.6, 0.4]).log().view(1, 2, 1, 1)
    for temperature, value in (([1], 16), ([], 10.239), ([0.01], 0)):
        ab = pretext.annealed_mean(logits, bins, *temperature)
        assert ab.flatten().tolist() == pytest.approx([value] * 2, abs=1e-3)


def slow_soft_targets(ab, bins):
    """(pixels, 313) of ab (B, 2, h, w), one at a time, and the nearest bin."""
    soft, nearest = [], []
    for pixel in ab.movedim(1, 3).reshape(-1, 2):
        distance = (bins - pixel).square().sum(dim=1).sqrt()
        chosen = distance.argsort()[:5]
        z = torch.zeros(313).index_put((chosen,), torch.exp(-distance[chosen].square() / 50))
        soft.append(z / z.sum())
        nearest.append(chosen[0])
    return torch.stack(soft), torch.stack(nearest)


def test_weights_loss_and_constant_answer_of_colorization(generator):
    """Oracles 8 and 10, and against slow versions; a gray image counts nothing and gets no gradient."""
    images, bins = colourful(gray=2, n=8), ab_gamut()
    task, lab = task_of("colorization", images), rgb_to_lab(images / 255)
    inputs, ab = task.make(images / 255, None)
    assert torch.equal(inputs, lab[:, :1]) and torch.equal(ab, lab[:, 1:, ::4, ::4])
    soft, nearest = slow_soft_targets(ab, bins)
    coloured = (torch.arange(8) >= 2).repeat_interleave(16)
    p = soft[coloured].mean(dim=0)
    expected = 1 / (0.5 * p + 0.5 / 313)
    expected /= (p * expected).sum()
    torch.testing.assert_close(task.weights, expected, atol=1e-4, rtol=1e-4)
    assert (p * task.weights).sum().item() == pytest.approx(1, abs=1e-4) and p.min() == 0
    ratio = task.weights.max() / task.weights.min()
    assert ratio.item() == pytest.approx(1 + 313 * p.max().item(), rel=1e-3)
    best = (expected[nearest][:, None] * soft)[coloured].mean(dim=0)
    torch.testing.assert_close(task.constant.flatten().softmax(dim=0), best / best.sum(), atol=1e-4, rtol=0)
    even = task_of("colorization", images, rebalance=1.0)
    torch.testing.assert_close(even.weights, torch.ones(313))

    logits = torch.randn(8, 313, 4, 4, generator=generator, requires_grad=True)
    errors, weights, _ = task.score(logits, ab)
    slow = -(soft * logits.log_softmax(dim=1).movedim(1, 3).reshape(-1, 313)).sum(dim=1)
    torch.testing.assert_close(errors.flatten(), slow, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(weights.flatten(), expected[nearest] * coloured, atol=1e-4, rtol=1e-4)
    (errors * weights).sum().backward()
    assert not logits.grad[:2].any() and logits.grad[2:].abs().amin(dim=1).min() > 0
    sure = F.one_hot(nearest.view(8, 4, 4), 313).movedim(3, 1)
    assert task.score(sure, ab)[2].all() and not task.score(-1 * sure, ab)[2].any()


def test_weights_are_of_2048_images_at_most(monkeypatch):
    """From all of the data; workers change nothing."""
    images, bins, seen = colourful(gray=2, n=8), ab_gamut(), []
    alone, shared = (colour_weights(Photos(images), bins, Args(workers=n)) for n in (0, 2))
    assert torch.equal(alone[0], shared[0]) and torch.equal(alone[1], shared[1])
    monkeypatch.setattr(Photos, "__getitem__", lambda self, i: seen.append(i) or (images[-1, :, :4, :4], i))
    for n, expected in ((5, 5), (2048, 2048), (2049, 1025), (6000, 2000)):
        colour_weights(Photos(range(n)), bins, Args(workers=0))
        assert len(seen) == len({*seen}) == expected and seen[-1] >= n - 3
        seen.clear()


def test_the_network_s_start_does_not_depend_on_the_data():
    """Nor on what reading it draws: for each seed the encoder of colorization begins as that of rotation."""
    states = []
    for task in ("colorization", "rotation"):
        torch.manual_seed(0)
        states.append(task_of(task).backbone.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


def test_colorization_sees_lightness_alone():
    """In each of torchvision's networks; h is what it gives."""
    for flags in ({}, {"arch": "resnet50", "stem": "cifar"}):
        task = task_of("colorization", **flags).eval()
        lightness, _ = task.make(random_images(2, 32) / 255, None)
        logits, h = task(lightness)
        assert logits.shape == (2, 313, 8, 8)
        expected = task.backbone(normal(lightness.expand(-1, 3, -1, -1) / 100))
        torch.testing.assert_close(h, expected, atol=1e-4, rtol=1e-4)


def test_colorization_picture():
    """Lightness without a colour; a sure answer of each pixel's nearest bin has nearly the colours it has."""
    images = colourful(gray=0, n=9)
    task = task_of("colorization", images)
    lightness, ab = task.make(images / 255, None)
    nearest = soft_bins(ab, task.bins, 1)[0][..., 0]
    gray, answered, right = task.picture(lightness, ab, 100.0 * F.one_hot(nearest, 313).movedim(3, 1))
    assert gray.shape == right.shape == (8, 3, 16, 16)
    assert (gray.amax(dim=1) - gray.amin(dim=1)).max() < 1e-3
    assert (answered - right).abs().mean() < 0.03 < 0.1 < (gray - right).abs().mean()
    halves = torch.full((1, 3, 16, 16), 0.3)
    halves[:, 1, :, 8:] = 0.6  # green on the right
    shown = task.picture(*task.make(halves, None), torch.zeros(1, 313, 4, 4))[2]
    for columns in (slice(4), slice(12, 16)):
        torch.testing.assert_close(shown[..., columns], halves[..., columns], atol=1e-4, rtol=0)


# Loss and monitor


@pytest.mark.parametrize("name, classes", [("rotation", 4), ("jigsaw", 100), ("colorization", 313)])
def test_an_untrained_network_knows_nothing(name, classes, generator):
    """Oracle 2: its cross-entropy is near the logarithm of the number of answers."""
    torch.manual_seed(0)
    side = 64 if name == "jigsaw" else 32
    task = task_of(name, image_size=side, permutations=100)
    inputs, targets = task.make(torch.rand(16, 3, side, side, generator=generator), numbers_for(task, 16))
    error, _, _ = task.score(task(inputs)[0], targets)
    assert error.mean().item() == pytest.approx(math.log(classes), abs=0.4)


def test_cross_entropy_is_pytorch_s(generator):
    """Of a label, and of shares; of rows and of maps; in float64, or at least float32. Of equal logits it is
    the logarithm of their number (oracle 2)."""
    for answers, floor in ((4, 1.3863), (100, 4.6052), (1000, 6.9078), (313, 5.7462)):
        equal = cross_entropy(torch.zeros(1, answers), torch.tensor([[3]]))
        assert equal.item() == pytest.approx(floor, abs=1e-4)
    logits = torch.randn(2, 7, 3, 4, generator=generator, dtype=DOUBLE)
    index = torch.rand(2, 3, 4, 7, generator=generator).argsort(dim=-1)[..., :3]
    share = torch.rand(2, 3, 4, 3, generator=generator, dtype=DOUBLE).softmax(dim=-1)
    target = torch.zeros(2, 3, 4, 7, dtype=DOUBLE).scatter(-1, index, share).movedim(-1, 1)
    expected = F.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(cross_entropy(logits, index, share), expected)
    logits, labels = logits[0, :, 0].T, torch.tensor([0, 6, 3, 3])
    for given, least in ((logits, logits), (logits.bfloat16(), logits.bfloat16().float())):
        expected = F.cross_entropy(least, labels, reduction="none")
        torch.testing.assert_close(cross_entropy(given, labels[:, None]), expected)  # of the same type


def test_metrics_by_hand(generator):
    """Of the answers with a weight; features about their mean. The problem is to be no better than a
    constant."""
    answers = torch.tensor([[1.0, 2, 3, 1], [3, 4, 1, 0], [9, 9, 0, 1]], dtype=DOUBLE)  # error to right
    h = torch.randn(64, 8, generator=generator) + 3
    metrics, problems = pretext.monitor(answers, h)
    expected = {f"monitor/{name}": v for name, v in pretext.collapse_metrics(h, center=True).items()}
    expected |= {"pretext/accuracy": 0.5, "pretext/plain_loss": 2, "pretext/gain": 1 - (3 + 3) / (6 + 4)}
    assert metrics == pytest.approx(expected) and not problems
    for error, rings in ((1.98, False), (1.99, True), (2.5, True), (0.5, False)):
        answers = torch.tensor([[error, 2, 1, i == 0] for i in range(4)], dtype=DOUBLE)
        problems = pretext.monitor(answers, h)[1]
        assert [*problems.values()] == ["pretext/accuracy"] * rings, error
        assert all("accuracy 0.250" in words for words in problems)


@pytest.mark.parametrize("task", ["jigsaw", "colorization"])
def test_random_labels_ring_the_alarm(task, folder, capsys, monkeypatch):
    """The control of rotation is in test_collapse.py; targets of other images are random ones."""
    kind = pretext.TASKS[task]
    make = kind.make

    def shuffled(self, images, u):
        inputs, targets = make(self, images, u)
        return inputs, targets[torch.randperm(len(targets))]

    monkeypatch.setattr(kind, "make", shuffled)
    flags = {"data": str(folder), "task": task, "epochs": 4, "log_every": 2, "permutations": 12}
    assert pretext.train(tiny_args("pretext", **flags, warmup_epochs=0.1))["monitor/alarm"] == 1
    assert re.search("COLLAPSE at step .*no better than one answer to all", capsys.readouterr().out)


# A run


@pytest.fixture(scope="module", params=pretext.TASKS)
def observed(request, folder, tmp_path_factory):
    """Ten steps of eight images, logged at each second one, and what went in and out."""
    run = SimpleNamespace(folder=tmp_path_factory.mktemp("run"), task=request.param, made=[], pictures=[])
    kind, save = pretext.TASKS[run.task], torchvision.utils.save_image
    make = kind.make

    def save_image(panels, path, nrow):
        run.pictures.append((len(run.made), path.name, len(panels) // nrow))
        save(panels, path, nrow=nrow)

    flags = {"data": str(folder), "task": run.task, "permutations": 7, "epochs": 2, "log_every": 2}
    flags |= {"base_lr": 0.3, "warmup_epochs": 1.4, "min_scale": 0.7, "seed": 1}
    flags["save_minutes"] = 10.0 if run.task == "rotation" else 0.0
    run.args = tiny_args("pretext", **flags, run_dir=str(run.folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "make", lambda self, x, u: run.made.append((x, u)) or make(self, x, u))
        patch.setattr(torchvision.utils, "save_image", save_image)
        pretext.train(run.args)
    run.checkpoint, run.lines = load(run.folder / "checkpoint.pt"), metrics_of(run.folder)
    return run


def test_a_run_passes_its_flags_on(observed, hundred):
    """Crops of the central square in [0, 1]; uniform numbers of (seed, step) alone; what is kept."""
    view = pretext.v2.Compose([pretext.central_square, pretext.random_crop(32, 0.7)])
    data = pretext.Images(observed.args, (view,), 1)
    crops = [data[key][0] for keys in data.batches(8, 0, 2, 0, 1) for key in keys]
    assert torch.equal(torch.cat([x for x, _ in observed.made]), torch.stack(crops) / 255)
    for step, (_, u) in enumerate(observed.made):
        size = 74 if observed.task == "jigsaw" else 0
        assert torch.equal(u, torch.rand(8, size, generator=pretext.seeded(3, 1, step)))
    state = observed.checkpoint["model"]
    assert observed.task != "jigsaw" or torch.equal(state["permutations"], hundred[:7])
    assert observed.task != "colorization" or state["weights"].min() < 0.9 < 1.1 < state["weights"].max()


def test_pictures_of_a_run(observed):
    """At the first step, at each save and at the end; a row for each kind."""
    rows, steps = (2, (1, 10)) if observed.task == "rotation" else (3, (1, 2, 4, 6, 8, 10))
    assert observed.pictures == [(step, "answers.png", rows) for step in steps]
    assert Image.open(observed.folder / "answers.png").width > 100


def test_gain_of_a_run_is_over_the_best_constant_answer(observed):
    task = task_of(observed.task, permutations=7)
    task.load_state_dict(observed.checkpoint["model"])
    inputs, targets = task.make(*observed.made[-1])
    errors, weights, _ = task.score(task.constant.expand_as(task(inputs)[0]), targets)
    expected = (errors * weights).sum() / (weights > 0).sum()
    last = observed.lines[-1]
    assert last["train/loss"] / (1 - last["pretext/gain"]) == pytest.approx(expected.item(), rel=1e-4)


def test_learning_rates_and_optimiser_of_a_run(observed):
    """Decay of every tensor, Nesterov."""
    rates = [pretext.cosine_schedule(step, 10, 7, 0.3 * 8 / 256) for step in (0, 1, 3, 5, 7, 9)]
    assert [line["train/lr"] for line in observed.lines] == rates
    [group] = observed.checkpoint["optimizer"]["param_groups"]
    options = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "fused": True}
    assert options.items() <= group.items()
    assert len(group["params"]) == len([*task_of(observed.task).parameters()])


def test_resume_is_exact(observed):
    """Stopped in step 5 of 10 and continued: the metrics and weights of a run that nothing stopped."""
    args = tiny_args("pretext", **vars(observed.args) | {"run_dir": "run"})
    with pytest.MonkeyPatch.context() as patch:
        at_each_step(pretext, patch, lambda step: step == 4 and os.kill(os.getpid(), signal.SIGTERM))
        stopped(lambda: pretext.train(args), "stopped after step 5")
    pretext.train(args)
    assert metrics_of("run") == observed.lines and len(observed.lines) == 6
    state = load("run/checkpoint.pt")["model"]
    assert all(torch.equal(state[name], tensor) for name, tensor in observed.checkpoint["model"].items())


def scaled(self, x):
    """In place of BatchNorm."""
    shape = (-1,) + (1,) * (x.ndim - 2)
    return x * self.weight.view(shape) + self.bias.view(shape)


@pytest.mark.parametrize("task", pretext.TASKS)
def test_training_is_the_same_in_processes(task, monkeypatch):
    """1 process = 2 processes, with a third of the images gray, so that these have unequal numbers of
    coloured pixels."""
    monkeypatch.setattr(nn.modules.batchnorm._BatchNorm, "forward", scaled)
    write(colourful(gray=8, n=24))
    flags = {"data": "photos", "task": task, "image_size": 24, "epochs": 1, "warmup_epochs": 0.01}

    def trained(rank):
        torch.set_default_dtype(DOUBLE)
        pretext.train(args)

    runs = []
    for n in (1, 2):
        args = tiny_args("pretext", **flags, permutations=10, base_lr=0.5, run_dir=f"run{n}")
        in_processes(trained, n)
        state = load(f"run{n}/checkpoint.pt")["optimizer"]["state"]
        buffers = [held["momentum_buffer"].flatten() for held in state.values()]  # gradients of all steps
        runs.append((metrics_of(f"run{n}"), torch.cat(buffers)))
    (lines, theirs), (found, ours) = runs
    assert len(lines) == 3 and lines[0]["train/loss"] != pytest.approx(lines[-1]["train/loss"], rel=1e-4)
    for line, expected in zip(found, lines, strict=True):
        for tag in line:  # the rank takes roots of what is nearly 0
            exact = 1e-6 if tag.startswith("monitor/") else 1e-9
            assert line[tag] == pytest.approx(expected[tag], rel=exact, abs=exact), tag
    assert theirs.abs().max() > 1e-3 and (ours - theirs).abs().max() < 1e-9 * theirs.abs().max()


# Data and flags


def test_gray_data_is_an_error_and_a_batch_without_colour_does_no_harm():
    """Each batch of two may have none; the loss is the mean over coloured pixels, of equal weight here."""
    write(colourful(gray=29))
    flags = {"data": "photos", "task": "colorization", "batch_size": 2, "epochs": 1, "warmup_epochs": 0.1}
    refused("pretext", "29 of 30 images are gray.*rotation", **flags, run_dir="run")
    assert not Path("run").exists()
    for i in range(11):
        Path(f"photos/{i:03d}.png").unlink()
    Image.fromarray(colourful(gray=0, n=1)[0].permute(1, 2, 0).numpy()).save("photos/other.png")
    pretext.train(tiny_args("pretext", **flags, rebalance=1.0, run_dir="run"))
    lines = metrics_of("run")
    empty = [line for line in lines if "pretext/plain_loss" not in line]
    assert len(lines) == 10 and 8 <= len(empty) < 10
    assert not any(line["train/loss"] or line["train/grad_norm"] for line in empty)
    for line in lines:
        assert line["train/loss"] == pytest.approx(line.get("pretext/plain_loss", 0), rel=1e-5)


def test_files_that_nothing_reads_end_colorization_in_one_line():
    """They are met before the loop, in a worker."""
    Path("bad").mkdir()
    for i in range(110):
        Path(f"bad/{i:03d}.jpg").write_text("no image")
    args = tiny_args("pretext", data="bad", task="colorization", workers=1, run_dir="run")
    with pytest.raises(SystemExit, match=r"100 files in a row cannot be read, the last is bad/\S+$"):
        pretext.train(args)
    assert not multiprocessing.active_children() and not Path("run").exists()


def test_bad_flags():
    refused("pretext", "--image-size 16: jigsaw needs tiles", task="jigsaw", image_size=16)
    refused("pretext", "--permutations 6000: must be above 0 and at most 5000", permutations=6000)
    refused("pretext", "--gray 1.5: must be at least 0 and at most 1", gray=1.5)
    refused("pretext", "^--rebalance 0.0: must be above 0$", rebalance=0.0)
    refused("pretext", "--neighbors 400: must be above 0 and at most 313", neighbors=400)
    assert not Path("runs").exists()


def test_paper_command_and_defaults_are_the_sheet_s():
    """No help takes the decay of colorization's sum, 1e-3, for that of a mean (sheet's addendum)."""
    command = re.search(r"torchrun --nproc-per-node 4 pretext\.py(.*?)(?<!\\)\n", pretext.__doc__, re.S)[1]
    args = tyro.cli(Args, args=command.replace("\\\n", " ").split())
    found = (args.task, args.data, args.stem, args.epochs, args.batch_size)
    assert found == ("rotation", "CIFAR10", "cifar", 200, 128)
    assert args.base_lr * args.batch_size / 256 == pytest.approx(0.1) and args.weight_decay == 5e-4
    assert (Args.gray, Args.neighbors, Args.rebalance) == (0.3, 5, 0.5)
    line = re.search(r"weight_decay: float.*", (ROOT / "pretext.py").read_text())[0]
    assert "5e-4" in line and "1e-3" not in line and "olorization" not in line
