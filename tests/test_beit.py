"""beit.py against methods/beit.md, transformers and timm; its first stage, and both together.

What both stages promise as all scripts do, test_contract.py and test_hardening.py test on the second alone.
"""

import itertools
import math
import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
import tyro
from conftest import command_line, features_of, run, run_processes, tiny_args
from PIL import Image
from test_contract import assert_same_run, load, metrics_of, stopped

import beit
import eval_linear
from beit import (
    DVAE,
    Args,
    BEiT,
    beit_loss,
    block_mask,
    code_shares,
    dvae_loss,
    gumbel_noise,
    jitter_colors,
    mask_view,
    monitor,
    tokenizer_monitor,
)

SMALL = {"arch": "vit_tiny", "side": 8, "patch_size": 4, "tokens": 512}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def shaken(model, generator):
    """Random weights where the initialisation is 0 or alike."""
    for p in model.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=generator)
    return model.eval()


# Masks and views


@pytest.mark.parametrize(
    "side, target, least, low, high, mean, exact",
    [(14, 75, 16, 60, 75, (74.3, 74.65), (0.63, 0.70)), (8, 26, 4, 22, 26, (25.9, 26), (0.94, 0.98))],
)
def test_block_mask_statistics(side, target, least, low, high, mean, exact):
    """2,000 draws: the sheet's section 5 and oracle 3."""
    masks = torch.stack([block_mask((side, side), target, random.Random(i), least) for i in range(2000)])
    counts = masks.sum(dim=(1, 2))
    assert masks.dtype == torch.bool and low <= counts.min() and counts.max() == high == target
    assert mean[0] < counts.double().mean() < mean[1]
    assert exact[0] < (counts == target).double().mean() < exact[1]
    often = masks.double().mean(dim=0)
    if side == 14:
        assert (
            0.68 < often[6:8, 6:8].mean() < 0.76
            and 0.02 < often[[0, 0, -1, -1], [0, -1, 0, -1]].mean() < 0.06
        )
    assert torch.equal(masks[5], block_mask((side, side), target, random.Random(5), least))


def test_blocks_are_blocks():
    """One block alone: an area of at least 16, aspect 0.3 to 3.3, never as high or wide as the grid."""
    for seed in range(200):
        mask = block_mask((14, 14), 16, random.Random(seed), 16)
        rows, columns = mask.any(dim=1).sum().item(), mask.any(dim=0).sum().item()
        if mask.sum() == rows * columns:
            assert max(rows, columns) < 14 and 0.2 < rows / columns < 5
        assert 0 < mask.sum() <= 16
    assert block_mask((10, 6), 20, random.Random(0), 4).shape == (10, 6)


def test_each_image_has_its_own_mask():
    """By torch's random numbers, which Images seeds by (seed, epoch, index)."""
    masks = []
    for seed in (0, 1, 2, 2):
        torch.manual_seed(seed)
        masks.append(mask_view(None, (8, 8), 26, 4))
    assert all(0 < mask.sum() <= 26 and mask.shape == (8, 8) for mask in masks)
    assert torch.equal(masks[2], masks[3]) and len(torch.stack(masks).unique(dim=0)) == 3


def test_jitter_is_torchvision_s(generator):
    images = torch.randint(0, 256, (4, 3, 16, 16), generator=generator).byte()
    u = torch.rand(4, 3, generator=generator)
    names = ("brightness", "contrast", "saturation")
    functions = [getattr(torchvision.transforms.v2.functional, f"adjust_{name}") for name in names]
    for strength, order in ((0.4, [0, 1, 2]), (0.4, [2, 0, 1]), (1.0, [1, 2, 0])):
        ours = jitter_colors(images, u, order, strength)
        for image, row, found in zip(images, u, ours, strict=True):
            x = image / 255
            for i in order:
                x = functions[i](x, 1 - strength + 2 * strength * row[i].item())
            torch.testing.assert_close(found, x, atol=1e-4, rtol=0)
    torch.testing.assert_close(jitter_colors(images, u, [0, 1, 2], 0.0), images / 255)


# The encoder


def relative_index(side):
    return beit.RelativePositionBias(side, 1).relative_position_index


def test_relative_index():
    """Oracles 1 and 2; timm's."""
    rows = [[11, 9, 9, 9, 9], [10, 4, 3, 1, 0], [10, 5, 4, 2, 1], [10, 7, 6, 4, 3], [10, 8, 7, 5, 4]]
    assert relative_index(2).tolist() == rows
    large = relative_index(14)
    assert (large.min(), large.max(), len(large.unique())) == (0, 731, 732) and large.sum() == 14_270_119
    assert (large[1:, 1:] + large[1:, 1:].T == 728).all()
    assert relative_index(8).sum() == 487_843 and relative_index(8).max() == 227
    from timm.models.beit import gen_relative_position_index

    for side in (14, 8, 5):
        assert torch.equal(relative_index(side), gen_relative_position_index((side, side)))
    bias = beit.RelativePositionBias(3, 2)
    bias.relative_position_bias_table.data = torch.randn(28, 2)
    assert bias().shape == (2, 10, 10)
    assert bias()[1, 4, 2] == bias.relative_position_bias_table[relative_index(3)[4, 2], 1]


