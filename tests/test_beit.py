"""beit.py against its fact sheet's oracles, transformers, timm and torchvision; its first stage, and both
together. What both stages promise as all scripts do, is tested of all scripts, on the second stage alone."""

import itertools
import math
import os
import random
import re
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import tyro
from conftest import (
    Forked,
    features_of,
    in_processes,
    load,
    metrics_of,
    shaken,
    stopped,
    tensors_of,
    tiny_args,
)
from PIL import Image
from timm.models.beit import gen_relative_position_index
from torchvision.transforms.v2 import functional as TF

import beit
import eval_linear
from beit import DVAE, BEiT, beit_loss, block_mask, dvae_loss, monitor, tokenizer_monitor

DOUBLE = torch.float64


@pytest.fixture
def small(monkeypatch):
    """(arch, side, patch_size, tokens) of a model of a moment's work, as all of vit_nano are now."""
    monkeypatch.setitem(beit.VITS, "vit_nano", (48, 3, 3))
    return "vit_nano", 8, 4, 32


@pytest.fixture
def hidden(small, generator):
    """A model with random weights, images, and masks by torch's random numbers, each image its own."""
    masks = []
    for seed in (0, 1, 2, 2):
        torch.manual_seed(seed)  # as Images does, by (seed, epoch, index)
        masks.append(beit.mask_view(None, (8, 8), 26, 4))
    assert torch.equal(masks[2], masks[3]) and len(torch.stack(masks).unique(dim=0)) == 3
    return shaken(BEiT(*small), generator, 0.05), torch.randn(3, 3, 32, 32), torch.stack(masks[:3])


# Masks and views


@pytest.mark.parametrize(
    "side, target, least, low, mean, exact",
    [(14, 75, 16, 60, (74.3, 74.65), (0.63, 0.70)), (8, 26, 4, 22, (25.9, 26), (0.94, 0.98))],
)
def test_block_mask_statistics(side, target, least, low, mean, exact):
    """The sheet's section 5 and oracle 3; and one block alone has an area of at least 16, an aspect of 0.3 to
    3.3, and is never as high or wide as the grid."""
    masks = torch.stack([block_mask((side, side), target, random.Random(i), least) for i in range(2000)])
    counts, often = masks.sum(dim=(1, 2)), masks.double().mean(dim=0)
    assert masks.dtype == torch.bool and low <= counts.min() and counts.max() == target
    assert mean[0] < counts.double().mean() < mean[1]
    assert exact[0] < (counts == target).double().mean() < exact[1]
    if side == 14:
        assert 0.68 < often[6:8, 6:8].mean() < 0.76
        assert 0.02 < often[[0, 0, -1, -1], [0, -1, 0, -1]].mean() < 0.06
    sides, single = set(), 0
    for seed in range(200):
        mask = block_mask((8, 8), 26, random.Random(seed), 26)
        rows, columns = mask.any(dim=1).sum().item(), mask.any(dim=0).sum().item()
        assert mask.sum() <= 26
        if 0 < mask.sum() == rows * columns:  # a single block, which never spans the grid
            sides, single = sides | {rows, columns}, single + 1
    assert max(sides) == 7 and single > 20
    assert block_mask((10, 6), 20, random.Random(0), 4).shape == (10, 6)


def test_jitter_is_torchvision_s(generator):
    images = torch.randint(0, 256, (4, 3, 16, 16), generator=generator).byte()
    u = torch.rand(4, 3, generator=generator)
    functions = TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation
    for strength, order in ((0.4, [0, 1, 2]), (0.4, [2, 0, 1]), (1.0, [1, 2, 0]), (0.0, [0, 1, 2])):
        ours = beit.jitter_colors(images, u, order, strength)
        for image, row, found in zip(images, u, ours, strict=True):
            x = image / 255
            for i in order:
                x = functions[i](x, 1 - strength + 2 * strength * row[i].item())
            torch.testing.assert_close(found, x, atol=1e-4, rtol=0)


# The encoder


