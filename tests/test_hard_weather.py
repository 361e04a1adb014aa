"""Hostile files, full disks, killed processes, odd names: a clear error or none, and what was there before stays."""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import struct
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from families import FAMILIES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from methods import METHODS, distance, home, run, trace, wrap
from peft import PeftModel, get_peft_model
from test_contract import Rows, trainer_for

import peft_multimodal
from peft_multimodal import FiniteBatches, load, save
from peft_multimodal.core.switching import tuner_of

TESTS = str(Path(__file__).parent)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAMES = [method for method in METHODS if "-" not in method]
CLIP = FAMILIES["clip"]
NAN = float("nan")

# --------------------------------------------------------------------------------------------------------- fuzzed files

MARKER = "hard_weather_marker"
WATCHED: list[str] | None = None
OUTSIDE = (
    "socket.connect",
    "socket.getaddrinfo",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
)


def watch(event: str, arguments: tuple) -> None:
    """Note what no adapter may do: run, ask the network, write; and any code that is called like a value of its config."""
    if WATCHED is None:
        return
    if event == "open":
        path, _, flags = arguments
        if isinstance(path, (str, bytes)) and (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            WATCHED.append(f"write {path}")
    elif event in OUTSIDE or (event in ("import", "exec", "compile") and MARKER in str(arguments[:2])):
        WATCHED.append(f"{event} {arguments}")


@contextmanager
def nothing_else_happens() -> Iterator[None]:
    global WATCHED
    if not hasattr(sys, MARKER):
        setattr(sys, MARKER, True)
        sys.addaudithook(watch)  # it can't be taken out again
    WATCHED = []
    try:
        yield
        seen = list(WATCHED)
    finally:
        WATCHED = None
    assert [event for event in seen if "/dev/null" not in event] == []


NASTY = [
    *(MARKER, f"../../{MARKER}", f"/tmp/{MARKER}", f"__import__('{MARKER}')", f"{MARKER}:main", "(a+)+$", "[", "(?P<"),
    *("", " ", ".", "..", "/", "\x00", "\ud800", "default", "all-linear", "q_proj", "vision", "LORA", "X" * 3000),
]
VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.sampled_from([0, -1, 1, 2, 2**31, 10**9, 2**63, 10**30]),
        st.floats(),
        st.sampled_from(NASTY),
        st.text(max_size=8),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from([*NASTY, "towers"]), inner, max_size=3)
    ),
    max_leaves=6,
)
SPANS = st.lists(st.lists(st.sampled_from([0, 1, -1, 10**12, 2**63, "a", None]), min_size=1, max_size=3), max_size=3)
SIGNATURES = st.fixed_dictionaries(
    {},
    optional={
        "model_class": VALUES,
        "towers": VALUES | st.dictionaries(st.sampled_from(["vision", "text"]), VALUES | st.lists(st.integers())),
        "roles": VALUES | st.dictionaries(st.sampled_from(["vision.q", "text.k", "decoder"]), VALUES | SPANS),
    },
)


@st.composite
def configs(draw: st.DrawFn, written: dict[str, Any]) -> bytes:
    """An adapter_config.json: the right one with fields changed, gone or added; any JSON; any bytes."""
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return draw(st.binary(max_size=60))
    if kind == 1:
        return json.dumps(draw(VALUES)).encode("utf-8", "surrogatepass")
    text = json.dumps(written).encode()
    if kind == 2:
        at = draw(st.integers(0, len(text) - 1))
        return text[:at] + draw(st.binary(max_size=3)) + text[at + 1 :]
    changed = dict(written)
    for _ in range(draw(st.integers(1, 3))):
        field = draw(st.sampled_from(sorted(written)) | st.sampled_from([MARKER, "lora_alpha", "runtime_config", ""]))
        if draw(st.booleans()) and draw(st.booleans()):
            changed.pop(field, None)
        else:
            changed[field] = draw(VALUES)
    if kind == 3:
        changed["base_signature"] = draw(SIGNATURES)
    return json.dumps(changed).encode("utf-8", "surrogatepass")