def test_sizes_and_names():
    with torch.device("meta"):
        assert sum(p.numel() for p in BEiT("vit_base", 14, 16, 8192).parameters()) == 91_965_776
    model = BEiT(**SMALL)
    names = {name for name in model.state_dict() if not re.match(r"blocks\.([1-9]|1\d)\.", name)}
    block = """gamma_1 gamma_2 norm1.weight norm1.bias norm2.weight norm2.bias attn.q_bias attn.v_bias
        attn.qkv.weight attn.proj.weight attn.proj.bias mlp.fc1.weight mlp.fc1.bias mlp.fc2.weight
        mlp.fc2.bias"""
    rest = """cls_token mask_token patch_embed.proj.weight patch_embed.proj.bias norm.weight norm.bias
        rel_pos_bias.relative_position_bias_table rel_pos_bias.relative_position_index
        lm_head.weight lm_head.bias"""
    assert names == {f"blocks.0.{name}" for name in block.split()} | set(rest.split())
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes["rel_pos_bias.relative_position_bias_table"] == (228, 3)
    assert shapes["rel_pos_bias.relative_position_index"] == (65, 65)
    assert shapes["blocks.0.attn.qkv.weight"] == (576, 192) and shapes["lm_head.weight"] == (512, 192)
    two = sum(p.numel() for n, p in model.named_parameters() if not re.match(r"blocks\.([2-9]|1\d)\.", n))
    assert two == 999_788


def test_initialisation():
    """Oracle 4."""
    torch.manual_seed(0)
    model = BEiT("vit_small", 14, 16, 1000)
    state = model.state_dict()
    for name in ("patch_embed.proj.weight", "blocks.3.attn.qkv.weight", "lm_head.weight"):
        assert state[name].abs().max() <= 0.02 and state[name].std().item() == pytest.approx(0.0108, rel=0.02)
    assert state["cls_token"].abs().max() <= 0.02 and state["mask_token"].std() > 0
    for block in (1, 12):
        for layer in ("attn.proj", "mlp.fc2"):
            weight = state[f"blocks.{block - 1}.{layer}.weight"]
            assert weight.abs().max().item() == pytest.approx(0.02 / math.sqrt(2 * block), rel=1e-2)
        assert (state[f"blocks.{block - 1}.gamma_1"] == 0.1).all()
    assert not any(state[name].any() for name in state if name.endswith("bias"))
    rates = [block.drop_path for block in BEiT(**SMALL, drop_path=0.1).blocks]
    assert rates == pytest.approx([0.1 * i / 11 for i in range(12)])


@pytest.mark.parametrize("tokens, low, high", [(8192, 9.0, 9.08), (512, 6.19, 6.29)])
def test_untrained_loss(tokens, low, high, generator):
    """Oracle 5: about ln V."""
    torch.manual_seed(0)
    model = BEiT("vit_small", 8, 4, tokens)
    mask = torch.rand(4, 8, 8, generator=generator) < 0.4
    codes = torch.randint(tokens, (4, 8, 8), generator=generator)
    logits = model(torch.randn(4, 3, 32, 32, generator=generator), mask)
    assert logits.shape == (mask.sum(), tokens)
    assert low < beit_loss(logits, codes[mask], mask.sum()) < high


def test_hidden_pixels_change_nothing(generator):
    """Oracle 6."""
    model = shaken(BEiT(**SMALL), generator)
    mask = torch.stack([block_mask((8, 8), 26, random.Random(i), 4) for i in range(3)])
    images = torch.randn(3, 3, 32, 32, generator=generator)
    hidden = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    other = torch.where(hidden, torch.randn(images.shape, generator=generator), images)
    logits = model(images, mask)
    assert logits.shape == (mask.sum(), 512) and torch.equal(model(other, mask), logits)
    assert not torch.equal(model(other.flip(1), mask), logits)


