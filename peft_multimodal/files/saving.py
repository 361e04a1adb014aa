"""Saving aside and renaming; loading with one clear message for whatever is wrong with the files; publishing.

PEFT's own `save_pretrained`, `push_to_hub` and `from_pretrained` work with these adapters too. What this adds: a failed or
interrupted save leaves the old adapter as it was, files are checked before the model is touched, and what is pushed has a
model card (PEFT's `push_to_hub` puts its own template in its place).
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, hf_hub_download
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn

from ..core.companions import CardNotes
from ..core.config import MultimodalConfig
from ..core.switching import tuner_of
from .card import CARD, renew_card

# What PEFT, torch and Python say of values that make no sense.
UNCLEAR = (TypeError, KeyError, AttributeError, IndexError, RuntimeError, ArithmeticError, MemoryError, AssertionError)


class AdapterError(ValueError):
    """The adapter's files can't be used; the message says why and what to do.

    Args:
        what: What was found.
        way_out: What to do.

    Examples:
        >>> print(AdapterError("The weights are cut off.", "Download them again."))
    """

    def __init__(self, what: str, way_out: str) -> None:
        super().__init__(what, way_out)
        self.what, self.way_out = what, way_out

    def __str__(self) -> str:
        return f"{self.what} {self.way_out}"


def save(model: PeftModel, folder: str | os.PathLike, notes: CardNotes | None = None, **kwargs: Any) -> Path:
    """`model.save_pretrained(folder)`, written aside and renamed: an interrupted save leaves the old files.

    What else the folder holds stays. On Linux the whole folder is exchanged in one step, unless it is this process's
    working directory. Then, and on other systems, its files are replaced one by one. PEFT's look at the embeddings,
    and on the Hub for how large they were, is left out where an adapter brings the rows of new tokens itself.

    Args:
        model: A `PeftModel`. All of its adapters are saved.
        folder: Made if it isn't there.
        notes: What the model card is to say of metrics, languages and classes. The rest it takes from the files.
        kwargs: Passed on to `PeftModel.save_pretrained`. Files are always safetensors.

    Raises:
        NotADirectoryError: `folder` is a file.
        ValueError: `safe_serialization=False` was asked for.

    Examples:
        >>> save(model, "my-adapter")
    """
    _check_options(kwargs)
    folder = Path(folder)
    _save(model, folder, Path(os.path.abspath(folder)).name, notes, **kwargs)
    return folder


def _check_options(options: dict[str, Any]) -> None:
    if not options.get("safe_serialization", True):
        raise ValueError(
            "safe_serialization=False: adapters are saved and loaded as safetensors alone, and an older adapter_model.safetensors "
            "would stay beside the new file. Leave it out."
        )


def _save(model: PeftModel, folder: Path, name: str, notes: CardNotes | None, **kwargs: Any) -> None:
    """As `save`; `name` is what the card calls the place."""
    if any(getattr(tuner_of(config), "owns_token_rows", False) for config in model.peft_config.values()):
        kwargs.setdefault("save_embedding_layers", False)
    with written_aside(folder) as aside:
        model.save_pretrained(str(aside), **kwargs)
        renew_card(model, aside, name, notes)


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder`, on the same disk, whose files take the place of those of `folder` at the end.

    It begins with the card that `folder` has: what its reader has written stays. After an error `folder` is as it was.

    Raises:
        NotADirectoryError: `folder` is a file.
    """
    folder = folder.resolve()  # a link stays, and what it leads to is replaced
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file. Name a folder for the adapter.")
    beside = folder if folder.is_mount() else folder.parent
    beside.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=beside))
    try:
        if (folder / CARD).is_file():
            shutil.copy(folder / CARD, aside)
        yield aside
        aside.chmod(0o755)
        _put_in_place(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _put_in_place(aside: Path, folder: Path) -> None:
    """Let `folder` hold what `aside` holds, and keep what else it holds (a trainer's state)."""
    if not folder.exists():
        try:
            os.replace(aside, folder)
            return
        except OSError:  # another process has just made it
            if not folder.exists():
                raise
    if _exchange(aside, folder):
        return
    # File by file, the config last: an adapter without a config is no adapter.
    files = sorted((p for p in aside.rglob("*") if p.is_file()), key=lambda p: p.name == CONFIG_NAME)
    targets = {file: folder / file.relative_to(aside) for file in files}
    for target in targets.values():  # what stands in the way is found before anything is replaced
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise IsADirectoryError(f"{target} is a folder, and the adapter has a file of this name. Move it away.")
    for file, target in targets.items():
        os.replace(file, target)


def _exchange(aside: Path, folder: Path) -> bool:
    """Let two folders change places in one step, what else is in the second staying; False where that can't be.

    Whoever dies at any moment leaves the old adapter or the new one, and two who save at once leave the later one's.
    """
    exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if exchange is None or folder.is_mount() or _stands_in(folder):
        return False
    try:
        _carry_over(folder, aside)
    except OSError:
        return False
    at_here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if exchange(at_here, os.fsencode(aside), at_here, os.fsencode(folder), swap) != 0:
        return False
    _carry_over(aside, folder)  # what another process has put there in between
    os.utime(folder)
    return True


def _stands_in(folder: Path) -> bool:
    try:
        return Path.cwd().is_relative_to(folder)
    except FileNotFoundError:  # it has been deleted
        return False


def _carry_over(source: Path, target: Path) -> None:
    """Give `target` what `source` has beside it: the same files and links, and folders like its own; else OSError."""
    for entry in os.scandir(source):
        place = target / entry.name
        with suppress(FileNotFoundError):  # another process has taken it away
            if entry.is_dir(follow_symlinks=False) and not os.path.ismount(entry):
                place.mkdir(exist_ok=True)
                _carry_over(Path(entry), place)
            elif not os.path.lexists(place):
                os.link(entry, place, follow_symlinks=False)
            elif place.is_dir() and not place.is_symlink():
                raise FileExistsError(f"{entry.path} is a link, a file or another disk, {place} a folder")
    owner = source.stat()
    os.chown(target, owner.st_uid, owner.st_gid)
    shutil.copystat(source, target)


def push_to_hub(
    model: PeftModel,
    repo_id: str,
    notes: CardNotes | None = None,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload adapter",
    create_pr: bool = False,
    **kwargs: Any,
) -> CommitInfo:
    """Save the adapters with their model card and companion files, and upload them as one commit.

    The text that a card in the repository has beside ours stays. A base model at a local path isn't named on the
    card.

    Args:
        model: A `PeftModel`. All of its adapters are pushed.
        repo_id: "user/name"; made if it isn't there.
        notes: As of `save`.
        private: Whether a repository that is made is private.
        token: Of the Hub; by default the one that `hf auth login` keeps.
        revision: Branch; made if it isn't there.
        commit_message: Of the commit that is returned.
        create_pr: Open a pull request instead of pushing to the branch.
        kwargs: Passed on to `PeftModel.save_pretrained`.

    Raises:
        ValueError: `safe_serialization=False` was asked for.

    Examples:
        >>> push_to_hub(model, "user/adapter", CardNotes(metrics={"mean recall": 22.4}, license="apache-2.0"))
    """
    _check_options(kwargs)
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made, "adapter")
        with suppress(EntryNotFoundError):
            card = hf_hub_download(repo_id, CARD, revision=revision, token=token)
            folder.mkdir()
            shutil.copyfile(card, folder / CARD)
        _save(model, folder, repo_id, notes, **kwargs)
        return api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message, create_pr=create_pr
        )