def test_relative_index():
    """Oracles 1 and 2; timm's."""
    index = {side: beit.RelativePositionBias(side, 1).relative_position_index for side in (2, 3, 5, 8, 14)}
    rows = [[11, 9, 9, 9, 9], [10, 4, 3, 1, 0], [10, 5, 4, 2, 1], [10, 7, 6, 4, 3], [10, 8, 7, 5, 4]]
    assert index[2].tolist() == rows and (index[14][1:, 1:] + index[14][1:, 1:].T == 728).all()
    assert (index[14].min(), index[14].max(), len(index[14].unique())) == (0, 731, 732)
    assert (index[14].sum(), index[8].sum(), index[8].max()) == (14_270_119, 487_843, 227)
    for side, ours in index.items():
        assert torch.equal(ours, gen_relative_position_index((side, side)))
    bias = beit.RelativePositionBias(3, 2)
    bias.relative_position_bias_table.data = torch.randn(28, 2)
    assert bias().shape == (2, 10, 10)
    assert bias()[1, 4, 2] == bias.relative_position_bias_table[index[3][4, 2], 1]


def test_sizes_and_names(monkeypatch):
    """Of the sheet's section 7; other names would not fit into transformers' model, nor timm's, below."""
    monkeypatch.setitem(beit.VITS, "vit_tiny", (192, 2, 3))
    with torch.device("meta"):
        models = BEiT("vit_tiny", 8, 4, 512), BEiT("vit_base", 14, 16, 8192), DVAE(512, 64, 64, 2)
    counts = [sum(p.numel() for p in model.parameters()) for model in models]
    assert counts == [999_788, 91_965_776, 578_243]
    for model, expected in (
        (models[0], {"rel_pos_bias.relative_position_index": (65, 65), "lm_head.weight": (512, 192)}),
        (models[0], {"blocks.1.attn.qkv.weight": (576, 192), "blocks.0.gamma_1": (192,)}),
        (models[0], {"rel_pos_bias.relative_position_bias_table": (228, 3), "mask_token": (1, 1, 192)}),
        (models[2], {"codebook.weight": (512, 64), "encoder.0.0.weight": (64, 3, 4, 4)}),
        (models[2], {"encoder.1.net.4.weight": (64, 64, 1, 1), "encoder.4.weight": (512, 64, 1, 1)}),
        (models[2], {"decoder.0.0.weight": (64, 64, 4, 4), "decoder.4.weight": (3, 64, 1, 1)}),
    ):
        assert expected.items() <= {k: tuple(v.shape) for k, v in model.state_dict().items()}.items()
    assert DVAE(32, 8, 8, 3).encoder(torch.zeros(1, 3, 112, 112)).shape == (1, 32, 14, 14)  # oracle 7


def test_initialisation_and_untrained_loss(monkeypatch, generator):
    """Oracles 4 and 5: about ln V."""
    monkeypatch.setitem(beit.VITS, "vit_small", (96, 12, 2))
    torch.manual_seed(0)
    state = BEiT("vit_small", 14, 16, 1000).state_dict()
    for name in ("patch_embed.proj.weight", "blocks.3.attn.qkv.weight", "lm_head.weight"):
        assert state[name].abs().max() <= 0.02 and state[name].std().item() == pytest.approx(0.0108, rel=0.02)
    assert state["cls_token"].abs().max() <= 0.02 and state["mask_token"].std() > 0
    for block, layer in itertools.product((1, 12), ("attn.proj", "mlp.fc2")):
        weight = state[f"blocks.{block - 1}.{layer}.weight"]
        assert weight.abs().max().item() == pytest.approx(0.02 / math.sqrt(2 * block), rel=1e-2)
        assert (state[f"blocks.{block - 1}.gamma_1"] == 0.1).all()
    assert not any(state[name].any() for name in state if name.endswith("bias"))
    rates = [block.drop_path for block in BEiT("vit_small", 8, 4, 32, drop_path=0.1).blocks]
    assert rates == pytest.approx([0.1 * i / 11 for i in range(12)])

    monkeypatch.setitem(beit.VITS, "vit_small", (384, 2, 6))
    mask = torch.rand(16, 8, 8, generator=generator) < 0.4
    images = torch.randn(16, 3, 32, 32, generator=generator)
    for tokens, low, high in ((8192, 9.0, 9.08), (512, 6.19, 6.29)):
        codes = torch.randint(tokens, mask.shape, generator=generator)
        logits = BEiT("vit_small", 8, 4, tokens)(images, mask)
        assert logits.shape == (mask.sum(), tokens)
        assert low < beit_loss(logits, codes[mask], mask.sum()) < high