def test_logits_and_loss_are_transformers_(generator):
    from transformers import BeitConfig, BeitForMaskedImageModeling

    model = shaken(BEiT(**SMALL), generator)
    config = BeitConfig(
        vocab_size=512, hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768,
        image_size=32, patch_size=4, layer_norm_eps=1e-6, use_mask_token=True, layer_scale_init_value=0.1,
        use_shared_relative_position_bias=True,
    )  # fmt: skip
    peer = BeitForMaskedImageModeling(config).eval()
    state, theirs = model.state_dict(), {}
    words = {
        r"^(cls_token|mask_token)": r"beit.embeddings.\1",
        r"^patch_embed.proj": "beit.embeddings.patch_embeddings.projection",
        r"^rel_pos_bias": "beit.shared_position_bias",
        r"^norm\.": "layernorm.",
        r"^blocks": "beit.layers",
        r"gamma_": "lambda_",
        r"norm1": "layernorm_before",
        r"norm2": "layernorm_after",
        r"attn\.proj": "attention.o_proj",
        r"attn\.([qv])_bias": r"attention.\1_proj.bias",
    }
    for name, tensor in state.items():
        for pattern, word in words.items():
            name = re.sub(pattern, word, name)
        if name.endswith("attn.qkv.weight"):
            for part, weight in zip("qkv", tensor.chunk(3), strict=True):
                theirs[name.replace("attn.qkv", f"attention.{part}_proj")] = weight
        elif not name.endswith("relative_position_index"):
            theirs[name] = tensor
    peer.load_state_dict(theirs)
    mask = torch.stack([block_mask((8, 8), 26, random.Random(i), 4) for i in range(3)])
    images, codes = (
        torch.randn(3, 3, 32, 32, generator=generator),
        torch.randint(512, (3, 8, 8), generator=generator),
    )
    expected = peer(images, bool_masked_pos=mask.flatten(1), labels=codes[mask])
    logits = model(images, mask)
    wanted = expected.logits[mask.flatten(1)]
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-4)
    loss = beit_loss(logits, codes[mask], mask.sum())
    torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=1e-5)
    loss.backward()
    expected.loss.backward()
    theirs = dict(peer.named_parameters())
    for ours, name in (
        ("cls_token", "beit.embeddings.cls_token"),
        ("mask_token", "beit.embeddings.mask_token"),
    ):
        torch.testing.assert_close(getattr(model, ours).grad, theirs[name].grad, atol=1e-6, rtol=1e-3)
    table = model.rel_pos_bias.relative_position_bias_table.grad
    [name] = [name for name in theirs if name.endswith("bias_table")]
    assert table.abs().max() > 1e-5
    torch.testing.assert_close(table, theirs[name].grad, atol=1e-6, rtol=1e-3)


def test_a_bias_of_the_keys_would_change_nothing(generator):
    """Oracle 10, first half."""
    attention = shaken(beit.BEiTAttention(64, 4), generator)
    x, constant = torch.randn(2, 9, 64, generator=generator), torch.randn(64, generator=generator)
    qkv = F.linear(x, attention.qkv.weight)
    qkv[..., :64] += attention.q_bias
    qkv[..., 128:] += attention.v_bias
    for shift in (0, constant):
        q, k, v = (
            t.unflatten(2, (4, 16)).transpose(1, 2)
            for t in (qkv[..., :64], qkv[..., 64:128] + shift, qkv[..., 128:])
        )
        y = (q @ k.mT / 4).softmax(dim=-1) @ v
        slow = attention.proj(y.transpose(1, 2).flatten(2))
        torch.testing.assert_close(attention(x, torch.zeros(4, 9, 9)), slow, atol=1e-5, rtol=1e-4)


def test_backbone_gives_the_same_features(folder, generator):
    """Oracle 10, of a run: read by eval_linear.py, with the table of positions that it has learnt."""
    beit.train(tiny_args("beit", data=str(folder), epochs=1, lr=0.02, run_dir="run"))
    model = BEiT("vit_nano", 8, 4, 32).eval()
    model.load_state_dict(load("run/checkpoint.pt")["model"])
    assert model.rel_pos_bias.relative_position_bias_table.abs().max() > 1e-3
    images = torch.randn(3, 3, 32, 32, generator=generator)
    with torch.no_grad():
        x = model(images, torch.zeros(3, 8, 8, dtype=torch.bool), return_tokens=True)[1]
        for feature, wanted in (("auto", x[:, 1:].mean(dim=1)), ("cls", x[:, 0])):
            backbone = eval_linear.load_backbone("run/backbone.pt", feature=feature)
            torch.testing.assert_close(features_of(backbone, images), wanted, atol=1e-5, rtol=1e-4)


# The tokenizer


def test_dvae_sizes_and_names():
    dvae = DVAE(512, 64, 64, 2)
    assert sum(p.numel() for p in dvae.parameters()) == 578_243
    shapes = {name: tuple(tensor.shape) for name, tensor in dvae.state_dict().items()}
    assert shapes["codebook.weight"] == (512, 64) and shapes["encoder.0.0.weight"] == (64, 3, 4, 4)
    assert shapes["encoder.1.net.4.weight"] == (64, 64, 1, 1) and shapes["encoder.4.weight"] == (
        512,
        64,
        1,
        1,
    )
    assert shapes["decoder.0.0.weight"] == (64, 64, 4, 4) and shapes["decoder.4.weight"] == (3, 64, 1, 1)
    assert DVAE(32, 8, 8, 3).encoder(torch.zeros(1, 3, 112, 112)).shape == (1, 32, 14, 14)  # oracle 7


