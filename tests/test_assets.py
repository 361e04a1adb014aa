"""benchmarks/assets: nothing half-written, clear errors, families that stay together; and the real things if cached."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("datasets")

from PIL import Image

from benchmarks.assets import __main__ as command_line
from benchmarks.assets import fetch as fetching
from benchmarks.assets.easy_vqa import easy_vqa
from benchmarks.assets.english_clip import Settings, best_logit_scale, canonical_projections, caption
from benchmarks.assets.fetch import AssetError, Package, build_once, cache_dir, fetch
from benchmarks.assets.images import bare, family_of, on_white, split_families
from benchmarks.assets.photos import family_of_caption, in_the_middle

REPOSITORY = Path(__file__).parent.parent
REAL_CACHE = cache_dir()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("PEFT_MULTIMODAL_CACHE", str(folder))
    return folder


def npm_package(contents: bytes, **options) -> Package:
    digest = hashlib.sha256(contents).hexdigest()
    usual = {"version": "1.0.0", "sha256": digest, "megabytes": 1, "licence": "MIT"}
    return Package("npm", "@scope/thing", **usual | options)


def tarball(**files: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


def serve(monkeypatch, contents: bytes, suffix: str = ".tgz"):
    """Let the registry's client hand over `contents`; returns the list of what was asked for."""
    asked = []

    def download(package, folder):
        asked.append(package)
        (folder / f"thing{suffix}").write_bytes(contents)
        return folder / f"thing{suffix}"

    monkeypatch.setattr(fetching, "_download", download)
    return asked


def leftovers(folder: Path) -> list[Path]:
    """Whatever a failed build should not have left: everything but empty parents and locks."""
    return [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]


# --- the cache -------------------------------------------------------------------------------------------------------


