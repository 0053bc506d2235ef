"""mae.py against its fact sheet's oracles, transformers, timm and slow versions written here."""

import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import tyro
from conftest import features_of, in_processes, load, metrics_of, refused, shaken, tiny_args
from PIL import Image
from torch import nn

import convert
import eval_linear
import mae
from mae import MAE, mae_loss, monitor, patch_moments, patchify, pixel_targets, random_masking, unpatchify

DOUBLE = torch.float64
MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def small(patch):
    """A small vit_nano for 32 px and patch 8: 16 patches."""
    patch.setitem(mae.VITS, "vit_nano", (32, 2, 2))
    patch.setitem(mae.DECODERS, "vit_nano", (16, 1, 2))
    return MAE("vit_nano", 32, 8)


def images(n=3, size=32):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_patches_are_rows_columns_channels():
    """Oracle 1."""
    grid = torch.arange(48.0).view(1, 3, 4, 4)
    patches = patchify(grid, 2)
    first = [0, 16, 32, 1, 17, 33, 4, 20, 36, 5, 21, 37, 2, 18, 34]
    assert patches.flatten()[:15].tolist() == first and torch.equal(unpatchify(patches, 2), grid)
    assert torch.equal(unpatchify(patchify(images(2, 24), 4), 4), images(2, 24))


def test_masking_by_noise_keeps_the_same_number_of_each_image():
    """Oracle 2. With the official rounding: of 100 patches 9 and 19, not 10 and 20."""
    noise, x = torch.tensor([[0.9, 0.1, 0.5, 0.3]]), torch.arange(4.0).view(1, 4, 1)
    kept, mask, ids_restore = random_masking(x, 0.75, noise)
    assert kept.tolist() == [[[1.0]]] and mask.tolist() == [[1, 0, 1, 1]]
    assert ids_restore.tolist() == [[3, 0, 2, 1]]
    assert random_masking(x, 0.5, noise)[0].flatten().tolist() == [1, 3]  # in the order of the noise
    for n, ratio, keep in ((64, 0.75, 16), (196, 0.75, 49), (256, 0.75, 64), (100, 0.9, 9), (100, 0.8, 19)):
        x = torch.randn(5, n, 1)
        kept, mask, _ = random_masking(x, ratio, torch.rand(5, n))
        assert mask.sum(dim=1).tolist() == [n - keep] * 5 and not torch.equal(mask[0], mask[1])
        assert torch.equal(kept.sort(dim=1)[0], x[mask == 0].view(5, keep, 1).sort(dim=1)[0])


# The model: oracles 5, 6, 7, 8 and 10


def test_positions_by_the_numbers():
    table = mae.sincos_positions(8, 2)[0]
    expected = [[0.0] * 8, [0, 0, 1, 1, 0, 0, 1, 1], [0.841471, 0.01, 0.540302, 0.99995, 0, 0, 1, 1]]
    expected += [[0, 0, 1, 1, 0.841471, 0.01, 0.540302, 0.99995]]
    torch.testing.assert_close(table[:4], torch.tensor(expected), atol=1e-6, rtol=0)
    table = mae.sincos_positions(768, 14)[0]
    assert table[2, [1, 192, 384, 576]].tolist() == pytest.approx([0.815251, 0.540302, 0, 1], abs=1e-6)
    torch.testing.assert_close(table[1:].square().sum(dim=1), torch.tensor([384.0] * 196))