def test_soft_codes_become_the_codes(generator):
    """Cold and without noise, the shares are the codes; warm ones are a mixture of the codebook."""
    dvae = shaken(DVAE(16, 8, 8, 2), generator)
    images = torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1
    logits, painted = dvae(images, torch.zeros(2, 16, 4, 4), 1e-4)
    assert logits.shape == (2, 16, 4, 4) and painted.shape == images.shape
    hard = dvae.decoder(dvae.codebook(logits.argmax(dim=1)).movedim(3, 1))
    torch.testing.assert_close(painted, hard, atol=1e-5, rtol=1e-4)
    noise = torch.randn(2, 16, 4, 4, generator=generator)
    warm = dvae(images, noise, 2.0)[1]
    mixture = (((logits + noise) / 2).softmax(dim=1).movedim(1, 3) @ dvae.codebook.weight).movedim(3, 1)
    torch.testing.assert_close(warm, dvae.decoder(mixture), atol=1e-5, rtol=1e-4)


def test_gumbel_noise_draws_by_the_softmax():
    """argmax(logits + noise) falls on code k with probability softmax(logits)_k."""
    seeds = torch.arange(2000)
    noise = gumbel_noise(seeds, (3, 4, 4), torch.device("cpu"))
    assert noise.shape == (2000, 3, 4, 4) and torch.isfinite(noise).all()
    assert torch.equal(gumbel_noise(seeds[7:9], (3, 4, 4), torch.device("cpu")), noise[7:9])
    p = torch.tensor([0.2, 0.5, 0.3])
    drawn = (p.log().view(1, 3, 1, 1) + noise).argmax(dim=1)
    shares = torch.bincount(drawn.flatten()) / drawn.numel()
    torch.testing.assert_close(shares, p, atol=0.01, rtol=0)


def test_dvae_loss(generator):
    """Oracle 9: KL 0 for equal logits, ln K for one-hot ones, a mean over positions."""
    images = torch.rand(2, 3, 8, 8, generator=generator)
    for logits, kl in ((torch.zeros(2, 32, 4, 4), 0), (1e4 * torch.eye(32)[:2, :, None, None], math.log(32))):
        loss, error, found = dvae_loss(logits.expand(2, 32, 4, 4), images + 0.5, images, 0.1)
        assert found.item() == pytest.approx(kl, abs=1e-4) and error.item() == pytest.approx(0.25)
        assert loss.item() == pytest.approx(0.25 + 0.1 * kl)
    logits = torch.randn(1, 5, 2, 2, generator=generator)
    q, places = logits.softmax(dim=1), list(itertools.product((0, 1), (0, 1)))
    slow = sum((q[0, :, i, j] * (5 * q[0, :, i, j]).log()).sum() for i, j in places) / 4
    for twice in (logits, logits.repeat(2, 1, 1, 1)):
        assert dvae_loss(twice, images, images, 1.0)[2].item() == pytest.approx(slow.item(), rel=1e-5)


