"""ijepa.py against its fact sheet's oracles, timm and slow versions."""

import copy
import json
import math
import re
import time
from unittest import mock

import numpy as np
import pytest
import timm
import torch
import tyro
from conftest import features_of, run_processes, tiny_args
from PIL import Image

import convert
import eval_linear
import ijepa
from ijepa import (
    IJEPA,
    IJEPAEncoder,
    IJEPAPredictor,
    apply_masks,
    ijepa_loss,
    masks_picture,
    momentum_update,
    monitor,
    multiblock_masks,
    target_features,
)


def small(patch=4):
    """vit_nano for 32 px and patch 4: 64 patches; its predictor has one block."""
    torch.manual_seed(0)
    with mock.patch.dict(ijepa.PREDICTORS, vit_nano=(64, 1)):
        return IJEPA("vit_nano", 32, patch).eval()


def images(n=3, size=32, seed=1):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def masks(grid=8, n=3, seed=0, **options):
    return multiblock_masks(grid, n, torch.Generator().manual_seed(seed), **({"min_keep": 4} | options))


def shaken(model):
    """Also where the initial value is 0 or 1."""
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p) * p.requires_grad
    return model


# Masks: oracles 7 and 8, and the sheet's section 4


def slow_size(grid, area, aspect):
    """Height and width of a block, in the official steps."""
    k = int(grid * grid * area)
    height, width = round(math.sqrt(k * aspect)), round(math.sqrt(k / aspect))
    while height > grid:
        height -= 1
    while width > grid:
        width -= 1
    return height, width


