"""mae.py against its fact sheet's oracles, transformers and timm."""

import json
import math
import re

import numpy as np
import pytest
import timm
import torch
import tyro
from conftest import features_of, run_processes, tiny_args
from PIL import Image

import convert
import eval_linear
import mae
from mae import (
    MAE,
    mae_loss,
    monitor,
    patch_moments,
    patchify,
    pixel_targets,
    random_masking,
    reconstruction,
    unpatchify,
)


def small():
    """vit_nano for 32 px and patch 8: 16 patches."""
    torch.manual_seed(0)
    return MAE("vit_nano", 32, 8)


def images(n=3, size=32, seed=1):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


# Patches: oracle 1


def test_patches_are_rows_columns_channels():
    grid = torch.arange(48.0).view(1, 3, 4, 4)
    patches = patchify(grid, 2)
    assert patches[0, 0].tolist() == [0, 16, 32, 1, 17, 33, 4, 20, 36, 5, 21, 37]
    assert patches[0, 1, :3].tolist() == [2, 18, 34]
    assert torch.equal(unpatchify(patches, 2), grid)
    random = images(2, 24)
    assert torch.equal(unpatchify(patchify(random, 4), 4), random)


# Masking: oracle 2


def test_masking_by_noise():
    noise = torch.tensor([[0.9, 0.1, 0.5, 0.3]])
    x = torch.arange(4.0).view(1, 4, 1)
    kept, mask, ids_restore = random_masking(x, 0.75, noise)
    assert kept.tolist() == [[[1.0]]] and mask.tolist() == [[1, 0, 1, 1]]
    assert ids_restore.tolist() == [[3, 0, 2, 1]]
    kept, _, _ = random_masking(x, 0.5, noise)
    assert kept.flatten().tolist() == [1, 3]  # in the order of the noise


@pytest.mark.parametrize("n, hidden", [(64, 48), (196, 147), (256, 192)])
def test_each_image_keeps_the_same_number(n, hidden):
    x = torch.randn(5, n, 2)
    kept, mask, _ = random_masking(x, 0.75, torch.rand(5, n))
    assert mask.sum(dim=1).tolist() == [hidden] * 5 and kept.shape == (5, n - hidden, 2)
    for i in range(5):
        assert sorted(kept[i].tolist()) == sorted(x[i][mask[i] == 0].tolist())
    assert not torch.equal(mask[0], mask[1])


def test_the_official_rounding():
    assert (
        random_masking(torch.zeros(1, 100, 1), 0.9, torch.rand(1, 100))[0].shape[1] == 9
    )  # int(100 * (1 - .9))
    assert random_masking(torch.zeros(1, 100, 1), 0.8, torch.rand(1, 100))[0].shape[1] == 19


# The loss: oracles 3 and 4


def test_visible_patches_do_not_count():
    pred, target = torch.randn(2, 16, 12, requires_grad=True), torch.randn(2, 16, 12)
    mask = random_masking(target, 0.75, torch.rand(2, 16))[1]
    loss = mae_loss(pred, target, mask)
    slow = sum(
        ((pred[b, i] - target[b, i]) ** 2).mean() for b in range(2) for i in range(16) if mask[b, i] == 1
    )
    assert loss.item() == pytest.approx(slow.item() / 24, rel=1e-6)
    shifted = pred + 100 * (1 - mask)[:, :, None]
    assert mae_loss(shifted, target, mask).item() == loss.item()
    assert mae_loss(pred + 0.1, target, mask).item() != loss.item()
    loss.backward()
    assert pred.grad[mask == 0].abs().max() == 0 and pred.grad[mask == 1].abs().min() > 0