def test_hidden_pixels_change_nothing(hidden):
    """Oracle 6."""
    model, images, mask = hidden
    where = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    other = torch.where(where, torch.randn(images.shape), images)
    logits = model(images, mask)
    assert logits.shape == (mask.sum(), 32) and torch.equal(model(other, mask), logits)
    assert not torch.equal(model(other.flip(1), mask), logits)


def test_logits_loss_and_gradients_are_transformers_(hidden):
    from transformers import BeitConfig, BeitForMaskedImageModeling

    model, images, mask = hidden
    config = BeitConfig(
        vocab_size=32, hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=192,
        image_size=32, patch_size=4, layer_norm_eps=1e-6, use_mask_token=True, layer_scale_init_value=0.1,
        use_shared_relative_position_bias=True,
    )  # fmt: skip
    peer = BeitForMaskedImageModeling(config).eval()
    words = r"""^(cls_token|mask_token) beit.embeddings.\1   ^norm\. layernorm.   ^blocks beit.layers
        ^patch_embed.proj beit.embeddings.patch_embeddings.projection   gamma_ lambda_
        ^rel_pos_bias beit.shared_position_bias   norm1 layernorm_before   norm2 layernorm_after
        attn\.proj attention.o_proj   attn\.([qv])_bias attention.\1_proj.bias""".split()

    def renamed(tensors):
        theirs = {}
        for name, tensor in tensors.items():
            for pattern, word in zip(words[::2], words[1::2], strict=True):
                name = re.sub(pattern, word, name)
            if name.endswith("attn.qkv.weight"):
                for part, weight in zip("qkv", tensor.chunk(3), strict=True):
                    theirs[name.replace("attn.qkv", f"attention.{part}_proj")] = weight
            elif not name.endswith("relative_position_index"):
                theirs[name] = tensor
        return theirs

    peer.load_state_dict(renamed(model.state_dict()))
    codes = torch.randint(32, (3, 8, 8))
    expected = peer(images, bool_masked_pos=mask.flatten(1), labels=codes[mask])
    logits = model(images, mask)
    torch.testing.assert_close(logits, expected.logits[mask.flatten(1)], atol=1e-5, rtol=1e-4)
    loss = beit_loss(logits, codes[mask], mask.sum())
    torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=1e-5)
    loss.backward()
    expected.loss.backward()
    theirs = {name: p.grad for name, p in peer.named_parameters()}
    gradients = renamed({name: p.grad for name, p in model.named_parameters()})
    assert min(gradient.abs().max() for gradient in gradients.values()) > 1e-6
    torch.testing.assert_close(gradients, theirs, atol=1e-6, rtol=1e-3)


def test_a_bias_of_the_keys_would_change_nothing(generator):
    """Oracle 10, first half."""
    attention = shaken(beit.BEiTAttention(64, 4), generator)
    x, constant = torch.randn(2, 9, 64, generator=generator), torch.randn(64, generator=generator)
    q, k, v = F.linear(x, attention.qkv.weight).chunk(3, dim=2)
    for shift in (0, constant):
        shifted = q + attention.q_bias, k + shift, v + attention.v_bias
        queries, keys, values = (t.unflatten(2, (4, 16)).transpose(1, 2) for t in shifted)
        y = (queries @ keys.mT / 4).softmax(dim=-1) @ values
        slow = attention.proj(y.transpose(1, 2).flatten(2))
        torch.testing.assert_close(attention(x, torch.zeros(4, 9, 9)), slow, atol=1e-5, rtol=1e-4)


