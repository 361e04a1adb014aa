"""A Trainer that visits hard pairs more often, and remembers how hard they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor

from ...rows import streams
from ..checkpoints import rows_of_a_step
from ..gathering import gather_with_gradients
from ..trainer import AdapterTrainer
from .bank import FILE, HardSampleBank, load_arrays, save_arrays
from .difficulty import difficulties
from .keys import SampleIds
from .sampler import HardSampleSampler

SAMPLER_FILE = "hard_sample_sampler.safetensors"


class RememberingTrainer(AdapterTrainer):
    """Samples by a bank, shows it each step's pairs, and keeps both in its checkpoints; without a bank an `AdapterTrainer`.

    Args:
        hard_samples: The bank of `train_dataset`.
        chunk_size: Draws of the sampler between two looks at the difficulties; None draws an epoch at once.
    """

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        *fixed: Any,
        hard_samples: HardSampleBank | None = None,
        chunk_size: int | None = 1024,
        **kwargs: Any,
    ) -> None:
        if hard_samples is not None and not isinstance(hard_samples, HardSampleBank):
            raise TypeError(f"hard_samples takes a HardSampleBank, got {type(hard_samples).__name__}.")
        self.bank: Any = hard_samples  # or None
        self.chunk_size = chunk_size
        self.sampler: HardSampleSampler | None = None
        self._resume_sampler: dict[str, np.ndarray] | None = None
        self._positions: Any = None  # the bank's rows in a data set that doesn't stream
        if self.bank is not None and train_dataset is not None and not streams(train_dataset):
            self._positions = self.bank.positions_in(train_dataset)  # another data set is an error here
            self.bank.dataset = train_dataset
        if self._positions is not None and args and args.world_size > 1 and args.accelerator_config.dispatch_batches:
            raise ValueError(
                "dispatch_batches=True lets the first process alone draw, and the other processes' banks fall behind: "
                "leave it out, or stream the data set."
            )
        self._first_bank = None  # what each model that model_init makes starts from
        if self.bank is not None and kwargs.get("model_init") is not None:
            self._first_bank = {name: array.copy() for name, array in self.bank.state().items()}
        super().__init__(model, args, data_collator, train_dataset, *fixed, **kwargs)

    def _adopt(self, model: Any) -> None:
        super()._adopt(model)
        banks = getattr(model.base_model, "banks", None) if isinstance(model, PeftModel) else None
        if self.bank is not None and banks is not None:  # of a method that saves the bank with its adapter
            banks.update(dict.fromkeys(model.active_adapters, self.bank))

    # --- the sampler hook ---

    def get_train_dataloader(self) -> Any:
        if self.bank is None:
            return super().get_train_dataloader()
        with self._collating(SampleIds(self.data_collator, self.bank.id_column, self.bank.image_id_column)):
            return super().get_train_dataloader()

    def _draws(self) -> int | None:
        return super()._draws() if self._positions is None else len(self._sampler())

    def _order(self) -> dict[str, int]:
        return super()._order() if self._positions is None else {}  # the sampler and the bank know theirs

    def _sampler(self) -> HardSampleSampler:
        rows = rows_of_a_step(self._batches())
        return HardSampleSampler(self.bank, self._positions, rows, self.chunk_size, self.args.seed)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self._positions is None:
            return super()._get_train_sampler(train_dataset)
        self.sampler = self._sampler()
        if self._resume_sampler is not None:
            self.sampler.load_state(self._resume_sampler)
            self._resume_sampler = None
        return self.sampler

    # --- checkpoints ---

    def _make_ready(self, checkpoint: Path | None) -> None:
        super()._make_ready(checkpoint)
        if self.bank is not None:
            if self._first_bank is not None:
                self.bank.load_state(self._first_bank)
            if checkpoint is not None:
                self._resume(checkpoint)
            self._agree()

    def _resume(self, folder: Path) -> None:
        if not (folder / FILE).is_file():
            raise FileNotFoundError(f"{folder} has no {FILE}: it is a checkpoint of a training without a bank.")
        if self._positions is not None and not self.args.ignore_data_skip:
            self._resume_sampler = load_arrays(folder / SAMPLER_FILE)[0]
            self._sampler().load_state(self._resume_sampler)  # refuses another sampler's
        self.bank.load_state(load_arrays(folder / FILE)[0])

    def _agree(self) -> None:
        """Every process starts from the first one's bank."""
        if self.args.world_size > 1:
            arrays = {name: torch.from_numpy(array).to(self.args.device) for name, array in self.bank.state().items()}
            for name in sorted(arrays):
                dist.broadcast(arrays[name], src=0)
            self.bank.load_state({name: array.cpu().numpy() for name, array in arrays.items()})

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.bank is not None:
            self.bank.save(output_dir or str(self.args.output_dir))

    def _save_beside(self, folder: Path) -> None:
        if self.sampler is not None:
            save_arrays(self.sampler.state(), folder / SAMPLER_FILE)

    # --- what a step tells ---

    def _visit(
        self, image: Tensor, text: Tensor, scale: Tensor, keys: dict[str, Tensor], first: int, count: int
    ) -> Tensor:
        """Show the bank the pairs of all processes; the weights (count,) of this one's."""
        bank = self.bank
        bank.queue.push(image, text, keys)
        local = slice(first, first + count)
        mine = {name: key[local] for name, key in keys.items()}
        values = difficulties(image[local], text[local], scale, mine, bank.queue, bank.settings)
        if count < len(image):
            values = gather_with_gradients(values)  # each computed once, so that all processes have the same bits
        sample = keys["sample"].cpu().numpy()
        bank.update(sample, values.cpu().numpy(), self.state.global_step)
        if self.sampler is not None:
            self.sampler.trained(len(sample))
        elif bank.since_ranked >= len(bank):  # no sampler says when an epoch starts
            bank.start_epoch()
        return torch.from_numpy(bank.loss_weights(sample)[local])
