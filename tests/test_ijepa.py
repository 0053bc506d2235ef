"""ijepa.py against its fact sheet's oracles, timm and slow versions."""

import importlib
import re
from itertools import product
from types import SimpleNamespace
from unittest import mock

import pytest
import timm
import torch
import torch.nn.functional as F
import tyro
from conftest import features_of, in_processes, load, metrics_of, refused, shaken, tiny_args
from PIL import Image
from torchvision.transforms.functional import to_tensor

import convert
import eval_linear
import ijepa
from ijepa import IJEPA, apply_masks, ijepa_loss, monitor, multiblock_masks, target_features

VITS = dict(ijepa.VITS)


@pytest.fixture(scope="module", autouse=True)
def tiny_vit():
    """A vit_nano of two blocks."""
    with mock.patch.dict(ijepa.VITS, vit_nano=(32, 2, 2)):
        yield


def masks(grid=8, n=3, seed=0, **options):
    return multiblock_masks(grid, n, torch.Generator().manual_seed(seed), **({"min_keep": 4} | options))


@pytest.fixture
def small(generator):
    """Model, images of 8 x 8 patches of 4 pixels, context and targets."""
    model = shaken(IJEPA("vit_nano", 32, 4), generator)
    return model, torch.randn(3, 3, 32, 32, generator=generator), *masks()


# Masks: oracles 7 and 8, and the sheet's section 4