def test_normalised_pixels():
    target, mean, std = pixel_targets(torch.tensor([1.0, 2, 3, 4]).view(1, 1, 2, 2), 2, True)
    expected = torch.tensor([-1.1619, -0.3873, 0.3873, 1.1619])
    torch.testing.assert_close(target.flatten(), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(target * std + mean, torch.tensor([1.0, 2, 3, 4]).view(1, 1, 4))
    for patch, expected in ((16, 0.998698), (8, 0.994792), (4, 0.979167)):
        target, _, _ = pixel_targets(images(2, 32), patch, True)
        loss = mae_loss(torch.zeros_like(target), target, torch.ones(target.shape[:2]))
        assert loss.item() == pytest.approx(expected, abs=2e-6)
    flat, _, _ = pixel_targets(torch.full((1, 3, 8, 8), 0.4), 8, True)
    assert flat.abs().max() < 1e-3 and mae_loss(0 * flat, flat, torch.ones(1, 1)) < 1e-6
    dim, _, _ = pixel_targets(1e-3 * torch.tensor([1.0, 2, 3, 4]).view(1, 1, 2, 2), 2, True)
    assert dim.flatten().tolist() == pytest.approx([-0.9186, -0.3062, 0.3062, 0.9186], abs=1e-4)
    raw, mean, std = pixel_targets(images(), 8, False)
    assert torch.equal(raw, patchify(images(), 8)) and (mean, std) == (0, 1)


def test_loss_keeps_float64_and_lifts_half_precision():
    pred, target = torch.randn(2, 2, 16, 12, dtype=torch.float64)
    mask = random_masking(target, 0.75, torch.rand(2, 16))[1]
    exact = ((pred - target).square().mean(dim=2) * mask).sum() / 24
    loss = mae_loss(pred, target, mask)
    assert loss.dtype == torch.float64 and loss.item() == pytest.approx(exact.item(), rel=1e-14)
    half, target = pred.bfloat16(), target.float()
    assert mae_loss(half, target, mask).dtype == torch.float32
    torch.testing.assert_close(mae_loss(half, target, mask), mae_loss(half.float(), target, mask))


# Positions: oracle 5


def test_positions_by_the_numbers():
    table = mae.sincos_positions(8, 2)[0]
    expected = torch.tensor(
        [
            [0.0] * 8,
            [0, 0, 1, 1, 0, 0, 1, 1],
            [0.841471, 0.01, 0.540302, 0.99995, 0, 0, 1, 1],
            [0, 0, 1, 1, 0.841471, 0.01, 0.540302, 0.99995],
        ]
    )
    torch.testing.assert_close(table[:4], expected, atol=1e-6, rtol=0)
    table = mae.sincos_positions(768, 14)[0]
    assert table.shape == (197, 768)
    assert table[2, [1, 192, 384, 576]].tolist() == pytest.approx([0.815251, 0.540302, 0, 1], abs=1e-6)
    torch.testing.assert_close(table[1:].square().sum(dim=1), torch.full((196,), 384.0))


# The model: oracles 6, 7, 8 and 10


def test_without_a_mask_the_encoder_is_a_plain_vit():
    model, x, noise = small().eval(), images(), torch.rand(3, 16)
    with torch.no_grad():
        _, mask, latent = model(x, 0.0, noise)
        assert latent.shape == (3, 17, 128) and mask.sum() == 0
        ids_restore = random_masking(torch.zeros(3, 16, 1), 0.0, noise)[2]
        restored = latent[:, 1:].gather(1, ids_restore[:, :, None].expand(-1, -1, 128))
        encoder = {k: v for k, v in model.state_dict().items() if "deco" not in k and k != "mask_token"}
        options = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4}
        theirs = timm.models.VisionTransformer(**options, num_classes=0).eval()
        theirs.load_state_dict(encoder)
        tokens = theirs.forward_features(x)
        torch.testing.assert_close(latent[:, 0], tokens[:, 0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(restored, tokens[:, 1:], atol=1e-5, rtol=1e-5)
        assert model(x, 0.75, noise)[2].shape == (3, 1 + 4, 128)


def test_order_of_the_kept_tokens_does_not_matter(monkeypatch):
    """Neither to the encoder, nor to the decoder, which gets where each of them belongs."""
    model, noise, order = small().eval(), torch.rand(3, 16), torch.randperm(8)

    def shuffled(*given):
        kept, mask, ids_restore = random_masking(*given)
        place = torch.cat([order.argsort(), torch.arange(8, 16)])
        return kept[:, order], mask, place[ids_restore]

    with torch.no_grad():
        pred, mask, latent = model(images(), 0.5, noise)
        monkeypatch.setattr(mae, "random_masking", shuffled)
        again, _, other = model(images(), 0.5, noise)
    torch.testing.assert_close(other[:, 1:], latent[:, 1:][:, order], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again, pred, atol=1e-5, rtol=1e-5)
    hidden = pred[0][mask[0] == 1]
    assert (hidden[0] - hidden[1]).abs().max() > 1e-3  # mask tokens have positions


def test_hidden_pixels_do_not_reach_the_encoder():
    model, x, noise = small().eval(), images(), torch.rand(3, 16)
    with torch.no_grad():
        _, mask, latent = model(x, 0.75, noise)
        changed = unpatchify(patchify(x, 8) + 10 * mask[:, :, None], 8)
        assert torch.equal(model(changed, 0.75, noise)[2], latent)
        changed = unpatchify(patchify(x, 8) + 0.1 * (1 - mask)[:, :, None], 8)
        assert not torch.equal(model(changed, 0.75, noise)[2], latent)


def test_what_learns_and_what_does_not():
    model = small()
    pred, mask, _ = model(images(), 0.75, torch.rand(3, 16))
    mae_loss(pred, patchify(images(), 8), mask).backward()
    fixed = {name for name, p in model.named_parameters() if p.grad is None}
    assert fixed == {"pos_embed", "decoder_pos_embed"}
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.grad is not None)


def test_initialisation():
    model = small()
    qkv, conv = model.blocks[0].attn.qkv.weight, model.patch_embed.proj
    bound = math.sqrt(6 / (4 * 128))  # of the fused matrix (3 D, D)
    assert bound * 0.99 < qkv.abs().max() <= bound
    assert conv.weight.abs().max() <= math.sqrt(6 / (128 + 192)) and conv.weight.std() > 0.05
    assert 0 < conv.bias.abs().max() <= 1 / math.sqrt(192)
    assert all(m.bias.abs().max() == 0 for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert MAE("vit_base", 32, 16).mask_token.std().item() == pytest.approx(0.02, rel=0.2)
    for layer in (model.decoder_blocks[1].attn.qkv, model.decoder_pred, model.blocks[5].mlp.fc2):
        bound = math.sqrt(6 / sum(layer.weight.shape))
        assert bound * 0.97 < layer.weight.abs().max() <= bound
    norms = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert all(m.weight.eq(1).all() and m.bias.eq(0).all() and m.eps == 1e-6 for m in norms)


@pytest.mark.parametrize("patch, decoder, low, high", [(16, 512, 1.70, 1.85), (4, 512, 2.6, 3.2)])
def test_loss_of_an_untrained_model(monkeypatch, patch, decoder, low, high):
    """Sheet, section 9: about 1 + 2 D / (D + 3 p^2) of the decoder's width D."""
    monkeypatch.setitem(mae.DECODERS, "vit_nano", (decoder, 1, 8))
    torch.manual_seed(0)
    model, x = MAE("vit_nano", 4 * patch, patch), images(16, 4 * patch)
    with torch.no_grad():
        pred, mask, _ = model(x, 0.75, torch.rand(16, 16))
    assert low < mae_loss(pred, pixel_targets(x, patch, True)[0], mask).item() < high


def test_official_names():
    """The keys of the sheet's example: D 192, patch 4, 32 px, decoder 96 wide."""
    shapes = {k: tuple(v.shape) for k, v in MAE("vit_tiny", 32, 4).state_dict().items()}
    assert shapes["decoder_pred.weight"] == (48, 96) and shapes["pos_embed"] == (1, 65, 192)
    assert shapes["decoder_embed.weight"] == (96, 192) and shapes["mask_token"] == (1, 1, 96)
    assert shapes["decoder_pos_embed"] == (1, 65, 96) and shapes["cls_token"] == (1, 1, 192)
    assert shapes["patch_embed.proj.weight"] == (192, 3, 4, 4)
    suffixes = {
        f"{a}.{b}"
        for a in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        for b in ("weight", "bias")
    }
    for blocks, depth in (("blocks", 12), ("decoder_blocks", 2)):
        keys = {key for key in shapes if key.startswith(f"{blocks}.")}
        assert keys == {f"{blocks}.{i}.{suffix}" for i in range(depth) for suffix in suffixes}
    others = {key for key in shapes if "blocks" not in key}
    assert others == set(
        """cls_token pos_embed mask_token decoder_pos_embed patch_embed.proj.weight patch_embed.proj.bias
        norm.weight norm.bias decoder_embed.weight decoder_embed.bias decoder_norm.weight decoder_norm.bias
        decoder_pred.weight decoder_pred.bias""".split()
    )


@pytest.mark.parametrize(
    "arch, patch, width, depth, heads",
    [("vit_base", 16, 768, 12, 12), ("vit_large", 16, 1024, 24, 16), ("vit_huge", 14, 1280, 32, 16)],
)
def test_sizes_and_the_papers_decoder(arch, patch, width, depth, heads):
    with torch.device("meta"):
        model = MAE(arch, 224, patch)
    assert len(model.blocks) == depth and model.norm.weight.shape == (width,)
    assert {block.attn.heads for block in model.blocks} == {heads}
    assert {name: heads for name, (_, _, heads) in mae.VITS.items()} == eval_linear.HEADS
    known = {name: (*sizes, heads) for sizes, (name, heads) in convert.VITS.items() if name != "vit_giant"}
    assert known == mae.VITS
    assert len(model.decoder_blocks) == 8 and model.decoder_norm.weight.shape == (512,)
    assert model.decoder_blocks[0].attn.heads == 16


@pytest.mark.parametrize("norm_pix", [False, True])
def test_loss_prediction_and_gradients_are_those_of_transformers(norm_pix):
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    names = {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 512}
    decoder = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
    names |= {f"decoder_{name}": value for name, value in decoder.items()}
    config = ViTMAEConfig(
        **names, image_size=32, patch_size=8, norm_pix_loss=norm_pix, layer_norm_eps=1e-6, mask_ratio=0.75
    )
    theirs, ours = ViTMAEForPreTraining(config), small()
    with torch.no_grad():
        for p in ours.parameters():
            p += 0.05 * torch.randn_like(p) * p.requires_grad  # also where the initial value is 0 or 1
    state, copied = ours.state_dict(), {}
    for key in theirs.state_dict():
        name = key.replace("decoder.decoder_layers.", "decoder_blocks.").replace("vit.layers.", "blocks.")
        name = name.replace("vit.embeddings.patch_embeddings.projection", "patch_embed.proj")
        name = name.replace("vit.embeddings.position_embeddings", "pos_embed").replace(
            "vit.layernorm", "norm"
        )
        name = name.replace("vit.embeddings.cls_token", "cls_token").replace("layernorm_before", "norm1")
        name = name.replace("layernorm_after", "norm2").replace("attention.o_proj", "attn.proj")
        name = name.removeprefix("decoder.")
        part = re.search(r"attention\.([qkv])_proj", name)
        if part:
            name = name.replace(part[0], "attn.qkv")
            copied[key] = (name, "qkv".index(part[1]))
        else:
            copied[key] = (name, None)
    pick = lambda tensors, name, i: tensors[name] if i is None else tensors[name].chunk(3)[i]  # noqa: E731
    theirs.load_state_dict({key: pick(state, *source) for key, source in copied.items()})
    x, noise = images(), torch.rand(3, 16)
    expected = theirs(x, noise=noise)
    pred, mask, latent = ours(x, 0.75, noise)
    loss = mae_loss(pred, pixel_targets(x, 8, norm_pix)[0], mask)
    assert torch.equal(mask, expected.mask)
    with torch.no_grad():
        torch.testing.assert_close(latent, theirs.vit(x, noise=noise).last_hidden_state, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pred, expected.logits, atol=1e-5, rtol=1e-5)
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    loss.backward()
    expected.loss.backward()
    grads = {name: p.grad for name, p in ours.named_parameters()}
    compared = 0
    for key, p in theirs.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(pick(grads, *copied[key]), p.grad, atol=1e-5, rtol=1e-4)
            compared += 1
    assert compared > 8 * 12


# Monitor


def metrics_of(pred, target, mask):
    metrics, _ = monitor(patch_moments(pred, target, mask), torch.randn(8, 4))
    return [metrics["mae/r2"], metrics["mae/prediction_variance"]]


def test_reconstruction_metrics():
    target, mask = torch.randn(6, 16, 12), random_masking(torch.zeros(6, 16, 1), 0.75, torch.rand(6, 16))[1]
    mean = target[mask == 1].mean(dim=0).expand_as(target)
    assert metrics_of(target, target, mask) == pytest.approx([1, 1], abs=1e-5)
    assert metrics_of(mean, target, mask) == pytest.approx([0, 0], abs=1e-5)
    assert metrics_of(mean + 0.5 * (target - mean), target, mask) == pytest.approx([0.75, 0.25], abs=1e-5)
    noisy = target + 100 * (1 - mask)[:, :, None]  # visible patches do not count
    assert metrics_of(noisy, target, mask) == pytest.approx([1, 1], abs=1e-5)
    parts = [
        patch_moments(*(x[rows] for x in (0.7 * target, target, mask))) for rows in (slice(4), slice(4, 6))
    ]
    whole = patch_moments(0.7 * target, target, mask)
    torch.testing.assert_close(4 / 6 * parts[0] + 2 / 6 * parts[1], whole)
    target = pixel_targets(torch.randn(64, 3, 32, 32), 16, True)[0]  # collapse.md, oracle 9
    zero = torch.zeros_like(target)
    mask = torch.ones(target.shape[:2])
    assert metrics_of(zero, target, mask) == pytest.approx([0, 0], abs=0.01)
    assert mae_loss(zero, target, mask).item() == pytest.approx(0.998697, abs=2e-6)


def test_the_problem_is_to_predict_the_mean():
    """And its tag is one of the metrics, by which the alarm sees whether it mends."""
    target, mask = torch.randn(6, 16, 12), torch.ones(6, 16)
    mean = target.mean(dim=(0, 1)).expand_as(target)
    for share, expected in ((0.0, ["mae/r2"]), (0.003, ["mae/r2"]), (0.008, []), (1.0, [])):
        metrics, problems = monitor(
            patch_moments(torch.lerp(mean, target, share), target, mask), torch.randn(8, 4)
        )
        assert metrics["mae/r2"] == pytest.approx(1 - (1 - share) ** 2, abs=1e-5)
        assert [*problems.values()] == expected and set(expected) <= set(metrics)
    moments = patch_moments(100 + 0 * target, target, mask)
    assert [*monitor(moments, torch.randn(8, 4))[1].values()] == ["mae/r2"]  # worse than the mean


def test_features_are_measured_about_their_mean():
    features = 5 + torch.randn(40, 16)
    metrics, _ = monitor(torch.rand(5, 12), features)
    for name, value in mae.collapse_metrics(features, center=True).items():
        assert metrics[f"monitor/{name}"] == value


@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("side, n", [(128, 2), (32, 9)])
def test_picture_of_a_perfect_prediction_is_the_image(norm_pix, side, n):
    """Where a patch is hidden; where it is visible the prediction, here noise, is not drawn."""
    x, patch = images(n, side), side // 8
    target, mean, std = pixel_targets(x, patch, norm_pix)
    mask = random_masking(target, 0.75, torch.rand(n, 64))[1]
    pred = torch.where(mask[:, :, None] == 1, target, torch.randn_like(target))
    panels = reconstruction(x, pred * std + mean, mask, patch)
    shown = min(n, 8)
    assert panels.shape == (3 * shown, 3, side, side)
    original, visible, filled = panels.chunk(3)
    assert torch.equal(original, x[:shown])
    torch.testing.assert_close(filled, original, atol=1e-5, rtol=0)
    hidden = unpatchify(mask[:shown, :, None].expand(-1, -1, 3 * patch**2), patch) > 0
    assert hidden.float().mean() == 0.75 and (visible[hidden] == 0).all()
    assert torch.equal(visible[~hidden], original[~hidden])


@pytest.mark.parametrize("norm_pix, micro", [(False, 0), (True, 4)])
def test_picture_of_a_run(folder, tmp_path, monkeypatch, norm_pix, micro):
    """Of the last images of its last step, from a network that predicts a perfect target."""
    seen, forward = [], MAE.forward

    def perfect(self, images, mask_ratio, noise):
        pred, mask, latent = forward(self, images, mask_ratio, noise)
        seen.append((images, mask))
        return 0 * pred + pixel_targets(images, 4, norm_pix)[0], mask, latent

    monkeypatch.setattr(MAE, "forward", perfect)
    flags = {"norm_pix": norm_pix, "micro_batch_size": micro, "epochs": 1, "run_dir": str(tmp_path)}
    assert mae.train(tiny_args("mae", data=str(folder), **flags))["mae/r2"] == pytest.approx(1, abs=1e-5)
    [path] = tmp_path.glob("*.png")
    assert path.name == ("reconstruction-true-mean.png" if norm_pix else "reconstruction.png")
    x, mask = seen[-1]
    n = micro or 8
    page = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255
    assert page.shape == (3, 3 * 34 + 2, n * 34 + 2)  # a border of 2 pixels
    rows = [
        torch.stack([page[:, top : top + 32, 2 + 34 * i : 34 * (i + 1)] for i in range(n)])
        for top in (2, 36, 70)
    ]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for row in (0, 2):
        torch.testing.assert_close(rows[row], x * std + mean, atol=1 / 255, rtol=0)
    hidden = unpatchify(mask[:, :, None].expand(-1, -1, 48), 4)
    torch.testing.assert_close(rows[1], x * (1 - hidden) * std + mean, atol=1 / 255, rtol=0)


def test_a_picture_at_the_first_step_at_each_save_and_at_the_end(folder, tmp_path, monkeypatch):
    steps, schedule = [], mae.cosine_schedule
    monkeypatch.setattr(
        mae, "cosine_schedule", lambda step, *a: steps.append([step + 1]) or schedule(step, *a)
    )
    monkeypatch.setattr(mae.torchvision.utils, "save_image", lambda *a, **k: steps[-1].append("picture"))
    for minutes, expected in ((10.0, [1, 5]), (0.0, [1, 2, 4, 5])):
        flags = {
            "epochs": 1,
            "log_every": 2,
            "save_minutes": minutes,
            "run_dir": str(tmp_path / str(minutes)),
        }
        steps.clear()
        mae.train(tiny_args("mae", data=str(folder), **flags))
        assert [step for step, *pictures in steps if pictures] == expected


# Training


def test_schedule():
    """Oracle 9."""
    factors = [mae.cosine_schedule(epoch, 800, 40, 1.0) for epoch in (0, 20, 40, 420, 800)]
    assert factors == pytest.approx([0, 0.5, 1, 0.5, 0])


def test_learning_rates_and_groups_of_a_run(folder, tmp_path, monkeypatch):
    seen, adamw = [], torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *a, **k: seen.append((a, k)) or adamw(*a, **k))
    mae.train(tiny_args("mae", data=str(folder), base_lr=0.3, run_dir=str(tmp_path), warmup_epochs=1.4))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    expected = [mae.cosine_schedule(step, 20, 7, 0.3 * 8 / 256) for step in range(20)]
    assert [line["train/lr"] for line in lines] == expected
    (groups, _), options = seen[0]
    assert options["betas"] == (0.9, 0.95)
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    assert all(p.ndim > 1 for p in groups[0]["params"]) and all(p.ndim == 1 for p in groups[1]["params"])
    model = small()
    assert sum(len(group["params"]) for group in groups) == len([*model.parameters()]) - 2  # fixed positions


def test_gradient_in_chunks_and_in_processes_is_that_of_the_batch(tmp_path, monkeypatch):
    """train() in float64: 1 process = chunks = 2 processes = 2 in chunks, over six steps. Metrics of what the
    network does are those of the last chunk."""
    monkeypatch.chdir(tmp_path)
    code = """
import mae, torch
torch.set_default_dtype(torch.float64)
args = mae.Args(
    data="photos", image_size=16, patch_size=4, batch_size=24, epochs=1, warmup_epochs=0.01, workers=0,
    log_every=1, micro_batch_size=MICRO, run_dir="RUN", norm_pix=True,
)
passes, forward = [], mae.MAE.forward
mae.MAE.forward = lambda self, images, *a: passes.append(len(images)) or forward(self, images, *a)
mae.train(args)
mae.MAE.forward = forward
assert passes == [MICRO or 24 // N] * (6 * 24 // N // (MICRO or 24 // N))
"""
    (tmp_path / "photos").mkdir()
    for i in range(144):
        mae.demo_image(i)[0].save(tmp_path / "photos" / f"{i:03d}.png")
    curves, states = {}, {}
    for n, micro in ((1, 0), (1, 6), (2, 0), (2, 6)):
        name = f"run{n}{micro}"
        words = code.replace("MICRO", str(micro)).replace("RUN", name).replace("N)", f"{n})")
        words = words.replace("24 // N", f"24 // {n}")
        if n == 1:
            try:
                exec(words, {})
            finally:
                torch.set_default_dtype(torch.float32)
        else:
            run_processes(tmp_path, words, n)
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        curves[name] = lines
        states[name] = torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
        assert len(lines) == 6
        tags = (
            lines[0].keys() - {"perf/images_per_second"} if not micro else ("train/loss", "train/grad_norm")
        )
        for line, first in zip(lines, curves["run10"], strict=True):
            for tag in tags:
                assert line[tag] == pytest.approx(first[tag], rel=1e-6, abs=1e-6), (name, tag)
            for tag in ("train/loss", "train/lr", "train/grad_norm"):
                assert line[tag] == pytest.approx(first[tag], rel=1e-9), (name, tag)
        # mean gradients of all steps, which AdamW holds
        ours, theirs = (states[run]["optimizer"]["state"] for run in (name, "run10"))
        scale = max(held["exp_avg"].abs().max() for held in theirs.values())
        assert scale > 1e-3 and ours.keys() == theirs.keys() and len(ours) > 100
        for i in ours:
            assert ours[i]["exp_avg"].dtype == torch.float64
            assert (ours[i]["exp_avg"] - theirs[i]["exp_avg"]).abs().max() < 1e-9 * scale
    assert lines[0]["train/loss"] != pytest.approx(lines[-1]["train/loss"], rel=1e-3)


def test_a_run_passes_its_flags_on(folder, tmp_path, monkeypatch):
    """--norm-pix and --mask-ratio reach the loss, which sees normalised crops; positions stay."""
    seen, crops, targets, loss = [], [], mae.pixel_targets, mae.mae_loss
    cuts, cut = [], mae.random_crop

    def targets_of(images, patch_size, norm_pix):
        seen.append((images, patch_size, norm_pix))
        return targets(images, patch_size, norm_pix)

    def loss_of(pred, target, mask):
        seen[-1] += (mask,)
        return loss(pred, target, mask)

    read = mae.Images.__getitem__
    monkeypatch.setattr(mae, "pixel_targets", targets_of)
    monkeypatch.setattr(mae, "mae_loss", loss_of)
    monkeypatch.setattr(mae, "random_crop", lambda *a: cuts.append(a) or cut(*a))
    monkeypatch.setattr(mae.Images, "__getitem__", lambda *a: crops.append(read(*a)) or crops[-1])
    flags = {"norm_pix": True, "mask_ratio": 0.5, "epochs": 1, "run_dir": str(tmp_path)}
    mae.train(tiny_args("mae", data=str(folder), min_scale=0.6, **flags))
    assert cuts == [(32, 0.6)]
    x, patch_size, norm_pix, mask = seen[0]
    assert (patch_size, norm_pix, mask.mean().item()) == (4, True, 0.5)
    pixels = torch.stack([crop for crop, _ in crops[:8]]) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(x, (pixels - mean) / std)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    assert torch.equal(state["pos_embed"], mae.sincos_positions(128, 8))
    assert torch.equal(state["decoder_pos_embed"], mae.sincos_positions(64, 8))


def test_each_step_hides_by_its_own_noise(folder, tmp_path, monkeypatch):
    """Uniform, for each image its own, of (seed, step) alone."""
    drawn, masking = [], random_masking
    monkeypatch.setattr(mae, "random_masking", lambda *a: drawn.append(a[2]) or masking(*a))
    for seed in (0, 1):
        flags = {"epochs": 1, "micro_batch_size": 2 * seed, "run_dir": str(tmp_path / str(seed))}
        mae.train(tiny_args("mae", data=str(folder), seed=seed, patch_size=8, **flags))
    steps = [*drawn[:5], *torch.cat(drawn[5:]).split(8)]
    assert len(steps) == 10 and len(torch.stack(steps).unique()) > 0.99 * 10 * 8 * 16
    for i, noise in enumerate(steps):
        assert torch.equal(noise, torch.rand(8, 16, generator=mae.seeded(3, i // 5, i % 5)))


def test_exported_backbone_is_the_encoder(folder, tmp_path):
    """eval_linear.py's ViT on backbone.pt gives the [CLS] of the encoder without a mask."""
    mae.train(tiny_args("mae", data=str(folder), epochs=1, run_dir=str(tmp_path)))
    backbone = eval_linear.load_backbone(str(tmp_path / "backbone.pt")).eval()
    model = MAE("vit_nano", 32, 4)
    model.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"])
    with torch.no_grad():
        latent = model(images(), 0.0, torch.rand(3, 64))[2]
        torch.testing.assert_close(features_of(backbone, images()), latent[:, 0], atol=1e-5, rtol=1e-5)
    fixed = eval_linear.load_backbone(f"random:{tmp_path / 'backbone.pt'}").net.pos_embed
    torch.testing.assert_close(fixed, mae.sincos_positions(128, 8))


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"patch_size": 5}, "--image-size 32: give a multiple of --patch-size 5"),
        ({"mask_ratio": 0.99}, "--mask-ratio 0.99: must leave one of the 64 patches visible"),
        ({"patch_size": 32}, "--mask-ratio 0.75: must leave one of the 1 patches visible"),
        ({"mask_ratio": 1.0}, "--mask-ratio 1.0: must leave one of the 64 patches visible"),
        ({"mask_ratio": 1.5}, "--mask-ratio 1.5: must be above 0 and at most 1"),
    ],
)
def test_bad_flags(tmp_path, flags, message):
    with pytest.raises(SystemExit) as stop:
        mae.train(tiny_args("mae", run_dir=str(tmp_path / "run"), **flags))
    assert message in str(stop.value) and not (tmp_path / "run").exists()


def test_paper_command_is_the_sheet_s():
    command = re.search(r"torchrun --nproc-per-node 8 mae\.py(.*?)(?<!\\)\n", mae.__doc__, re.S)[1]
    args = tyro.cli(mae.Args, args=command.replace("\\\n", " ").split())
    assert (args.image_size, args.patch_size, args.arch, args.epochs, args.batch_size) == (
        224,
        16,
        "vit_base",
        800,
        4096,
    )
    assert (args.base_lr, args.weight_decay, args.warmup_epochs) == (1.5e-4, 0.05, 40)
    assert (args.mask_ratio, args.norm_pix, args.min_scale) == (0.75, True, 0.2)
    assert args.base_lr * args.batch_size / 256 == pytest.approx(2.4e-3)
