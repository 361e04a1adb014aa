"""Contrastive training of dual encoders, with a memory of hard pairs or without.

Over the B pairs of a step on all processes together, with l_i a pair's loss of both directions and w_i c_i its weight
(see `hard_samples`; 1 without a bank),

    L = 1/B sum_i w_i c_i l_i + lambda 1/B sum_i (||v_i - v_i'||^2 + ||t_i - t_i'||^2) / 2

l_i is InfoNCE's, or the sigmoid loss's for a model that was trained by it (see `losses`). v', t' are what the model gives with its adapters off: staying near to it is what keeps general knowledge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.anatomy import base_model
from ..core.modes import unadapted
from .gathering import gather_with_gradients
from .hard_samples import HardSampleBank, default_collator, split_keys
from .hard_samples.trainer import RememberingTrainer
from .losses import dual_embeddings, pair_losses, sigmoid_pair_losses
from .temperature import logit_bias, logit_scale


class ContrastiveTrainer(RememberingTrainer):
    """`transformers.Trainer` with the contrastive loss of all processes' pairs, for every dual encoder.

    It serves any adapter, and full fine-tuning. The loss sees the pairs of all processes: two of them give the
    gradients of one on the joint batch. With gradient accumulation each step of it has a loss of its own; a larger
    batch with `rows_at_once` gives the gradients of the whole in the memory of a part.

    With a bank, a map-style data set is sampled by it, in every process alike. One that streams comes in its own
    order, and the bank acts by the loss weights alone. Its ids must be known to the bank. The bank is saved with the
    model and in every checkpoint, and resumed with the sampler to the last bit.

    `evaluate()` gives eval_loss, of each process's batches alone; `compute_metrics` gets image embeddings as
    predictions and text embeddings as labels, `(rows, d)` each, of unit length.

    Args:
        model: A dual encoder, bare or in a `PeftModel`.
        args: `TrainingArguments`.
        data_collator: As for `HardSampleBank.from_model`, whose default it shares.
        train_dataset: Rows of images and texts, or whatever the collator takes.
        fixed: What else `Trainer` takes by position, `eval_dataset` first.
        hard_samples: The bank of `train_dataset`.
        keep_close: lambda; 0 leaves the term out. It takes a second pass without adapters.
        rows_at_once: Rows of a process's batch that go through the model together (GradCache, Gao et al. 2021):
            embeddings first, then the loss of the whole batch, then each part again with its share of the gradient.
        chunk_size: Draws of the sampler between two looks at the difficulties; None draws an epoch at once.
        encode: `(model, batch) -> (image, text)` for models whose output has no `image_embeds` and `text_embeds`.
        loss: "infonce" (also called "softmax") or "sigmoid"; None takes the one that the model was trained by: sigmoid
            where it has a `logit_bias`, as SigLIP has.
        multi_positive: Pairs of a batch that share an image or a text are each other's matches; otherwise they are
            left out as negatives of each other. Images are known by the collator's `id_column`, texts by themselves.
        kwargs: The other arguments of `Trainer`, and `saved_modules_lr`, `tower_lr` and `role_lr` of
            `parameter_groups`.

    Raises:
        ValueError: batches of one pair, a model that is no dual encoder, or a bank of other pairs.

    Examples:
        >>> from transformers import TrainingArguments
        >>> args = TrainingArguments("out", learning_rate=1e-3, remove_unused_columns=False)
        >>> ContrastiveTrainer(model, args, collator, dataset, rows_at_once=4).train()
    """

    joint_loss = True

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
        train_dataset: Any = None,
        *fixed: Any,
        hard_samples: HardSampleBank | None = None,
        keep_close: float = 0.0,
        rows_at_once: int | None = None,
        chunk_size: int | None = 1024,
        encode: Callable[[nn.Module, Mapping[str, Any]], tuple[Tensor, Tensor]] | None = None,
        loss: Literal["infonce", "softmax", "sigmoid"] | None = None,
        multi_positive: bool = False,
        **kwargs: Any,
    ) -> None:
        if not (isinstance(keep_close, (int, float)) and 0 <= keep_close < float("inf")):
            raise ValueError(f"keep_close must be a number >= 0, got {keep_close!r}.")
        if loss not in (None, "infonce", "softmax", "sigmoid"):
            raise ValueError(f"loss must be 'infonce', 'sigmoid' or None, got {loss!r}.")
        for name, value in (("rows_at_once", rows_at_once), ("chunk_size", chunk_size)):
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be a positive integer or None, got {value!r}.")
        self.keep_close, self.rows_at_once, self.loss = keep_close, rows_at_once, loss
        self.multi_positive = multi_positive
        self.encode = encode or dual_embeddings
        kwargs |= {"hard_samples": hard_samples, "chunk_size": chunk_size}
        super().__init__(model, args, data_collator, train_dataset, *fixed, **kwargs)
        self.can_return_loss = True
        if data_collator is None and (row := _first_row(self.train_dataset, self.eval_dataset)) is not None:
            self.data_collator.collator = default_collator(self.model, row)

    def _adopt(self, model: Any) -> None:
        if self.keep_close and not hasattr(model, "disable_adapter"):
            raise ValueError("keep_close compares with the model without its adapters: it needs a PeftModel.")
        if self.loss == "sigmoid" and logit_bias(model) is None:
            raise ValueError(
                f"{type(base_model(model)).__name__} has no logit_bias, which the sigmoid loss needs: it was trained by "
                "softmax; leave loss= out."
            )
        super()._adopt(model)

    # --- the loss ---

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs, keys = self._keys(inputs)
        image, text = self._embed(model, inputs)
        loss = self._loss(model, image, text, self._temper(model), inputs, keys)
        return (loss, {"image_embeds": image, "text_embeds": text}) if return_outputs else loss

    def _keys(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What the model reads, and the pairs' keys; without ids each image is another."""
        if "sample_ids" not in inputs:
            count = len(inputs["input_ids"])
            rows = torch.arange(count, device=inputs["input_ids"].device) + self.args.process_index * count
            inputs = {**inputs, "sample_ids": rows}
        return split_keys(inputs)

    def _module(self, model: nn.Module) -> Any:
        return self.accelerator.unwrap_model(model, keep_torch_compile=False)

    def _temper(self, model: nn.Module) -> list[Tensor]:
        """What stands between cosines and the loss: the scale, and for the sigmoid loss the bias."""
        module = self._module(model)
        scale, bias = logit_scale(module).float(), logit_bias(module)
        return [scale] if bias is None or self.loss in ("infonce", "softmax") else [scale, bias]

    def _embed(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Unit embeddings, float32 (B, d) each."""
        if self.encode is dual_embeddings:
            image, text = dual_embeddings(model, inputs)
        else:  # it may call parts of the model, which a wrapper around it knows nothing of
            image, text = self._inside(model, self.encode, inputs)
        with torch.autocast(image.device.type, enabled=False):
            return F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)

    def _loss(
        self,
        model: nn.Module,
        image: Tensor,
        text: Tensor,
        temper: list[Tensor],
        inputs: Mapping[str, Any],
        keys: dict[str, Tensor],
    ) -> Tensor:
        """The module docstring's L as this process has it: the mean over processes is L, and its gradient L's."""
        training = model.training
        gather: Any = gather_with_gradients if training and self.args.world_size > 1 else lambda rows: rows
        every_image, every_text = gather(image), gather(text)
        every = {name: gather(key) for name, key in keys.items()}
        first = self.args.process_index * len(image) if gather is gather_with_gradients else 0
        with torch.autocast(image.device.type, enabled=False):
            of_pairs: Any = sigmoid_pair_losses if len(temper) == 2 else pair_losses
            ids = every["image"], every["text"]
            losses = of_pairs(
                image, text, every_image, every_text, *temper, *ids, first, multi_positive=self.multi_positive
            )
        if training and self.bank is not None:
            scale = temper[0].detach()
            weights = self._visit(every_image.detach(), every_text.detach(), scale, every, first, len(image))
            losses = losses * weights.to(losses)
        loss = losses.mean()
        if training and self.keep_close:
            with unadapted(self._module(model)), torch.no_grad(), self.accelerator.autocast():
                images, texts = self.encode(self._module(model), inputs)
            apart = [(x - F.normalize(y.float(), dim=-1)).square().sum(-1) for x, y in ((image, images), (text, texts))]
            loss = loss + self.keep_close * (apart[0] + apart[1]).mean() / 2
        return loss

    # --- a batch in parts ---

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        if self.rows_at_once is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        optimizer: Any = self.optimizer
        if callable(getattr(optimizer, "train", None)):  # schedule-free ones have modes
            optimizer.train()
        inputs, keys = self._keys(self._prepare_inputs(inputs))
        size = len(inputs["input_ids"])
        parts = [part_of(inputs, start, start + self.rows_at_once, size) for start in range(0, size, self.rows_at_once)]
        states, embedded = [], []
        with torch.no_grad(), self.compute_loss_context_manager():
            for part in parts:
                states.append(random_states(self.args.device))
                embedded.append(self._embed(self._module(model), part))
        image, text = (torch.cat(side).requires_grad_() for side in zip(*embedded, strict=True))
        temper = [number.detach().requires_grad_() for number in self._temper(model)]
        with self.compute_loss_context_manager():
            loss = self._loss(model, image, text, temper, inputs, keys)
        share = loss / self.current_gradient_accumulation_steps
        by_image, by_text, *by_temper = torch.autograd.grad(share, (image, text, *temper))
        for i, part in enumerate(parts):
            rows = slice(i * self.rows_at_once, (i + 1) * self.rows_at_once)
            last = i == len(parts) - 1
            # Only the last part's backward exchanges the gradients that have added up.
            with (
                nullcontext() if last else self.accelerator.no_sync(model),
                with_random_states(states[i], self.args.device),
            ):
                with self.compute_loss_context_manager():
                    again = self._embed(model, part)
                    surrogate = (again[0] * by_image[rows]).sum() + (again[1] * by_text[rows]).sum()
                    if last:
                        tempers = zip(self._temper(model), by_temper, strict=True)
                        surrogate = surrogate + sum(number * by for number, by in tempers if number.requires_grad)
                self.accelerator.backward(surrogate)
        return share.detach()


def _first_row(*datasets: Any) -> Any:
    """Of the first data set that there is; evaluation takes a dict of them."""
    parts = [part for data in datasets for part in (data.values() if isinstance(data, dict) else [data])]
    return next((next(iter(part), None) for part in parts if part is not None), None)


def part_of(inputs: Mapping[str, Any], start: int, stop: int, size: int) -> dict[str, Any]:
    """A part of a batch; what isn't a tensor or a list of the batch's rows goes with every part."""

    def has_rows(value: Any) -> bool:
        return isinstance(value, list) or (isinstance(value, Tensor) and value.ndim > 0)

    return {
        name: value[start:stop] if has_rows(value) and len(value) == size else value for name, value in inputs.items()
    }


def random_states(device: torch.device) -> list[Tensor]:
    on_device = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *on_device]


@contextmanager
def with_random_states(states: list[Tensor], device: torch.device) -> Iterator[None]:
    """Within it random numbers are drawn as they were before: dropout is the same in both passes."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(states[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(states[1], device)
        yield