def assert_rectangles(indices, grid, height, width):
    """Of this size, within the grid, in raster order."""
    first = indices[..., :1]
    offsets = torch.arange(height)[:, None] * grid + torch.arange(width)
    assert torch.equal(indices, first + offsets.flatten()) and first.min() >= 0
    assert (first // grid).max() <= grid - height and (first % grid).max() <= grid - width


SIZES = {8: "33 43", 12: "45 55 65 64", 14: "56 66 65 75 85", 16: "57 67 66 76 86 96"}  # height, width


@pytest.mark.parametrize("grid", SIZES)
def test_what_masks_must_be(grid):
    """Targets: rectangles of one size of the sheet's list, anywhere alike. Contexts: of a square of 85 to
    100 % of the grid what is no target, increasing, more than min_keep, cut above as often as below."""
    found, hit, seen, min_keep = set(), *torch.zeros(2, grid, grid), 4 if grid == 8 else 10
    for seed in range(300):
        context, blocks = masks(grid, 4, seed, min_keep=min_keep)
        shares = torch.rand(2, generator=torch.Generator().manual_seed(seed)).tolist()
        area, aspect = int(grid * grid * (0.15 + 0.05 * shares[0])), 0.75 + 0.75 * shares[0]
        size = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        assert_rectangles(blocks, grid, *size)
        found.add("".join(map(str, size)))

        taken = torch.zeros(4, grid**2).scatter(1, blocks.transpose(0, 1).flatten(1), 1.0)
        assert not taken.gather(1, context).any() and context.max() < grid**2
        assert context.shape[0] == 4 and context.shape[1] > min_keep and (context.diff(dim=1) > 0).all()
        hit += torch.bincount(blocks.flatten(), minlength=grid**2).view(grid, grid)
        seen += torch.bincount(context.flatten(), minlength=grid**2).view(grid, grid)

        square, _ = masks(grid, 1, seed, targets=0)
        side = round(int(grid * grid * (0.85 + 0.15 * shares[1])) ** 0.5)
        assert_rectangles(square, grid, side, side)
        rest, blocks = masks(grid, 1, seed, context_scale=(1.0, 1.0))  # nothing is cut from a batch of one
        assert len({*rest.flatten().tolist(), *blocks.flatten().tolist()}) == grid**2

    sizes = set(SIZES[grid].split())
    assert found <= sizes and len(found) >= len(sizes) - 1  # some of a grid of 16 are rare
    assert hit.min() > 0 and seen.min() > 0  # official: none in the last row and column
    for sums in (hit.sum(dim=0), hit.sum(dim=1)):
        torch.testing.assert_close(sums, sums.flip(0), atol=0, rtol=0.3)
    assert 0.7 < seen[0].sum() / seen[-1].sum() < 1.4


def test_sampling_ends_on_every_grid():
    """10,000 draws on grids of 4 to 16, too strict ones too, where the official loop never ends."""
    for grid, seed, min_keep in product(range(4, 17), range(6), (4, 10)):
        context, blocks = masks(grid, 128 if grid < 16 else 64, seed, min_keep=min_keep)
        assert blocks.shape[2] > 0 and blocks.max() < grid**2
        assert context.shape[1] > (min_keep if grid >= 8 or min_keep == 4 < grid else 0)
    context, _ = masks(4, 64, min_keep=1000)  # no context can have so many: it may overlap all targets
    assert context.shape[1] == 16


def test_a_short_context_is_drawn_20_times_before_the_last_target_is_given_up():
    """A small square often lies under the targets, but seldom 20 times. With four targets of half the image
    each, contexts overlap the last ones alone."""
    counts, scales = torch.zeros(4), {"target_scale": (0.45, 0.5), "context_scale": (1.0, 1.0)}
    for seed in range(20):
        context, blocks = masks(12, 4, seed, context_scale=(0.3, 0.3), min_keep=12)
        assert context.shape[1] > 12 and not (blocks[..., None] == context[:, None]).any()
        context, blocks = masks(8, 32, seed, **scales, min_keep=25)
        counts += (blocks[..., None] == context[:, None]).any(dim=3).any(dim=2).sum(dim=1)
    assert counts[0] == 0 < counts[1] <= counts[2] <= counts[3]


# The model: oracles 3, 4, 9, 10 and 11


def test_apply_masks():
    x = torch.arange(8.0).view(2, 4, 1)
    picked = apply_masks(x, torch.tensor([[[0, 1], [2, 3]], [[1, 2], [0, 3]]]))
    assert picked[..., 0].tolist() == [[0, 1], [6, 7], [1, 2], [4, 7]]
    targets = torch.tensor([[[0], [1]], [[2], [3]]]).repeat_interleave(2, dim=0)  # each block twice
    rows = apply_masks(torch.arange(4.0).expand(2, 4)[:, :, None], targets)
    assert rows.flatten().tolist() == [0, 1, 0, 1, 2, 3, 2, 3]


def timm_vit(**options):
    options |= {"num_classes": 0, "class_token": False, "global_pool": "avg", "fc_norm": False}
    return timm.models.VisionTransformer(img_size=32, **options).eval()


def test_the_encoder_is_timm_s_vit_with_positions_before_the_mask(small):
    model, x, context, _ = small
    encoder, theirs = model.encoder, timm_vit(patch_size=4, embed_dim=32, depth=2, num_heads=2)
    theirs.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        tokens = encoder(x)
        torch.testing.assert_close(tokens, theirs.forward_features(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(tokens.mean(dim=1), theirs(x), atol=1e-5, rtol=1e-5)
        embedded = encoder.patch_embed(x).flatten(2).mT + encoder.pos_embed
        rows = torch.stack([embedded[i, context[i]] for i in range(3)])
        torch.testing.assert_close(encoder(x, context), encoder.norm(encoder.blocks(rows)))


def test_predictions_and_loss_are_those_of_slow_versions(small):
    """Row (block b, image i) is that pair alone: embed, add positions, mask tokens with positions, blocks,
    norm, project. The order of the context does not matter, nor do the pixels outside."""
    model, x, context, blocks = small
    net, where, terms = model.predictor, model.predictor.predictor_pos_embed[0], []
    with torch.no_grad():
        pred, tokens = model(x, context, blocks), model.target_encoder(x)
        assert pred.shape == (12, blocks.shape[2], 32)
        for b, i in product(range(4), range(3)):
            latent = model.encoder(x[i : i + 1], context[i : i + 1])[0]
            known = [net.predictor_embed(latent[k]) + where[place] for k, place in enumerate(context[i])]
            asked = [net.mask_token[0, 0] + where[place] for place in blocks[b, i]]
            y = net.predictor_blocks(torch.stack(known + asked)[None])[0, len(known) :]
            expected = net.predictor_proj(net.predictor_norm(y))
            torch.testing.assert_close(pred[3 * b + i], expected, atol=1e-5, rtol=1e-5)
            for guess, t in zip(expected, tokens[i, blocks[b, i]], strict=True):
                t = (t - t.mean()) / (t.var(correction=0) + 1e-5).sqrt()
                terms += [0.5 * d * d if d < 1 else d - 0.5 for d in (guess - t).abs().tolist()]
        loss = ijepa_loss(pred, apply_masks(target_features(tokens), blocks))
        assert loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)
        torch.testing.assert_close(model(x, context.flip(1), blocks), pred, atol=1e-5, rtol=1e-5)
        outside = torch.ones(3, 64).scatter(1, context, 0.0).view(3, 1, 8, 8)
        changed = x + 10 * F.interpolate(outside, scale_factor=4)
        assert torch.equal(model(changed, context, blocks), pred)
        assert not torch.allclose(model.target_encoder(changed), tokens, atol=0.1)
        assert (pred[0, 0] - pred[0, 1]).abs().max() > 1e-3  # mask tokens have positions


def test_what_learns_and_what_does_not(small):
    model, x, context, blocks = small
    target = apply_masks(target_features(model.target_encoder(x)), blocks)
    ijepa_loss(model(x, context, blocks), target).backward()
    of_target = {f"target_encoder.{name}" for name, _ in model.target_encoder.named_parameters()}
    fixed = {name for name, p in model.named_parameters() if p.grad is None}
    assert fixed == of_target | {"encoder.pos_embed", "predictor.predictor_pos_embed"}
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.grad is not None)


def test_initialisation(monkeypatch):
    """Official: all weights trunc normal .02, no rescaling by depth; convolutions as at patch 16; predictors
    as one of the official width of 384, of vit_base and larger ones."""
    monkeypatch.setitem(ijepa.VITS, "vit_small", (384, 2, 6))
    model, patch4 = IJEPA("vit_small", 32, 16), IJEPA("vit_small", 32, 4).encoder.patch_embed.proj
    assert patch4.weight.std().item() == pytest.approx(0.08, rel=0.02) and patch4.bias.abs().max() == 0
    last, encoder = model.encoder.blocks[-1], model.encoder
    for layer in (encoder.patch_embed.proj, last.attn.proj, last.mlp.fc2):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.02) and layer.bias.abs().max() == 0
    monkeypatch.setitem(ijepa.VITS, "vit_base", (768, 1, 12))
    for predictor, std in ((model.predictor, 0.02 * 2**0.5), (IJEPA("vit_base", 32, 16).predictor, 0.02)):
        for layer in (predictor.predictor_proj, predictor.predictor_blocks[-1].mlp.fc2):
            assert layer.weight.std().item() == pytest.approx(std, rel=0.02) and layer.bias.abs().max() == 0
    assert model.predictor.mask_token.std().item() == pytest.approx(0.02, rel=0.2)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert all(m.weight.eq(1).all() and m.bias.eq(0).all() and m.eps == 1e-6 for m in norms)
    target = model.target_encoder.state_dict()
    assert all(torch.equal(tensor, target[name]) for name, tensor in encoder.state_dict().items())


