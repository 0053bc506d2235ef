"""How images are found and read: folders, links, data sets in Arrow files, deep and transparent pictures."""

import importlib
import io
import os
import pickle
import re
import resource
import struct
import sys
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision
from conftest import REPRESENTATIVES, ROOT, TRAINING, run
from PIL import Image, TiffImagePlugin
from torchvision.transforms import v2

# What scripts have word for word runs on one of them, and on eval_linear.py; on all in `make test-all`.
LEARN = [s if s in REPRESENTATIVES else pytest.param(s, marks=pytest.mark.slow) for s in TRAINING]
SHAPE, CORNER = (48, 64), np.s_[:16, :20]  # a tenth of the pixels


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(params=[*LEARN, "eval_linear"])
def reader(request):
    return importlib.import_module(request.param)


@pytest.fixture(params=LEARN)
def module(request):
    return importlib.import_module(request.param)


def images_of(module, data, views=(), shortest=8):
    return module.Images(module.Args(data=str(data)), views, shortest)


def fill(*paths):
    for path in map(Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def names(paths):
    assert isinstance(paths, np.ndarray) and paths.dtype.kind == "S" and [*paths] == sorted(paths)
    return [os.fsdecode(path) for path in paths]


def refused(words, call, *given):
    """SystemExit of one line in which each of these words is."""
    with pytest.raises(SystemExit) as caught:
        call(*given)
    line = caught.value.code
    assert len(line.splitlines()) == 1 and all(re.search(word, line) for word in words), line


def read(reader, source, shortest=8):
    """Pixels (H, W, 3) as signed integers; a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = reader.read_image(source, shortest)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def tiff(values, order="<", orientation=1, nodata=None):
    """An open uncompressed TIFF of any numbers (H, W) or (H, W, samples); Pillow writes few kinds."""
    height, width, samples = *values.shape[:2], values[0, 0].size
    pixels = values.astype(values.dtype.newbyteorder(order)).tobytes()
    head = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8)
    fields = TiffImagePlugin.ImageFileDirectory_v2(head)
    facts = {256: width, 257: height, 258: (8 * values.itemsize,) * samples, 259: 1, 262: 1 + (samples == 3)}
    facts |= {273: 0, 274: orientation, 277: samples, 278: height, 279: len(pixels)}
    facts |= {339: ("_uif".index(values.dtype.kind),) * samples} | ({42113: nodata} if nodata else {})
    fields.update(facts)
    return io.BytesIO(head + fields.tobytes(8) + pixels)


def ramp(low, high, dtype):
    line = np.linspace(low, high, SHAPE[1])
    return np.tile((line if dtype == "f4" else line.round()).astype(dtype), (SHAPE[0], 1))


def test_hidden_files_and_folders_are_no_photos(reader):
    good = [f"photos/{name}" for name in "__z.bmp b.c/x.Jpeg train/IMG.JPG train/i.webp y@2.tif".split()]
    fill(*good)
    assert names(reader.image_paths("photos")) == good
    bad = "train/.ipynb_checkpoints/i0-checkpoint.png train/._IMG.jpg .thumbnails/x.jpg @eaDir/IMG/x.jpg"
    fill(*(f"photos/{name}" for name in f"{bad} __MACOSX/train/x.jpg @x.jpg notes.txt".split()))
    os.mkdir("photos/folder.jpg")
    assert names(reader.image_paths("photos")) == good
    fill(".cache/@old/photos/1.png", ".cache/@old/photos/.x/2.png")  # a root may be called anything
    for root in (".cache/@old/photos", os.path.abspath(".cache/@old/photos"), ".cache/@old/photos/.x"):
        assert len(reader.image_paths(root)) == 1


def test_links_are_followed_and_no_folder_counts_twice(reader):
    plain = [f"photos/{name}.png" for name in ("a/0", "a/1", "a/2", "b/c/0", "b/c/1")]
    fill(*plain, "outside/0.png", "outside/d/1.png", "single.png", "photos/.store/0.png")
    os.symlink("../photos", "outside/back")
    for link, target in (("a/back", ".."), ("a/to", "../b"), ("b/to", "../a"), ("0", "b/c"), ("z", "b/c")):
        os.symlink(target, f"photos/{link}")
        assert names(reader.image_paths("photos")) == plain
    for link in ("one", "two"):
        os.symlink("../outside", f"photos/{link}")
        found = [name.replace("/two/", "/one/") for name in names(reader.image_paths("photos"))]
        assert found == [*plain, "photos/one/0.png", "photos/one/d/1.png"]
    os.symlink("../single.png", "photos/file.png")
    os.symlink(".store", "photos/shown")  # not reached otherwise
    os.symlink("photos", "root")
    found = names(reader.image_paths("root"))
    assert len(found) == 9 and {"root/file.png", "root/shown/0.png"} < {*found}


def test_images_to_test_on_are_left_out_and_that_is_said(module, capsys, monkeypatch):
    fill(*(f"vehicles/{name}/{i}.png" for name in ("bus", "car", "train") for i in range(3)))
    fill("albums/a/train/0.png", "albums/a/val/0.png", "albums/b/test/0.png", "albums/val/0.png")
    for data, count in (("vehicles", 9), ("albums", 4)):  # a class of trains; splits of something else
        assert len(names(images_of(module, data).items)) == count and not capsys.readouterr().out
    fill(*(f"signs/Training/{i}/0.png" for i in range(3)), "signs/Testing/0/0.png")
    assert names(images_of(module, "signs").items) == [f"signs/Training/{i}/0.png" for i in range(3)]
    capsys.readouterr()
    learnt = [f"photos/{name}/{i}.png" for name in ("train", "unlabeled") for i in range(2)]
    fill(*learnt, *(f"photos/val/x/{i}.png" for i in range(5)))
    assert names(images_of(module, "photos").items) == learnt
    (line,) = capsys.readouterr().out.splitlines()
    assert re.search(r"\b5\b", line) and re.search(r"\bval\b", line)
    for name, value in (("is_initialized", True), ("get_rank", 1), ("barrier", None)):
        monkeypatch.setattr(module.dist, name, lambda value=value: value)
    assert names(images_of(module, "photos").items) == learnt and not capsys.readouterr().out


def test_data_without_images_is_refused_in_a_line(reader, monkeypatch):
    fill("phone/1.heic", "phone/a/2.heic", "empty/.hidden/0.png")
    calls = [reader.image_paths]
    if hasattr(reader, "Images"):
        calls.append(lambda data: images_of(reader, data))
    for call in calls:
        refused([r"\.jpg", r"\.webp", r"\.tiff", r"\.heic"], call, "phone")
        refused(["empty", "no images"], call, "empty")
        for folder in ("photo/", "data/photo"):
            refused([folder, "no such folder"], call, folder)
    error = OSError("<urlopen error [Errno -2]\nName or service not known>")
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", mock.Mock(side_effect=error))
    for call in calls[1:]:
        refused(["CIFAR10", "not known", "folder", "demo"], call, "CIFAR10")


def test_deep_pictures_are_stretched_to_their_range(reader):
    """TIFF in both byte orders, and PNG; from end to end, and evenly between."""
    whole = ((0, 65535, "u2"), (0, 4095, "u2"), (1000, 1100, "u2"), (-1000, 2000, "i2"), (-1000, 2000, "i4"))
    for low, high, dtype in (*whole, (0, 255, "i4"), (0, 10**6, "i4"), (0, 1, "f4"), (-1e-4, 3e-4, "f4")):
        values = ramp(low, high, dtype)
        if dtype == "u2":
            Image.fromarray(values).save("sixteen.png")
        for file in (tiff(values), tiff(values, ">"), *["sixteen.png"] * (dtype == "u2")):
            pixels, expected = read(reader, file)[..., 0], (values.astype(float) - low) / (high - low) * 255
            assert pixels.shape == SHAPE and abs(pixels - expected).max() <= 1, (low, high, dtype, file)
    full = np.arange(65536, dtype="u2").reshape(256, 256)
    Image.fromarray(full).save("full.png")
    assert abs(read(reader, "full.png")[..., 0] - full / 257).max() <= 1


@pytest.mark.parametrize("dtype", ["u2", "i4", "f4"])
def test_a_few_hot_pixels_do_not_darken_the_rest(reader, dtype):
    values = ramp(200, 300, dtype)
    expected = (values.astype(float) - 200) * 2.55
    values[7, 9], values[9, 7] = 65535, 0
    expected[7, 9], expected[9, 7] = 255, 0
    assert abs(read(reader, tiff(values))[..., 0] - expected).max() <= 2
    values = ramp(200, 300, dtype)
    values[8:12, 8:12] = 1000  # .5 % are no error, they are in the range
    pixels = read(reader, tiff(values))[..., 0]
    assert (pixels[8:12, 8:12] >= 254).all() and 30 <= pixels[:, -1].max() <= 34 and pixels[:, 0].max() <= 1


def test_deep_pictures_without_contrast(reader):
    for dtype, value in (("u2", 0), ("u2", 1000), ("i4", -5), ("i4", 70000), ("f4", 0.5)):
        values = np.full(SHAPE, value, dtype)
        assert {*read(reader, tiff(values))[..., 0].flat} <= {127, 128}, (dtype, value)
        values[20, 30] += 100  # both percentiles are the same: from min to max
        pixels = read(reader, tiff(values))[..., 0]
        assert pixels[20, 30] == pixels.sum() == 255, (dtype, value)
    pixels = read(reader, tiff(np.full(SHAPE, np.nan, "f4")))[..., 0]
    assert len({*pixels.flat}) == 1 and pixels[0, 0] in (0, 127, 128)


def test_holes_are_black_and_leave_the_contrast_of_the_rest(reader):
    holes = [(dtype, -9999, tag) for dtype in ("i2", "i4", "f4") for tag in (None, "-9999")]
    holes += [("u2", 65535, "65535"), ("u2", 250, "250")]  # not white; within the range of the rest
    holes += [("f4", -3.4028234663852886e38, "-3.40282346638529e+38"), ("f4", 1e20, "1e+20")]  # as float32
    holes += [("f4", hole, tag) for hole in (np.nan, np.inf, -np.inf) for tag in (None, "nan")]
    for dtype, hole, tag in holes:
        values = ramp(200, 300, dtype)
        values[values == 250] += 1
        expected = (values.astype(float) - 200) * 2.55
        values[CORNER], expected[CORNER] = hole, 0
        for order in "<>":
            pixels = read(reader, tiff(values, order, nodata=tag))[..., 0]
            assert abs(pixels - expected).max() <= 2 and not pixels[CORNER].any(), (dtype, hole, tag)


def test_eight_bits_are_left_as_they_are(reader):
    values = np.random.default_rng(0).integers(30, 90, (*SHAPE, 3), "u1")
    gray = values[..., :1]
    Image.fromarray(values).save("color.png")
    Image.fromarray(values).quantize(40).save("palette.png")
    Image.fromarray(values[..., 0]).save("gray.png")
    Image.fromarray(values[..., 0] > 60).save("bits.png")
    assert (read(reader, "palette.png") == np.asarray(Image.open("palette.png").convert("RGB"))).all()
    assert (read(reader, "gray.png") == gray).all() and (read(reader, tiff(gray)) == gray).all()
    assert (read(reader, "bits.png") == 255 * (gray > 60)).all()
    with open("color.png", "rb") as file:
        for source in ("color.png", b"color.png", Path("color.png"), file, tiff(values)):
            assert (read(reader, source) == values).all()


def test_what_is_transparent_is_white(reader):
    """Columns: nothing is seen of the first, half of the second, all of the third; files that know one
    transparent colour have only the first."""
    colors = np.uint8([[[250, 10, 20], [40, 80, 160], [5, 6, 7]]] * 4)
    gray, alpha = colors[..., 1], np.uint8([[0, 128, 255]] * 4)
    color = Image.fromarray(np.dstack([colors, alpha]))
    palette = Image.fromarray(np.uint8([[0, 1, 2]] * 4)).copy()
    palette.putpalette(colors[0].tobytes())
    color.save("half-color.png")
    color.save("half-color.tif")
    color.save("half-color.webp", lossless=True, exact=True)
    Image.merge("LA", [Image.fromarray(gray), Image.fromarray(alpha)]).save("half-gray.png")
    palette.save("half-palette.png", transparency=bytes([0, 128, 255]))
    palette.save("one-palette.png", transparency=0)
    palette.save("one-palette.gif", transparency=0)
    Image.fromarray(colors).save("one-color.png", transparency=(250, 10, 20))
    Image.fromarray(gray).save("one-gray.png", transparency=10)
    for path in sorted(Path().iterdir()):
        kept = np.dstack([gray] * 3) if "gray" in path.stem else colors
        share = alpha if "half" in path.stem else np.where(alpha, 255, 0)
        pixels, blend = read(reader, path), 255 + (kept - 255.0) * share[..., None] / 255
        assert (abs(pixels - blend).max(axis=(0, 2)) <= [0, 1, 0]).all(), path


def gif_of_a_claim(width, height):
    """35 bytes: a screen of this size in two colours, with a picture of one pixel."""
    head = struct.pack("<6sHHB", b"GIF89a", width, height, 0x80)
    return head + bytes(8) + b",\0\0\0\0\1\0\1\0\0\2\2\x44\1\0;"


@pytest.fixture
def bad():
    """photos: 0, black, and 6, white, with a file of each kind of bad ones; these."""
    Path("photos/z.jpg").mkdir(parents=True)  # no photo at all
    Image.new("RGB", (40, 30), "black").save("photos/0.png")
    Image.new("RGB", (40, 30), "white").save("photos/6.png")
    Image.effect_noise((400, 300), 50).save("photos/1.jpg")
    os.truncate("photos/1.jpg", os.path.getsize("photos/1.jpg") // 2)
    Path("photos/2.jpg").write_text("I am no image")
    Path("photos/4.tif").write_bytes(tiff(np.ones((*SHAPE, 13), "u1")).getvalue())
    Path("photos/5.png").write_bytes(gif_of_a_claim(20000, 20000))
    fill("photos/3.png", "photos/7.jpg")
    return [f"photos/{name}" for name in ("1.jpg", "2.jpg", "3.png", "4.tif", "5.png", "7.jpg")]


def assert_named_once(text, bad):
    lines = sorted(text.splitlines())
    assert len(lines) == len(bad), text
    for line, path in zip(lines, bad, strict=True):
        assert re.search(rf"(?<![\w'\"]){path}\b.*cannot be read", line), line


def test_bad_files_are_named_once_and_the_next_takes_their_place(module, bad, capfd):
    images = images_of(module, "photos", (torch.clone,))
    assert len(images.items) == 8
    for _ in range(2):
        drawn = [images[key] for key in range(16)]
        assert [index for _, index in drawn] == [0, 6, 6, 6, 6, 6, 6, 0] * 2
        assert all((pixels == (255 if index else 0)).all() for pixels, index in drawn)
    assert_named_once(capfd.readouterr().err, bad)


def test_a_worker_names_bad_files_in_a_line_each(module, bad):
    """All that it writes: no source line of Python, and none of Pillow's log."""
    code = f"""if True:
        import {module.__name__} as script
        from torch.utils.data import DataLoader
        images = script.Images(script.Args(data="photos"), (), 8)
        print([index for (index,) in DataLoader(images, None, sampler=[*range(8)] * 2, num_workers=1)])
    """
    result = run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert result.stdout == f"{[0, 6, 6, 6, 6, 6, 6, 0] * 2}\n", result.stderr
    assert_named_once(result.stderr, bad)


def test_a_hundred_in_a_row_are_an_error(module, capfd):
    fill(*(f"photos/{i:03d}.jpg" for i in range(110)))
    with pytest.raises(OSError, match=r"100.*photos/104\.jpg"):
        images_of(module, "photos")[5]
    assert len(capfd.readouterr().err.splitlines()) == 100


def test_names_in_any_encoding(module, capfd):
    os.mkdir("photos")
    files = [b"photos/a.png", "photos/é.png".encode(), b"photos/\xff.png"]
    for number, path in enumerate(files):
        Image.new("L", (9, 9), number).save(os.fsdecode(path))
    images = images_of(module, "photos", (torch.Tensor.max,))
    assert [*images.items] == files and [images[i] for i in range(3)] == [(0, 0), (1, 1), (2, 2)]
    open(files[2], "w").close()
    assert images[2] == (0, 0) and "cannot be read" in capfd.readouterr().err


def test_absurd_sizes_and_bad_files_raise_and_photos_of_phones_do_not(reader, bad):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
    for path in bad:
        with pytest.raises(Exception, match=r"\w"):
            reader.read_image(path, 8)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024
    assert read(reader, io.BytesIO(gif_of_a_claim(20, 30))).shape == (30, 20, 3)
    Image.new("L", (16320, 12240), 99).save("phone.jpg")  # 200 megapixels; .1 s to read at 1/8
    assert read(reader, "phone.jpg").shape == (1530, 2040, 3)


def test_pictures_are_upright(reader):
    """All that turn, of JPEG, PNG and raw TIFF, which Pillow would map into memory."""
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    upright, exif = np.uint8(np.dstack([4 * x, 5 * y, 99 + 0 * x])), Image.Exif()
    for orientation, method in enumerate((0, 3, 1, 5, 2, 6, 4), 2):  # of Image.Transpose, undone
        stored = Image.fromarray(upright).transpose(method)
        exif[0x0112] = orientation
        stored.save("photo.jpg", exif=exif, quality=100, subsampling=0)
        assert abs(read(reader, "photo.jpg", 48) - upright).max() <= 4, orientation
        assert read(reader, "photo.jpg", 12).shape == (12, 16, 3), orientation
        values, red = np.asarray(stored), upright[..., :1]
        deep = values[..., 0] * np.uint16(9)
        for raw, expected in ((values, upright), (values[..., 0], red), (deep, red * (255 / 252))):
            Path("raw.tif").write_bytes(tiff(raw, orientation=orientation).getvalue())
            Image.fromarray(raw).save("raw.png", exif=exif)
            for path in ("raw.tif", "raw.png"):
                assert abs(read(reader, path) - expected).max() <= (raw is deep), (orientation, path)


def test_large_jpegs_are_decoded_smaller(reader):
    photo = Image.new("RGB", (1600, 1200))
    photo.paste((255, 100, 0), (800, 0, 1600, 1200))
    photo.save("photo.jpg")
    photo.convert("CMYK").save("ink.jpg")
    for path in ("photo.jpg", "ink.jpg"):
        for shortest, height in ((100, 150), (150, 150), (150.5, 300), (601, 1200)):
            pixels = read(reader, path, shortest)
            assert pixels.shape == (height, height * 4 // 3, 3), (path, shortest)
            left, right = np.split(pixels, 2, axis=1)  # not of inverted colours
            assert left[:, :-8].max() < 30 and abs(right[:, 8:] - [255, 100, 0]).max() < 30, (path, shortest)
    for size in ((2400, 300), (300, 2400)):
        photo.resize(size).save("panorama.jpg")
        assert [min(read(reader, "panorama.jpg", side).shape[:2]) for side in (150, 200)] == [150, 300], size


@pytest.fixture(scope="module")
def albums(tmp_path_factory):
    """A folder of 40 photos, turned in all ways; the same, in this order, as a Dataset and as train of a
    DatasetDict; a Dataset with bad rows, and one without images."""
    import datasets

    root, rng, exif = tmp_path_factory.mktemp("albums"), np.random.default_rng(0), Image.Exif()
    (root / "photos").mkdir()
    for i in range(40):
        exif[0x0112] = i % 8 + 1
        photo = Image.fromarray(rng.integers(0, 256, (6, 8, 3), "u1")).resize((160, 120), Image.BICUBIC)
        photo.save(root / f"photos/{i:02d}.jpg", exif=exif)

    paths = [str(path) for path in sorted((root / "photos").iterdir())]
    album = datasets.Dataset.from_dict({"image": paths, "label": [*range(40)]})
    album = album.cast_column("image", datasets.Image())
    album.save_to_disk(root / "plain")
    datasets.DatasetDict(test=album.take(7), train=album).save_to_disk(root / "split")
    rows = [{"bytes": Path(path).read_bytes(), "path": None} for path in paths[:5]]
    rows[1]["bytes"], rows[3]["bytes"] = b"rubbish", rows[3]["bytes"][:2000]
    bad = datasets.Dataset.from_dict({"image": rows}).cast_column("image", datasets.Image())
    bad.save_to_disk(root / "bad")
    datasets.Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(root / "text")
    return root


@pytest.mark.parametrize("name", ["plain", "split"])
def test_arrow_files_give_what_a_folder_of_the_same_files_gives(module, albums, name, capfd):
    """As do pickled copies, which spawned workers get."""
    crops = (v2.RandomResizedCrop(16), v2.RandomResizedCrop(16))
    folder, arrow = (images_of(module, albums / data, crops, 30) for data in ("photos", name))
    copies = [pickle.loads(pickle.dumps(images)) for images in (folder, arrow)]
    assert len(arrow.items) == len(folder.items) == 40
    for key in range(44):
        first, second, index = folder[key]
        assert index == key % 40 and not torch.equal(first, second)
        for images in (arrow, *copies):
            *views, other = images[key]
            assert other == index and torch.equal(views[0], first) and torch.equal(views[1], second), key
    pixels, index = images_of(module, albums / name, (torch.clone,), 30)[5]
    assert pixels.shape == (3, 40, 30) and index == 5  # upright, of a JPEG at 1/4
    assert not capfd.readouterr().err


def test_bad_rows_are_named_once_and_the_next_takes_their_place(module, albums, capfd):
    images = images_of(module, albums / "bad")
    assert [images[key][-1] for key in [*range(5)] * 2] == [0, 2, 2, 4, 4] * 2
    assert_named_once(capfd.readouterr().err, [rf"albums\d*/bad\b.*\b{row}" for row in (1, 3)])


def test_arrow_files_that_cannot_be_used_are_refused_in_a_line(module, albums, monkeypatch):
    refused(["text", "image"], images_of, module, albums / "text")
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in ("plain", "split"):
        refused(["pip install datasets"], images_of, module, albums / name)
