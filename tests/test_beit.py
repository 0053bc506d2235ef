"""beit.py against methods/beit.md, transformers and timm."""

import itertools
import json
import math
import os
import random
import re
import signal
import subprocess

import pytest
import torch
import torch.nn.functional as F
import torchvision
import tyro
from conftest import command_line, features_of, run, run_processes, tiny_args

import beit
import eval_linear
from beit import (
    DVAE,
    Args,
    BEiT,
    MaskedViews,
    beit_loss,
    block_mask,
    code_metrics,
    dvae_loss,
    gumbel_noise,
    jitter_colors,
    relative_index,
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


def test_both_views_are_the_same_crop(generator):
    pixels = torch.randint(0, 256, (3, 6, 6), generator=generator).byte()
    pixels = torchvision.transforms.v2.functional.resize(pixels, (60, 60))
    flips = set()
    for seed in range(12):
        torch.manual_seed(seed)
        large, small, mask = MaskedViews(32, 16, 0.3, 8, 26, 4)(pixels)
        assert large.shape == (3, 32, 32) and small.shape == (3, 16, 16) and mask.shape == (8, 8)
        assert (F.avg_pool2d(large.float(), 2) - small).abs().mean() < 6
        same, alike, _ = MaskedViews(32, 32, 0.3, 8, 26, 4)(pixels)
        assert torch.equal(same, alike)
        ramp = torch.arange(60).expand(3, 60, 60).byte()
        torch.manual_seed(seed)
        row = MaskedViews(32, 16, 0.3, 8, 26, 4)(ramp)[0][0, 5].float()
        flips.add(bool(row[-1] > row[0]))
    assert flips == {True, False}


def test_jitter_is_torchvision_s(generator):
    images = torch.randint(0, 256, (4, 3, 16, 16), generator=generator).byte()
    factors = 0.6 + 0.8 * torch.rand(4, 3, generator=generator)
    functions = [
        getattr(torchvision.transforms.v2.functional, f"adjust_{n}") for n in ("brightness", "contrast")
    ]
    functions.append(torchvision.transforms.v2.functional.adjust_saturation)
    for order in ([0, 1, 2], [2, 0, 1]):
        for image, f, ours in zip(images, factors, jitter_colors(images, factors, order), strict=True):
            x = image / 255
            for i in order:
                x = functions[i](x, f[i].item())
            torch.testing.assert_close(ours, x, atol=1e-4, rtol=0)
    torch.testing.assert_close(jitter_colors(images, torch.ones(4, 3), [0, 1, 2]), images / 255)


# The encoder


def test_relative_index():
    """Oracles 1 and 2; timm's."""
    rows = [[11, 9, 9, 9, 9], [10, 4, 3, 1, 0], [10, 5, 4, 2, 1], [10, 7, 6, 4, 3], [10, 8, 7, 5, 4]]
    assert relative_index(2, 2).tolist() == rows
    large = relative_index(14, 14)
    assert (large.min(), large.max(), len(large.unique())) == (0, 731, 732) and large.sum() == 14_270_119
    assert (large[1:, 1:] + large[1:, 1:].T == 728).all()
    assert relative_index(8, 8).sum() == 487_843 and relative_index(8, 8).max() == 227
    from timm.models.beit import gen_relative_position_index

    for grid in ((14, 14), (8, 8), (5, 7)):
        assert torch.equal(relative_index(*grid), gen_relative_position_index(grid))


def test_sizes_and_names():
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
    absolute = BEiT(**SMALL, positions="absolute", layer_scale=0).state_dict()
    assert absolute["pos_embed"].shape == (1, 65, 192)
    assert not any("gamma" in name or "relative" in name for name in absolute)
    own = BEiT(**SMALL, positions="blocks").state_dict()
    assert own["blocks.11.attn.relative_position_bias_table"].shape == (228, 3)
    assert "rel_pos_bias.relative_position_index" not in own


def test_initialisation():
    """Oracle 4."""
    torch.manual_seed(0)
    model = BEiT("vit_small", 14, 16, 1000, positions="absolute")
    state = model.state_dict()
    for name in ("patch_embed.proj.weight", "blocks.3.attn.qkv.weight", "lm_head.weight", "pos_embed"):
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
    loss = beit_loss(model(torch.randn(4, 3, 32, 32, generator=generator), mask), codes, mask)
    assert loss.shape == (mask.sum(),) and low < loss.mean() < high


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


@pytest.mark.parametrize("positions", ["shared", "blocks", "absolute"])
def test_logits_and_loss_are_transformers_(positions, generator):
    from transformers import BeitConfig, BeitForMaskedImageModeling

    model = shaken(BEiT(**SMALL, positions=positions), generator)
    config = BeitConfig(
        vocab_size=512, hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768,
        image_size=32, patch_size=4, layer_norm_eps=1e-6, use_mask_token=True, layer_scale_init_value=0.1,
        use_shared_relative_position_bias=positions == "shared",
        use_relative_position_bias=positions == "blocks",
        use_absolute_position_embeddings=positions == "absolute",
    )  # fmt: skip
    peer = BeitForMaskedImageModeling(config).eval()
    state, theirs = model.state_dict(), {}
    words = {
        r"^(cls_token|mask_token)": r"beit.embeddings.\1",
        r"^pos_embed": "beit.embeddings.position_embeddings",
        r"^patch_embed.proj": "beit.embeddings.patch_embeddings.projection",
        r"^rel_pos_bias": "beit.shared_position_bias",
        r"^norm\.": "layernorm.",
        r"^blocks": "beit.layers",
        r"gamma_": "lambda_",
        r"norm1": "layernorm_before",
        r"norm2": "layernorm_after",
        r"attn\.proj": "attention.o_proj",
        r"attn\.relative": "relative_position_bias.relative",
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
    with torch.no_grad():
        expected = peer(images, bool_masked_pos=mask.flatten(1), labels=codes[mask])
        logits = model(images, mask)
    wanted = expected.logits[mask.flatten(1)]
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(beit_loss(logits, codes, mask).mean(), expected.loss, atol=1e-5, rtol=1e-5)


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
        torch.testing.assert_close(attention(x), slow, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("positions", ["shared", "blocks", "absolute"])
def test_backbone_gives_the_same_features(positions, tmp_path, generator):
    """Oracle 10: with the shared table in every block; read by eval_linear.py, and started from by --init."""
    args = Args(positions=positions)
    stage = beit.BEiTStage(args, 8, None)
    shaken(stage.model, generator)
    stage.save(tmp_path)
    images = torch.randn(3, 3, 32, 32, generator=generator)
    with torch.no_grad():
        x = stage.model(images, torch.zeros(3, 8, 8, dtype=torch.bool), return_tokens=True)[1]
        for feature, wanted in (("auto", x[:, 1:].mean(dim=1)), ("cls", x[:, 0])):
            backbone = eval_linear.load_backbone(str(tmp_path / "backbone.pt"), feature=feature)
            torch.testing.assert_close(features_of(backbone, images), wanted, atol=1e-5, rtol=1e-4)
    other = beit.BEiTStage(args, 8, None).model
    beit.load_encoder(other, "", str(tmp_path / "backbone.pt"), 0)
    for name, tensor in other.state_dict().items():
        same = torch.equal(tensor, stage.model.state_dict()[name])
        assert same != name.startswith(("lm_head", "mask_token")), name


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
    logits, painted = dvae(images, 0.0, 1e-4)
    codes = logits.argmax(dim=1)
    assert logits.shape == (2, 16, 4, 4) and painted.shape == images.shape
    torch.testing.assert_close(painted, dvae.decode(codes), atol=1e-5, rtol=1e-4)
    warm = dvae(images, 0.0, 2.0)[1]
    mixture = ((logits / 2).softmax(dim=1).movedim(1, 3) @ dvae.codebook.weight).movedim(3, 1)
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
        assert found.tolist() == pytest.approx([kl] * 2, abs=1e-4)
        assert error.tolist() == pytest.approx([0.25] * 2) and loss.tolist() == pytest.approx(
            [0.25 + 0.1 * kl] * 2
        )
    logits = torch.randn(1, 5, 2, 2, generator=generator)
    q = logits.softmax(dim=1)
    slow = (
        sum((q[0, :, i, j] * (5 * q[0, :, i, j]).log()).sum() for i, j in itertools.product((0, 1), (0, 1)))
        / 4
    )
    assert dvae_loss(logits, images[:1], images[:1], 1.0)[2].item() == pytest.approx(slow.item(), rel=1e-5)


def test_code_metrics():
    even = code_metrics(torch.full((64,), 5.0))
    assert even == pytest.approx(
        {"perplexity": 64, "entropy": math.log(64), "active": 64, "majority": 1 / 64}
    )
    one = code_metrics(F.one_hot(torch.tensor(3), 64) * 100)
    assert one == pytest.approx({"perplexity": 1, "entropy": 0, "active": 1, "majority": 1}, abs=1e-6)
    assert code_metrics(torch.tensor([3.0, 1, 0]))["majority"] == 0.75


class Stripes(torch.nn.Module):
    """A tokenizer of the user's: brightness of 4 x 4 pixels in `levels` steps."""

    def __init__(self, levels: int):
        super().__init__()
        self.levels = levels

    def forward(self, images):
        gray = torch.nn.functional.avg_pool2d(images.mean(dim=1), 4)
        return (gray * self.levels).long().clamp(0, self.levels - 1)


def lines_of(folder):
    lines = [json.loads(line) for line in open(f"{folder}/metrics.jsonl")]
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]


def test_tokenizers_of_others(folder, tmp_path):
    """A TorchScript module, and the folder of another run, which is trained once and used again."""
    torch.jit.script(Stripes(8)).save("stripes.pt")
    flags = {"data": str(folder), "epochs": 1}
    metrics = beit.train(tiny_args("beit", **flags, tokenizer="stripes.pt", tokens=8, run_dir="a"))
    assert 1 < metrics["beit/codebook_perplexity"] <= 8 and not os.path.exists("a/tokenizer")
    for more, words in (
        ({"tokens": 4}, r"--tokenizer: gives codes \d to \d, must be 0 to below --tokens 4"),
        ({"tokens": 8, "tokenizer_layers": 3}, r"64 pixels .*gives \(1, 16, 16\).* \(1, 8, 8\) integers"),
    ):
        with pytest.raises(SystemExit, match=words):
            beit.train(tiny_args("beit", **flags, tokenizer="stripes.pt", run_dir="b", **more))
    for path in ("none.pt", str(folder)):
        with pytest.raises(SystemExit, match="none.pt|holds no tokenizer/checkpoint.pt"):
            beit.train(tiny_args("beit", **flags, tokenizer=path, run_dir="c"))
    assert not os.path.exists("c")
    beit.train(tiny_args("beit", **flags, run_dir="d"))
    beit.train(tiny_args("beit", **flags, tokenizer="d", tokens=99, run_dir="e"))
    assert lines_of("d") == lines_of("e") and not os.path.exists("e/tokenizer")


def test_one_code_rings_the_alarm(tmp_path, capsys):
    torch.jit.script(Stripes(1)).save("one.pt")
    flags = {"data": "demo", "epochs": 1, "batch_size": 64, "log_every": 3, "warmup_epochs": 0.1}
    flags |= {"image_size": 16, "min_block": 2}
    beit.train(tiny_args("beit", **flags, tokenizer="one.pt", run_dir="run"))
    assert lines_of("run")[-1]["monitor/alarm"] == 1
    assert re.search("COLLAPSE.*most frequent code.*perplexity 1.0: the tokenizer", capsys.readouterr().out)


# Runs


def test_a_kill_in_the_first_stage_or_between_the_stages(folder, tmp_path):
    flags = {"data": folder, "epochs": 2, "tokenizer_epochs": 8, "checkpoint_every": 10, "drop_path": 0.2}
    beit.train(tiny_args("beit", **(flags | {"data": str(folder)}), run_dir="whole"))
    words = command_line("beit", **flags, run_dir="run")
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    path = tmp_path / "run/tokenizer/metrics.jsonl"
    while not path.exists() or path.read_text().count("\n") < 14:
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    held = torch.load("run/tokenizer/checkpoint.pt", weights_only=True)["step"]
    assert held in (10, 20, 30)
    done = run(words)
    assert done.returncode == 0 and f"run/tokenizer, step {held} of 40" in done.stdout, done.stderr
    os.remove("whole/checkpoint.pt")  # as if killed between the stages: the second begins anew
    first = os.stat("whole/tokenizer/checkpoint.pt").st_mtime_ns
    wanted = lines_of("whole")
    beit.train(tiny_args("beit", **(flags | {"data": str(folder)}), run_dir="whole"))
    assert os.stat("whole/tokenizer/checkpoint.pt").st_mtime_ns == first
    for name in ("run", "whole"):
        assert lines_of(name) == wanted
    assert lines_of("run/tokenizer") == lines_of("whole/tokenizer")


def test_training_is_the_same_in_chunks_and_in_processes(tmp_path):
    """Both stages: 1 process = chunks = 2 processes = 2 in chunks; masks of unequal size in each image."""
    code = """
import beit
beit.train(beit.Args(
    data="photos", batch_size=24, epochs=1, tokenizer_epochs=1, warmup_epochs=0.01, workers=0, log_every=1,
    micro_batch_size=MICRO, tokens=32, tokenizer_dim=8, mask_ratio=0.6, min_block=12, run_dir="RUN",
))
"""
    (tmp_path / "photos").mkdir()
    for i in range(72):
        beit.demo_image(i)[0].save(tmp_path / "photos" / f"{i:03d}.png")
    first = {}
    for n, micro in ((1, 0), (1, 5), (2, 0), (2, 5)):
        name = f"run{n}{micro}"
        run_processes(tmp_path, code.replace("MICRO", str(micro)).replace("RUN", name), n)
        for stage in ("tokenizer", ""):
            lines = lines_of(tmp_path / name / stage)
            assert len(lines) == 3
            for line, wanted in zip(lines, first.setdefault(stage, lines), strict=True):
                for tag in line:
                    assert line[tag] == pytest.approx(wanted[tag], rel=2e-3, abs=1e-4), (name, stage, tag)
                for tag in ("train/loss", "train/grad_norm"):
                    assert line[tag] == pytest.approx(wanted[tag], rel=2e-4), (name, stage, tag)
            assert lines[0]["train/loss"] != pytest.approx(lines[-1]["train/loss"], rel=1e-3)


def test_first_stage_learns_and_the_codes_are_used(tmp_path):
    flags = {"data": "demo", "batch_size": 64, "epochs": 1, "tokenizer_epochs": 2, "log_every": 8}
    flags |= {"image_size": 16, "min_block": 2}
    beit.train(tiny_args("beit", **flags, run_dir="run"))
    lines = lines_of("run/tokenizer")
    assert lines[-1]["dvae/hard_error"] < 0.5 * lines[0]["dvae/error"]
    assert {path.suffix for path in (tmp_path / "run/tokenizer").iterdir()} >= {".png", ".pt", ".jsonl"}


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"image_size": 30}, "--image-size 30: give a multiple of --patch-size 4"),
        ({"mask_ratio": 0.01}, "--mask-ratio 0.01: 1 of 64 patches to hide, must be twice --min-block 4"),
        ({"mask_ratio": 1.0}, "--mask-ratio 1.0: 64 of 64 patches to hide"),
        ({"drop_path": 1.5}, "--drop-path 1.5: must be 0 or more, at most 1"),
        ({"tokens": 0}, "--tokens 0: must be above 0"),
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
    assert args.positions == "shared" and args.tokenizer_layers == 3
    stage = beit.BEiTStage(Args(), 8, None)
    assert stage.clip == 3.0 and beit.BEiTStage(Args(lr=1.5e-3), 8, None).final == pytest.approx(1e-5)
    plain = {id(p) for group in stage.groups if not group["weight_decay"] for p in group["params"]}
    named = dict(stage.model.named_parameters())
    assert {n for n, p in named.items() if id(p) in plain} == {
        n for n, p in named.items() if p.ndim < 2 or n in ("cls_token", "pos_embed")
    }
    assert id(named["mask_token"]) not in plain and len(plain) < len(named)