def shapes(net):
    return {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}


def test_official_names_and_sizes():
    """Names of the sheet's example: Ti, patch 8, 32 px, predictor 96 wide; in the blocks timm's."""
    with torch.device("meta"):
        models = [IJEPA(arch, 224, 16) for arch in ("vit_tiny", "vit_small", "vit_base")]
        tiny, huge = IJEPA("vit_tiny", 32, 8), IJEPA("vit_huge", 224, 14)
        encoder = timm_vit(patch_size=8, embed_dim=192, depth=12, num_heads=3)
        blocks = timm_vit(patch_size=8, embed_dim=96, depth=4, num_heads=3).blocks
    predictor = {"mask_token": (1, 1, 96), "predictor_pos_embed": (1, 16, 96)}
    predictor |= {f"predictor_blocks.{name}": shape for name, shape in shapes(blocks).items()}
    for name, shape in {"embed": (96, 192), "norm": (96,), "proj": (192, 96)}.items():
        predictor |= {f"predictor_{name}.weight": shape, f"predictor_{name}.bias": shape[:1]}
    assert shapes(tiny.encoder) == shapes(tiny.target_encoder) == shapes(encoder)
    assert shapes(tiny.predictor) == predictor and len(shapes(tiny)) == 2 * 149 + 56

    def millions(net):
        return sum(p.numel() for p in net.parameters() if p.requires_grad) / 1e6

    assert [millions(net.encoder) for net in models] == pytest.approx([5.49, 21.59, 85.65], abs=0.005)
    assert millions(models[2].predictor) == pytest.approx(11.24, abs=0.005)
    block, *others = huge.predictor.predictor_blocks
    assert (len(others), block.attn.heads, len(block.norm1.weight)) == (11, 16, 384)
    assert {name: heads for name, (_, _, heads) in VITS.items()} == eval_linear.HEADS
    known = {name: (*sizes, heads) for sizes, (name, heads) in convert.VITS.items() if name != "vit_giant"}
    assert known == VITS and VITS.keys() == ijepa.PREDICTORS.keys()