def load(model: nn.Module, name_or_path: str | os.PathLike, **kwargs: Any) -> PeftModel:
    """`PeftModel.from_pretrained(model, name_or_path)` after a check of the files.

    Nothing is allocated for what the config says before the weights have been found to fit it.

    Args:
        model: The base model.
        name_or_path: A folder, or the id of a repository on the Hub.
        kwargs: Passed on to `PeftModel.from_pretrained` (adapter_name, is_trainable, revision, subfolder, token, ...).

    Raises:
        TypeError: `model` is no model.
        AdapterError: a file is missing, truncated or of an unknown kind, or the config asks for what can't be built.
        ValueError: the adapter doesn't fit the model.

    Examples:
        >>> save(model, "my-adapter")
        >>> loaded = load(clip, "my-adapter")
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"load(model, folder) takes the base model itself first, got {model!r} ({type(model).__name__}). Build it before: "
            "model = AutoModel.from_pretrained(...), or the class that the adapter was trained with."
        )
    folder = find_adapter(name_or_path, **kwargs)
    kind = check_files(folder)["peft_type"]
    if kwargs.get("subfolder") and (is_offline_mode() or kwargs.get("local_files_only")):
        # Here PEFT looks for the weights in subfolder/subfolder, or asks the Hub for them.
        name_or_path = folder
        kwargs = {k: v for k, v in kwargs.items() if k not in ("subfolder", "revision", "local_files_only")}
    ours = issubclass(PEFT_TYPE_TO_CONFIG_MAPPING[kind], MultimodalConfig)
    if ours and kwargs.get("autocast_adapter_dtype", True):
        kwargs.setdefault("low_cpu_mem_usage", True)
    try:
        return PeftModel.from_pretrained(model, str(name_or_path), **kwargs)
    except UNCLEAR as error:
        if not ours:
            raise
        raise AdapterError(
            f"The adapter in {folder} can't be built: {type(error).__name__}: {error}.",
            f"Restore its {CONFIG_NAME} from where it was saved.",
        ) from error


def find_adapter(name_or_path: str | os.PathLike, **kwargs: Any) -> Path:
    """The folder that holds the adapter's config and weights: a local one, or that of the Hub's files in the cache.

    Raises:
        AdapterError: there is none.
    """
    root, subfolder = Path(name_or_path), kwargs.get("subfolder")
    folder = root / (subfolder or "")
    if folder.is_dir():
        return folder
    if root.is_file():
        raise AdapterError(f"{root} is a file, and an adapter is a folder.", f"Name the folder: {root.parent}")
    if root.is_dir():
        there = _subfolders(root)
        raise AdapterError(
            f"The folder {root} has no subfolder {subfolder!r}.",
            f"There are adapters in {', '.join(there)}." if there else "Leave the subfolder out, or check its name.",
        )
    weights = _download(str(name_or_path), SAFETENSORS_WEIGHTS_NAME, kwargs)
    config = _download(str(name_or_path), CONFIG_NAME, kwargs)
    if config is None:
        raise AdapterError(
            f"{_place(str(name_or_path), kwargs)} on the Hub has no {CONFIG_NAME}: it is no adapter.",
            "Check the name and the revision; of several adapters in one repository name one as the subfolder.",
        )
    return Path(weights or config).parent


def _subfolders(folder: Path) -> list[str]:
    return sorted(file.parent.name for file in folder.glob(f"*/{CONFIG_NAME}"))


def _download(name: str, file: str, kwargs: dict[str, Any]) -> str | None:
    """The file of a repository in the cache; None where there is none of this name."""
    asked = ("subfolder", "revision", "token", "cache_dir", "force_download", "local_files_only")
    try:
        return hf_hub_download(name, file, **{key: kwargs[key] for key in asked if key in kwargs})
    except HFValidationError:
        raise AdapterError(
            f"There is no folder {name!r}, and it is no repository's id.",
            "Check the path; repositories are called 'owner/name'.",
        ) from None
    except LocalEntryNotFoundError as error:
        raise AdapterError(
            f"{_place(name, kwargs)} is no folder and isn't in the cache, and the Hub can't be asked ({_first_line(error)}).",
            "Download it once while online, or name a folder.",
        ) from error
    except EntryNotFoundError:
        return None
    except HfHubHTTPError as error:
        raise AdapterError(
            f"{_place(name, kwargs)} is no folder, and the Hub doesn't give it: {_first_line(error)}",
            "Check the name and the revision; a private repository needs token=... or `hf auth login`.",
        ) from error


def _place(name: str, kwargs: dict[str, Any]) -> str:
    return ", ".join([repr(name), *(f"{key} {kwargs[key]!r}" for key in ("subfolder", "revision") if kwargs.get(key))])


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "Request ID" not in line]
    return lines[0] if lines else type(error).__name__


def check_files(folder: Path) -> dict[str, Any]:
    """Raise AdapterError unless the folder holds a readable adapter; returns what its config holds."""
    config_file, weights_file = folder / CONFIG_NAME, folder / SAFETENSORS_WEIGHTS_NAME
    restore = "Restore it from where the adapter was saved."
    if not config_file.is_file():
        if there := _subfolders(folder):
            raise AdapterError(
                f"{folder} has no {CONFIG_NAME}, but there are adapters in its subfolders: {', '.join(there)}.",
                f"Name one: subfolder={there[0]!r}, or --subfolder {there[0]} on the command line.",
            )
        raise AdapterError(
            f"{folder} has no {CONFIG_NAME}: it is no adapter folder, or its save was interrupted.",
            "Name the folder that an adapter was saved to, or save it again.",
        )
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # unreadable, not UTF-8, a number of thousands of digits
        raise AdapterError(f"{config_file} is no JSON file ({error}).", restore) from None
    if not isinstance(config, dict):
        raise AdapterError(f"{config_file} must hold a JSON object, not a {type(config).__name__}.", restore)
    kind = config.get("peft_type")
    if kind is None:
        raise AdapterError(
            f"{config_file} has no peft_type, so it doesn't say which method it is of: it was written by another library, "
            "or by hand.",
            "Save the adapter with PEFT, or convert it.",
        )
    if not isinstance(kind, str) or kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise AdapterError(
            f"{config_file} names the method {kind!r}, which neither PEFT nor this package knows.",
            "Import the package that defines it, or upgrade peft and peft-multimodal.",
        )
    if not weights_file.is_file():
        found = (f for f in folder.iterdir() if f.is_file())
        others = sorted(f.name for f in found if f.suffix in (".bin", ".pt", ".pth", ".safetensors"))
        raise AdapterError(
            f"{folder} has no {SAFETENSORS_WEIGHTS_NAME}; other formats are not loaded.",
            f"There is {', '.join(others)}: if you trust where it is from, load it by PEFT's PeftModel.from_pretrained and save "
            "it again, or rename it if it is the file."
            if others
            else "Save or download the adapter again.",
        )
    try:
        with safe_open(weights_file, framework="pt") as tensors:
            list(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{weights_file} is damaged or truncated ({error}).", "Save or download it again.") from None
    return config