def test_losses_keep_float64_and_lift_half_precision(generator):
    logits = torch.randn(6, 32, 4, 4, generator=generator, dtype=torch.float64)
    images = torch.rand(6, 3, 16, 16, generator=generator, dtype=torch.float64)
    codes = torch.randint(32, (6, 4, 4), generator=generator)

    def losses(logits, images):
        rows = logits.movedim(1, 3).flatten(0, 2)
        return torch.stack(
            [dvae_loss(logits, images / 2, images.float(), 0.1)[0], beit_loss(rows, codes.flatten(), 96)]
        )

    exact = losses(logits, images)
    assert exact.dtype == torch.float64
    wanted = F.cross_entropy(logits, codes)
    assert exact[1].item() == pytest.approx(wanted.item(), rel=1e-14)
    half = losses(logits.bfloat16(), images.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(
        half, losses(logits.bfloat16().float(), images.bfloat16().float()), rtol=1e-2, atol=0
    )
    assert half[1] == losses(logits.bfloat16().float(), images.bfloat16().float())[1]


# Monitors


def test_code_shares():
    shares, perplexity = code_shares(torch.arange(64).repeat(5), 64)
    assert perplexity == pytest.approx(64) and shares.tolist() == pytest.approx([1 / 64] * 64)
    shares, perplexity = code_shares(torch.full((2, 4, 4), 3), 64)
    assert perplexity == 1 and shares.max() == shares[3] == 1
    assert code_shares(torch.tensor([0, 0, 0, 1]), 3)[0].tolist() == [0.75, 0.25, 0]


def test_the_problem_of_a_tokenizer_is_that_few_codes_are_in_use():
    """And its tag is one of the metrics, by which the alarm sees whether it mends."""
    error = torch.tensor(0.2)
    for used, kl, words in (
        (4, 0.05, "lower --kl-weight"),
        (4, 3.0, "raise --kl-weight, or lower --tokens"),
        (6, 3.0, ""),
    ):
        codes = torch.arange(used).repeat(16).view(-1, 4, 4)
        metrics, problems = tokenizer_monitor(codes, 100, error, torch.tensor(kl))
        assert metrics == pytest.approx({"dvae/error": 0.2, "dvae/kl": kl, "dvae/perplexity": used})
        assert problems == ({f"few codes are in use; {words}": "dvae/perplexity"} if words else {})


def test_accuracy_is_of_the_hidden_patches_and_compared_with_the_most_frequent_code():
    codes = torch.tensor([0] * 40 + [1] * 30 + [2] * 30).repeat(8).view(8, 10, 10)
    features = torch.randn(8, 4)
    for name, answers, accuracy, problem in (
        ("right", codes, 1.0, False),
        ("always the most frequent", torch.zeros_like(codes), 0.4, True),
        ("three standard errors", torch.where(torch.arange(100).view(10, 10) < 44, codes, 3), 0.44, True),
        ("more than that", torch.where(torch.arange(100).view(10, 10) < 46, codes, 3), 0.46, False),
    ):
        metrics, problems = monitor(codes, answers, 5, features)
        assert metrics["beit/masked_accuracy"] == pytest.approx(accuracy), name
        assert metrics["beit/majority"] == pytest.approx(0.4)
        entropy = -sum(p * math.log(p) for p in (0.4, 0.3, 0.3))
        assert metrics["beit/codebook_perplexity"] == pytest.approx(math.exp(entropy))
        assert [*problems.values()] == ["beit/masked_accuracy"] * problem, name
        assert set(problems.values()) <= set(metrics)
    for name, value in beit.collapse_metrics(features, center=True).items():
        assert metrics[f"monitor/{name}"] == value

    hidden = torch.arange(100).view(10, 10) < 50  # 40 of code 0, 10 of code 1
    metrics, problems = monitor(codes, torch.where(hidden, codes, -1), 5, features)
    assert metrics["beit/masked_accuracy"] == 1 and metrics["beit/majority"] == pytest.approx(0.8)
    assert metrics["beit/codebook_perplexity"] < 2 and [*problems.values()] == ["beit/codebook_perplexity"]


# Runs, with both stages


def lines_of(folder):
    """Metrics of the first and the second stage."""
    return [metrics_of(Path(folder) / stage) for stage in ("tokenizer", "")]


@pytest.fixture
def both(folder):
    """both(run_dir, ...) -> arguments of a run of 10 + 10 steps, each of which is logged."""

    def both(run_dir, **flags):
        flags = {"epochs": 2, "tokenizer_epochs": 2, "dvae": "", "drop_path": 0.2} | flags
        return tiny_args("beit", data=str(folder), run_dir=run_dir, **flags)

    return both


def test_the_tokenizer_of_an_earlier_run(both):
    """It is trained once, used again, and gives the same."""
    beit.train(both("a"))
    path = "a/tokenizer/backbone.pt"
    beit.train(both("b", dvae=path))
    assert not os.path.exists("b/tokenizer") and lines_of("a")[1] == metrics_of("b")
    saved = load(path)
    assert (saved["builder"], saved["method"]) == ("beit.DVAE", "dvae")
    DVAE(32, 16, 8, 2).load_state_dict(saved["state_dict"])
    stopped(beit, both("c", dvae=path, tokens=31), "backbone.pt: its weights are not those")
    for wrong in ("none.pt", "a/backbone.pt"):
        stopped(beit, both("c", dvae=wrong), f"{wrong}: ")
    assert not os.path.exists("c")


def test_tokens_of_a_run_are_those_of_its_tokenizer(both, monkeypatch):
    """Of the images that the ViT sees, with all patches, at the size that suits the tokenizer."""
    seen, codes, forward, monitored = [], [], BEiT.forward, beit.monitor
    monkeypatch.setattr(
        BEiT, "forward", lambda self, images, *a, **k: seen.append(images) or forward(self, images, *a, **k)
    )
    monkeypatch.setattr(beit, "monitor", lambda *a: codes.append(a) or monitored(*a))
    for layers in (1, 2, 3):
        beit.train(both(f"run{layers}", tokenizer_layers=layers, epochs=1, tokenizer_epochs=1))
        tokenizer = DVAE(32, 16, 8, layers)
        tokenizer.load_state_dict(load(f"run{layers}/tokenizer/backbone.pt")["state_dict"])
        mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (beit.MEAN, beit.STD))
        pixels = seen[-1] * std + mean
        assert 0 <= pixels.min() + 1e-5 and pixels.max() <= 1 + 1e-5
        sized = {1: F.avg_pool2d(pixels, 2), 2: pixels, 3: F.interpolate(pixels, (64, 64), mode="bilinear")}[
            layers
        ]
        wanted = tokenizer.encoder(2 * sized - 1).argmax(dim=1)
        found, answers = codes[-1][:2]
        alike = (found == wanted).float().mean()
        assert found.shape == (8, 8, 8) and (alike > 0.9 if layers == 1 else alike > 0.999), (layers, alike)
        assert 0 < (answers >= 0).sum() <= 8 * 26 and ((answers >= 0).sum(dim=(1, 2)) <= 26).all()