# The tokenizer


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
    noise = beit.gumbel_noise(seeds, (3, 4, 4), torch.device("cpu"))
    assert noise.shape == (2000, 3, 4, 4) and torch.isfinite(noise).all()
    assert torch.equal(beit.gumbel_noise(seeds[7:9], (3, 4, 4), torch.device("cpu")), noise[7:9])
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
    q, places = logits.softmax(dim=1), itertools.product((0, 1), (0, 1))
    slow = sum((q[0, :, i, j] * (5 * q[0, :, i, j]).log()).sum() for i, j in places) / 4
    for twice in (logits, logits.repeat(2, 1, 1, 1)):
        assert dvae_loss(twice, images, images, 1.0)[2].item() == pytest.approx(slow.item(), rel=1e-5)


def test_losses_keep_float64_and_lift_half_precision(generator):
    logits = torch.randn(6, 32, 4, 4, generator=generator, dtype=DOUBLE)
    images = torch.rand(6, 3, 16, 16, generator=generator, dtype=DOUBLE)
    codes = torch.randint(32, (6, 4, 4), generator=generator)

    def losses(logits, images):
        rows = logits.movedim(1, 3).flatten(0, 2)
        return dvae_loss(logits, images / 2, images.float(), 0.1)[0], beit_loss(rows, codes.flatten(), 96)

    first, second = losses(logits, images)
    assert first.dtype == DOUBLE
    torch.testing.assert_close(second, F.cross_entropy(logits, codes), rtol=1e-14, atol=0)
    half, images = logits.bfloat16(), images.bfloat16()
    found, wanted = losses(half, images), losses(half.float(), images.float())
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=0)
    assert found[1] == wanted[1]


# Monitors


def test_the_problem_of_a_tokenizer_is_that_few_codes_are_in_use():
    """And its tag is one of the metrics, by which the alarm sees whether it mends."""
    for used, kl, words in (
        (4, 0.05, "lower --kl-weight"),
        (4, 3.0, "raise --kl-weight, or lower --tokens"),
        (6, 3.0, ""),
    ):
        codes = torch.arange(used).repeat(16).view(-1, 4, 4)
        metrics, problems = tokenizer_monitor(codes, 100, torch.tensor(0.2), torch.tensor(kl))
        assert metrics == pytest.approx({"dvae/error": 0.2, "dvae/kl": kl, "dvae/perplexity": used})
        assert problems == ({f"few codes are in use; {words}": "dvae/perplexity"} if words else {})


def test_accuracy_is_of_the_hidden_patches_and_compared_with_the_most_frequent_code():
    codes = torch.tensor([0] * 40 + [1] * 30 + [2] * 30).repeat(8).view(8, 10, 10)
    place, features = torch.arange(100).view(10, 10), torch.randn(8, 4)
    in_use = math.exp(-sum(p * math.log(p) for p in (0.4, 0.3, 0.3)))
    names = "beit/masked_accuracy", "beit/majority", "beit/codebook_perplexity"
    for answers, expected, problems in (
        (codes, [1.0, 0.4, in_use], []),
        (0 * codes, [0.4, 0.4, in_use], ["beit/masked_accuracy"]),
        (torch.where(place < 44, codes, 3), [0.44, 0.4, in_use], ["beit/masked_accuracy"]),  # by chance
        (torch.where(place < 46, codes, 3), [0.46, 0.4, in_use], []),  # over three standard errors
        (torch.where(place < 50, codes, -1), [1.0, 0.8, 5 / 4**0.8], ["beit/codebook_perplexity"]),
    ):
        metrics, found = monitor(codes, answers, 5, features)
        assert [metrics[name] for name in names] == pytest.approx(expected)
        assert [*found.values()] == problems
    for name, value in beit.collapse_metrics(features, center=True).items():
        assert metrics[f"monitor/{name}"] == value


# Runs, with both stages


def lines_of(folder):
    """Metrics of the first and the second stage."""
    return [metrics_of(Path(folder) / stage) for stage in ("tokenizer", "")]


@pytest.fixture
def both(folder, small):
    """both(run_dir, ...) trains, 10 + 10 steps, each of which is logged."""

    def both(run_dir, **flags):
        flags = {"epochs": 2, "tokenizer_epochs": 2, "dvae": "", "drop_path": 0.2} | flags
        return beit.train(tiny_args("beit", **{"data": str(folder), "run_dir": run_dir} | flags))

    return both