@st.composite
def weights(draw: st.DrawFn, written: bytes) -> bytes:
    """A safetensors file: its header changed as JSON or as bytes, its length wrong, its data cut or prolonged."""
    size = struct.unpack("<Q", written[:8])[0]
    header, data = json.loads(written[8 : 8 + size]), written[8 + size :]
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return draw(st.binary(max_size=80))
    if kind == 1:
        wrong = draw(st.sampled_from([0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1]))
        return struct.pack("<Q", wrong) + written[8:]
    if kind == 2:
        at = draw(st.integers(0, size + 7))
        return written[:at] + draw(st.binary(min_size=1, max_size=2)) + written[at + 1 :]
    if kind == 3:
        return written[: draw(st.integers(0, len(written)))] + draw(st.binary(max_size=9))
    for _ in range(draw(st.integers(1, 2))):
        key = draw(st.sampled_from(sorted(header)))
        entry = header[key]
        what = draw(st.integers(0, 5))
        if what == 0:
            header.pop(key)
        elif what == 1:
            header[draw(st.sampled_from([*NASTY, f"{key}.more", key.upper()]))] = header.pop(key)
        elif what == 2 or not isinstance(entry, dict) or "dtype" not in entry:
            header[key] = draw(VALUES)
        else:
            sizes = st.sampled_from([[], [0], [2**40], [2**62, 4], [-1], [1, 2, 3]])
            changes = {"dtype": st.sampled_from(["F16", "I64", "U8", "BOOL", "F4", "", None]), "shape": sizes | VALUES,
                       "data_offsets": st.sampled_from([[0, 0], [0, len(data)], [8, 4], [-4, 0], [0, 2**63]]) | VALUES}  # fmt: skip
            field = draw(st.sampled_from(sorted(changes)))
            header[key] = {**entry, field: draw(changes[field])}
        if not header:
            break
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize("method", NAMES)
def test_an_injection_that_fails_in_its_midst(method: str, monkeypatch: pytest.MonkeyPatch):
    """Such as for want of memory, after the first layer or part was made: model and other adapters are what they were."""
    family = home(method)
    model = family.build()
    before, output, left = list(model.state_dict()), run(family, model), trace(model)
    config = METHODS[method](family)
    tuner = tuner_of(config)
    own = tuner.add

    def fails(*args: Any, **kwargs: Any) -> None:
        own(*args, **kwargs)
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(tuner, "add", fails)
        with pytest.raises(RuntimeError, match="no memory"):
            get_peft_model(model, config)
    assert list(model.state_dict()) == before
    assert trace(model) == left
    assert torch.equal(run(family, model), output)

    wrapped = wrap(family, method, base=model)
    before, output = list(wrapped.state_dict()), run(family, wrapped)
    with monkeypatch.context() as patch:
        patch.setattr(tuner, "add", fails)
        with pytest.raises(RuntimeError, match="no memory"):
            wrapped.add_adapter("other", METHODS[method](family))
    assert list(wrapped.state_dict()) == before
    assert torch.equal(run(family, wrapped), output)