def test_colours_are_jittered_alike_in_both_stages(both, monkeypatch):
    """By (seed, step), within the strength of the flag; and every image by its own numbers."""
    drawn, jitter = [], jitter_colors
    monkeypatch.setattr(beit, "jitter_colors", lambda *a: drawn.append(a[1:]) or jitter(*a))
    beit.train(both("run", epochs=1, tokenizer_epochs=1, color_jitter=0.2, seed=3))
    assert len(drawn) == 10 and {strength for _, _, strength in drawn} == {0.2}
    for step, (u, order, _) in enumerate(drawn):
        generator = beit.seeded(3, 3, step % 5)
        assert torch.equal(u, torch.rand(8, 3, generator=generator)) and len(u.unique()) == 24
        assert order == torch.randperm(3, generator=generator).tolist()
    assert len({tuple(order) for _, order, _ in drawn}) > 1


def test_schedules(both, monkeypatch):
    """The official warm-up of the second stage: linspace(0, lr, 5), then the cosine to lr / 150. In the first
    the rate falls to 0; it is cold from 0.3 of the steps on, and has all of the KL term from a tenth on."""
    seen, forward, loss = [], DVAE.forward, dvae_loss
    monkeypatch.setattr(DVAE, "forward", lambda self, *a: seen.append([a[2]]) or forward(self, *a))
    monkeypatch.setattr(beit, "dvae_loss", lambda *a: seen[-1].append(a[3]) or loss(*a))
    beit.train(both("run", lr=1.5e-3, tokenizer_lr=1e-3, tokenizer_epochs=4, kl_weight=0.5))
    first, second = ([line["train/lr"] for line in lines] for lines in lines_of("run"))
    assert second[:5] == pytest.approx([1.5e-3 * i / 4 for i in range(5)])
    half = [0.5 * (1 + math.cos(math.pi * i / 5)) for i in range(5)]
    assert second[5:] == pytest.approx([1e-5 + (1.5e-3 - 1e-5) * x for x in half])
    assert first == pytest.approx([1e-3 * 0.5 * (1 + math.cos(math.pi * i / 20)) for i in range(20)])
    temperatures, weights = zip(*seen, strict=True)
    cooling = [1 / 16 + 15 / 16 * 0.5 * (1 + math.cos(math.pi * i / 6)) for i in range(7)]
    assert temperatures == pytest.approx([*cooling, *[1 / 16] * 13])
    assert weights == pytest.approx([0, 0.25, *[0.5] * 18])
    assert 1.5e-3 / 150 == pytest.approx(1e-5)


def test_groups_and_clipping(both, monkeypatch):
    """No decay of vectors and of [CLS]; the norm of the gradient is cut to 3 before the step."""
    seen, adamw, norms = [], torch.optim.AdamW, []

    def made(groups, *a, **k):
        seen.append((adamw(groups, *a, **k), k))
        return seen[-1][0]

    def stepped(self, optimizer):
        norms.append(
            torch.stack([p.grad.norm() for g in optimizer.param_groups for p in g["params"]]).norm().item()
        )
        return step(self, optimizer)

    step = torch.amp.GradScaler.step
    monkeypatch.setattr(torch.optim, "AdamW", made)
    monkeypatch.setattr(torch.amp.GradScaler, "step", stepped)
    beit.train(both("run", epochs=1, tokenizer_epochs=1))
    (second, _), (first, _) = seen
    assert [group["weight_decay"] for group in first.param_groups] == [1e-4]
    decayed, plain = second.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    assert second.defaults["betas"] == first.defaults["betas"] == (0.9, 0.999)
    model = BEiT("vit_nano", 8, 4, 32)
    shapes = sorted(tuple(p.shape) for n, p in model.named_parameters() if p.ndim < 2 or n == "cls_token")
    assert sorted(tuple(p.shape) for p in plain["params"]) == shapes
    assert len(decayed["params"]) + len(plain["params"]) == len([*model.parameters()])
    logged = [[line["train/grad_norm"] for line in lines] for lines in lines_of("run")]
    assert norms[:5] == pytest.approx(logged[0]) and max(logged[1]) > 3
    assert norms[5:] == pytest.approx([min(norm, 3.0) for norm in logged[1]], rel=1e-4)