def test_the_tokenizer_of_an_earlier_run(both):
    """It is trained once, used again, and gives the same."""
    both("a")
    path = "a/tokenizer/backbone.pt"
    both("b", dvae=path)
    assert not os.path.exists("b/tokenizer") and lines_of("a")[1] == metrics_of("b")
    saved = load(path)
    assert (saved["builder"], saved["method"]) == ("beit.DVAE", "dvae")
    DVAE(**saved["arch_args"]).load_state_dict(saved["state_dict"])
    for wrong, tokens in ((path, 31), ("none.pt", 32), ("a/backbone.pt", 32)):
        words = f"^--dvae {wrong}: (its weights are not those|.*No such file)"
        stopped(partial(both, "c", dvae=wrong, tokens=tokens), words)
    assert both("c", epochs=0) == {} and load("c/backbone.pt") and not os.path.exists("c/tokenizer")


def test_tokens_of_a_run_are_those_of_its_tokenizer(both, monkeypatch):
    """Of the images that the ViT sees, with all patches, at the size that suits the tokenizer."""
    seen, codes, forward, monitored = [], [], BEiT.forward, beit.monitor
    monkeypatch.setattr(BEiT, "forward", lambda self, x, *a, **k: seen.append(x) or forward(self, x, *a, **k))
    monkeypatch.setattr(beit, "monitor", lambda *a: codes.append(a) or monitored(*a))
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (beit.MEAN, beit.STD))
    for layers in (1, 2, 3):
        both(f"run{layers}", tokenizer_layers=layers, epochs=1, tokenizer_epochs=1)
        tokenizer = DVAE(32, 16, 8, layers)
        tokenizer.load_state_dict(load(f"run{layers}/tokenizer/backbone.pt")["state_dict"])
        pixels = seen[-1] * std + mean
        assert 0 <= pixels.min() + 1e-5 and pixels.max() <= 1 + 1e-5
        larger = F.interpolate(pixels, (64, 64), mode="bilinear")
        sized = {1: F.avg_pool2d(pixels, 2), 2: pixels, 3: larger}[layers]
        wanted = tokenizer.encoder(2 * sized - 1).argmax(dim=1)
        found, answers = codes[-1][:2]
        alike = (found == wanted).float().mean()
        assert found.shape == (8, 8, 8) and alike > (0.9 if layers == 1 else 0.999), (layers, alike)
        assert 0 < (answers >= 0).sum() <= 8 * 26 and ((answers >= 0).sum(dim=(1, 2)) <= 26).all()