@torch.no_grad()
def test_encoder_and_decoder(monkeypatch, generator):
    """The encoder is timm's ViT, of visible patches alone; the order of those matters to neither."""
    model, x = shaken(small(monkeypatch), generator), images()
    rank = torch.rand(3, 16).argsort(dim=1)
    state = {k: v for k, v in model.state_dict().items() if "deco" not in k and k != "mask_token"}
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    theirs = timm.models.VisionTransformer(**options, num_classes=0).eval()
    theirs.load_state_dict(state)
    _, mask, latent = model(x, 0.0, rank)
    tokens = theirs.forward_features(x)
    expected = tokens[:, 1:].take_along_dim(rank.argsort(dim=1)[:, :, None], dim=1)
    assert mask.sum() == 0
    torch.testing.assert_close(latent, torch.cat([tokens[:, :1], expected], dim=1), atol=1e-5, rtol=1e-5)

    pred, mask, latent = model(x, 0.75, rank)
    assert latent.shape == (3, 1 + 4, 32)
    order = torch.cat([torch.randperm(4), torch.arange(4, 16)])
    again, _, other = model(x, 0.75, order[rank])
    torch.testing.assert_close(other[:, 1:][:, order[:4]], latent[:, 1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again, pred, atol=1e-5, rtol=1e-5)
    hidden = pred[0][mask[0] == 1]
    assert (hidden[0] - hidden[1]).abs().max() > 1e-3  # mask tokens have positions

    for change, same in ((10 * mask, True), (0.1 * (1 - mask), False)):
        changed = unpatchify(patchify(x, 8) + change[:, :, None], 8)
        assert torch.equal(model(changed, 0.75, rank)[2], latent) == same


def test_initialisation_and_loss_of_an_untrained_model(monkeypatch):
    """Sheet, sections 3 and 9: the loss is about 1 + 2 D / (D + 3 p^2) of the decoder's width D."""
    monkeypatch.setitem(mae.DECODERS, "vit_nano", (512, 1, 8))
    for patch, low, high in ((16, 1.70, 1.85), (4, 2.6, 3.2)):
        torch.manual_seed(0)
        model, x = MAE("vit_nano", 4 * patch, patch), images(16, 4 * patch)
        with torch.no_grad():
            pred, mask, _ = model(x, 0.75, torch.rand(16, 16))
        assert low < mae_loss(pred, pixel_targets(x, patch, True)[0], mask).item() < high

    for layer in (m for m in model.modules() if isinstance(m, nn.Linear)):
        bound = math.sqrt(6 / sum(layer.weight.shape))  # also of the fused matrix (3 D, D)
        assert bound * 0.97 < layer.weight.abs().max() <= bound and not layer.bias.any()
    conv = model.patch_embed.proj
    assert conv.weight.abs().max() <= math.sqrt(6 / (128 + 48)) and conv.weight.std() > 0.1
    assert 0 < conv.bias.abs().max() <= 1 / math.sqrt(48)
    for token in (model.cls_token, model.mask_token):
        assert token.std().item() == pytest.approx(0.02, rel=0.2)
    for m in (m for m in model.modules() if isinstance(m, nn.LayerNorm)):
        assert m.weight.eq(1).all() and m.bias.eq(0).all() and m.eps == 1e-6


def test_official_names_and_sizes():
    """Of the sheet's example: D 192, patch 4, 32 px, decoder 96 wide. timm knows the encoder's names; sizes
    are the paper's, and those of the other files."""
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in MAE("vit_tiny", 32, 4).state_dict().items()}
    sizes = {"decoder_pred.weight": (48, 96), "pos_embed": (1, 65, 192), "mask_token": (1, 1, 96)}
    sizes |= {"decoder_embed.weight": (96, 192), "decoder_pos_embed": (1, 65, 96), "cls_token": (1, 1, 192)}
    sizes |= {"patch_embed.proj.weight": (192, 3, 4, 4)}
    assert sizes.items() <= shapes.items()
    layers = "norm1 norm2 attn.qkv attn.proj mlp.fc1 mlp.fc2".split()
    layers = [f"blocks.{i}.{layer}" for i in range(2) for layer in layers] + ["embed", "norm", "pred"]
    expected = {f"decoder_{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    assert {name for name in shapes if "decoder" in name} == expected | {"decoder_pos_embed"}

    assert {name: heads for name, (_, _, heads) in mae.VITS.items()} == eval_linear.HEADS
    known = {name: (*sizes, heads) for sizes, (name, heads) in convert.VITS.items() if name != "vit_giant"}
    assert known == mae.VITS
    base, large, huge = (768, 12, 12), (1024, 24, 16), (1280, 32, 16)
    for arch, patch, sizes in (("vit_base", 16, base), ("vit_large", 16, large), ("vit_huge", 14, huge)):
        with torch.device("meta"):
            model = MAE(arch, 224, patch)
        for blocks, expected in ((model.blocks, sizes), (model.decoder_blocks, (512, 8, 16))):
            assert (len(blocks[0].norm1.weight), len(blocks), blocks[0].attn.heads) == expected


NAMES = """decoder.decoder_layers.=decoder_blocks. vit.layers.=blocks. vit.layernorm=norm
    vit.embeddings.patch_embeddings.projection=patch_embed.proj vit.embeddings.position_embeddings=pos_embed
    vit.embeddings.cls_token=cls_token layernorm_before=norm1 layernorm_after=norm2
    attention.o_proj=attn.proj"""


def by_name(tensors, key):
    """Of {name in mae.py: tensor} that of a name in transformers, which has q, k and v apart."""
    for theirs, ours in (pair.split("=") for pair in NAMES.split()):
        key = key.replace(theirs, ours)
    key = key.removeprefix("decoder.")
    part = re.search(r"attention\.([qkv])_proj", key)
    return tensors[key.replace(part[0], "attn.qkv")].chunk(3)["qkv".index(part[1])] if part else tensors[key]


@pytest.mark.parametrize("norm_pix", [False, True])
def test_loss_prediction_and_gradients_are_those_of_transformers(monkeypatch, generator, norm_pix):
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    names = "hidden_size num_hidden_layers num_attention_heads intermediate_size".split()
    sizes = dict(zip(names, (32, 2, 2, 128), strict=True)) | {"image_size": 32, "patch_size": 8}
    sizes |= {f"decoder_{name}": size for name, size in zip(names, (16, 1, 2, 64), strict=True)}
    theirs = ViTMAEForPreTraining(ViTMAEConfig(**sizes, layer_norm_eps=1e-6, norm_pix_loss=norm_pix))
    ours, x, noise = shaken(small(monkeypatch), generator), images(), torch.rand(3, 16)
    theirs.load_state_dict({key: by_name(ours.state_dict(), key) for key in theirs.state_dict()})
    expected, encoded = theirs(x, noise=noise), theirs.vit(x, noise=noise).last_hidden_state
    pred, mask, latent = ours(x, 0.75, noise)
    loss = mae_loss(pred, pixel_targets(x, 8, norm_pix)[0], mask)
    assert torch.equal(mask, expected.mask)
    torch.testing.assert_close(latent, encoded, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pred, expected.logits, atol=1e-5, rtol=1e-5)
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)

    loss.backward()
    expected.loss.backward()
    grads = {name: p.grad for name, p in ours.named_parameters()}
    assert {name for name in grads if grads[name] is None} == {"pos_embed", "decoder_pos_embed"}
    assert all(grad.any() for grad in grads.values() if grad is not None)
    for key, p in theirs.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(by_name(grads, key), p.grad, atol=1e-5, rtol=1e-4)


