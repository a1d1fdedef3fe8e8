"""Images as sequences: whole images, nothing but pixels judged, pictures of what a model draws."""

import dataclasses
import json
import math
import sys

import bench_call
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the language model needs torch (extra 'torch')")
from_the_checkout = bench_call.from_the_checkout


@pytest.fixture
def stripes(tmp_path):
    """60 images of 4x4: a bright row in one of four places, 5 levels."""
    images = np.zeros((60, 4, 4), np.uint8)
    images[np.arange(60), np.arange(60) % 4] = 4
    path = tmp_path / "stripes.npz"
    np.savez(path, images=images)
    return path


def test_a_sequence_is_whole_images_and_every_target_is_a_pixel(stripes):
    from bench.lm.images import START, load_images

    found = load_images(stripes)
    assert (found.height, found.width, found.levels, found.name) == (4, 4, 5, "stripes")
    assert (len(found.corpus.train), len(found.corpus.validation)) == (57, 3)
    split = found.corpus.reader(found.corpus.train, "cpu")
    text, target = split.batch(64, 3, seed=1, draw=2)
    assert (text[:, 0] == START).all()
    assert torch.equal(text[:, 1:], target[:, :-1])
    rows = target.view(3, 4, 4, 4) - 1
    assert set(rows.unique().tolist()) == {0, 4}
    assert (rows.sum((-1, -2)) == 16).all(), "an image is cut"
    assert not torch.equal(target, split.batch(64, 3, seed=1, draw=3)[1])
    with pytest.raises(SystemExit, match="multiple of the 16 pixels"):
        split.batch(60, 1, seed=0, draw=0)


def test_images_are_told_from_what_is_none(tmp_path, monkeypatch):
    from bench.lm.images import load_images

    np.savez(tmp_path / "a.npz", images=np.zeros((3, 2, 2)))
    np.savez(tmp_path / "b.npz", other=np.zeros((3, 2, 2), np.uint8))
    with pytest.raises(SystemExit, match="float64"):
        load_images(tmp_path / "a.npz")
    with pytest.raises(SystemExit, match="no array 'images', only"):
        load_images(tmp_path / "b.npz")
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit, match=r"pip install scikit-learn.*--data FILE"):
        load_images()


def test_scikit_learns_digits():
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    from bench.lm.images import load_images

    found = load_images()
    assert (found.height, found.width, found.levels) == (8, 8, 17)
    assert len(found.corpus.train) + len(found.corpus.validation) == 1797
    assert found.corpus.train.min() == 1


def test_command_learns_stripes_and_draws_them(stripes, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the page has plots (extra 'plot')")
    from bench.lm import __main__ as command

    kept, page = tmp_path / "images.json", tmp_path / "page.md"
    words = f"bench.lm images --preset tiny --data {stripes} --seqlen 32 --tokens-per-step 512 "
    words += (
        f"--micro-batch 16 --steps 80 --learning-rate 0.01 --points 3 --json {kept} --variants "
    )
    monkeypatch.setattr(sys, "argv", (words + "dense hash2 reformer2").split())
    command.main()
    runs = json.loads(kept.read_text())["runs"]
    assert [run["config"]["attention"] for run in runs] == ["dense", "hash2", "reformer2"]
    for run in runs:
        assert run["done"], run.get("error")
        assert (run["unit"], run["shape"], run["levels"]) == ("pixel", [4, 4], 5)
        assert run["config"]["vocabulary"] == 6
        assert np.shape(run["samples"])[1] == 16
        assert set(np.unique(run["samples"])) <= set(range(5))
    end = runs[0]["curve"][-1]["validation"]
    assert end < 0.5 * math.log(2), "an untrained model pays 2.3 bits, four places 1/8 bit"
    drawn = np.array(runs[0]["samples"]).reshape(-1, 4, 4)
    bright = [(image == 4).all(1).sum() == 1 and image.sum() == 16 for image in drawn]
    assert np.mean(bright) > 0.5

    report = f"bench.lm report {kept} --page {page} --plots {tmp_path / 'img'}"
    monkeypatch.setattr(sys, "argv", report.split())
    command.main()
    text = page.read_text()
    assert "## Images, pixel by pixel" in text
    assert "bits a pixel" in text
    assert "## Quality" not in text
    assert "| dense | 1 | 80 | " in text
    for name in ("lm-images-0", "lm-images-0-samples"):
        assert (tmp_path / "img" / f"{name}-dark.png").stat().st_size > 1000
        assert f"img/{name}-light.png" in text


def test_drawing_asks_for_pixels_only(stripes):
    from bench.lm.config import PRESETS
    from bench.lm.images import load_images, sample
    from bench.lm.train import Trainer, World

    found = load_images(stripes)
    config = dataclasses.replace(
        PRESETS["tiny"], vocabulary=6, seqlen=16, tokens_per_step=16, micro_batch=1
    )
    trainer = Trainer(config, found.corpus, World(0, 1, "cpu"))
    first = sample(trainer, 16, count=40, seed=5)
    assert np.shape(first) == (40, 16)
    assert np.min(first) == 0, "the start token is drawn as a pixel"
    assert first == sample(trainer, 16, count=40, seed=5)
    assert first != sample(trainer, 16, count=40, seed=6)