def test_recipe_of_a_run(both, monkeypatch):
    """Colours are jittered alike in both stages, by (seed, step). The official warm-up of the second stage:
    linspace(0, lr, 5), then the cosine to lr / 150. In the first the rate falls to 0; it is cold from 0.3 of
    the steps on, and has all of the KL term from a tenth on. No decay of vectors and of [CLS]; the norm of
    the gradient is cut to 3 before the step, in the second."""
    drawn, seen, made, norms = [], [], [], []
    jitter, forward, loss, adamw = beit.jitter_colors, DVAE.forward, dvae_loss, torch.optim.AdamW
    step = torch.amp.GradScaler.step

    def stepped(self, optimizer):
        gradients = [p.grad.norm() for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.stack(gradients).norm().item())
        return step(self, optimizer)

    monkeypatch.setattr(beit, "jitter_colors", lambda *a: drawn.append(a[1:]) or jitter(*a))
    monkeypatch.setattr(DVAE, "forward", lambda self, *a: seen.append([a[2]]) or forward(self, *a))
    monkeypatch.setattr(beit, "dvae_loss", lambda *a: seen[-1].append(a[3]) or loss(*a))
    monkeypatch.setattr(torch.optim, "AdamW", lambda *a, **k: made.append(adamw(*a, **k)) or made[-1])
    monkeypatch.setattr(torch.amp.GradScaler, "step", stepped)
    flags = {"lr": 1.5e-3, "tokenizer_lr": 1e-3, "tokenizer_epochs": 4, "kl_weight": 0.5, "color_jitter": 0.2}
    both("run", **flags, seed=3)

    lines = lines_of("run")
    first, second = ([line["train/lr"] for line in stage] for stage in lines)
    half = [0.5 * (1 + math.cos(math.pi * i / 5)) for i in range(5)]
    assert second[:5] == pytest.approx([1.5e-3 * i / 4 for i in range(5)])
    assert second[5:] == pytest.approx([1e-5 + (1.5e-3 - 1e-5) * x for x in half])
    assert first == pytest.approx([1e-3 * 0.5 * (1 + math.cos(math.pi * i / 20)) for i in range(20)])
    temperatures, weights = zip(*seen, strict=True)
    cooling = [1 / 16 + 15 / 16 * 0.5 * (1 + math.cos(math.pi * i / 6)) for i in range(7)]
    assert temperatures == pytest.approx([*cooling, *[1 / 16] * 13])
    assert weights == pytest.approx([0, 0.25, *[0.5] * 18])

    assert len(drawn) == 30 and {strength for _, _, strength in drawn} == {0.2}
    for i, (u, order, _) in enumerate(drawn):
        generator = beit.seeded(3, 3, i if i < 20 else i - 20)
        assert torch.equal(u, torch.rand(8, 3, generator=generator)) and len(u.unique()) == 24
        assert order == torch.randperm(3, generator=generator).tolist()
    assert len({tuple(order) for _, order, _ in drawn}) > 1

    of_second, of_first = made
    assert [group["weight_decay"] for group in of_first.param_groups] == [1e-4]
    decayed, plain = of_second.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    assert of_second.defaults["betas"] == of_first.defaults["betas"] == (0.9, 0.999)
    parameters = dict(BEiT("vit_nano", 8, 4, 32).named_parameters())
    shapes = sorted(tuple(p.shape) for n, p in parameters.items() if p.ndim < 2 or n == "cls_token")
    assert sorted(tuple(p.shape) for p in plain["params"]) == shapes
    assert len(decayed["params"]) + len(plain["params"]) == len(parameters)
    logged = [[line["train/grad_norm"] for line in stage] for stage in lines]
    assert norms[:20] == pytest.approx(logged[0]) and max(logged[1]) > 3
    assert norms[20:] == pytest.approx([min(norm, 3.0) for norm in logged[1]], rel=1e-4)


def test_backbone_gives_the_same_features(both, generator):
    """Oracle 10, of a run: read by eval_linear.py, with the table of positions that it has learnt."""
    both("run", epochs=1, tokenizer_epochs=1, lr=0.02)
    model = BEiT("vit_nano", 8, 4, 32).eval()
    model.load_state_dict(load("run/checkpoint.pt")["model"])
    assert model.rel_pos_bias.relative_position_bias_table.abs().max() > 1e-3
    images = torch.randn(3, 3, 32, 32, generator=generator)
    with torch.no_grad():
        x = model(images, torch.zeros(3, 8, 8, dtype=torch.bool), return_tokens=True)[1]
        for feature, wanted in (("auto", x[:, 1:].mean(dim=1)), ("cls", x[:, 0])):
            backbone = eval_linear.load_backbone("run/backbone.pt", feature=feature)
            torch.testing.assert_close(features_of(backbone, images), wanted, atol=1e-5, rtol=1e-4)