# The loss: oracles 1 and 2


def test_loss_and_targets_of_variance_1_keep_float64_and_lift_half_precision(generator):
    assert ijepa_loss(torch.tensor([0.0, 0.5, 2, -3]), torch.zeros(4)).item() == 1.03125
    target = torch.randn(64, 20, 128, generator=generator)
    assert ijepa_loss(0 * target, target).item() == pytest.approx(0.4246, abs=2e-3)

    pred, tokens = torch.randn(2, 6, 16, 12, dtype=torch.float64, generator=generator)
    target, loss = target_features(5 + 3 * tokens), ijepa_loss(pred, tokens)
    assert target.dtype == loss.dtype == torch.float64
    centred = 3 * (tokens - tokens.mean(dim=2, keepdim=True))
    exact = centred / (centred.square().mean(dim=2, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(target, exact, atol=1e-13, rtol=0)
    assert target.mean(dim=2).abs().max() < 1e-7 and (target.var(dim=2, correction=0) - 1).abs().max() < 1e-5

    d = (pred - tokens).abs()
    assert loss.item() == pytest.approx(torch.where(d < 1, 0.5 * d**2, d - 0.5).mean().item(), rel=1e-14)
    half, target = pred.bfloat16(), tokens.float()
    assert target_features(half).dtype == ijepa_loss(half, target).dtype == torch.float32
    torch.testing.assert_close(target_features(half), target_features(half.float()))
    torch.testing.assert_close(ijepa_loss(half, target), ijepa_loss(half.float(), target))


# Monitor


def test_the_problem_is_that_targets_of_different_images_are_alike(generator):
    """And its tag is one of the metrics, by which the alarm sees whether it mends."""
    noise, features = (torch.randn(*shape, generator=generator) for shape in ((512, 4, 32), (40, 16)))
    for share, expected in ((0.0, True), (0.13, True), (0.15, False), (1.0, False)):
        targets = share * noise + noise[:1]
        for n in (512, 256):  # of one process, of two
            moments = [torch.stack([x.mean(dim=0), x.square().mean(dim=0)]) for x in targets.split(n)]
            metrics, problems = monitor(torch.stack(moments), 5 + features)
            variance = targets.var(dim=0, correction=0).mean().item()
            assert metrics["ijepa/target_variance"] == pytest.approx(variance, abs=1e-5)
            assert [*problems.values()] == ["ijepa/target_variance"] * expected
    for name, value in ijepa.collapse_metrics(5 + features, center=True).items():
        assert metrics[f"monitor/{name}"] == value


# Training


def recorded(script, root, names, **flags):
    """A run from the weights of another: its state after each step, what the functions `names` were given."""
    module, states = importlib.import_module(script), []
    module.train(tiny_args(script, **flags | {"epochs": 0}, seed=1, run_dir=f"{root}/first"))
    flags |= {"seed": 5, "save_minutes": 0.0, "init": f"{root}/first/backbone.pt", "run_dir": f"{root}/run"}
    args, save = tiny_args(script, **flags), module.save_checkpoint

    def spy(path, **state):
        save(path, **state)
        states.extend([load(path)] if "model" in state else [])

    spies = {name: mock.Mock(wraps=getattr(module, name)) for name in names}
    with mock.patch.multiple(module, **spies, save_checkpoint=spy):
        module.train(args)
    given = {name: [call.args for call in spy.call_args_list] for name, spy in spies.items()}
    init = load(args.init)["state_dict"]
    return SimpleNamespace(args=args, folder=root / "run", init=init, states=states, **given)


@pytest.fixture(scope="module", params=[True, False], ids=["stop-gradient", "no-stop-gradient"])
def trained(request, folder, tmp_path_factory):
    """T = 12 steps with W = 4 of warm-up."""
    flags = {"data": str(folder), "batch_size": 13, "epochs": 4, "warmup_epochs": 4 / 3, "targets": 2}
    flags |= {"target_scale": (0.2, 0.3), "min_scale": 0.6, "stop_gradient": request.param}
    names = ("multiblock_masks", "random_crop", "ijepa_loss", "monitor")
    with mock.patch.object(IJEPA, "forward", autospec=True, side_effect=IJEPA.forward) as forward:
        run = recorded("ijepa", tmp_path_factory.mktemp("runs"), names, **flags)
    run.forward = [call.args[1:] for call in forward.call_args_list]
    return run


def test_schedules_by_the_numbers(trained):
    """Oracles 5 and 6, here with a warm-up from 0."""
    rates = [2.5e-4, 5e-4, 7.5e-4, 1e-3]
    rates += [9.62e-4, 8.54e-4, 6.92e-4, 5.01e-4, 3.09e-4, 1.47e-4, 3.9e-5, 1e-6]
    decays = [0.04613, 0.06412, 0.09272, 0.13, 0.17341, 0.22, 0.26659, 0.31, 0.34728, 0.37588, 0.39387, 0.4]
    optimizers = [state["optimizer"] for state in trained.states]
    for optimizer, rate, decay in zip(optimizers, rates, decays, strict=True):
        groups, held = optimizer["param_groups"], optimizer["state"]
        sizes = [{held[i]["exp_avg"].ndim for i in group["params"]} for group in groups]
        assert max(sizes[1]) == 1 < min(sizes[0])
        assert [group["lr"] for group in groups] == pytest.approx([rate, rate], abs=6e-7)
        assert [group["weight_decay"] for group in groups] == pytest.approx([decay, 0], abs=6e-6)
        assert all((group["betas"], group["eps"]) == ((0.9, 0.999), 1e-8) for group in groups)
    lines = metrics_of(trained.folder)
    assert [line["train/lr"] for line in lines] == [o["param_groups"][0]["lr"] for o in optimizers]
    momenta = [line["ijepa/momentum"] for line in lines]
    assert momenta == pytest.approx([0.996 + 0.004 * i / 12 for i in range(12)], abs=1e-12)


def test_a_warm_up_longer_than_the_run_leaves_its_last_step_the_lowest_rate(folder):
    ijepa.train(tiny_args("ijepa", data=str(folder), epochs=1, warmup_epochs=3, run_dir="run"))
    rates = [line["train/lr"] for line in metrics_of("run")]
    assert rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-6])