# The loss: oracles 3 and 4


def test_loss_of_hidden_patches(generator):
    """Visible ones do not count. In float64, or at least float32."""
    pred, target = torch.randn(2, 2, 16, 12, generator=generator, dtype=DOUBLE).requires_grad_()
    mask = random_masking(target, 0.75, torch.rand(2, 16))[1]
    loss = mae_loss(pred, target, mask)
    slow = [((pred[b, i] - target[b, i]) ** 2).mean() for b, i in mask.nonzero().tolist()]
    assert len(slow) == 24 and loss.item() == pytest.approx(sum(slow).item() / 24, rel=1e-14)
    assert mae_loss(pred + 100 * (1 - mask)[:, :, None], target, mask).item() == loss.item()
    assert mae_loss(pred + 0.1, target, mask).item() != loss.item()
    [grad] = torch.autograd.grad(loss, pred)
    assert grad[mask == 0].abs().max() == 0 and grad[mask == 1].abs().min() > 0
    half, target = pred.bfloat16(), target.float()
    assert mae_loss(half, target, mask).dtype == torch.float32
    torch.testing.assert_close(mae_loss(half, target, mask), mae_loss(half.float(), target, mask))


def test_normalised_pixels():
    values = torch.tensor([1.0, 2, 3, 4])
    target, mean, std = pixel_targets(values.view(1, 1, 2, 2), 2, True)
    assert target.flatten().tolist() == pytest.approx([-1.1619, -0.3873, 0.3873, 1.1619], abs=1e-4)
    torch.testing.assert_close((target * std + mean).flatten(), values)
    for patch, expected in ((16, 0.998698), (8, 0.994792), (4, 0.979167)):
        target, _, _ = pixel_targets(images(2), patch, True)
        loss = mae_loss(torch.zeros_like(target), target, torch.ones(target.shape[:2]))
        assert loss.item() == pytest.approx(expected, abs=2e-6)
    flat, _, _ = pixel_targets(torch.full((1, 3, 8, 8), 0.4), 8, True)
    assert flat.abs().max() < 1e-3 and mae_loss(0 * flat, flat, torch.ones(1, 1)) < 1e-6
    dim, _, _ = pixel_targets(1e-3 * values.view(1, 1, 2, 2), 2, True)  # 1e-6 stands under the root
    assert dim.flatten().tolist() == pytest.approx([-0.9186, -0.3062, 0.3062, 0.9186], abs=1e-4)
    raw, mean, std = pixel_targets(images(), 8, False)
    assert torch.equal(raw, patchify(images(), 8)) and (mean, std) == (0, 1)