def test_a_first_stage_that_is_stopped_goes_on_bit_for_bit(both, monkeypatch, capsys):
    """By kill -9, by a signal, after which nothing of the second stage begins, and between the stages."""

    def stop_in_step_5(number, run_dir, **more):
        kill = (i == 5 and os.kill(os.getpid(), number) for i in itertools.count(1))
        with monkeypatch.context() as patch:
            patch.setattr(beit, "dvae_loss", lambda *a: (next(kill), dvae_loss(*a))[1])
            both(run_dir, log_every=2, **more)

    both("whole", log_every=2)
    (end,) = Forked(lambda rank: stop_in_step_5(signal.SIGKILL, "killed", save_minutes=0.0)).end()
    assert end.returncode == -signal.SIGKILL and load("killed/tokenizer/checkpoint.pt")["step"] == 4
    capsys.readouterr()
    said = "^stopped after step 5, saved; the same command goes on$"
    stopped(lambda: stop_in_step_5(signal.SIGTERM, "stopped"), said)
    assert load("stopped/tokenizer/checkpoint.pt")["step"] == 5
    assert [[line["step"] for line in lines] for lines in lines_of("stopped")] == [[1, 2, 4], []]
    assert "effective" not in capsys.readouterr().out

    for name in ("killed", "stopped", "killed"):
        assert not os.path.exists(f"{name}/checkpoint.pt")
        both(name, log_every=2)
        assert lines_of(name) == lines_of("whole")
        for file in ("checkpoint.pt", "backbone.pt", "tokenizer/checkpoint.pt", "tokenizer/backbone.pt"):
            tensors, wanted = (tensors_of(load(f"{run}/{file}")) for run in (name, "whole"))
            torch.testing.assert_close(tensors, wanted, rtol=0, atol=0)
        if name == "stopped":  # and now as if killed between the stages: the second begins anew
            os.remove("killed/checkpoint.pt")
            first = os.stat("killed/tokenizer/checkpoint.pt").st_mtime_ns
    assert os.stat("killed/tokenizer/checkpoint.pt").st_mtime_ns == first
    assert "killed/tokenizer, step 4\n" in capsys.readouterr().out


def test_a_first_stage_that_goes_wrong_stops_there(both, monkeypatch):
    """A loss that is not finite; and a folder of another run is refused before the first stage begins."""
    with monkeypatch.context() as patch:
        patch.setattr(beit, "dvae_loss", lambda *a: [math.nan * part for part in dvae_loss(*a)])
        stopped(lambda: both("run"), "^step 1: loss nan")
    assert not list(Path("run").rglob("*.pt"))
    stopped(lambda: both("run", tokenizer_epochs=3), "^run holds a run with tokenizer_epochs 2, not 3: ")
    stopped(lambda: both("run", lr=1.0), "^run holds a run with lr 0.001, not 1.0: ")


def test_few_codes_ring_the_alarm_of_the_first_stage(both, monkeypatch, capsys):
    """With a KL term that leaves nothing to tell; if it is so from the first, at 0.3 of the steps."""
    flags = {"tokens": 64, "tokenizer_epochs": 4, "kl_weight": 100.0, "epochs": 1}
    both("run", **flags)
    assert lines_of("run")[0][-1]["monitor/alarm"] == 1
    said = [line for line in capsys.readouterr().out.splitlines() if "COLLAPSE" in line]
    assert "few codes are in use; lower --kl-weight" in said[0]
    monkeypatch.setattr(beit, "tokenizer_monitor", lambda codes, *rest: tokenizer_monitor(0 * codes, *rest))
    both("one", **flags)
    assert [line["monitor/alarm"] for line in lines_of("one")[0]] == [0] * 8 + [1] * 12


def test_first_stage_learns_and_the_codes_are_used(small, monkeypatch):
    """On the demo, and its picture is of images and of what is painted from their codes."""
    monkeypatch.setattr(beit, "open_data", lambda data: [beit.demo_image(i) for i in range(256)])
    flags = {"dvae": "", "batch_size": 32, "tokenizer_epochs": 8, "epochs": 8, "log_every": 8}
    beit.train(tiny_args("beit", **flags, image_size=16, min_block=2, run_dir="run"))
    first, second = lines_of("run")
    assert first[-1]["dvae/error"] < 0.5 * first[0]["dvae/error"] and first[-1]["dvae/perplexity"] > 2
    assert second[-1]["beit/masked_accuracy"] > second[-1]["beit/majority"]
    assert not any(line["monitor/alarm"] for line in first + second)
    page = TF.pil_to_tensor(Image.open("run/tokenizer/painted.png")) / 255
    assert page.shape == (3, 2 * 18 + 2, 8 * 18 + 2)
    above, below = page[:, 2:18], page[:, 20:36]
    assert 0 < (above - below).square().mean() * 4 < 2 * first[-1]["dvae/error"]


# Processes