def test_moving_average_starts_from_init_and_comes_after_the_step(trained):
    """Of the encoder that the step left; the positions stay."""
    name, last = "blocks.0.attn.qkv.weight", trained.states[-1]["model"]
    before = trained.init[name]
    for i, state in enumerate(trained.states):
        m, model = 0.996 + 0.004 * i / 12, state["model"]
        expected = m * before + (1 - m) * model[f"encoder.{name}"]
        before = model[f"target_encoder.{name}"]
        torch.testing.assert_close(before, expected, atol=2e-8, rtol=0)
    for part, width in (("encoder.", 32), ("target_encoder.", 32), ("predictor.predictor_", 64)):
        assert torch.equal(last[f"{part}pos_embed"], ijepa.sincos_positions(width, 4)[:, 1:])


def test_targets_are_of_whole_images_by_the_moving_average_or_by_the_encoder_itself(trained):
    """Without a gradient, or with it."""
    names = ("target_encoder", "encoder") if trained.args.stop_gradient else ("encoder", "target_encoder")
    model = IJEPA("vit_nano", 32, 8)
    for i, state in enumerate(trained.states[:-1]):
        (x, _, blocks), (_, target) = trained.forward[i + 1], trained.ijepa_loss[i + 1]
        model.load_state_dict(state["model"])
        with torch.no_grad():
            tokens = [getattr(model, name)(x) for name in names]
        expected, other = (apply_masks(target_features(x), blocks) for x in tokens)
        torch.testing.assert_close(target.detach(), expected, atol=1e-4, rtol=1e-4)
        features = trained.monitor[i + 1][1]
        torch.testing.assert_close(features, tokens[0].mean(dim=1), atol=1e-4, rtol=1e-4)
        assert target.requires_grad != trained.args.stop_gradient
    assert (target - other).abs().max() > 1e-2