def test_a_kill_in_the_first_stage_or_between_the_stages(both, folder):
    """kill -9, and the same command again: bit for bit."""
    beit.train(both("whole", tokenizer_epochs=8))
    flags = {"data": folder, "epochs": 2, "tokenizer_epochs": 8, "dvae": "", "drop_path": 0.2}
    words = command_line("beit", **flags, save_minutes=0, run_dir="run")
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    path = Path("run/tokenizer/metrics.jsonl")
    while not path.exists() or path.read_text().count("\n") < 14:
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    held = load("run/tokenizer/checkpoint.pt")["step"]
    assert 13 <= held < 40 and not os.path.exists("run/checkpoint.pt")
    done = run(words)
    assert done.returncode == 0 and f"run/tokenizer, step {held}\n" in done.stdout, done.stderr
    assert lines_of("run") == lines_of("whole")

    os.rename("whole", "saved")
    assert_same_run("run", "saved")
    assert_same_run("run/tokenizer", "saved/tokenizer")
    os.rename("saved", "whole")
    os.remove("whole/checkpoint.pt")  # as if killed between the stages: the second begins anew
    first = os.stat("whole/tokenizer/checkpoint.pt").st_mtime_ns
    beit.train(both("whole", tokenizer_epochs=8))
    assert os.stat("whole/tokenizer/checkpoint.pt").st_mtime_ns == first
    assert_same_run("whole", "run")


def in_step(monkeypatch, number, action):
    """Do it in step `number` of the first stage."""
    loss, count = dvae_loss, itertools.count(1)
    monkeypatch.setattr(beit, "dvae_loss", lambda *a: (next(count) == number and action(), loss(*a))[1])