def rectangle(indices, grid):
    """(top, left, height, width) of raster indices that fill a rectangle."""
    rows, columns = [i // grid for i in indices], [i % grid for i in indices]
    top, left, height, width = (
        min(rows),
        min(columns),
        max(rows) - min(rows) + 1,
        max(columns) - min(columns) + 1,
    )
    assert indices == [
        (top + y) * grid + left + x for y in range(height) for x in range(width)
    ]  # in raster order, none missing
    return top, left, height, width


@pytest.mark.parametrize("grid, min_keep", [(8, 4), (14, 10)])
def test_what_masks_must_be(grid, min_keep):
    """One size, rectangles, disjoint, increasing, more than min_keep before they are cut to one length."""
    for seed in range(20):
        context, blocks = masks(grid, 16, seed, min_keep=min_keep)
        share, _ = torch.rand(2, generator=torch.Generator().manual_seed(seed)).tolist()
        size = slow_size(grid, 0.15 + 0.05 * share, 0.75 + 0.75 * share)
        assert context.shape[0] == 16 and blocks.shape == (4, 16, math.prod(size))
        assert context.shape[1] > min_keep and (context.diff(dim=1) > 0).all()
        for image in range(16):
            kept, taken = set(context[image].tolist()), set()
            for block in blocks[:, image].tolist():
                assert rectangle(block, grid)[2:] == size
                taken |= set(block)
            assert not kept & taken and min(kept | taken) >= 0 and max(kept | taken) < grid**2


@pytest.mark.parametrize(
    "grid, sizes",
    [
        (8, {(3, 3), (4, 3)}),
        (12, {(4, 5), (5, 5), (6, 5), (6, 4)}),
        (14, {(5, 6), (6, 6), (6, 5), (7, 5), (8, 5)}),
        (16, {(5, 7), (6, 7), (6, 6), (7, 6), (8, 6), (9, 6)}),
    ],
)
def test_possible_sizes_of_targets(grid, sizes):
    """The sheet's list; some of a grid of 16 are rare."""
    found = set()
    for seed in range(300):
        _, blocks = masks(grid, 1, seed)
        found.add(rectangle(blocks[0, 0].tolist(), grid)[2:])
    assert found <= sizes and len(found) >= len(sizes) - 1


@pytest.mark.parametrize("grid", [8, 14])
def test_places_of_blocks(grid):
    """Uniform, in the last row and column, too; in the official code these are never used."""
    seen, hit = torch.zeros(grid**2), torch.zeros(grid**2)
    for seed in range(1000 // 32 + 1):
        context, blocks = masks(grid, 32, seed)
        hit += torch.bincount(blocks.flatten(), minlength=grid**2)
        seen += torch.bincount(context.flatten(), minlength=grid**2)
    seen, hit = seen.view(grid, grid), hit.view(grid, grid)
    assert (seen > 0).all() and (hit > 0).all()
    for sums in (hit.sum(dim=0), hit.sum(dim=1)):  # as likely above as below
        torch.testing.assert_close(sums, sums.flip(0), atol=0, rtol=0.3)
    assert 0.7 < seen[0].sum() / seen[-1].sum() < 1.4


def test_a_random_part_of_the_context_is_kept():
    """A batch of one keeps all; in others the cut falls on rows above and below alike."""
    context, blocks = masks(8, 1, 1, context_scale=(1.0, 1.0))
    assert sorted(context[0].tolist()) == sorted(set(range(64)) - set(blocks.flatten().tolist()))
    rows = torch.zeros(8)
    for seed in range(50):
        context, _ = masks(8, 64, seed, context_scale=(1.0, 1.0))
        rows += torch.bincount(context.flatten() // 8, minlength=8)
    torch.testing.assert_close(rows, rows.flip(0), atol=0, rtol=0.1)


def test_sampling_ends_on_every_grid():
    """10,000 draws on grids of 4 to 16, too strict ones too, where the official loop never ends."""
    start, draws = time.process_time(), 0
    for grid in range(4, 17):
        for seed in range(12):
            for min_keep in (4, 10):
                context, blocks = masks(grid, 64, seed, min_keep=min_keep)
                assert context.shape[1] > 0 and blocks.shape[2] > 0 and blocks.max() < grid**2
                draws += 64
                if grid >= 8 or min_keep == 4 and grid > 4:
                    assert context.shape[1] > min_keep
    assert draws > 10_000 and time.process_time() - start < 20
    context, blocks = masks(4, 64, 0, min_keep=1000)  # no context can have so many: it may overlap targets
    assert context.shape[1] >= 9


def test_one_target_less_is_taken_out_when_the_context_is_short():
    """Last first: with four targets of half the image each, contexts overlap the last ones alone."""
    flags = {"target_scale": (0.45, 0.5), "context_scale": (1.0, 1.0)}
    overlaps = torch.zeros(4)
    for seed in range(20):
        context, blocks = masks(8, 32, seed, min_keep=25, **flags)
        for image in range(32):
            overlaps += torch.tensor(
                [len(set(b.tolist()) & set(context[image].tolist())) > 0 for b in blocks[:, image]]
            )
    assert overlaps[0] == 0 < overlaps[1] <= overlaps[2] <= overlaps[3]


def test_sides_of_contexts():
    """Of a batch of one, from which nothing is cut: a square of 85 to 100 % of the grid, less the targets."""
    sides = set()
    for seed in range(20):
        _, share = torch.rand(2, generator=torch.Generator().manual_seed(seed)).tolist()
        side = round(math.sqrt(int(14**2 * (0.85 + 0.15 * share))))
        context, blocks = masks(14, 1, seed, min_keep=10)
        gone, places = set(blocks.flatten().tolist()), range(15 - side)
        squares = [
            {(top + i // side) * 14 + left + i % side for i in range(side**2)}
            for top in places
            for left in places
        ]
        assert set(context[0].tolist()) in [square - gone for square in squares]
        sides.add(side)
    assert sides == {13, 14}


def test_a_short_context_is_drawn_again_before_a_target_is_given_up():
    """A small square often lies under the targets, but seldom 20 times."""
    options = {"context_scale": (0.3, 0.3), "min_keep": 12}
    for seed in range(20):
        context, blocks = masks(12, 4, seed, **options)
        assert context.shape[1] > 12
        for image in range(4):
            assert not set(context[image].tolist()) & set(blocks[:, image].flatten().tolist())


def test_masks_are_random_by_their_generator_alone():
    first, again, other = masks(seed=1), masks(seed=1), masks(seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert first[0].shape != other[0].shape or not torch.equal(first[0], other[0])


# Tokens: oracles 3 and 4


def test_apply_masks():
    x = torch.arange(8.0).view(2, 4, 1)
    picked = apply_masks(x, torch.tensor([[[0, 1], [2, 3]], [[1, 2], [0, 3]]]))
    assert picked[..., 0].tolist() == [[0, 1], [6, 7], [1, 2], [4, 7]]


# The model: oracles 9, 10 and 11


def test_the_encoder_is_timm_s_vit():
    encoder, x = shaken(IJEPAEncoder("vit_nano", 32, 4)), images()
    options = {
        "img_size": 32,
        "patch_size": 4,
        "embed_dim": 128,
        "depth": 6,
        "num_heads": 4,
        "num_classes": 0,
    }
    theirs = timm.models.VisionTransformer(
        **options, class_token=False, global_pool="avg", fc_norm=False
    ).eval()
    theirs.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        tokens = encoder(x)
        torch.testing.assert_close(tokens, theirs.forward_features(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(tokens.mean(dim=1), theirs(x), atol=1e-5, rtol=1e-5)
        everything = torch.arange(64).repeat(3, 1)
        torch.testing.assert_close(encoder(x, everything), tokens)


def test_positions_are_added_before_the_mask():
    encoder, x, (context, _) = shaken(IJEPAEncoder("vit_nano", 32, 4)), images(), masks()
    tokens = encoder.patch_embed(x).flatten(2).mT + encoder.pos_embed
    rows = torch.stack([tokens[i, context[i]] for i in range(3)])
    torch.testing.assert_close(encoder(x, context), encoder.norm(encoder.blocks(rows)))


def test_positions_by_the_numbers():
    """As MAE's, without the row of [CLS]: column first."""
    table = IJEPAPredictor(128, 2, width=8, depth=1, heads=4).predictor_pos_embed[0]
    expected = [[0, 0, 1, 1, 0, 0, 1, 1], [0.841471, 0.01, 0.540302, 0.99995, 0, 0, 1, 1]]
    torch.testing.assert_close(table[:2], torch.tensor(expected), atol=1e-6, rtol=0)
    expected = torch.tensor([0, 0, 1, 1, 0.841471, 0.01, 0.540302, 0.99995])
    torch.testing.assert_close(table[2], expected, atol=1e-6, rtol=0)


def test_each_block_is_predicted_on_its_own():
    """Row (block b, image i) is that pair alone; the order of the context does not matter."""
    model, x, (context, blocks) = shaken(small()), images(), masks()
    with torch.no_grad():
        pred = model(x, context, blocks)
        assert pred.shape == (12, blocks.shape[2], 128)
        for b in range(4):
            for i in range(3):
                alone = model(x[i : i + 1], context[i : i + 1], blocks[b : b + 1, i : i + 1])
                torch.testing.assert_close(pred[3 * b + i], alone[0], atol=1e-5, rtol=1e-5)
        order = torch.randperm(context.shape[1])
        shuffled = model(x, context[:, order], blocks)
        torch.testing.assert_close(shuffled, pred, atol=1e-5, rtol=1e-5)
        assert (pred[0, 0] - pred[0, 1]).abs().max() > 1e-3  # mask tokens have positions


def test_slow_predictor():
    """For one image and block: embed, add positions, mask tokens with positions, blocks, norm, project."""
    model, x, (context, blocks) = shaken(small()), images(1), masks(n=1)
    net, where = model.predictor, model.predictor.predictor_pos_embed[0]
    with torch.no_grad():
        latent = model.encoder(x, context)[0]
        known = [net.predictor_embed(latent[k]) + where[i] for k, i in enumerate(context[0])]
        asked = [net.mask_token[0, 0] + where[i] for i in blocks[2, 0]]
        y = net.predictor_blocks(torch.stack(known + asked)[None])[0, len(known) :]
        expected = net.predictor_proj(net.predictor_norm(y))
        torch.testing.assert_close(model(x, context, blocks)[2], expected, atol=1e-5, rtol=1e-5)


def test_rows_of_the_predictor_are_in_official_order():
    """Oracle 4: rows [0, 1, 2, 3], B 2, each block twice, are [0, 1, 0, 1, 2, 3, 2, 3], row b x 2 + i being
    block b of image i; beside them stand the contexts of images [0, 1] over and over."""
    net = IJEPAPredictor(8, 4, width=8, depth=1, heads=1)
    targets = torch.tensor([[[0], [1]], [[2], [3]]]).repeat_interleave(2, dim=0)  # (4, B, 1)
    rows = apply_masks(torch.arange(4.0).expand(2, 4)[:, :, None], targets)[:, 0, 0]
    assert rows.tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    seen, context = [], torch.tensor([[5, 6], [7, 8]])
    net.predictor_blocks.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        net.mask_token.fill_(7.0)
        x = torch.randn(2, 2, 8)
        assert net(x, context, targets).shape == (8, 1, 8)
        known, asked = seen[0].split([2, 1], dim=1)
        where = net.predictor_pos_embed[0]
        torch.testing.assert_close(known, (net.predictor_embed(x) + where[context])[[0, 1] * 4])
        torch.testing.assert_close(asked[:, 0], 7.0 + where[[0, 1, 0, 1, 2, 3, 2, 3]])


def test_pixels_outside_the_context_do_not_reach_the_encoder():
    model, x, (context, blocks) = small(), images(), masks()
    outside = torch.ones(3, 64).scatter(1, context, 0.0).view(3, 1, 8, 8)
    changed = x + 10 * torch.nn.functional.interpolate(outside, scale_factor=4)
    with torch.no_grad():
        assert torch.equal(model.encoder(changed, context), model.encoder(x, context))
        assert not torch.equal(model.encoder(changed), model.encoder(x))
        assert torch.equal(model(changed, context, blocks), model(x, context, blocks))


def test_what_learns_and_what_does_not():
    model, (context, blocks) = small(), masks()
    target = apply_masks(target_features(model.target_encoder(images())), blocks)
    ijepa_loss(model(images(), context, blocks), target).backward()
    of_target = {f"target_encoder.{name}" for name, _ in model.target_encoder.named_parameters()}
    fixed = {name for name, p in model.named_parameters() if p.grad is None}
    assert fixed == of_target | {"encoder.pos_embed", "predictor.predictor_pos_embed"}
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.grad is not None)
    assert not target.requires_grad


def test_initialisation():
    """Official: all weights trunc normal .02, no rescaling by depth; convolutions as at patch 16."""
    model = IJEPA("vit_small", 32, 16)
    assert model.encoder.patch_embed.proj.weight.std().item() == pytest.approx(0.02, rel=0.02)
    patch4 = IJEPA("vit_small", 32, 4).encoder.patch_embed.proj
    assert patch4.weight.std().item() == pytest.approx(0.08, rel=0.02) and patch4.bias.abs().max() == 0
    for layer in (
        model.encoder.blocks[-1].attn.proj,
        model.encoder.blocks[-1].mlp.fc2,
        model.predictor.predictor_proj,
    ):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.02) and layer.bias.abs().max() == 0
    assert model.predictor.mask_token.std().item() == pytest.approx(0.02, rel=0.2)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert all(m.weight.eq(1).all() and m.bias.eq(0).all() and m.eps == 1e-6 for m in norms)
    target = model.target_encoder.state_dict()
    assert all(torch.equal(tensor, target[name]) for name, tensor in model.encoder.state_dict().items())


def official_shapes(dim, depth, patch, patches, width, predictor_depth):
    """{name: shape} of the sheet's section 6, of encoder and predictor."""

    def block(prefix, d):
        shapes = {f"{n}.{p}": (d,) for n in ("norm1", "norm2") for p in ("weight", "bias")}
        for name, size in (
            ("attn.qkv", (3 * d, d)),
            ("attn.proj", (d, d)),
            ("mlp.fc1", (4 * d, d)),
            ("mlp.fc2", (d, 4 * d)),
        ):
            shapes |= {f"{name}.weight": size, f"{name}.bias": size[:1]}
        return {f"{prefix}.{name}": shape for name, shape in shapes.items()}

    encoder = {"pos_embed": (1, patches, dim), "patch_embed.proj.weight": (dim, 3, patch, patch)}
    encoder |= {"patch_embed.proj.bias": (dim,), "norm.weight": (dim,), "norm.bias": (dim,)}
    predictor = {"mask_token": (1, 1, width), "predictor_pos_embed": (1, patches, width)}
    predictor |= {"predictor_embed.weight": (width, dim), "predictor_embed.bias": (width,)}
    predictor |= {"predictor_norm.weight": (width,), "predictor_norm.bias": (width,)}
    predictor |= {"predictor_proj.weight": (dim, width), "predictor_proj.bias": (dim,)}
    for i in range(depth):
        encoder |= block(f"blocks.{i}", dim)
    for i in range(predictor_depth):
        predictor |= block(f"predictor_blocks.{i}", width)
    return encoder, predictor


def test_official_names_load_strictly():
    """The sheet's example: Ti, patch 8, 32 px, predictor 96 wide; "module." of DDP stripped."""
    encoder, predictor = official_shapes(192, 12, 8, 16, 96, 4)
    file = {
        "encoder": {f"module.{k}": torch.randn(v) for k, v in encoder.items()},
        "predictor": {f"module.{k}": torch.randn(v) for k, v in predictor.items()},
        "target_encoder": {f"module.{k}": torch.randn(v) for k, v in encoder.items()},
    }
    model = IJEPA("vit_tiny", 32, 8)
    for name, part in file.items():
        state = {k.removeprefix("module."): v for k, v in part.items()}
        getattr(model, name).load_state_dict(state, strict=True)
    parts = {"encoder": encoder, "predictor": predictor, "target_encoder": encoder}
    assert {*model.state_dict()} == {f"{part}.{name}" for part, names in parts.items() for name in names}


@pytest.mark.parametrize(
    "arch, patch, millions, predictor",
    [("vit_tiny", 16, 5.49, None), ("vit_small", 16, 21.59, None), ("vit_base", 16, 85.65, 11.24)],
)
def test_sizes(arch, patch, millions, predictor):
    with torch.device("meta"):
        model = IJEPA(arch, 224, patch)
        huge = IJEPA("vit_huge", 224, 14)
    count = lambda net: sum(p.numel() for p in net.parameters() if p.requires_grad) / 1e6  # noqa: E731
    assert count(model.encoder) == pytest.approx(millions, abs=0.005)
    if predictor:
        assert count(model.predictor) == pytest.approx(predictor, abs=0.005)
    block = huge.predictor.predictor_blocks[0]
    assert (
        len(huge.predictor.predictor_blocks) == 12
        and block.attn.heads == 16
        and len(block.norm1.weight) == 384
    )
    assert {name: heads for name, (_, _, heads) in ijepa.VITS.items()} == eval_linear.HEADS
    known = {name: (*sizes, heads) for sizes, (name, heads) in convert.VITS.items() if name != "vit_giant"}
    assert known == ijepa.VITS == {name: ijepa.VITS[name] for name in ijepa.PREDICTORS}


# The loss: oracles 1 and 2


def test_loss_by_the_numbers():
    pred = torch.tensor([0.0, 0.5, 2, -3])
    assert ijepa_loss(pred, torch.zeros(4)).item() == 1.03125
    target = torch.randn(64, 20, 128, generator=torch.Generator().manual_seed(0))
    assert ijepa_loss(0 * target, target).item() == pytest.approx(0.4246, abs=2e-3)


def test_targets_have_mean_0_and_variance_1():
    target = target_features(5 + 3 * torch.randn(4, 16, 128))
    torch.testing.assert_close(target.mean(dim=2), torch.zeros(4, 16), atol=1e-6, rtol=0)
    torch.testing.assert_close(target.var(dim=2, correction=0), torch.ones(4, 16), atol=1e-5, rtol=0)


def test_loss_and_targets_keep_float64_and_lift_half_precision():
    pred, tokens = torch.randn(2, 6, 16, 12, dtype=torch.float64)
    target, loss = target_features(tokens), ijepa_loss(pred, tokens)
    assert target.dtype == loss.dtype == torch.float64
    centred = tokens - tokens.mean(dim=2, keepdim=True)
    exact = centred / (centred.square().mean(dim=2, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(target, exact, atol=1e-14, rtol=0)
    d = (pred - tokens).abs()
    exact = torch.where(d < 1, 0.5 * d**2, d - 0.5).mean()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-14)
    half, target = pred.bfloat16(), tokens.float()
    assert target_features(half).dtype == ijepa_loss(half, target).dtype == torch.float32
    torch.testing.assert_close(target_features(half), target_features(half.float()))
    torch.testing.assert_close(ijepa_loss(half, target), ijepa_loss(half.float(), target))


def test_loss_of_a_batch_is_the_slow_one():
    model, x, (context, blocks) = shaken(small()), images(), masks()
    with torch.no_grad():
        tokens = model.encoder(x)
        loss = ijepa_loss(model(x, context, blocks), apply_masks(target_features(tokens), blocks)).item()
        slow, count = 0.0, 0
        for i in range(3):
            latent = model.encoder(x[i : i + 1], context[i : i + 1])
            for b in range(4):
                pred = model.predictor(latent, context[i : i + 1], blocks[b : b + 1, i : i + 1])[0]
                for k, place in enumerate(blocks[b, i].tolist()):
                    t = tokens[i, place]
                    t = (t - t.mean()) / (t.var(correction=0) + 1e-5).sqrt()
                    for d in (pred[k] - t).abs().tolist():
                        slow, count = slow + (0.5 * d * d if d < 1 else d - 0.5), count + 1
    assert loss == pytest.approx(slow / count, rel=1e-4)


# The moving average


def test_moving_average():
    q, k = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    q0, k0 = q.weight.detach().clone(), k.weight.detach().clone()
    momentum_update(q, k, 1.0)
    assert torch.equal(k.weight, k0)
    momentum_update(q, k, 0.9)
    torch.testing.assert_close(k.weight, 0.9 * k0 + 0.1 * q0)
    momentum_update(q, k, 0.0)
    assert torch.equal(k.weight, q0)


# Monitor


def moments_of(*parts):
    """Of the targets (B, N, D) of each process."""
    return torch.stack([torch.stack([x.mean(dim=0), x.square().mean(dim=0)]) for x in parts])


def variance_of(*parts):
    return monitor(moments_of(*parts), torch.randn(8, 4))[0]["ijepa/target_variance"]


def test_target_variance():
    torch.manual_seed(0)
    noise, place = torch.randn(512, 4, 32), torch.randn(1, 4, 32)
    assert variance_of(noise) == pytest.approx(1, abs=0.01)
    assert variance_of(place.expand(512, -1, -1)) == pytest.approx(0, abs=1e-6)
    mixed = 0.6 * noise + 0.8 * place  # by place alone .64, by image .36
    assert variance_of(mixed) == pytest.approx(0.36, abs=0.01)
    assert variance_of(mixed[:256], mixed[256:]) == pytest.approx(variance_of(mixed), abs=1e-5)


def test_the_problem_is_that_targets_are_alike():
    """And its tag is one of the metrics, by which the alarm sees whether it mends."""
    torch.manual_seed(0)
    noise, place = torch.randn(512, 4, 32), torch.randn(1, 4, 32)
    for share, expected in ((0.0, True), (0.13, True), (0.15, False), (1.0, False)):
        metrics, problems = monitor(moments_of(share * noise + place), torch.randn(8, 4))
        assert metrics["ijepa/target_variance"] == pytest.approx(share**2, abs=0.01)
        assert [*problems.values()] == ["ijepa/target_variance"] * expected


def test_features_are_measured_about_their_mean():
    features = 5 + torch.randn(40, 16)
    metrics, _ = monitor(torch.rand(1, 2, 4, 8), features)
    for name, value in ijepa.collapse_metrics(features, center=True).items():
        assert metrics[f"monitor/{name}"] == value


@pytest.mark.parametrize("n", [2, 9])
def test_picture_shows_what_the_networks_saw(n):
    """Each image, its context, its target blocks; what is not in them is gray."""
    x, (context, blocks) = torch.rand(n, 3, 32, 32), masks(n=n)
    panels = masks_picture(x, [context, *blocks], 4).unflatten(0, (-1, 6))
    assert len(panels) == min(n, 8)
    for i, (whole, *seen) in enumerate(panels):
        assert torch.equal(whole, x[i])
        for panel, indices in zip(seen, (context, *blocks), strict=True):
            shown = torch.zeros(64).scatter(0, indices[i], 1.0).view(8, 8)
            shown = shown.repeat_interleave(4, 0).repeat_interleave(4, 1)
            torch.testing.assert_close(panel, torch.where(shown > 0, x[i], 0.5))


# Training


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def saved_states(monkeypatch):
    """The model's state at each checkpoint."""
    states, save = [], ijepa.save_checkpoint

    def saved(path, **state):
        states.extend([copy.deepcopy(state["model"])] if "model" in state else [])
        save(path, **state)

    monkeypatch.setattr(ijepa, "save_checkpoint", saved)
    return states


def test_schedules_by_the_numbers(folder, tmp_path, monkeypatch):
    """Oracles 5 and 6, of a run of T = 12 steps with W = 4 of warm-up, here from 0."""
    seen, step = [], torch.optim.AdamW.step

    def spy(self, *arguments):
        groups = self.param_groups
        seen.append([(group["lr"], group["weight_decay"], group["betas"], group["eps"]) for group in groups])
        sizes = [{p.ndim for p in group["params"]} for group in groups]
        assert max(sizes[1]) == 1 < min(sizes[0])
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    flags = {"data": str(folder), "batch_size": 13, "epochs": 4, "warmup_epochs": 4 / 3}
    ijepa.train(tiny_args("ijepa", **flags, run_dir=str(tmp_path)))
    rates = [2.5e-4, 5e-4, 7.5e-4, 1e-3]
    rates += [9.62e-4, 8.54e-4, 6.92e-4, 5.01e-4, 3.09e-4, 1.47e-4, 3.9e-5, 1e-6]
    decays = [0.04613, 0.06412, 0.09272, 0.13, 0.17341, 0.22, 0.26659, 0.31, 0.34728, 0.37588, 0.39387, 0.4]
    for groups, rate, decay in zip(seen, rates, decays, strict=True):
        assert [group[0] for group in groups] == [pytest.approx(rate, abs=6e-7)] * 2
        assert [group[1] for group in groups] == [pytest.approx(decay, abs=6e-6), 0]
        assert [group[2:] for group in groups] == [((0.9, 0.999), 1e-8)] * 2
    lines = lines_of(tmp_path)
    assert [line["train/lr"] for line in lines] == [groups[0][0] for groups in seen]
    momenta = [line["ijepa/momentum"] for line in lines]
    assert momenta == pytest.approx([0.996 + 0.004 * i / 12 for i in range(12)], abs=1e-12)


@pytest.mark.parametrize("epochs, warmup", [(1, 0.0), (1, 3.0)])
def test_short_runs_end_at_the_lowest_rate(folder, tmp_path, epochs, warmup):
    """Without a warm-up; and where the warm-up is cut, to all steps but the last."""
    flags = {"data": str(folder), "epochs": epochs, "warmup_epochs": warmup, "run_dir": str(tmp_path)}
    ijepa.train(tiny_args("ijepa", **flags))
    rates = [line["train/lr"] for line in lines_of(tmp_path)]
    assert rates[-1] == pytest.approx(1e-6) and len(rates) == 5
    if warmup:
        assert rates[:4] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3])
    else:
        assert rates == sorted(rates, reverse=True) and rates[0] < 1e-3


def test_moving_average_of_a_run(folder, tmp_path, monkeypatch):
    """After the step, of the encoder that it left; the positions stay."""
    states = saved_states(monkeypatch)
    flags = {"lr": 0.01, "momentum": 0.9, "save_minutes": 0.0, "epochs": 2, "run_dir": str(tmp_path)}
    ijepa.train(tiny_args("ijepa", data=str(folder), **flags))
    name = "blocks.0.attn.qkv.weight"
    assert len(states) == 10
    for i in range(1, 10):
        before, after, m = states[i - 1], states[i], 0.9 + 0.01 * i
        expected = m * before[f"target_encoder.{name}"] + (1 - m) * after[f"encoder.{name}"]
        torch.testing.assert_close(after[f"target_encoder.{name}"], expected, atol=1e-7, rtol=1e-5)
        assert not torch.equal(before[f"encoder.{name}"], after[f"encoder.{name}"])
    for part in ("encoder", "target_encoder"):
        assert torch.equal(states[-1][f"{part}.pos_embed"], ijepa.sincos_positions(128, 4)[:, 1:])
    positions = states[-1]["predictor.predictor_pos_embed"]
    assert torch.equal(positions, ijepa.sincos_positions(64, 4)[:, 1:])


def test_the_target_starts_as_the_encoder_of_init(folder, tmp_path):
    """In a run that goes on it is what the checkpoint holds."""
    flags = {"data": str(folder), "batch_size": 20}
    ijepa.train(tiny_args("ijepa", **flags, epochs=0, seed=1, run_dir=str(tmp_path / "first")))
    path = tmp_path / "first/backbone.pt"
    ijepa.train(tiny_args("ijepa", **flags, epochs=0, init=str(path), run_dir=str(tmp_path / "second")))
    model = torch.load(tmp_path / "second/checkpoint.pt", weights_only=True)["model"]
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert len(saved) > 70
    for name, tensor in saved.items():
        assert torch.equal(model[f"encoder.{name}"], tensor)
        assert torch.equal(model[f"target_encoder.{name}"], tensor)


def test_a_run_passes_its_flags_on(folder, tmp_path, monkeypatch):
    """Masks of the flags reach the network, which sees normalised crops; the targets are of whole images."""
    drawn, cuts, asked, crops, losses = [], [], [], [], []
    draw, cut, read = ijepa.multiblock_masks, ijepa.random_crop, ijepa.Images.__getitem__
    forward, loss = IJEPA.forward, ijepa.ijepa_loss
    monkeypatch.setattr(ijepa, "multiblock_masks", lambda *a: drawn.append(a) or draw(*a))
    monkeypatch.setattr(ijepa, "random_crop", lambda *a: cuts.append(a) or cut(*a))
    monkeypatch.setattr(ijepa.Images, "__getitem__", lambda *a: crops.append(read(*a)) or crops[-1])
    monkeypatch.setattr(IJEPA, "forward", lambda self, *a: asked.append(a) or forward(self, *a))
    monkeypatch.setattr(ijepa, "ijepa_loss", lambda *a: losses.append(a) or loss(*a))
    flags = {"targets": 2, "target_scale": (0.2, 0.3), "min_scale": 0.6, "epochs": 1}
    ijepa.train(tiny_args("ijepa", data=str(folder), **flags, run_dir=str(tmp_path)))
    grid, batch_size, _, *options = drawn[0]
    assert (grid, batch_size) == (4, 8) and options == [2, (0.2, 0.3), 4] and cuts == [(32, 0.6)]
    pixels = torch.stack([crop for crop, _ in crops[:8]]) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x, context, blocks = asked[0]
    torch.testing.assert_close(x, (pixels - mean) / std)
    torch.manual_seed(0)
    model = IJEPA("vit_nano", 32, 8)
    with torch.no_grad():
        target = apply_masks(target_features(model.encoder(x)), blocks)
        torch.testing.assert_close(losses[0][1], target, atol=1e-5, rtol=1e-5)

    # the picture is of the first step
    [path] = tmp_path.glob("*.png")
    page = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255
    assert path.name == "views.png" and page.shape == (3, 8 * 34 + 2, 4 * 34 + 2)  # a border of 2 pixels
    for i, panel in enumerate(masks_picture(pixels, [context, *blocks], 8)):
        top, left = 2 + 34 * (i // 4), 2 + 34 * (i % 4)
        shown = page[:, top : top + 32, left : left + 32]
        torch.testing.assert_close(shown, panel, atol=1 / 255, rtol=0)


@pytest.mark.parametrize("size, patch, least", [(16, 4, 4), (24, 4, 9), (32, 4, 10), (64, 4, 10)])
def test_contexts_are_the_official_10_where_there_is_room(folder, tmp_path, monkeypatch, size, patch, least):
    drawn, draw = [], ijepa.multiblock_masks
    monkeypatch.setattr(ijepa, "multiblock_masks", lambda *a: drawn.append(a) or draw(*a))
    flags = {"image_size": size, "patch_size": patch, "batch_size": 20, "epochs": 1}
    ijepa.train(tiny_args("ijepa", data=str(folder), **flags, run_dir=str(tmp_path)))
    assert [(given[0], given[1], *given[3:]) for given in drawn] == [
        (size // 4, 20, 4, (0.15, 0.2), least)
    ] * 2


def test_each_step_has_its_own_masks(folder, tmp_path, monkeypatch):
    """Of (seed, step) alone."""
    asked, forward = [], IJEPA.forward
    monkeypatch.setattr(IJEPA, "forward", lambda self, *a: asked.append(a[1:]) or forward(self, *a))
    for seed in (0, 1):
        flags = {"patch_size": 4, "epochs": 1, "seed": seed, "run_dir": str(tmp_path / str(seed))}
        ijepa.train(tiny_args("ijepa", data=str(folder), **flags))
    for i, (context, blocks) in enumerate(asked):
        expected = multiblock_masks(8, 8, ijepa.seeded(3, i // 5, i % 5))
        assert torch.equal(context, expected[0]) and torch.equal(blocks, expected[1])
    assert len({str(blocks.tolist()) for _, blocks in asked}) == len(asked) == 10


@pytest.mark.parametrize("stop_gradient", [True, False])
def test_targets_of_a_step(folder, tmp_path, monkeypatch, stop_gradient):
    """They are of the moving average, without a gradient; else of the encoder itself, with its gradient."""
    asked, targets, states = [], [], saved_states(monkeypatch)
    forward, loss = IJEPA.forward, ijepa.ijepa_loss
    monkeypatch.setattr(IJEPA, "forward", lambda self, *a: asked.append(a) or forward(self, *a))
    monkeypatch.setattr(ijepa, "ijepa_loss", lambda *a: targets.append(a[1]) or loss(*a))
    flags = {"epochs": 1, "save_minutes": 0.0, "momentum": 0.5, "lr": 1e-2, "warmup_epochs": 0}
    flags |= {"stop_gradient": stop_gradient, "run_dir": str(tmp_path)}
    ijepa.train(tiny_args("ijepa", data=str(folder), **flags))
    assert [target.requires_grad for target in targets] == [not stop_gradient] * 5
    model = IJEPA("vit_nano", 32, 8)
    for step in range(1, 5):
        model.load_state_dict(states[step - 1])
        encoders = [model.target_encoder, model.encoder]
        images, _, blocks = asked[step]
        with torch.no_grad():
            tokens = [encoder(images) for encoder in encoders]
        ours, other = (apply_masks(target_features(x), blocks) for x in tokens)
        if not stop_gradient:
            ours, other = other, ours
        torch.testing.assert_close(targets[step].detach(), ours, atol=1e-4, rtol=1e-4)
        assert (targets[step] - other).abs().max() > 1e-2


@pytest.mark.parametrize("stop_gradient", [True, False])
def test_two_processes_are_one(tmp_path, monkeypatch, stop_gradient):
    """train() in float64 over six steps: metrics, and the mean gradients that AdamW holds."""
    monkeypatch.chdir(tmp_path)
    code = f"""
import ijepa, torch
torch.set_default_dtype(torch.float64)
args = ijepa.Args(
    data="photos", image_size=32, patch_size=4, batch_size=8, epochs=1, warmup_epochs=0.01, workers=0,
    log_every=1, momentum=0.9, stop_gradient={stop_gradient}, run_dir="RUN",
)
seen, forward = [], ijepa.IJEPA.forward
ijepa.IJEPA.forward = lambda self, images, *a: seen.append(len(images)) or forward(self, images, *a)
try:
    ijepa.train(args)
finally:
    ijepa.IJEPA.forward = forward
assert seen == [8 // N] * 6
"""
    (tmp_path / "photos").mkdir()
    for i in range(48):
        ijepa.demo_image(i)[0].save(tmp_path / "photos" / f"{i:03d}.png")
    try:
        exec(code.replace("RUN", "one").replace("N]", "1]").replace("// N", "// 1"), {})
    finally:
        torch.set_default_dtype(torch.float32)
    run_processes(tmp_path, code.replace("RUN", "two").replace("// N", "// 2"), 2)
    lines, expected = lines_of(tmp_path / "two"), lines_of(tmp_path / "one")
    assert len(lines) == 6 and lines[0]["train/loss"] != pytest.approx(lines[-1]["train/loss"], rel=1e-3)
    for line, first in zip(lines, expected, strict=True):
        for tag in first.keys() - {"perf/images_per_second"}:
            assert line[tag] == pytest.approx(first[tag], rel=1e-7, abs=1e-9), tag
    states = [torch.load(tmp_path / run / "checkpoint.pt", weights_only=True) for run in ("two", "one")]
    for name, tensor in states[1]["model"].items():
        torch.testing.assert_close(states[0]["model"][name], tensor, atol=1e-8, rtol=0)
    ours, theirs = (state["optimizer"]["state"] for state in states)
    scale = max(held["exp_avg"].abs().max() for held in theirs.values())
    assert scale > 1e-4 and ours.keys() == theirs.keys() and len(ours) > 100
    for i in ours:
        assert ours[i]["exp_avg"].dtype == torch.float64
        assert (ours[i]["exp_avg"] - theirs[i]["exp_avg"]).abs().max() < 1e-8 * scale


def test_exported_backbone_is_the_target_encoder(folder, tmp_path):
    """eval_linear.py's ViT on backbone.pt gives the mean of the target encoder's tokens."""
    ijepa.train(tiny_args("ijepa", data=str(folder), epochs=1, momentum=0.5, run_dir=str(tmp_path)))
    model = IJEPA("vit_nano", 32, 8)
    model.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"])
    encoder = model.target_encoder
    assert not torch.equal(encoder.blocks[0].attn.qkv.weight, model.encoder.blocks[0].attn.qkv.weight)
    backbone = eval_linear.load_backbone(str(tmp_path / "backbone.pt")).eval()
    with torch.no_grad():
        ours, theirs = features_of(backbone, images()), encoder(images()).mean(dim=1)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    untrained = eval_linear.load_backbone(f"random:{tmp_path / 'backbone.pt'}").net
    torch.testing.assert_close(untrained.pos_embed, encoder.pos_embed)
    with pytest.raises(SystemExit, match="the network has no .CLS., use mean"):
        eval_linear.load_backbone(str(tmp_path / "backbone.pt"), feature="cls")


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"patch_size": 5}, "--image-size 32: give 4, 5, .. times --patch-size 5"),
        ({"patch_size": 16}, "--image-size 32: give 4, 5, .. times --patch-size 16"),
        ({"target_scale": (0.2, 0.6)}, "--target-scale (0.2, 0.6): must be above 0 and at most 0.5"),
        ({"targets": 17}, "--targets 17: must be above 0 and at most 16"),
        ({"targets": 0}, "--targets 0: must be above 0"),
        ({"momentum": 1.5}, "--momentum 1.5: must be at least 0 and at most 1"),
        ({"final_weight_decay": -0.1}, "--final-weight-decay -0.1: must be at least 0"),
    ],
)
def test_bad_flags(tmp_path, flags, message):
    with pytest.raises(SystemExit) as stop:
        ijepa.train(tiny_args("ijepa", run_dir=str(tmp_path / "run"), **flags))
    assert message in str(stop.value) and not (tmp_path / "run").exists()


def test_paper_command_is_the_sheet_s():
    command = re.search(
        r"torchrun --nnodes 2 --nproc-per-node 8 ijepa\.py(.*?)(?<!\\)\n", ijepa.__doc__, re.S
    )[1]
    args = tyro.cli(ijepa.Args, args=command.replace("\\\n", " ").split())
    assert (args.image_size, args.patch_size, args.arch, args.min_scale) == (224, 14, "vit_huge", 0.3)
    assert (args.epochs, args.batch_size, args.warmup_epochs) == (300, 2048, 40)
    assert (args.lr, args.weight_decay, args.final_weight_decay) == (1e-3, 0.04, 0.4)
    assert (args.targets, args.target_scale, args.momentum, args.stop_gradient) == (
        4,
        (0.15, 0.2),
        0.996,
        True,
    )


@pytest.mark.slow
def test_the_demo_learns(tmp_path):
    """python ijepa.py: logistic regression and k-NN 5 points above the untrained ViT."""
    ijepa.train(ijepa.Args(run_dir=str(tmp_path)))
    for mode in ("logreg", "knn"):
        scores = []
        for name in (f"{tmp_path / 'backbone.pt'}", f"random:{tmp_path / 'backbone.pt'}"):
            scores.append(eval_linear.evaluate(eval_linear.Args(backbone=name, mode=mode))["top1"])
        assert scores[0] > scores[1] + 5, mode