def test_a_run_passes_its_flags_on(trained):
    """Masks of the flags, and of seed and step alone, reach the network, which sees normalised crops; the
    picture is of the first step: eight images, context, target blocks; what is not in them is gray."""
    options = [2, (0.2, 0.3), 4]
    assert [[*given[:2], *given[3:]] for given in trained.multiblock_masks] == [[4, 13, *options]] * 12
    assert trained.random_crop[-1:] == [(32, 0.6)]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for step, (x, context, blocks) in enumerate(trained.forward):
        pixels = (x * std + mean) * 255
        torch.testing.assert_close(pixels, pixels.round().clamp(0, 255), atol=1e-3, rtol=0)
        expected = multiblock_masks(4, 13, ijepa.seeded(3, 5, step), *options)
        assert torch.equal(context, expected[0]) and torch.equal(blocks, expected[1])
    assert len({str(blocks.tolist()) for *_, blocks in trained.forward}) == 12

    x, context, blocks = trained.forward[0]
    page = to_tensor(Image.open(trained.folder / "views.png"))
    assert page.shape == (3, 8 * 34 + 2, 4 * 34 + 2)  # a border of 2 pixels
    columns = (torch.arange(16).repeat(13, 1), context, *blocks)
    for i, (column, mask) in product(range(8), enumerate(columns)):
        shown = torch.zeros(16).scatter(0, mask[i], 1.0).view(4, 4)
        shown = shown.repeat_interleave(8, 0).repeat_interleave(8, 1)
        panel = page[:, 2 + 34 * i :, 2 + 34 * column :][:, :32, :32]
        expected = torch.where(shown > 0, x[i] * std + mean, 0.5)
        torch.testing.assert_close(panel, expected, atol=1 / 255, rtol=0)