# Monitor


def test_r2_and_variance_of_the_prediction():
    """Of hidden patches; the problem is to predict the mean, or worse, and R2 tells whether it mends."""

    def check(pred, target, mask, *expected, tolerance=1e-5):
        metrics, problems = monitor(patch_moments(pred, target, mask), torch.randn(8, 4))
        found = [metrics["mae/r2"], metrics["mae/prediction_variance"]]
        assert found == pytest.approx(expected, abs=tolerance)
        assert [*problems.values()] == ["mae/r2"] * (expected[0] < 0.01)

    target, mask = torch.randn(6, 16, 12), random_masking(torch.zeros(6, 16, 1), 0.75, torch.rand(6, 16))[1]
    mean = target[mask == 1].mean(dim=0).expand_as(target)
    for share in (0.0, 0.003, 0.008, 0.5, 1.0):
        check(torch.lerp(mean, target, share), target, mask, 1 - (1 - share) ** 2, share**2)
    check(target + 100 * (1 - mask)[:, :, None], target, mask, 1, 1)
    check(2 * mean - target, target, mask, -3, 1)
    whole, *parts = (patch_moments(0.7 * target[i], target[i], mask[i]) for i in (..., slice(4), slice(4, 6)))
    torch.testing.assert_close(4 / 6 * parts[0] + 2 / 6 * parts[1], whole)

    target = pixel_targets(torch.randn(64, 3, 32, 32), 16, True)[0]  # collapse.md, oracle 9
    zero, mask = torch.zeros_like(target), torch.ones(target.shape[:2])
    check(zero, target, mask, 0, 0, tolerance=0.01)
    assert mae_loss(zero, target, mask).item() == pytest.approx(0.998697, abs=2e-6)


# A run