def test_training_is_the_same_in_chunks_and_in_processes(both, monkeypatch):
    """Both stages, in float64: 1 process = chunks = 2 processes = 2 in chunks; masks of unequal size in each
    image. What the networks do is seen in the last chunk."""
    jitter = beit.jitter_colors
    monkeypatch.setattr(beit, "jitter_colors", lambda x, u, *rest: jitter(x, u.float(), *rest).double())
    monkeypatch.setattr(beit, "open_data", lambda data: [beit.demo_image(i) for i in range(72)])
    flags = {"batch_size": 24, "epochs": 1, "tokenizer_epochs": 1, "warmup_epochs": 0.01, "drop_path": 0.0}

    def end(rank, run_dir, micro):
        torch.set_default_dtype(DOUBLE)
        both(run_dir, **flags, mask_ratio=0.6, min_block=12, micro_batch_size=micro)

    for n, micro in ((1, 0), (1, 6), (2, 0), (2, 6)):
        in_processes(partial(end, run_dir=f"{n}-{micro}", micro=micro), n)
        for stage in ("tokenizer", "."):
            folders = Path(f"{n}-{micro}") / stage, Path("1-0") / stage
            lines, whole = (metrics_of(folder) for folder in folders)
            for line, wanted in zip(lines, whole, strict=True):
                always = {tag: line[tag] for tag in ("step", "train/lr", "train/loss", "train/grad_norm")}
                assert always == pytest.approx({tag: wanted[tag] for tag in always}, rel=1e-9)
                assert micro or line == pytest.approx(wanted, rel=1e-6, abs=1e-6)
            assert len(lines) == 3 and abs(lines[0]["train/loss"] / lines[-1]["train/loss"] - 1) > 1e-3

            # mean gradients of all steps, which AdamW holds
            states = (load(folder / "checkpoint.pt")["optimizer"]["state"] for folder in folders)
            means, wanted = ([held["exp_avg"] for held in state.values()] for state in states)
            largest = max(mean.abs().max() for mean in wanted)
            assert largest > 1e-4 and len(wanted) > 20 and wanted[0].dtype == DOUBLE
            torch.testing.assert_close(means, wanted, rtol=0, atol=1e-9 * largest.item())


# Flags


def test_bad_flags():
    for flags, message in (
        ({"image_size": 30}, "--image-size 30: give a multiple of --patch-size 4"),
        ({"mask_ratio": 0.01}, "--mask-ratio 0.01: 1 of 64 patches to hide, must be twice --min-block 4"),
        ({"mask_ratio": 1.0}, "--mask-ratio 1.0: 64 of 64 patches to hide"),
        ({"drop_path": 1.5}, "--drop-path 1.5: must be at least 0 and at most 1"),
        ({"tokens": 0}, "--tokens 0: must be above 0"),
        ({"tokenizer_epochs": 0}, "--tokenizer-epochs 0: must be above 0"),
    ):
        stopped(partial(beit.train, tiny_args("beit", run_dir="run", **flags)), message)
        assert not os.path.exists("run")


def test_paper_command_is_the_sheet_s():
    pattern = r"torchrun --nnodes 2 .*HOST:29500 .\n +beit\.py(.*?)(?<!\\)\n\n"
    command = re.search(pattern, beit.__doc__, re.S)[1].replace("\\\n", " ")
    args = vars(tyro.cli(beit.Args, args=command.split()))
    expected = {"image_size": 224, "patch_size": 16, "arch": "vit_base", "tokens": 8192, "epochs": 800}
    expected |= {"batch_size": 2048, "lr": 1.5e-3, "warmup_epochs": 10, "min_block": 16, "min_scale": 0.08}
    expected |= {"weight_decay": 0.05, "drop_path": 0.1, "layer_scale": 0.1, "color_jitter": 0.4}
    expected |= {"tokenizer_layers": 3, "tokenizer_dim": 256}
    assert expected.items() <= args.items() and round(args["mask_ratio"] * 14**2) == 75
    assert beit.MEAN == (0.485, 0.456, 0.406) and beit.STD == (0.229, 0.224, 0.225)  # as its command says