def test_exported_backbone_is_the_target_encoder(trained, generator):
    """timm's ViT of backbone.pt, and eval_linear.py's, give the mean of the target encoder's tokens."""
    model, path = IJEPA("vit_nano", 32, 8), str(trained.folder / "backbone.pt")
    model.load_state_dict(trained.states[-1]["model"])
    x, saved = torch.randn(3, 3, 32, 32, generator=generator), load(path)
    theirs = timm.models.VisionTransformer(**saved["arch_args"]).eval()
    theirs.load_state_dict(saved["state_dict"])
    with torch.no_grad():
        features = features_of(eval_linear.load_backbone(path).eval(), x)
        torch.testing.assert_close(features, theirs(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(features, model.target_encoder(x).mean(dim=1), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(features, model.encoder(x).mean(dim=1), atol=1e-3)
    with pytest.raises(SystemExit, match="the network has no .CLS., use mean"):
        eval_linear.load_backbone(path, feature="cls")


def assert_same_training(run, other, steps, parameters, tolerance):
    """In float64: metrics, weights, and the mean gradients that AdamW holds."""
    lines, expected = metrics_of(run), metrics_of(other)
    assert lines == [pytest.approx(line, rel=tolerance, abs=tolerance) for line in expected]
    assert abs(lines[0]["train/loss"] / lines[-1]["train/loss"] - 1) > 1e-3 and len(lines) == steps
    held, expected = (load(f"{name}/checkpoint.pt") for name in (run, other))
    torch.testing.assert_close(held["model"], expected["model"], atol=1e-8, rtol=0)
    ours, theirs = (
        [p["exp_avg"] for p in state["optimizer"]["state"].values()] for state in (held, expected)
    )
    scale = max(average.abs().max() for average in theirs)
    assert scale > 1e-4 and len(theirs) == parameters and theirs[0].dtype == torch.float64
    torch.testing.assert_close(ours, theirs, atol=1e-8 * scale.item(), rtol=0)


@pytest.mark.parametrize("stop_gradient", [True, False])
def test_two_processes_are_one(folder, stop_gradient):
    """Masks are drawn for the global batch, with the official 10, where there is room."""
    flags = {"data": str(folder), "patch_size": 4, "epochs": 1, "warmup_epochs": 0.01, "momentum": 0.9}

    def train(n):
        torch.set_default_dtype(torch.float64)
        with mock.patch("ijepa.multiblock_masks", wraps=multiblock_masks) as draw:
            ijepa.train(tiny_args("ijepa", **flags, stop_gradient=stop_gradient, run_dir=str(n)))
        return [[*call.args[:2], *call.args[3:]] for call in draw.call_args_list]

    for n in (1, 2):
        assert in_processes(lambda rank, n=n: train(n), n) == [[[8, 8, 4, (0.15, 0.2), 10]] * 5] * n
    assert_same_training("2", "1", 5, 28 + 43, 1e-7)
    model, backbone = load("2/checkpoint.pt")["model"], load("2/backbone.pt")["state_dict"]
    assert all(torch.equal(model[f"target_encoder.{name}"], backbone[name]) for name in backbone)


# Flags and commands


def test_bad_flags(tmp_path):
    for patch_size in (5, 16):
        match = f"^--image-size 32: give 4, 5, .. times --patch-size {patch_size}$"
        refused("ijepa", match, patch_size=patch_size, epochs=0)
    most = {"target_scale": ((0.2, 0.6), 0.5), "targets": (17, 16), "momentum": (1.5, 1)}
    for name, (value, allowed) in most.items():
        refused("ijepa", f"^--{name.replace('_', '-')} .* and at most {allowed}$", **{name: value}, epochs=0)
    refused("ijepa", "^--final-weight-decay -0.1: must be at least 0$", final_weight_decay=-0.1, epochs=0)
    assert not list(tmp_path.iterdir())


def test_paper_command_is_the_sheet_s():
    words = r"torchrun --nnodes 2 .*HOST:29500 .\n +ijepa\.py(.*?)(?<!\\)\n"
    command = re.search(words, ijepa.__doc__, re.S)[1]
    args = tyro.cli(ijepa.Args, args=command.replace("\\\n", " ").split())
    expected = {"image_size": 224, "patch_size": 14, "arch": "vit_huge", "min_scale": 0.3, "epochs": 300}
    expected |= {"batch_size": 2048, "warmup_epochs": 40, "lr": 1e-3, "weight_decay": 0.04, "targets": 4}
    expected |= {"final_weight_decay": 0.4, "target_scale": (0.15, 0.2), "momentum": 0.996}
    assert vars(args) | expected | {"stop_gradient": True} == vars(args)


@pytest.mark.slow
def test_the_demo_learns():
    """python ijepa.py: logistic regression and k-NN 5 points above the untrained ViT."""
    with mock.patch.dict(ijepa.VITS, VITS):
        ijepa.train(ijepa.Args(run_dir="run"))
    for mode in ("logreg", "knn"):
        names = ("run/backbone.pt", "random:run/backbone.pt")
        args = [eval_linear.Args(backbone=name, mode=mode) for name in names]
        trained, untrained = (eval_linear.evaluate(given)["top1"] for given in args)
        assert trained > untrained + 5, mode