@pytest.mark.parametrize("which", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("method", NAMES)
def test_fuzzed_files(method: str, which: str, tmp_path: Path):
    """A hundred cases a file: an adapter loads, or there is a ValueError that says why, and the model is as it was."""
    family = home(method)
    folder = save(wrap(family, method), tmp_path / "adapter")
    right = (folder / which).read_bytes()
    model = family.build()
    before, output, left = list(model.state_dict()), run(family, model), trace(model)
    strategy = configs(json.loads(right)) if which == CONFIG else weights(right)
    refusals: list[str | None] = []

    @settings(max_examples=100, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def check(content: bytes) -> None:
        (folder / which).write_bytes(content)
        files = sorted(str(p) for p in tmp_path.rglob("*"))
        with nothing_else_happens():
            try:
                loaded = load(model, folder)
            except ValueError as error:
                refusals.append(str(error))
            else:
                loaded.unload()
                refusals.append(None)
        assert list(model.state_dict()) == before
        assert sorted(str(p) for p in tmp_path.rglob("*")) == files

    check()
    assert trace(model) == left
    assert torch.equal(run(family, model), output)
    assert None in refusals, "what is right is still loaded"
    said = [message for message in refusals if message is not None]
    assert len(said) >= 30  # of 100
    assert min(map(len, said)) > 20


@pytest.mark.parametrize("which", ["one more span", "the only span"])
def test_a_span_of_roles_is_not_written_out(which: str, tmp_path: Path):
    """A file of one kilobyte can name more roles than memory holds."""
    folder = save(wrap(CLIP, "aurora_mode_approx"), tmp_path / "adapter")
    written = json.loads((folder / CONFIG).read_text())
    for spans in written["base_signature"]["roles"].values():
        spans[:] = [[0, 10**12]] if which == "the only span" else [*spans, [10**6, 10**12]]
    (folder / CONFIG).write_text(json.dumps(written))
    base = CLIP.build()

    def with_little_memory() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
        load(base, folder)

    assert result(in_a_child(with_little_memory)) == 0


def test_the_watch_sees(tmp_path: Path):
    with pytest.raises(AssertionError, match=r"write .*here"), nothing_else_happens():
        (tmp_path / "here").write_text("x")
    with pytest.raises(AssertionError, match=r"import .*marker"), nothing_else_happens(), pytest.raises(ImportError):
        __import__(MARKER)


# ------------------------------------------------------------------------------------------------- disks and processes


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def in_a_child(function: Any) -> int:
    """The id of a forked process that runs the function and ends with 0, or 1 where it raised."""
    child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return child


def result(child: int) -> int:
    return os.waitpid(child, 0)[1]


def two_adapters() -> dict[int, PeftModel]:
    """Of different shapes: a file of one beside a file of the other is no adapter."""
    return {r: wrap(CLIP, "aurora_mode_approx", r=r, alpha=None) for r in (2, 5)}


@pytest.mark.parametrize("room", [0, 500, 3000])
def test_a_full_disk(room: int, tmp_path: Path):
    models = two_adapters()
    save(models[2], tmp_path / "adapter")
    before = content(tmp_path)

    def full() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        save(models[5], tmp_path / "adapter")

    assert os.WEXITSTATUS(result(in_a_child(full))) == 1
    assert content(tmp_path) == before
    assert distance(run(CLIP, load(CLIP.build(), tmp_path / "adapter")), run(CLIP, models[2])) <= 1e-6


def test_killed_at_any_moment(tmp_path: Path):
    folder, models = tmp_path / "adapter", two_adapters()
    outputs = {r: run(CLIP, model) for r, model in models.items()}
    save(models[2], folder)
    (folder / "trainer_state.json").write_text("{}")

    def forever() -> None:
        while True:
            for model in models.values():
                save(model, folder)

    seen = set()
    for moment in range(30):
        child = in_a_child(forever)
        time.sleep(0.01 + 0.007 * moment)
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(result(child))
        r = json.loads((folder / CONFIG).read_text())["r"]
        assert distance(run(CLIP, load(CLIP.build(), folder)), outputs[r]) <= 1e-6
        assert (folder / "trainer_state.json").read_text() == "{}"
        seen.add(r)
    assert seen == {2, 5}


def test_two_processes_save_to_one_folder(tmp_path: Path):
    models = two_adapters()

    def often(model: PeftModel) -> None:
        for _ in range(25):
            save(model, tmp_path / "adapter")

    children = [in_a_child(lambda model=model: often(model)) for model in models.values()]
    assert [result(child) for child in children] == [0, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    assert set(content(tmp_path / "adapter")) == {CONFIG, WEIGHTS, "README.md"}
    r = json.loads((tmp_path / "adapter" / CONFIG).read_text())["r"]
    assert distance(run(CLIP, load(CLIP.build(), tmp_path / "adapter")), run(CLIP, models[r])) <= 1e-6


# ---------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name",
    ["a.b", "a/b", "../out", "", " ", "a b", "C:", "a\\b", "keys", "items", "forward", "\x00", "encoder", "tokenizer"],
)
@pytest.mark.parametrize("method", NAMES)
def test_names_that_can_be_no_adapters(method: str, name: str, tmp_path: Path):
    family = home(method)
    base = family.build()
    before = trace(base)
    with pytest.raises(ValueError, match=r"adapter_name=.*can't be used"):
        get_peft_model(base, METHODS[method](family), adapter_name=name)
    assert trace(base) == before
    model = wrap(family, method)
    expected = run(family, model)
    with pytest.raises(ValueError, match=r"adapter_name=.*can't be used"):
        model.add_adapter(name, METHODS[method](family))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(run(family, model), expected)


@pytest.mark.parametrize("method", NAMES)
def test_names_that_are_parts_of_each_other(method: str, tmp_path: Path):
    family = home(method)
    prefix = f"{method}_"
    names = ["a", "ab", "default", "default-1", "vision", prefix, f"{prefix}P_norm", "weight", "zh_TW", "中文"]
    model = wrap(family, method, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, METHODS[method](family))
    expected = {}
    for i, name in enumerate(names):
        disturb(model, name, seed=i)
        model.set_adapter(name)
        expected[name] = run(family, model)
    save(model, tmp_path)
    loaded = None
    for name in names:
        place = {"subfolder": name} if name != "default" else {}
        if loaded is None:
            loaded = load(family.build(), tmp_path, adapter_name=name, **place)
        else:
            loaded.load_adapter(tmp_path, name, **place)
    for name in names:
        loaded.set_adapter(name)
        assert distance(run(family, loaded), expected[name]) <= 1e-6, name
    for name in names[:0:-1]:
        loaded.delete_adapter(name)
        assert distance(run(family, loaded), expected[loaded.active_adapters[0]]) <= 1e-6
    assert list(loaded.peft_config) == [names[0]]


@torch.no_grad()
def disturb(model: PeftModel, name: str, seed: int) -> None:
    """By the keys under which it is stored: this name may be a part of others' and of the prefix."""
    generator, own = torch.Generator().manual_seed(seed), model.state_dict()
    for key in model.base_model.checkpoint_keys(model, name).values():
        if own[key].is_floating_point():
            own[key].add_(0.1 * torch.randn(own[key].shape, generator=generator))


@pytest.mark.parametrize(
    "method", ["gated_xattn", *(pytest.param(m, marks=pytest.mark.full) for m in NAMES if m != "gated_xattn")]
)
def test_a_hundred_adapters_come_and_go(method: str, tmp_path: Path):
    """500 in all: nothing of them stays in the model or in memory."""
    family = home(method)
    save(wrap(family, method), tmp_path)
    model = wrap(family, method, adapter_name="stays")
    expected, before = run(family, model), None
    last: list[weakref.ref] = []
    left = trace(model)
    for i in range(100):
        model.load_adapter(tmp_path, f"n{i}")
        last = [weakref.ref(p) for n, p in model.named_parameters() if f".n{i}" in n]
        assert last
        model.delete_adapter(f"n{i}")
        if i == 10:
            gc.collect()
            before, left = len(gc.get_objects()), trace(model)
    gc.collect()
    assert [ref for ref in last if ref() is not None] == []
    last.clear()
    assert len(gc.get_objects()) - before < 90, "less than one object an adapter"
    assert trace(model) == left
    assert list(model.peft_config) == ["stays"]
    assert torch.equal(run(family, model), expected)


# ----------------------------------------------------------------------------------------------------------------- data


def test_nan_in_data_stops_with_the_samples_ids_and_the_last_checkpoint_stays(tmp_path: Path):
    trainer = trainer_for(CLIP, "aurora_mode_approx", tmp_path, max_steps=12, eval_strategy="no")
    rows = trainer.train_dataset
    assert isinstance(rows, Rows)
    collate = rows.collate
    rows.rows = [{**row, "id": 100 + i} for i, row in enumerate(rows.rows)]
    trainer.data_collator = FiniteBatches(
        lambda batch: collate([{k: v for k, v in row.items() if k != "id"} for row in batch])
    )
    drawn: list[int] = []
    original = type(rows).__getitem__

    def spoilt(self: Rows, index: int) -> dict:
        row = original(self, index)
        drawn.append(row["id"])
        if len(drawn) == 12:  # in the fourth batch of three; one is read ahead
            row = {**row, "pixel_values": row["pixel_values"] / 0}
        return row

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rows, "__getitem__", spoilt)
        with pytest.raises(
            ValueError, match="'pixel_values' holds NaN or infinite values in 1 of 3 samples: "
        ) as error:
            trainer.train()
    assert f"samples: {drawn[11]}." in str(error.value)
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-2"
    loaded = load(CLIP.build(), checkpoint)
    assert all(p.isfinite().all() for p in loaded.parameters())
    assert all(p.isfinite().all() for p in trainer.model.parameters()), "no step was made with it"


def test_samples_without_ids_and_batches_without_rows():
    def collate(rows: list[dict]) -> dict:
        return {"x": torch.stack([row["x"] for row in rows]), "attention_mask": torch.tensor([float("-inf")])}

    good, bad = {"x": torch.zeros(2)}, {"x": torch.tensor([0.0, float("nan")])}
    assert FiniteBatches(collate)([good, good])["x"].shape == (2, 2)
    with pytest.raises(ValueError, match="in 1 of 2 samples: row 1 of the batch"):
        FiniteBatches(collate)([good, bad])
    with pytest.raises(ValueError, match=r"in a batch of the samples \[7, None\]"):
        FiniteBatches(lambda rows: {"x": bad["x"].sum()})([{"id": 7}, {}])


@pytest.mark.parametrize(
    ("batch", "field", "whose"),
    [
        ({"media": {"pixel_values": torch.tensor([1.0, NAN])}}, "media.pixel_values", " in 1 of 2 samples: 'b'."),
        ({"frames": [torch.ones(2), (torch.tensor([NAN, 1.0]),)]}, "frames.1.0", " in 1 of 2 samples: 'a'."),
        ((torch.ones(2), torch.tensor(NAN)), "1", r", in a batch of the samples \['a', 'b'\]."),
        (torch.tensor([1.0, NAN]), "the batch", " in 1 of 2 samples: 'b'."),
        ({"x": np.array([1.0, NAN], dtype=np.float16)}, "x", " in 1 of 2 samples: 'b'."),
        (hf.BatchFeature({"x": {"y": [np.array([[NAN], [1.0]])]}}), "x.y.0", " in 1 of 2 samples: 'a'."),
    ],
)
def test_batches_are_looked_through(batch: Any, field: str, whose: str):
    with pytest.raises(ValueError, match=f"^'{field}' holds NaN or infinite values{whose}"):
        FiniteBatches(lambda rows: batch)([{"id": "a"}, {"id": "b"}])


@pytest.mark.parametrize(
    "batch",
    [
        {
            "attention_mask": {"x": torch.tensor(NAN)},
            "masks": [np.array(NAN)],
            "x": [{"bool_masked_pos": torch.tensor(NAN)}],
        },
        {"x": [], "text": ["nan"], "ids": np.array([1]), "names": np.array(["a"], dtype=object), "y": None},
    ],
)
def test_batches_that_are_in_order_pass(batch: Any):
    assert FiniteBatches(lambda rows: batch)([]) is batch


@pytest.mark.parametrize("trainer", ["ContrastiveTrainer", "ImageTextRetrievalTrainer"])
def test_our_trainers_look_at_their_data(trainer: str, tmp_path: Path):
    family = CLIP if trainer == "ContrastiveTrainer" else FAMILIES["blip_retrieval"]
    model = wrap(family, "aurora_mode_approx")
    batch = family.inputs(model)
    rows = [{k: v[i] for k, v in batch.items() if isinstance(v, torch.Tensor)} for i in range(2)]
    for row in rows:
        row["pixel_values"] = row["pixel_values"] * float("inf")
    arguments = hf.TrainingArguments(
        str(tmp_path), max_steps=1, use_cpu=True, report_to="none", remove_unused_columns=False
    )
    made = getattr(peft_multimodal, trainer)(
        model, arguments, data_collator=hf.default_data_collator, train_dataset=rows
    )
    with pytest.raises(ValueError, match="'pixel_values' holds NaN"):
        made.train()