def test_a_signal_in_the_first_stage(both, monkeypatch, capsys):
    """It ends after its step, nothing of the second has begun, and the same command goes on bit for bit."""
    beit.train(both("whole", log_every=2))
    capsys.readouterr()
    with monkeypatch.context() as patch:
        in_step(patch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert stopped(
            beit, both("run", log_every=2), "^stopped after step 5, saved; the same command goes on$"
        )
    assert load("run/tokenizer/checkpoint.pt")["step"] == 5
    assert [[line["step"] for line in lines] for lines in lines_of("run")] == [[1, 2, 4], []]
    assert "effective" not in capsys.readouterr().out
    beit.train(both("run", log_every=2))
    assert_same_run("run", "whole")
    assert_same_run("run/tokenizer", "whole/tokenizer")


def test_a_first_stage_that_goes_wrong_stops_there(both, monkeypatch):
    """A loss that is not finite; and a folder of another run is refused before the first stage begins."""
    with monkeypatch.context() as patch:
        loss = dvae_loss
        patch.setattr(beit, "dvae_loss", lambda *a: [math.nan * part for part in loss(*a)])
        stopped(beit, both("run"), "^step 1: loss nan")
    assert not list(Path("run").rglob("*.pt"))
    stopped(beit, both("run", tokenizer_epochs=3), "^run holds a run with tokenizer_epochs 2, not 3: ")
    stopped(beit, both("run", lr=1.0), "^run holds a run with lr 0.001, not 1.0: ")


def test_no_epochs_train_no_tokenizer(both):
    assert beit.train(both("run", epochs=0)) == {}
    assert load("run/backbone.pt") and not os.path.exists("run/tokenizer")


def test_few_codes_ring_the_alarm_of_the_first_stage(both, capsys):
    """With a KL term that leaves nothing to tell; not before 0.3 of its steps."""
    beit.train(both("run", tokens=64, tokenizer_epochs=4, kl_weight=100.0, epochs=1))
    alarms = [line["monitor/alarm"] for line in lines_of("run")[0]]
    assert alarms[-1] == 1 and not any(alarms[:8])
    said = [line for line in capsys.readouterr().out.splitlines() if "COLLAPSE" in line]
    assert "few codes are in use; lower --kl-weight" in said[0]


CHUNKS = """
import beit, torch
torch.set_default_dtype(torch.float64)
jitter = beit.jitter_colors
beit.jitter_colors = lambda images, u, *rest: jitter(images, u.float(), *rest).double()
beit.train(beit.Args(
    data="photos", batch_size=24, epochs=1, tokenizer_epochs=1, warmup_epochs=0.01, workers=0, log_every=1,
    micro_batch_size=MICRO, tokens=32, tokenizer_dim=8, mask_ratio=0.6, min_block=12, run_dir="RUN",
))
"""


def test_training_is_the_same_in_chunks_and_in_processes(tmp_path, monkeypatch):
    """Both stages, in float64: 1 process = chunks = 2 processes = 2 in chunks; masks of unequal size in each
    image. What the networks do is seen in the last chunk."""
    (tmp_path / "photos").mkdir()
    for i in range(72):
        beit.demo_image(i)[0].save(tmp_path / "photos" / f"{i:03d}.png")
    for n, micro in ((1, 0), (1, 6), (2, 0), (2, 6)):
        name = f"run{n}{micro}"
        code = CHUNKS.replace("MICRO", str(micro)).replace("RUN", name)
        if n > 1:
            run_processes(tmp_path, code, n)
        else:
            with monkeypatch.context() as patch:
                patch.setattr(beit, "jitter_colors", beit.jitter_colors)  # to be put back
                try:
                    exec(code, {})
                finally:
                    torch.set_default_dtype(torch.float32)
        for stage in ("tokenizer", ""):
            lines, first = (metrics_of(tmp_path / run / stage) for run in (name, "run10"))
            assert [line["step"] for line in lines] == [1, 2, 3]
            tags = ("train/loss", "train/lr", "train/grad_norm") if micro else first[0].keys()
            for line, wanted in zip(lines, first, strict=True):
                for tag in tags:
                    assert line[tag] == pytest.approx(wanted[tag], rel=1e-6, abs=1e-6), (name, stage, tag)
                for tag in ("train/loss", "train/grad_norm"):
                    assert line[tag] == pytest.approx(wanted[tag], rel=1e-9), (name, stage, tag)
            assert lines[0]["train/loss"] != pytest.approx(lines[-1]["train/loss"], rel=1e-3)
            # mean gradients of all steps, which AdamW holds
            states = [
                load(tmp_path / run / stage / "checkpoint.pt")["optimizer"]["state"]
                for run in (name, "run10")
            ]
            largest = max(held["exp_avg"].abs().max() for held in states[1].values())
            assert largest > 1e-4 and states[0].keys() == states[1].keys() and len(states[0]) > 20
            for i in states[0]:
                off = states[0][i]["exp_avg"] - states[1][i]["exp_avg"]
                assert off.dtype == torch.float64 and off.abs().max() < 1e-9 * largest


def test_first_stage_learns_and_the_codes_are_used(both):
    """On the demo, and its picture is of images and of what is painted from their codes."""
    flags = {"batch_size": 64, "epochs": 0, "tokenizer_epochs": 2, "log_every": 8, "image_size": 16}
    args = both("run", **flags | {"epochs": 1}, min_block=2)
    args.data = "demo"
    beit.train(args)
    first, second = lines_of("run")
    assert first[-1]["dvae/error"] < 0.5 * first[0]["dvae/error"] and first[-1]["dvae/perplexity"] > 2
    assert second[-1]["beit/masked_accuracy"] > second[-1]["beit/majority"]
    assert not any(line["monitor/alarm"] for line in first + second)
    page = torch.from_numpy(np.array(Image.open("run/tokenizer/painted.png"))).permute(2, 0, 1) / 255
    assert page.shape == (3, 2 * 18 + 2, 8 * 18 + 2)
    above, below = page[:, 2:18], page[:, 20:36]
    assert 0 < (above - below).square().mean() * 4 < 2 * first[-1]["dvae/error"]


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"image_size": 30}, "--image-size 30: give a multiple of --patch-size 4"),
        ({"mask_ratio": 0.01}, "--mask-ratio 0.01: 1 of 64 patches to hide, must be twice --min-block 4"),
        ({"mask_ratio": 1.0}, "--mask-ratio 1.0: 64 of 64 patches to hide"),
        ({"drop_path": 1.5}, "--drop-path 1.5: must be at least 0 and at most 1"),
        ({"tokens": 0}, "--tokens 0: must be above 0"),
        ({"tokenizer_epochs": 0}, "--tokenizer-epochs 0: must be above 0"),
    ],
)
def test_bad_flags(tmp_path, flags, message):
    with pytest.raises(SystemExit) as stop:
        beit.train(tiny_args("beit", run_dir="run", **flags))
    assert message in str(stop.value) and not (tmp_path / "run").exists()


def test_paper_command_is_the_sheet_s():
    command = re.search(
        r"torchrun --nnodes 2 --nproc-per-node 8 beit\.py(.*?)(?<!\\)\n\n", beit.__doc__, re.S
    )[1]
    args = tyro.cli(Args, args=command.replace("\\\n", " ").split())
    assert (args.image_size, args.patch_size, args.arch, args.tokens) == (224, 16, "vit_base", 8192)
    assert (args.epochs, args.batch_size, args.lr, args.warmup_epochs) == (800, 2048, 1.5e-3, 10)
    assert (round(args.mask_ratio * 14**2), args.min_block, args.min_scale) == (75, 16, 0.08)
    assert (args.weight_decay, args.drop_path, args.layer_scale, args.color_jitter) == (0.05, 0.1, 0.1, 0.4)
    assert (args.tokenizer_layers, args.tokenizer_dim) == (3, 256)
    assert beit.MEAN == (0.485, 0.456, 0.406) and beit.STD == (0.229, 0.224, 0.225)  # as its command says