@pytest.fixture(scope="module", params=[False, True], ids=["pixels", "norm_pix in chunks"])
def observed(request, folder, tmp_path_factory):
    """Eight steps of ten images, logged at each second one, and what went through the network."""
    norm_pix, n = request.param, 5 if request.param else 10
    folder_of_run = tmp_path_factory.mktemp("run")
    run = SimpleNamespace(norm_pix=norm_pix, n=n, passes=[], pictures=[], folder=folder_of_run)
    forward, save = MAE.forward, mae.torchvision.utils.save_image

    def pass_of(self, images, mask_ratio, noise):
        run.model = self
        run.passes.append((images, noise, *forward(self, images, mask_ratio, noise)))
        return run.passes[-1][2:]

    def save_image(*given, **options):
        run.pictures.append(len(run.passes) * n // 10)
        save(*given, **options)

    flags = {"data": str(folder), "image_size": 16, "batch_size": 10, "epochs": 2, "warmup_epochs": 1.25}
    flags |= {"norm_pix": norm_pix, "micro_batch_size": 5 * norm_pix, "mask_ratio": 0.5 + 0.25 * norm_pix}
    flags |= {"log_every": 2, "save_minutes": 10.0 * (1 - norm_pix), "base_lr": 0.3, "min_scale": 0.6}
    run.args = tiny_args("mae", **flags, seed=int(norm_pix), run_dir=str(run.folder))
    with pytest.MonkeyPatch.context() as patch:
        small(patch)
        patch.setattr(MAE, "forward", pass_of)
        patch.setattr(mae.torchvision.utils, "save_image", save_image)
        mae.train(run.args)
    parts = zip(*run.passes, strict=True)
    run.x, run.noise, run.pred, run.mask, run.latent = (torch.cat(part).detach() for part in parts)
    run.targets, run.mean, run.std = pixel_targets(run.x, 4, norm_pix)
    run.checkpoint, run.lines = load(run.folder / "checkpoint.pt"), metrics_of(run.folder)
    return run


def test_a_run_passes_its_flags_on(observed):
    """Its crops, normalised, are hidden by uniform noise of (seed, step) alone; positions stay."""
    data = mae.Images(observed.args, (mae.random_crop(16, 0.6),), 1)
    crops = [data[key][0] for keys in data.batches(10, 0, 2, 0, 1) for key in keys]
    torch.testing.assert_close(observed.x, (torch.stack(crops) / 255 - MEAN) / STD)
    numbers = [torch.rand(10, 16, generator=mae.seeded(3, observed.args.seed, step)) for step in range(8)]
    assert torch.equal(observed.noise, torch.cat(numbers))
    assert observed.mask.mean(dim=1).unique().tolist() == [observed.args.mask_ratio]
    for name, width in (("pos_embed", 32), ("decoder_pos_embed", 16)):
        assert torch.equal(observed.checkpoint["model"][name], mae.sincos_positions(width, 4))


def test_loss_and_metrics_of_a_run(observed):
    """The loss of the step; R2, and the features but [CLS], of its last pass."""
    error, last = (observed.pred - observed.targets).square(), observed.lines[-1]
    loss = error.mean(dim=2)[-10:][observed.mask[-10:] == 1].mean()
    assert last["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    hidden = observed.mask[-observed.n :] == 1
    variance = observed.targets[-observed.n :][hidden].var(dim=0, correction=0).mean()
    r2 = 1 - error[-observed.n :][hidden].mean() / variance
    assert last["mae/r2"] == pytest.approx(r2.item(), abs=1e-4)
    features = observed.latent[-observed.n :, 1:].mean(dim=1)
    for name, value in mae.collapse_metrics(features, center=True).items():
        assert last[f"monitor/{name}"] == pytest.approx(value, rel=1e-5)


def test_picture_of_a_run(observed):
    """At the first step, at each save and at the end, of eight images of its last pass: as they are, what is
    visible, and that with the prediction where it is not; with norm_pix with the true means."""
    assert observed.pictures == ([1, 2, 4, 6, 8] if observed.norm_pix else [1, 8])
    [path] = observed.folder.glob("*.png")
    assert path.name == ("reconstruction-true-mean.png" if observed.norm_pix else "reconstruction.png")
    hidden = observed.mask[:, :, None].expand_as(observed.pred)
    painted = torch.where(hidden == 1, observed.pred * observed.std + observed.mean, patchify(observed.x, 4))
    rows = [observed.x, observed.x * (1 - unpatchify(hidden, 4)), unpatchify(painted, 4)]
    rows = [(row[-observed.n :][:8] * STD + MEAN).clamp(0, 1) for row in rows]
    expected = mae.torchvision.utils.make_grid(torch.cat(rows), nrow=min(observed.n, 8))
    page = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255
    torch.testing.assert_close(page, expected, atol=1 / 255, rtol=0)


@torch.no_grad()
def test_exported_backbone_is_the_encoder(observed):
    """eval_linear.py's ViT on backbone.pt gives the [CLS] of the encoder without a mask."""
    path, x = observed.folder / "backbone.pt", images(size=16)
    features = features_of(eval_linear.load_backbone(str(path)).eval(), x)
    expected = observed.model(x, 0.0, torch.rand(3, 16))[2][:, 0]
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    fixed = eval_linear.load_backbone(f"random:{path}").net.pos_embed
    torch.testing.assert_close(fixed, mae.sincos_positions(32, 4))


def test_learning_rates_and_groups_of_a_run(observed):
    """Oracle 9."""
    factors = [mae.cosine_schedule(epoch, 800, 40, 1.0) for epoch in (0, 20, 40, 420, 800)]
    assert factors == pytest.approx([0, 0.5, 1, 0.5, 0])
    rates = [mae.cosine_schedule(step, 8, 5, 0.3 * 10 / 256) for step in (0, 1, 3, 5, 7)]
    assert [line["train/lr"] for line in observed.lines] == rates
    optimizer = observed.checkpoint["optimizer"]
    groups = optimizer["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.05, 0] and groups[0]["betas"] == (0.9, 0.95)
    sizes = [[optimizer["state"][i]["exp_avg"].ndim for i in group["params"]] for group in groups]
    assert min(sizes[0]) == 2 and {*sizes[1]} == {1}
    assert len(sizes[0] + sizes[1]) == len(observed.checkpoint["model"]) - 2  # without fixed positions


def test_gradient_in_chunks_and_in_processes_is_that_of_the_batch(folder, monkeypatch):
    """train() in float64: 1 process = chunks = 2 processes = 2 in chunks, over five steps. Metrics of what
    the network does are those of the last chunk."""
    small(monkeypatch)
    forward, passes, runs = MAE.forward, [], {}
    monkeypatch.setattr(MAE, "forward", lambda *a: passes.append(len(a[1])) or forward(*a))
    flags = {"data": str(folder), "image_size": 16, "epochs": 1, "warmup_epochs": 0.01, "norm_pix": True}

    def trained(rank):
        torch.set_default_dtype(DOUBLE)
        mae.train(args)
        return passes

    for n, micro in ((1, 0), (1, 2), (2, 0), (2, 2)):
        args = tiny_args("mae", **flags, micro_batch_size=micro, run_dir=f"run{n}{micro}")
        size = micro or 8 // n
        assert in_processes(trained, n) == [[size] * (40 // n // size)] * n
        state = load(f"run{n}{micro}/checkpoint.pt")["optimizer"]["state"]
        averages = [held["exp_avg"].flatten() for held in state.values()]  # mean gradients of all steps
        runs[n, micro] = metrics_of(f"run{n}{micro}"), torch.cat(averages)
    lines, averages = runs[1, 0]
    assert len(lines) == 5 and averages.dtype == DOUBLE and averages.abs().max() > 1e-3
    assert lines[0]["train/loss"] != pytest.approx(lines[-1]["train/loss"], rel=1e-3)
    for (_, micro), (found, ours) in runs.items():
        assert (ours - averages).abs().max() < 1e-9 * averages.abs().max()
        for line, expected in zip(found, lines, strict=True):
            for tag in line if not micro else ("train/loss", "train/lr", "train/grad_norm"):
                exact = 1e-9 if tag.startswith("train") else 1e-6
                assert line[tag] == pytest.approx(expected[tag], rel=exact, abs=exact), tag


# Flags


def test_bad_flags():
    refused("mae", "--image-size 32: give a multiple of --patch-size 5", patch_size=5)
    refused("mae", "--mask-ratio 0.99: must leave one of the 64 patches visible", mask_ratio=0.99)
    refused("mae", "--mask-ratio 1.5: must be above 0 and at most 1", mask_ratio=1.5)
    assert not Path("runs").exists()


def test_paper_command_is_the_sheet_s():
    command = re.search(r"torchrun --nproc-per-node 8 mae\.py(.*?)(?<!\\)\n", mae.__doc__, re.S)[1]
    args = tyro.cli(mae.Args, args=command.replace("\\\n", " ").split())
    sizes = (args.image_size, args.patch_size, args.arch, args.epochs, args.batch_size)
    assert sizes == (224, 16, "vit_base", 800, 4096)
    assert (args.base_lr, args.weight_decay, args.warmup_epochs) == (1.5e-4, 0.05, 40)
    assert (args.mask_ratio, args.norm_pix, args.min_scale) == (0.75, True, 0.2)
    assert args.base_lr * args.batch_size / 256 == pytest.approx(2.4e-3)