def test_cache_dir_follows_the_environment(monkeypatch):
    monkeypatch.setenv("PEFT_MULTIMODAL_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_dir() == Path("/a")
    monkeypatch.delenv("PEFT_MULTIMODAL_CACHE")
    assert cache_dir() == Path("/b/peft_multimodal")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache/peft_multimodal"


def test_build_runs_once(cache):
    calls = []

    def build(folder):
        calls.append(folder)
        (folder / "file").write_text("whole")

    for _ in range(2):
        assert (build_once("some/thing", build) / "file").read_text() == "whole"
    assert len(calls) == 1
    assert leftovers(cache) == [cache / "some/thing/file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failed_build_leaves_nothing_and_can_be_repeated(cache, error):
    def build(folder):
        (folder / "half").write_text("half")
        raise error

    with pytest.raises(error):
        build_once("thing", build)
    assert leftovers(cache) == []
    assert not (cache / "thing").exists()
    assert build_once("thing", lambda folder: (folder / "file").write_text("whole")).is_dir()


def test_killed_build_is_cleared_away(cache):
    """SIGKILL gives no chance to tidy up: the folder is still absent, and the next build removes the remains."""
    child = start_build(cache, "(folder / 'half').write_text('half'); print('begun', flush=True); time.sleep(60)")
    assert child.stdout.readline() == "begun\n"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert not (cache / "thing").exists()
    assert [path.name for path in leftovers(cache)] == ["half"]
    build_once("thing", lambda folder: (folder / "file").write_text("whole"))
    assert leftovers(cache) == [cache / "thing/file"]


def test_two_processes_build_once(cache):
    body = "print('built', flush=True); time.sleep(0.5); (folder / 'file').write_text(str(os.getpid()))"
    children = [start_build(cache, body) for _ in range(2)]
    output = [child.communicate()[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert "".join(output).count("built") == 1
    assert (cache / "thing/file").read_text() in {str(child.pid) for child in children}


def start_build(cache: Path, body: str) -> subprocess.Popen:
    program = f"""
        import os, time
        from fetch import build_once  # by itself, as importing the package takes seconds
        def build(folder):
            {body}
        build_once("thing", build)
    """
    environment = os.environ | {"PEFT_MULTIMODAL_CACHE": str(cache)}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=REPOSITORY / "benchmarks/assets",
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def test_unwritable_cache_says_what_to_set(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PEFT_MULTIMODAL_CACHE", str(tmp_path / "file"))
    with pytest.raises(AssetError, match="PEFT_MULTIMODAL_CACHE"):
        build_once("thing", lambda folder: None)


# --- fetching --------------------------------------------------------------------------------------------------------


def test_fetch_keeps_what_is_named(cache, monkeypatch):
    contents = tarball(**{"package/img/a.png": "a", "package/index.js": "no"})
    asked = serve(monkeypatch, contents)
    package = npm_package(contents, keep=("package/img/",))
    for _ in range(2):
        folder = fetch(package)
    assert folder == cache / "packages/scope-thing-1.0.0"
    assert leftovers(folder) == [folder / "package/img/a.png"]
    assert len(asked) == 1


def test_wheels_are_extracted(cache, monkeypatch):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        wheel.writestr("thing/a.txt", "a")
    serve(monkeypatch, buffer.getvalue(), ".whl")
    assert (fetch(npm_package(buffer.getvalue())) / "thing/a.txt").read_text() == "a"


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs Debian's tools")
def test_debian_packages_are_extracted(cache, monkeypatch, tmp_path):
    (tmp_path / "root/DEBIAN").mkdir(parents=True)
    (tmp_path / "root/DEBIAN/control").write_text(
        "Package: thing\nVersion: 1\nArchitecture: all\nMaintainer: A <a@b.c>\nDescription: thing\n"
    )
    (tmp_path / "root/usr/share").mkdir(parents=True)
    (tmp_path / "root/usr/share/a.txt").write_text("a")
    subprocess.run(["dpkg-deb", "--build", tmp_path / "root", tmp_path / "thing.deb"], check=True, capture_output=True)
    contents = (tmp_path / "thing.deb").read_bytes()
    serve(monkeypatch, contents, ".deb")
    assert (fetch(npm_package(contents, keep=("./usr/",))) / "usr/share/a.txt").read_text() == "a"
    serve(monkeypatch, contents[:200], ".deb")
    with pytest.raises(AssetError, match="cannot be extracted"):
        fetch(npm_package(contents[:200], version="2"))


def test_wrong_hash_leaves_nothing(cache, monkeypatch):
    serve(monkeypatch, b"something else")
    with pytest.raises(
        AssetError, match=r"@scope/thing 1\.0\.0 .*sha256 is [0-9a-f]{64}, pinned is .*What to do"
    ) as error:
        fetch(npm_package(b"what was pinned"))
    assert hashlib.sha256(b"something else").hexdigest() in str(error.value)
    assert leftovers(cache) == []


@pytest.mark.parametrize("suffix", [".tgz", ".whl"])
def test_truncated_archive_leaves_nothing(cache, monkeypatch, suffix):
    contents = tarball(**{"package/a": "a" * 1000})[:60]
    serve(monkeypatch, contents, suffix)
    with pytest.raises(AssetError, match="cannot be extracted"):
        fetch(npm_package(contents))
    assert leftovers(cache) == []


def test_archive_cannot_write_outside(cache, monkeypatch):
    contents = tarball(**{"../../../escaped": "x"})
    serve(monkeypatch, contents)
    with pytest.raises(AssetError, match="cannot be extracted"):
        fetch(npm_package(contents))
    assert not list(cache.parent.rglob("escaped"))


@pytest.mark.parametrize("client", ["pip", "npm", "apt"])
def test_failing_client_is_reported_in_its_words(cache, monkeypatch, client):
    def run(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: noise\nERROR: the registry is away\n")

    monkeypatch.setattr(fetching.subprocess, "run", run)
    monkeypatch.setattr(fetching.shutil, "which", lambda name: name)
    with pytest.raises(AssetError) as error:
        fetch(Package(client, "thing", "1.0.0", "0" * 64, megabytes=1, licence="MIT"))
    message = str(error.value)
    for part in ("thing 1.0.0", f"`{client}`", "status 1", "the registry is away", "PEFT_MULTIMODAL_CACHE"):
        assert part in message
    assert "noise" not in message
    assert leftovers(cache) == []


def test_missing_npm_is_named(cache, monkeypatch):
    monkeypatch.setattr(fetching.shutil, "which", lambda name: None)
    with pytest.raises(AssetError, match=r"npm is not installed.*install Node\.js"):
        fetch(npm_package(b""))


def test_command_line_lists_and_refuses(cache, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks.assets"])
    assert command_line.main() == 0
    assert {"english_clip", "emoji_images"} <= set(capsys.readouterr().out.split())
    monkeypatch.setattr(sys, "argv", ["benchmarks.assets", "nonsense"])
    with pytest.raises(SystemExit):
        command_line.main()
    assert "nonsense" in capsys.readouterr().err
    assert leftovers(cache) == []


def test_command_line_fails_in_words(cache, monkeypatch, capsys):
    monkeypatch.setattr(fetching.shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["benchmarks.assets", "emoji_images"])
    assert command_line.main() == 1
    assert capsys.readouterr().err.startswith("error: emojibase-data 17.0.0 (npm, 7 MB): npm is not installed")


# --- families and splits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels",
    [
        ("cook", "man cook", "woman cook", "woman cook: dark skin tone"),
        ("merperson", "merman", "mermaid"),
        ("person with crown", "prince", "princess"),
        ("Santa Claus", "Mrs. Claus", "Mx Claus"),
        ("men holding hands", "woman and man holding hands", "people holding hands"),
        ("person", "woman: red hair", "boy", "old man", "older person"),
        ("family: man, woman, boy", "family: woman, girl", "family"),
        ("twelve o’clock", "two-thirty"),
        ("keycap: 3", "keycap: #", "keycap: 10"),
        ("red heart", "light blue heart", "two hearts"),
        ("A button (blood type)", "OK button", "UP! button"),
        ("Japanese “here” button", "Japanese “free of charge” button"),
        ("globe showing Americas", "globe showing Europe-Africa"),
        ("waxing crescent moon", "full moon"),
        ("left-facing fist", "right-facing fist"),
        ("1st place medal", "3rd place medal"),
        ("hourglass done", "hourglass not done"),
    ],
)
def test_variants_share_a_family(labels):
    assert len({family_of(label) for label in labels}) == 1


def test_different_things_do_not():
    labels = ("cook", "pilot", "person", "ZZZ", "kiss mark", "alarm clock", "broken heart", "orange book", "moon cake")
    assert len({family_of(label) for label in labels}) == len(labels)


def test_splits_deal_whole_families():
    rng = random.Random(0)
    families = [name for index in range(300) for name in [f"family {index}"] * rng.choice([1, 1, 1, 2, 3])]
    families += ["crowd"] * 25
    dealt = split_families(families, test=100, validation=50, largest=10, seed=0)
    counts = {split: sum(dealt[family] == split for family in families) for split in ("train", "validation", "test")}
    assert (counts["test"], counts["validation"]) == (100, 50)
    assert dealt["crowd"] == "train"
    assert dealt == split_families(reversed(families), test=100, validation=50, largest=10, seed=0)
    assert dealt != split_families(families, test=100, validation=50, largest=10, seed=1)


def test_images_lie_on_white():
    image = on_white(Image.new("RGBA", (64, 64), (255, 0, 0, 0)))
    assert (image.mode, image.size, image.getpixel((5, 5))) == ("RGB", (84, 84), (255, 255, 255))
    assert bare("1f441-fe0f-200d-1f5e8-fe0f") == "1F441-200D-1F5E8"


def test_photos_keep_their_proportions():
    image = Image.new("RGBA", (300, 100), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (100, 25, 200, 75))
    drawn = in_the_middle(image)
    assert drawn.size == (168, 168)
    assert [drawn.getpixel((84, y)) for y in (20, 84, 148)] == [(255, 255, 255), (255, 0, 0), (255, 255, 255)]
    assert in_the_middle(Image.new("L", (10, 20), 0)).getpixel((84, 84)) == (0, 0, 0)


def test_captions_of_one_thing_share_a_family():
    same = ("A red rose.", "Roses", "The rose! It has thorns. Don't touch it.")
    assert {family_of_caption(text) for text in same} == {"rose"}
    assert family_of_caption("A rose window.") != "rose"


# --- the English CLIP's projections ----------------------------------------------------------------------------------


def test_canonical_projections_match_unseen_pairs():
    """Two noisy linear views of the same hidden factors, with a large common mean: unseen pairs find each other."""
    hidden = torch.randn(400, 8)
    images = (hidden @ torch.randn(8, 24) + 5)[None] + 0.3 * torch.randn(3, 400, 24)
    texts = (hidden @ torch.randn(8, 16) - 3)[None] + 0.3 * torch.randn(2, 400, 16)
    settings = Settings(projection_dim=8)
    visual, text = canonical_projections(images[:, :300], texts[:, :300], settings)
    assert (visual.shape, text.shape) == ((8, 24), (8, 16))
    assert visual.std().item() == pytest.approx((1 / 72) ** 0.5, rel=1e-5)
    mean = images[:, :300].mean(dim=(0, 1))
    assert (visual @ mean).norm() < 1e-4 * visual.norm() * mean.norm()
    unit = torch.nn.functional.normalize
    scores = unit(texts[0, 300:] @ text.T, dim=-1) @ unit(images[0, 300:] @ visual.T, dim=-1).T
    assert (scores.argmax(dim=1) == torch.arange(100)).float().mean() > 0.9


def test_logit_scale_minimises_the_contrastive_loss():
    scores = torch.eye(20) * 0.5 + 0.2 * torch.randn(20, 20)
    best = best_logit_scale([scores])

    def loss(log_scale):
        logits = torch.tensor(log_scale).exp() * scores
        target = torch.arange(20)
        return torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)

    assert loss(best) < min(loss(best - 0.2), loss(best + 0.2))


def test_captions_come_from_names_and_keywords():
    found = {caption("red apple", ["fruit", "food", "ripe"], random.Random(seed)) for seed in range(200)}
    words = {word for text in found for word in text.split(", ")}
    assert words == {"red apple", "fruit", "food", "ripe"}
    assert caption("red apple", [], random.Random(0)) == "red apple"


# --- the real ones ---------------------------------------------------------------------------------------------------


def cached(key: str) -> Path:
    if not (REAL_CACHE / key).is_dir():
        pytest.skip(f"{key} is not in the cache: `python -m benchmarks.assets` prepares it")
    return REAL_CACHE / key


@pytest.mark.assets
def test_real_images():
    cached("emoji-pictures-1")
    from benchmarks.assets import emoji_images

    rows = emoji_images()
    table = rows.remove_columns("image").to_pandas()
    assert len(table) == 3 * 1599
    assert set(table["style"].value_counts()) == {1599}
    assert table.groupby("family")["split"].nunique().max() == 1
    assert table.groupby("style")["split"].value_counts().to_dict() == {
        (style, split): count
        for style in ("google", "twitter", "fluent")
        for split, count in (("train", 1039), ("validation", 180), ("test", 380))
    }
    one = table[table["style"] == "fluent"]
    assert one["label_en"].is_unique
    assert one["label_zh"].is_unique
    assert (rows[0]["image"].size, rows[0]["image"].mode) == ((84, 84), "RGB")
    for label in one["label_en"]:
        assert family_of(label) == one.loc[one["label_en"] == label, "family"].item()


@pytest.mark.assets
def test_real_towers():
    from transformers import AutoModel, AutoTokenizer

    vision = AutoModel.from_pretrained(cached("dinov2-small-1"))
    assert sum(parameter.numel() for parameter in vision.parameters()) == 22_056_576
    text, tokenizer = (kind.from_pretrained(cached("minilm-1")) for kind in (AutoModel, AutoTokenizer))
    batch = tokenizer(["a red apple", "a crimson fruit", "a tax office"], padding=True, return_tensors="pt")
    with torch.no_grad():
        states, mask = text.eval()(**batch).last_hidden_state, batch["attention_mask"][..., None]
    means = torch.nn.functional.normalize((states * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)
    assert means[0] @ means[1] > 0.5 > 0.3 > means[0] @ means[2]


@pytest.mark.assets
def test_real_english_clip():
    from transformers import VisionTextDualEncoderModel, VisionTextDualEncoderProcessor

    from benchmarks.assets.english_clip import evaluate
    from benchmarks.assets.images import emoji_images

    cached("emoji-pictures-1")
    folder = cached("english-clip-2")
    report = json.loads((folder / "assembly.json").read_text())
    assert report["settings"]["projection_dim"] == 256
    model = VisionTextDualEncoderModel.from_pretrained(folder).eval()
    recalls = evaluate(model, VisionTextDualEncoderProcessor.from_pretrained(folder), emoji_images(), "validation")
    means = {style: row["mean_recall"] for style, row in recalls.items()}
    assert min(means["google"], means["twitter"]) > 27  # chance is 3
    assert 18 < means["fluent"] < min(means["google"], means["twitter"])


@pytest.mark.assets
def test_real_questions():
    cached("easy-vqa-1")
    rows = easy_vqa()
    splits = list(rows["split"])
    counts = {split: splits.count(split) for split in ("train", "validation", "test")}
    assert counts["test"] == 9673
    assert counts["train"] + counts["validation"] == 38575
    assert len(set(rows["answer"])) == 13
    split_of = {}
    for image, split in zip(rows["image_id"], splits, strict=True):
        assert split_of.setdefault(image, split) == split


@pytest.mark.assets
def test_real_animations():
    cached("animated-emoji-2")
    from benchmarks.assets import animated_emoji, emoji_images

    rows = animated_emoji()
    assert len(rows) == 182
    split_of = dict(zip(emoji_images()["concept"], emoji_images()["split"], strict=True))
    assert all(split_of[concept] == split for concept, split in zip(rows["concept"], rows["split"], strict=True))
    assert [frame.size for frame in rows[0]["frames"]] == [(84, 84)] * 8


@pytest.mark.assets
def test_real_photos():
    cached("photos-1")
    from benchmarks.assets import photos

    table = photos().remove_columns("image").to_pandas()
    assert len(table) == 875
    assert table["category"].nunique() == 16
    assert table["kind"].value_counts().to_dict() == {"photo": 519, "drawing": 356}
    assert (table["caption_en"].str.len() > 3).all()
    assert (photos()[0]["image"].size, photos()[0]["image"].mode) == ((168, 168), "RGB")


@pytest.mark.assets
def test_real_captions_and_their_reader():
    for key in ("emoji-pictures-1", "animated-emoji-2", "easy-vqa-1", "photos-1", "caption-lm-2"):
        cached(key)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.assets import captions
    from benchmarks.assets.captions import KINDS
    from benchmarks.assets.fetch import cache_dir

    split_of = {}
    for kind in KINDS:
        assert {c.split for c in captions(kind)} - {"text"} == {"train", "validation", "test"}
        for found in captions(kind):  # a concept lies in one split, whatever is said of it
            key = found.thing if kind in ("sentences", "questions") else f"emoji {found.thing}"
            assert split_of.setdefault(key, found.split) == found.split
    seen = " ".join(c.answer.lower() for c in captions("sentences") if c.split == "train")
    assert not {"penguin", "owl", "flamingo"} & set(seen.replace(".", "").split()), "unseen emoji, so no photos of them"
    folder = cache_dir() / "caption-lm-2"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert tokenizer.eos_token == "<end>"
    assert not any(tokenizer.unk_token_id in tokenizer(c.answer)["input_ids"] for c in captions("names"))

    def loss(text):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            return model(input_ids=ids, labels=ids).loss.item()

    assert loss("<end>what color is the shape? red<end>") < loss("<end>what color is the red? shape<end>") - 1
