"""pretext.py against methods/pretext.md, methods/collapse.md, slow versions written here, and PyTorch."""

import ast
import itertools
import json
import math
import re
import signal

import pytest
import torch
import torch.nn.functional as F
import tyro
from conftest import ROOT, run_processes, tiny_args
from PIL import Image
from test_hardening import stop_at

import pretext
from pretext import (
    Args,
    Jigsaw,
    Rotation,
    ab_gamut,
    annealed_mean,
    colour_weights,
    cross_entropy,
    jigsaw_permutations,
    jigsaw_tiles,
    lab_to_rgb,
    monitor,
    rgb_to_lab,
    rotate_batch,
    soft_bins,
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


class Photos(list):
    """A data set as colour_weights reads it."""

    def __getitem__(self, index):
        return super().__getitem__(index), index

    @property
    def items(self):
        return range(len(self))


def task_of(name, data=None, **flags):
    """A task; colorization's frequencies of colours are those of some random images."""
    args = Args(task=name, workers=0, **flags)
    return pretext.TASKS[name](args, data or Photos(random_images(4, 16)))


def numbers_for(task, n, seed=0):
    return torch.rand(n, task.random_numbers, generator=torch.Generator().manual_seed(seed))


def test_the_tasks_stand_side_by_side():
    """Three classes with the same methods in the same order; train() asks for none by name."""
    tree = {
        node.name: node for node in ast.parse((ROOT / "pretext.py").read_text()).body if hasattr(node, "name")
    }
    methods = [
        [node.name for node in tree[kind.__name__].body if isinstance(node, ast.FunctionDef)]
        for kind in pretext.TASKS.values()
    ]
    assert methods == [["__init__", "make", "forward", "score", "picture"]] * 3
    words = [node.value for node in ast.walk(tree["train"]) if isinstance(node, ast.Constant)]
    assert not set(pretext.TASKS) & set(words)
    compared = [node for node in ast.walk(tree["train"]) if isinstance(node, (ast.Compare, ast.Match))]
    assert not any("task" in ast.unparse(node) for node in compared)


def test_cross_entropy_is_pytorch_s(generator):
    """Of a label, and of shares; of rows and of maps."""
    logits, labels = torch.randn(5, 7, generator=generator, dtype=DOUBLE), torch.tensor([0, 6, 3, 3, 1])
    torch.testing.assert_close(
        cross_entropy(logits, labels[:, None]), F.cross_entropy(logits, labels, reduction="none")
    )
    logits = torch.randn(2, 7, 3, 4, generator=generator, dtype=DOUBLE)
    index = torch.rand(2, 3, 4, 7, generator=generator).argsort(dim=-1)[..., :3]
    share = torch.rand(2, 3, 4, 3, generator=generator, dtype=DOUBLE).softmax(dim=-1)
    target = torch.zeros(2, 3, 4, 7, dtype=DOUBLE).scatter(-1, index, share).movedim(-1, 1)
    torch.testing.assert_close(
        cross_entropy(logits, index, share), F.cross_entropy(logits, target, reduction="none")
    )


def test_loss_keeps_float64_and_lifts_half_precision(generator):
    logits, labels = torch.randn(9, 5, generator=generator), torch.arange(9)[:, None] % 5
    assert cross_entropy(logits.double(), labels).dtype == DOUBLE
    half = logits.bfloat16()
    assert cross_entropy(half, labels).dtype == torch.float32
    assert torch.equal(cross_entropy(half, labels), cross_entropy(half.float(), labels))


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
    task, images = task_of("rotation").eval(), random_images(5, 32) / 255
    inputs, targets = task.make(images, numbers_for(task, 5))
    assert torch.equal(inputs[::4], images) and targets.tolist() == [0, 1, 2, 3] * 5
    logits, h = task(inputs)
    assert logits.shape == (20, 4) and h.shape == (20, 512)
    normal = pretext.v2.functional.normalize(inputs[6:7], pretext.MEAN, pretext.STD)
    torch.testing.assert_close(h[6:7], task.backbone(normal))
    torch.testing.assert_close(logits, task.head(h))
    errors, weights, right = task.score(50.0 * F.one_hot(targets, 4), targets)
    assert right.all() and errors.max() < 1e-6 and torch.equal(weights, torch.ones(20))
    assert task.score(50.0 * F.one_hot(targets, 4), (targets + 1) % 4)[2].sum() == 0


def test_rotation_picture_turns_back_what_was_answered():
    task, images = task_of("rotation"), random_images(5, 16) / 255
    inputs, targets = task.make(images, None)
    turned, back = task.picture(inputs, targets, F.one_hot(targets, 4).float())
    assert torch.equal(turned, inputs[:16]) and torch.equal(back, images[:4].repeat_interleave(4, dim=0))
    wrong = task.picture(inputs, targets, F.one_hot((targets + 1) % 4, 4).float())[1]
    assert torch.equal(wrong, torch.rot90(back, -1, (2, 3)))


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
def test_sizes_of_tiles(size, cell, tile, monkeypatch):
    """255 are those of the authors' code. Corners reach both ends and pass none; colours are up to 2 apart,
    as there, in small images 1; in gray images they are one."""
    seen, tiles = [], pretext.jigsaw_tiles
    monkeypatch.setattr(pretext, "jigsaw_tiles", lambda *a: seen.append(a) or tiles(*a))
    task, images = task_of("jigsaw", image_size=size, permutations=4), torch.zeros(1, 3, size, size)
    assert (task.room + task.tile, task.tile) == (cell, tile)
    u = numbers_for(task, 400)
    task.make(images.expand(400, -1, -1, -1), u)
    [(_, permutations, corners, side)] = seen
    assert corners.min() == 0 and corners.max() == cell - tile and side == tile
    gray = u[:, 1] < 0.3
    apart = corners.amax(dim=2) - corners.amin(dim=2)
    assert (
        not apart[gray].any()
        and apart[~gray].unique().tolist() == [*range(2 if size > 48 else 1, -1, -1)][::-1]
    )
    first = corners[~gray].sub((u[~gray, 2:20].view(-1, 9, 1, 2) * (cell - tile + 1)).long())
    assert first.unique().tolist() == [*range(3 if size > 48 else 2)]
    labels = (permutations[:, None] == task.permutations).all(dim=2).long().argmax(dim=1)
    assert labels.bincount().min() > 60


def test_numbers_close_to_1_are_no_permutation_too_many():
    """u n rounds below n for any u of float32 and any n."""
    most = 1 - 2.0**-24
    for n in range(1, 5001):
        assert (torch.tensor([most]) * n).long() == n - 1


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


def test_jigsaw_inputs():
    """Oracle 4: tiles of mean 0 and deviation 1; gray images and shifted colours as the sheet has them."""
    task = task_of("jigsaw", image_size=64, permutations=30)
    images = random_images(300, 64)
    images[0, :, :21, :21] = 7  # a flat tile divides by 1, not by 0
    u = numbers_for(task, 300)
    inputs, labels = task.make(images / 255, u)
    assert inputs.shape == (300, 9, 3, 16, 16) and set(labels.tolist()) == set(range(30))
    flat = inputs[0, task.permutations[labels[0]].argsort()[0]]
    assert torch.isfinite(inputs).all() and flat.abs().max() < 1e-3
    assert inputs[1:].mean(dim=(3, 4)).abs().max() < 1e-5
    assert (inputs[1:].std(dim=(3, 4)) - 1).abs().max() < 1e-3
    gray = u[:, 1] < 0.3
    assert 0.2 < gray.float().mean() < 0.4
    same = (inputs[:, :, 0] - inputs[:, :, 1]).abs().amax(dim=(1, 2, 3)) < 1e-4
    assert torch.equal(same, gray)
    none = task_of("jigsaw", image_size=64, permutations=30, gray=0.0)
    coloured = none.make(images / 255, u)[0]
    assert torch.equal(coloured[~gray], inputs[~gray]) and not torch.equal(coloured[gray], inputs[gray])


def test_jigsaw_column_is_context_free(generator):
    """Oracle 10: permuting the tiles permutes the rows of h, each tile has the same network."""
    task = task_of("jigsaw", image_size=64, permutations=9).eval()
    tiles, order = torch.rand(2, 9, 3, 16, 16, generator=generator), torch.randperm(9, generator=generator)
    logits, h = task(tiles)
    assert logits.shape == (2, 9) and h.shape == (18, 512)
    shuffled = task(tiles[:, order])[1]
    torch.testing.assert_close(shuffled.view(2, 9, -1), h.view(2, 9, -1)[:, order], atol=1e-5, rtol=1e-4)
    errors, weights, right = task.score(torch.tensor([[50.0] + [0] * 8] * 2), torch.tensor([0, 3]))
    assert right.tolist() == [True, False] and errors.tolist() == pytest.approx([0, 50])
    assert weights.tolist() == [1, 1]


def test_jigsaw_picture_solves_the_puzzle():
    task = task_of("jigsaw", permutations=9, gray=1.0)
    inputs, labels = task.make(random_images(4, 32) / 255, numbers_for(task, 4, seed=1))
    shuffled, answered, right = task.picture(inputs, labels, F.one_hot(labels, 9).float())
    assert torch.equal(answered, right) and not torch.equal(shuffled, right)
    wrong = task.picture(inputs, labels, F.one_hot((labels + 1) % 9, 9).float())
    assert torch.equal(wrong[2], right) and not torch.equal(wrong[1], right)
    in_order = inputs[torch.arange(4), task.permutations[labels].argsort(dim=1)[:, 0]]  # the first tile
    torch.testing.assert_close(right[:, :, 1:9, 1:9], in_order / 5 + 0.5)
    second = inputs[torch.arange(4), task.permutations[labels].argsort(dim=1)[:, 1]]
    torch.testing.assert_close(right[:, :, 1:9, 11:19], second / 5 + 0.5)


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


def inside_the_hull(points, colours):
    """Points (P, 2) in the convex hull of colours (C, 2): seen from one outside, all lie on one side."""
    angles = torch.atan2(*(colours - points[:, None]).unbind(dim=2)).sort(dim=1).values
    around = torch.cat([angles, angles[:, :1] + 2 * math.pi], dim=1)
    return around.diff(dim=1).amax(dim=1) < math.pi


def test_ab_gamut_by_its_rule():
    """Multiples of 10 in the convex hull of all sRGB colours, 233, and their eight neighbours."""
    cube = torch.cartesian_prod(*[torch.arange(6, dtype=DOUBLE) / 5] * 3)
    colours = rgb_to_lab(cube.T[:, :, None])[1:, :, 0].T
    grid = torch.cartesian_prod(*[torch.arange(-120, 121, 10, dtype=DOUBLE)] * 2)
    inside = inside_the_hull(grid, colours)
    near = F.max_pool2d(inside.view(1, 25, 25).double(), 3, stride=1, padding=1).flatten() > 0
    assert inside.sum() == 233 and torch.equal(ab_gamut().double(), grid[near])


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


def test_soft_targets():
    """Oracle 7."""
    bins = ab_gamut()
    for k, centre in ((5, 0.6488), (10, 0.6192)):
        index, share, _ = soft_bins(torch.zeros(1, 2, 1, 1), bins, k)
        assert index[0, 0, 0, 0] == 120 and share[0, 0, 0, 0] == pytest.approx(centre, abs=1e-4)
        assert share.shape == (1, 1, 1, k)
    index, share, _ = soft_bins(torch.tensor([[0.0, 3], [0, 4]]).view(2, 2, 1, 1).transpose(0, 1), bins, 5)
    share = share.flatten(0, 2)
    assert share[0].tolist() == pytest.approx([0.6488] + [0.0878] * 4, abs=1e-4)
    assert share[1].tolist() == pytest.approx([0.4062, 0.2723, 0.1825, 0.1224, 0.0166], abs=1e-4)
    torch.testing.assert_close(share.sum(dim=1), torch.ones(2))
    names = {(1, 0, 0): (80, 70), (0, 1, 0): (-90, 80), (0, 0, 1): (80, -110)}
    for rgb, nearest in names.items():
        index, _, coloured = soft_bins(rgb_to_lab(plane([rgb]).float())[:, 1:], bins, 5)
        assert tuple(bins[index[0, 0, 0, 0]].tolist()) == nearest and coloured.item()


def test_an_image_with_no_colour_above_5_is_gray():
    """One value of the whole image is enough."""
    ab = torch.zeros(4, 2, 3, 3)
    ab[1, 1, 2, 0], ab[2, 0, 1, 1], ab[3] = -5.01, 5.01, 5.0
    coloured = soft_bins(ab, ab_gamut(), 5)[2]
    assert coloured.shape == (4, 1, 1) and coloured.flatten().tolist() == [False, True, True, False]


def test_annealed_mean():
    """Oracle 9."""
    bins = torch.tensor([[0.0, 0], [40, 40]])
    logits = torch.tensor([0.6, 0.4]).log().view(1, 2, 1, 1)
    for temperature, value in ((1, 16), (0.38, 10.239), (0.01, 0)):
        ab = annealed_mean(logits, bins, temperature)
        assert ab.flatten().tolist() == pytest.approx([value] * 2, abs=1e-3)
    assert torch.equal(annealed_mean(logits, bins), annealed_mean(logits, bins, 0.38))


def colourful(gray, n=30):
    """n images of random colours, the first `gray` of them without."""
    images = F.interpolate(random_images(n, 6).float(), 16, mode="bilinear")
    images[:gray] = images[:gray].mean(dim=1, keepdim=True)
    return images.byte()


def quarter_ab(images):
    return rgb_to_lab(images / 255)[:, 1:, ::4, ::4]


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


def test_weights_and_constant_answer():
    """Oracle 8, and both against slow versions; gray images are left out."""
    images, bins = colourful(gray=10), ab_gamut()
    task = task_of("colorization", Photos(images))
    soft, nearest = slow_soft_targets(quarter_ab(images[10:]), bins)
    p = soft.mean(dim=0)
    weights = 1 / (0.5 * p + 0.5 / 313)
    weights /= (p * weights).sum()
    torch.testing.assert_close(task.weights, weights, atol=1e-4, rtol=1e-4)
    assert (p * task.weights).sum().item() == pytest.approx(1, abs=1e-4) and p.min() == 0
    ratio = task.weights.max() / task.weights.min()
    assert ratio.item() == pytest.approx(1 + 313 * p.max().item(), rel=1e-3)
    best = (weights[nearest][:, None] * soft).mean(dim=0)
    torch.testing.assert_close(task.constant.flatten().softmax(dim=0), best / best.sum(), atol=1e-4, rtol=0)
    even = task_of("colorization", Photos(images), rebalance=1.0)
    torch.testing.assert_close(even.weights, torch.ones(313))
    for workers in (0, 2):
        many = colour_weights(Photos(images), bins, Args(workers=workers))
        assert torch.equal(many[0], task.weights)


def test_weights_are_of_2048_images_at_most():
    seen = []

    class Counted(Photos):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    for n, expected in ((5, 5), (2048, 2048), (2049, 1025), (6000, 2000)):
        seen.clear()
        colour_weights(Counted([colourful(0, 1)[0]] * n), ab_gamut(), Args(workers=0))
        assert len(seen) == len({*seen}) == expected and seen[-1] >= n - 3  # from all of the data


def test_the_network_s_start_does_not_depend_on_the_data(folder):
    """Nor on what reading it draws: for each seed the encoder of colorization begins as that of rotation."""
    states = []
    for task in ("colorization", "rotation"):
        args = tiny_args("pretext", data=str(folder), task=task, epochs=0, run_dir=task)
        pretext.train(args)
        states.append(torch.load(f"{task}/backbone.pt", weights_only=True)["state_dict"])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


def test_colorization_loss(generator):
    """Against a loop over the pixels; a gray image counts nothing and gets no gradient (oracle 10)."""
    images = colourful(gray=2, n=6)
    task = task_of("colorization", Photos(images))
    inputs, ab = task.make(images / 255, None)
    assert torch.equal(ab, quarter_ab(images)) and torch.equal(inputs, rgb_to_lab(images / 255)[:, :1])
    logits = torch.randn(6, 313, 4, 4, generator=generator, requires_grad=True)
    errors, weights, _ = task.score(logits, ab)
    soft, nearest = slow_soft_targets(ab, task.bins)
    slow = -(soft * logits.log_softmax(dim=1).movedim(1, 3).reshape(-1, 313)).sum(dim=1)
    coloured = (torch.arange(6) >= 2).repeat_interleave(16)
    torch.testing.assert_close(errors.flatten(), slow, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(weights.flatten(), task.weights[nearest] * coloured, atol=1e-4, rtol=1e-4)
    (errors * weights).sum().backward()
    assert not logits.grad[:2].any() and logits.grad[2:].abs().amin(dim=1).min() > 0
    assert (weights > 0).sum() == 4 * 16
    sure = F.one_hot(nearest.view(6, 4, 4), 313).movedim(3, 1)
    assert task.score(sure, ab)[2].all() and not task.score(-1 * sure, ab)[2].any()


def test_colorization_sees_lightness_alone():
    task, images = task_of("colorization").eval(), random_images(2, 32)
    lightness, ab = task.make(images / 255, None)
    assert lightness.shape == (2, 1, 32, 32) and ab.shape == (2, 2, 8, 8)
    logits, h = task(lightness)
    assert logits.shape == (2, 313, 8, 8) and h.shape == (2, 512)
    light = lightness.expand(-1, 3, -1, -1) / 100
    normal = pretext.v2.functional.normalize(light, pretext.MEAN, pretext.STD)
    torch.testing.assert_close(task.backbone(normal), h)  # h is what torchvision's network gives
    assert task_of("colorization", stem="cifar")(lightness)[0].shape == (2, 313, 8, 8)


def test_colorization_picture():
    """Lightness without a colour; a sure answer of each pixel's nearest bin has nearly the colours it has."""
    images = colourful(gray=0, n=9)
    task = task_of("colorization", Photos(images))
    lightness, ab = task.make(images / 255, None)
    nearest = soft_bins(ab, task.bins, 1)[0][..., 0]
    gray, answered, right = task.picture(lightness, ab, 100.0 * F.one_hot(nearest, 313).movedim(3, 1))
    assert gray.shape == right.shape == (8, 3, 16, 16)
    assert (gray.amax(dim=1) - gray.amin(dim=1)).max() < 1e-3
    assert (answered - right).abs().mean() < 0.03 < 0.1 < (gray - right).abs().mean()
    halves = torch.full((1, 3, 16, 16), 0.3)
    halves[:, 1, :, 8:] = 0.6  # green on the right
    lightness, ab = task.make(halves, None)
    shown = task.picture(lightness, ab, torch.zeros(1, 313, 4, 4))[2]
    torch.testing.assert_close(shown[..., 12:], halves[..., 12:], atol=1e-4, rtol=0)
    torch.testing.assert_close(shown[..., :4], halves[..., :4], atol=1e-4, rtol=0)


def write(images):
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(f"photos/{i:03d}.png")


def test_gray_data_is_an_error(tmp_path):
    (tmp_path / "photos").mkdir()
    write(colourful(gray=29))
    flags = {"data": "photos", "task": "colorization", "run_dir": "run"}
    with pytest.raises(SystemExit, match="29 of 30 images are gray.*rotation"):
        pretext.train(tiny_args("pretext", **flags))
    assert not (tmp_path / "run").exists()
    pretext.train(tiny_args("pretext", **(flags | {"task": "rotation"}), epochs=1))


@pytest.mark.parametrize("workers", [0, 1])
def test_files_that_nothing_reads_end_colorization_in_one_line(tmp_path, workers):
    """They are met before the loop."""
    for i in range(110):
        (tmp_path / f"bad/{i // 60}").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"bad/{i // 60}/{i:03d}.jpg").write_text("no image")
    args = tiny_args("pretext", data="bad", task="colorization", workers=workers, run_dir="run")
    with pytest.raises(SystemExit) as stop:
        pretext.train(args)
    assert re.search(r"100 files in a row cannot be read, the last is bad/\S+$", stop.value.code)
    assert "\n" not in stop.value.code and not (tmp_path / "run").exists()


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
    """Oracle 2, also of the constant answer where all answers are as frequent."""
    monkeypatch.setattr(pretext, "jigsaw_permutations", lambda n: torch.arange(9).repeat(n, 1))
    task = task_of(
        flags.get("task", "rotation"), image_size=48, **{k: v for k, v in flags.items() if k != "task"}
    )
    inputs, targets = task.make(random_images(4, 48) / 255, numbers_for(task, 4))
    logits = task(inputs)[0].detach()
    constants = [0 * logits] + [task.constant.expand_as(logits)] * (flags.get("task") != "colorization")
    for equal in constants:
        errors, weights, _ = task.score(equal, targets)
        assert errors.mean().item() == pytest.approx(floor, abs=1e-4) and weights.min() > 0


# Monitor


def answers_of(error, constant, weight, right):
    return torch.tensor(list(zip(error, constant, weight, right, strict=True)), dtype=DOUBLE)


def test_metrics_by_hand(generator):
    """Of the answers with a weight; features about their mean."""
    answers = answers_of([1.0, 3.0, 9.0], [2.0, 4.0, 9.0], [3.0, 1.0, 0.0], [1, 0, 1])
    h = torch.randn(64, 8, generator=generator) + 3
    metrics, problems = monitor(answers, h)
    assert metrics["pretext/accuracy"] == 0.5 and metrics["pretext/plain_loss"] == 2
    assert metrics["pretext/gain"] == pytest.approx(1 - (3 + 3) / (6 + 4)) and not problems
    expected = pretext.collapse_metrics(h, center=True)
    assert {tag: metrics[tag] for tag in metrics if "monitor" in tag} == {
        f"monitor/{name}": value for name, value in expected.items()
    }


def test_the_problem_is_to_be_no_better_than_a_constant():
    for error, rings in ((1.98, False), (1.99, True), (2.5, True), (0.5, False)):
        problems = monitor(answers_of([error] * 4, [2.0] * 4, [1.0] * 4, [1, 0, 0, 0]), torch.randn(4, 3))[1]
        assert bool(problems) == rings, error
        assert (
            not rings or [*problems.values()] == ["pretext/accuracy"] and "accuracy 0.250" in [*problems][0]
        )


# Training


def test_learning_rates_and_optimiser_of_a_run(folder, monkeypatch):
    """Decay of every tensor, Nesterov; fused but in float16."""
    seen, sgd = [], torch.optim.SGD
    monkeypatch.setattr(
        torch.optim, "SGD", lambda p, *a, **k: seen.append(([*p], a, k)) or sgd([*seen[-1][0]], *a, **k)
    )
    pretext.train(tiny_args("pretext", data=str(folder), base_lr=0.3, warmup_epochs=1.4, run_dir="run"))
    lines = [json.loads(line) for line in open("run/metrics.jsonl")]
    peak = 0.3 * 8 / 256
    assert [line["train/lr"] for line in lines] == [
        pretext.cosine_schedule(step, 20, 7, peak) for step in range(20)
    ]
    [(parameters, rate, options)] = seen
    assert len(parameters) == len([*task_of("rotation").parameters()]) and rate == (peak,)
    assert options == {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "fused": True}


def test_training_is_the_same_in_processes(tmp_path):
    """A network without BatchNorm: 1 process = 2 processes, for all three tasks, with a third of the images
    gray, so that the processes have unequal numbers of coloured pixels."""
    code = """
import pretext, torch
import torch.distributed as dist
from torch import nn
torch.set_default_dtype(torch.float64)
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
models = pretext.torchvision.models
models.resnet18 = lambda: models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1])
for task in pretext.TASKS:
    pretext.train(pretext.Args(
        task=task, data="photos", image_size=24, batch_size=24, epochs=1, warmup_epochs=0.01, workers=0,
        permutations=10, log_every=1, base_lr=0.05, run_dir="RUN-" + task,
    ))
"""
    (tmp_path / "photos").mkdir()
    for i in range(72):
        image = pretext.demo_image(i)[0]
        image.convert("L" if i % 3 == 0 else "RGB").save(tmp_path / "photos" / f"{i:03d}.png")
    for n in (1, 2):
        run_processes(tmp_path, code.replace("RUN", f"run{n}"), n)
    for task in pretext.TASKS:
        texts = [(tmp_path / f"run{n}-{task}/metrics.jsonl").read_text() for n in (1, 2)]
        one, two = [[json.loads(line) for line in text.splitlines()] for text in texts]
        assert len(one) == 3
        for line, expected in zip(two, one, strict=True):
            for tag in line.keys() - {"perf/images_per_second"}:
                exact = (
                    1e-6 if tag.startswith("monitor/") else 1e-9
                )  # the rank takes roots of what is nearly 0
                assert line[tag] == pytest.approx(expected[tag], rel=exact, abs=exact), (task, tag)
        assert one[0]["train/loss"] != pytest.approx(one[-1]["train/loss"], rel=1e-4)
        states = [torch.load(tmp_path / f"run{n}-{task}/checkpoint.pt", weights_only=True) for n in (1, 2)]
        ours, theirs = ([v["momentum_buffer"] for v in s["optimizer"]["state"].values()] for s in states)
        scale = max(buffer.abs().max() for buffer in theirs)
        assert len(ours) > 30 and scale > 1e-3
        assert max((a - b).abs().max() for a, b in zip(ours, theirs, strict=True)) < 1e-9 * scale


@pytest.mark.parametrize("task, rows", [("rotation", 2), ("jigsaw", 3), ("colorization", 3)])
def test_pictures_of_a_run(task, rows, folder, monkeypatch):
    """At the first step, at each save and at the end; a row for each kind."""
    steps, schedule, save = [], pretext.cosine_schedule, pretext.torchvision.utils.save_image
    monkeypatch.setattr(
        pretext, "cosine_schedule", lambda step, *a: steps.append([step + 1]) or schedule(step, *a)
    )

    def spy(panels, path, nrow):
        steps[-1].append(len(panels) // nrow)
        assert path.name == "answers.png" and panels.shape[1] == 3
        save(panels, path, nrow=nrow)

    monkeypatch.setattr(pretext.torchvision.utils, "save_image", spy)
    for minutes, expected in ((10.0, [1, 5]), (0.0, [1, 2, 4, 5])):
        steps.clear()
        flags = {"task": task, "epochs": 1, "log_every": 2, "save_minutes": minutes, "run_dir": f"{minutes}"}
        pretext.train(tiny_args("pretext", data=str(folder), permutations=7, **flags))
        assert [step for step, *pictures in steps if pictures == [rows]] == expected
        assert Image.open(f"{minutes}/answers.png").width > 100


@pytest.mark.parametrize("task", ["jigsaw", "colorization"])
def test_random_labels_ring_the_alarm(task, folder, capsys, monkeypatch):
    """The control of rotation is in test_contract.py; targets of other images are random ones."""
    kind = pretext.TASKS[task]
    make = kind.make

    def shuffled(self, images, u):
        inputs, targets = make(self, images, u)
        return inputs, targets[torch.randperm(len(targets))]

    flags = {"data": str(folder), "task": task, "epochs": 12, "log_every": 3, "permutations": 12}
    monkeypatch.setattr(kind, "make", shuffled)
    pretext.train(tiny_args("pretext", **flags, warmup_epochs=0.1, run_dir="run"))
    lines = [json.loads(line) for line in open("run/metrics.jsonl")]
    assert lines[-1]["monitor/alarm"] == 1
    assert re.search("COLLAPSE at step .*no better than one answer to all", capsys.readouterr().out)


def test_a_batch_without_colour_does_no_harm(tmp_path):
    """Five of six images have one; each batch of two may have none."""
    (tmp_path / "photos").mkdir()
    write(colourful(gray=16, n=20))
    flags = {"data": "photos", "task": "colorization", "batch_size": 2, "epochs": 1, "warmup_epochs": 0.1}
    pretext.train(tiny_args("pretext", **flags, run_dir="run"))
    lines = [json.loads(line) for line in open("run/metrics.jsonl")]
    empty = [line for line in lines if line["train/loss"] == 0]
    assert len(lines) == 10 and 4 <= len(empty) < 10
    assert not any("pretext/accuracy" in line or line["train/grad_norm"] for line in empty)


def test_each_step_has_its_own_numbers(folder, monkeypatch):
    """Uniform, for each image its own, of (seed, step) alone."""
    drawn, make = [], Jigsaw.make
    monkeypatch.setattr(Jigsaw, "make", lambda *a: drawn.append(a[2]) or make(*a))
    for seed in (0, 1):
        flags = {"task": "jigsaw", "epochs": 1, "permutations": 7, "run_dir": str(seed)}
        pretext.train(tiny_args("pretext", data=str(folder), seed=seed, **flags))
    assert len(drawn) == 10 and len(torch.stack(drawn).unique()) > 0.99 * 10 * 8 * 74
    for i, u in enumerate(drawn):
        assert torch.equal(u, torch.rand(8, 74, generator=pretext.seeded(3, i // 5, i % 5)))


def test_a_run_passes_its_flags_on(folder, monkeypatch):
    crops, cuts, seen = [], [], []
    cut, square, read, make = (
        pretext.random_crop,
        pretext.central_square,
        pretext.Images.__getitem__,
        Rotation.make,
    )
    monkeypatch.setattr(pretext, "random_crop", lambda *a: cuts.append(a) or cut(*a))
    monkeypatch.setattr(pretext, "central_square", lambda x: cuts.append(x.shape) or square(x))
    monkeypatch.setattr(pretext.Images, "__getitem__", lambda *a: crops.append(read(*a)) or crops[-1])
    monkeypatch.setattr(Rotation, "make", lambda self, x, u: seen.append(x) or make(self, x, u))
    pretext.train(tiny_args("pretext", data=str(folder), min_scale=0.7, epochs=1, run_dir="run"))
    assert cuts[0] == (32, 0.7) and {*cuts[1:]} == {(3, 36, 40)} and len(cuts) == 41
    assert torch.equal(seen[0], torch.stack([crop for crop, _ in crops[:8]]) / 255)


def test_the_permutations_and_weights_are_kept_with_the_run(folder):
    for task in ("jigsaw", "colorization"):
        flags = {"data": str(folder), "task": task, "permutations": 7, "epochs": 1}
        pretext.train(tiny_args("pretext", **flags, run_dir=task))
    state = torch.load("jigsaw/checkpoint.pt", weights_only=True)["model"]
    assert torch.equal(state["permutations"], jigsaw_permutations(7))
    state = torch.load("colorization/checkpoint.pt", weights_only=True)["model"]
    assert state["weights"].min() < 0.9 < 1.1 < state["weights"].max() and "constant" in state


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"task": "jigsaw", "image_size": 16}, "--image-size 16: jigsaw needs tiles"),
        ({"permutations": 6000}, "--permutations 6000: must be above 0 and at most 5000"),
        ({"gray": 1.5}, "--gray 1.5: must be at least 0 and at most 1"),
        ({"rebalance": 0.0}, "--rebalance 0.0: must be above 0 and at most 1"),
        ({"neighbors": 400}, "--neighbors 400: must be above 0 and at most 313"),
    ],
)
def test_bad_flags(tmp_path, flags, message):
    with pytest.raises(SystemExit) as stop:
        pretext.train(tiny_args("pretext", run_dir="run", **flags))
    assert message in str(stop.value) and not (tmp_path / "run").exists()


def test_no_help_takes_the_decay_of_a_sum_for_that_of_a_mean():
    """methods/pretext.md, addendum: 1e-3 belongs to colorization's loss summed over pixels."""
    line = re.search(r"weight_decay: float.*", (ROOT / "pretext.py").read_text())[0]
    assert "5e-4" in line and "1e-3" not in line and "olorization" not in line


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
def test_resume_is_exact(task, folder):
    """Stopped in step 5 of 10 and continued: the metrics and weights of a run that nothing stopped."""
    flags = {"data": str(folder), "task": task, "permutations": 7, "epochs": 2}
    whole, stopped = (tiny_args("pretext", **flags, run_dir=name) for name in ("whole", "run"))
    pretext.train(whole)
    assert "step 5" in stop_at(pretext, stopped, 5, signal.SIGTERM)
    pretext.train(stopped)
    lines, states = [], []
    for name in ("whole", "run"):
        found = [json.loads(line) for line in open(f"{name}/metrics.jsonl")]
        lines.append([{k: v for k, v in line.items() if k[:4] != "perf"} for line in found])
        states.append(torch.load(f"{name}/checkpoint.pt", weights_only=True)["model"])
    assert lines[0] == lines[1] and len(lines[0]) == 10
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
