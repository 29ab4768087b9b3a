"""A Trainer for a model with exits: where they start, how fast they learn, and that none is left out."""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils.data import Subset
from transformers import TrainerCallback
from transformers.trainer_utils import has_length
from transformers.utils import logging

from gaml_hf.models.losses_gaml import distillation_pairs, exit_weights

from .exit_start import LEAST_VARIATION, NUM_ROWS, collect_exit_states, input_variation, warm_start
from .robust_trainer import RobustTrainer


logger = logging.get_logger(__name__)

# The way out, where a loss of one's own would not train what the config says.
OTHER_LOSSES = (
    "Class weights go into `class_weights` of the config and label smoothing into `label_smoothing_factor`, for every "
    "exit; for anything else, override `compute_loss`: add to what `super().compute_loss` returns or, with "
    '`ga_mode="none"`, make the loss of `outputs.exit_logits`.'
)
BASE_CONFIG = "base_config.json"  # beside adapters; a `config.json` would have Transformers look for a whole model
# Of a config, by what another value does to a training that goes on: the exits would read something else; the loss is
# another one.
EXIT_READS = ("exit_layers", "exit_pooling", "exit_pooler", "exit_norm")
LOSS_FIELDS = (
    "exit_loss_weights",
    "class_weights",
    "distillation",
    "kd_reduction",
    "kd_temperature_growth",
    "alpha",
    "ga_mode",
    "ga_granularity",
    "stop_gradient_between_exits",
    "mixed_training",
)
EXIT_PARAMETER = re.compile(r"(^|\.)exit_(classifiers|poolers)\.")  # its name, also where PEFT has wrapped it


class ExitTrainer(RobustTrainer):
    """
    Trains a model with exits by the loss that its config says, Eq. 2 of Zhu et al. (2021).

    New exits start at what the pre-trained layers tell (`exit_warm_start`), learn at their own rate
    (`exit_learning_rate_multiplier`), and may wait until the last one has learned (`mixed_training`). Label smoothing
    (`label_smoothing_factor`) and the config's `class_weights` are part of L^CE at every exit; with the stock Trainer,
    label smoothing trains the last exit alone.

    Predictions are the logits, and `compute_metrics` gets them as in any example. One that has `ignore_keys`, as
    [`~gaml_hf.evaluation.ExitMetrics`] has, names what it does not need, and the predictions of `evaluate` and
    `predict` are then a tuple, (logits, exit_layer, exit_logits).

    Raises:
        ValueError: at construction, or when training starts, where the model has no exits, where `compute_loss_func`
            would leave exits or `class_weights` out, where `label_smoothing_factor` does not lie in [0, 1], or where
            exits are new and frozen, see [`~ExitsMixin.exit_modules`]. When a training is resumed with another
            `exit_learning_rate_multiplier`, or with exits that read something else; another loss is a warning. In the
            first step, where a `compute_loss` of a subclass leaves exits out.
        FloatingPointError: when training starts, where the encoder gives numbers that are not finite.
    """

    aligns = False  # whether steps are aligned; see [`GamlTrainer`]

    def __init__(self, *args, **kwargs):
        self._given_temperature: float | None = None  # `kd_temperature`, while it grows in a training
        super().__init__(*args, **kwargs)
        self.label_smoother = None  # it would take the labels away from the model; `compute_loss` has its own way
        self.add_callback(_ExitSchedule(self))

    @property
    def bare_model(self) -> Module:
        """The model itself, also where PEFT has put another around it."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def first_joint_step(self) -> int:
        """The first step in which all exits learn, from 0; see `mixed_training`. They have one step at least."""
        share, max_steps = self.model.config.mixed_training, self.state.max_steps
        return min(math.ceil(share * max_steps), max_steps - 1)

    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, self._with_smoothing(inputs), *args, **kwargs)

    def _with_smoothing(self, inputs: dict[str, Any]) -> dict[str, Any]:
        smoothing = self.args.label_smoothing_factor
        return {**inputs, "smoothing": smoothing} if smoothing else inputs

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if ignore_keys is None:
            ignore_keys = getattr(self.compute_metrics, "ignore_keys", None)
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)

    # Where they start and how fast they learn

    def _start_exits(self, exit_layers: list[int]) -> None:
        """Look at what the exits read of some training rows, and let the new ones of `exit_layers` start there."""
        model, config = self.bare_model, self.model.config
        if config.pipeline_task == "image-classification":
            return  # an encoder of images may start at random, and its exits read maps of several sizes
        if self._is_sharded or not has_length(self.train_dataset):
            why = "the model is sharded" if self._is_sharded else "`train_dataset` has no length"
            tell = logger.warning if config.exit_warm_start else logger.info
            tell(f"New exits start at random, without `exit_warm_start`, and their inputs are not looked at: {why}.")
            return
        generator = torch.Generator().manual_seed(self.args.seed)
        chosen = torch.randperm(len(self.train_dataset), generator=generator)[:NUM_ROWS].sort().values.tolist()
        rows = self.train_dataset
        rows = rows.select(chosen) if hasattr(rows, "select") else Subset(rows, chosen)
        with torch.random.fork_rng(devices=[]):  # a data loader draws a number when it starts
            # No more than there are, which `dataloader_drop_last` would leave out.
            world_size = self.args.world_size  # of which a batch that is split must be a multiple
            batch_size = min(self.args.eval_batch_size, len(chosen) // world_size)
            batch_size = max(world_size, batch_size // world_size * world_size)
            batches = self._get_dataloader(rows, "Training", batch_size)
            states, labels = collect_exit_states(
                model, (self._prepare_inputs(batch) for batch in batches), self.accelerator.gather_for_metrics
            )
        finite = states.isfinite().all(dim=2).all(dim=0).tolist()  # one wait for the GPU
        if not all(finite):
            raise FloatingPointError(
                f"Training did not start: layer {config.exit_layers[finite.index(False)]} of the model makes numbers "
                "that are not finite (NaN or infinite) of training rows. Look for broken weights, or for a type too "
                "narrow for them (`fp16`)."
            )
        variation = input_variation(states)
        told = ", ".join(f"{m}: {share:.3g}" for m, share in zip(config.exit_layers, variation, strict=True))
        logger.info(f"How much an exit's input varies from text to text, beside its length: {told}.")
        blind = [m for m, share in zip(config.exit_layers, variation, strict=True) if share < LEAST_VARIATION]
        if blind and config.exit_norm == "none":
            logger.warning(
                f"The inputs of exits {str(blind)[1:-1]} vary by less than {LEAST_VARIATION:.0%} of their length from "
                "text to text, and such exits tend to answer with the most frequent class. Use "
                '`exit_pooling="mean"`, or scale them (`exit_norm="layer"`).'
            )
        if config.exit_warm_start:
            warm_start(model, states, labels, exit_layers)
            if world_size > 1:  # nothing else would mend a last digit that two processors round differently
                for name, parameter in model.named_parameters():
                    if EXIT_PARAMETER.search(name):
                        torch.distributed.broadcast(parameter.data, 0)

    def create_optimizer(self, *args, **kwargs):
        """As the stock Trainer's; the exits' parameters in groups of their own, with their own learning rate."""
        is_ours = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        multiplier = self.model.config.exit_learning_rate_multiplier
        if not is_ours or multiplier == 1:
            return optimizer
        exits = {id(p) for name, p in self.model.named_parameters() if EXIT_PARAMETER.search(name)}
        for group in list(optimizer.param_groups):
            own = [p for p in group["params"] if id(p) in exits]
            if own and len(own) == len(group["params"]):
                group["lr"] *= multiplier
            elif own:
                group["params"] = [p for p in group["params"] if id(p) not in exits]
                optimizer.add_param_group({**group, "params": own, "lr": group["lr"] * multiplier})
        return optimizer

    def _check_resume(self, checkpoint: Path) -> None:
        """The optimizer's groups, and the learning rate of each, are stored: they cannot be others on a resume."""
        config = self.model.config
        # A checkpoint that does not say it is of a time when exits read [CLS] and learned at the rate of the encoder.
        stored = {"exit_learning_rate_multiplier": 1.0, "exit_pooling": "cls"} | self._stored_config(checkpoint)
        for name in ("exit_learning_rate_multiplier", *EXIT_READS):
            if (now := getattr(config, name)) != (then := stored.get(name, now)):
                raise ValueError(
                    f"`{name}` must be as in the checkpoint to go on from, `{checkpoint}`, where it is {then}. "
                    f"Got {now}."
                )
        changed = [name for name in LOSS_FIELDS if getattr(config, name) != stored.get(name, getattr(config, name))]
        if changed:
            told = ", ".join(f"`{name}` {getattr(config, name)} (there {stored[name]})" for name in changed)
            logger.warning(f"The training goes on from `{checkpoint}` with another loss: {told}.")

    def _stored_config(self, checkpoint: Path) -> dict[str, Any]:
        path = checkpoint / ("config.json" if self.bare_model is self.model else BASE_CONFIG)
        if not path.is_file():  # adapters of an earlier version
            return self.bare_model.config.to_dict()
        return json.loads(path.read_text(encoding="utf-8"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        config = self.bare_model.config  # of a new model, where there is a `model_init`
        if config.kd_temperature_growth > 1:  # go on from where it had grown to
            if self._given_temperature is None:  # else of a training before, which did not come to its end
                self._given_temperature = config.kd_temperature
            config.kd_temperature = self._stored_config(Path(resume_from_checkpoint))["kd_temperature"]

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save and self.bare_model is not self.model:  # PEFT saves its own config alone
            self.bare_model.config.to_json_file(Path(output_dir or self.args.output_dir) / BASE_CONFIG)

    # Whether all of them learn

    def training_step(self, model, inputs, num_items_in_batch=None):
        own = getattr(self.compute_loss, "__func__", None)
        is_ours = getattr(own, "__module__", "").rpartition(".")[0] == __package__
        if self._loss_is_finite is not None or is_ours:
            return super().training_step(model, inputs, num_items_in_batch)
        # With the `compute_loss` of a subclass: see what its loss reaches, before a weight has moved.
        reached: list[Tensor] = []  # gradients of the loss at `exit_logits`, (batch_size, num_exits, num_labels)

        def watch(module, args, output) -> None:
            output.exit_logits.register_hook(reached.append)

        hook = self.model.register_forward_hook(watch)
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        finally:
            hook.remove()
        self._check_own_loss(f"`{type(self).__name__}.compute_loss`", reached)
        return loss

    def _check_own_loss(self, name: str, reached: list[Tensor]) -> None:
        layers = self.model.config.exit_layers
        forgotten = [m for i, m in enumerate(layers) if not any(g[:, i].any() for g in reached)]
        if forgotten := [m for m in forgotten if m in self._learning_exits()]:
            raise ValueError(f"{name} leaves out exits {forgotten}: its loss has no gradient there. {OTHER_LOSSES}")

    def _learning_exits(self) -> set[int]:
        """The layers of the exits that have a part in L, as the config says."""
        config = self.model.config
        if self.bare_model.last_exit_alone:
            return set(config.exit_layers[-1:])
        students = {student for _, student in distillation_pairs(config.distillation, config.exit_layers)}
        return students | self._exits_of_ce()

    def _exits_of_ce(self) -> set[int]:
        """The layers of the exits that have a part in L^CE."""
        config = self.model.config
        weights = exit_weights(config.exit_layers, config.exit_loss_weights, self.bare_model.training_progress)
        return {m for m, weight in zip(config.exit_layers, weights, strict=True) if weight}

    def _determine_best_metric(self, *args, **kwargs) -> bool:
        # While the last exit learns alone, the others are no better than random: no such model is the best, and with
        # none to compare with, `EarlyStoppingCallback` does not count.
        return not self.bare_model.last_exit_alone and super()._determine_best_metric(*args, **kwargs)

    def _refuse_unsupported(self) -> None:
        super()._refuse_unsupported()
        config = self.model.config
        if not hasattr(config, "exit_layers"):
            raise ValueError(
                "`model` must be one with exits: load it by `GamlAutoModelForSequenceClassification.from_pretrained`. "
                f"Got a {type(self.model).__name__}."
            )
        if config.kd_temperature_growth > 1 and self.args.n_gpu > 1:
            raise ValueError(
                "`kd_temperature_growth` above 1 does not work with nn.DataParallel, whose copies of the model do not "
                "tell how sure the last exit is. Use torchrun, or show one GPU only. "
                f"Got `kd_temperature_growth={config.kd_temperature_growth}` and {self.args.n_gpu} GPUs."
            )
        if config.kd_temperature_growth > 1 and config.num_labels == 2:
            raise ValueError(
                "`kd_temperature_growth` above 1 is for three classes and more: of two, the largest probability is "
                f"never below the 0.5 where it stops. Got `kd_temperature_growth={config.kd_temperature_growth}`."
            )
        if not 0 <= self.args.label_smoothing_factor <= 1:
            raise ValueError(f"`label_smoothing_factor` must lie in [0, 1]. Got {self.args.label_smoothing_factor}.")
        if self.compute_loss_func is not None and (
            self.aligns or config.class_weights or self._learning_exits() != {config.exit_layers[-1]}
        ):
            raise ValueError(
                "`compute_loss_func` takes the place of the loss of all exits (Eq. 1) and of `class_weights`, and is "
                f"for models that train their last exit alone. {OTHER_LOSSES}"
            )
        untrainable_exits = getattr(self.model, "untrainable_exits", None)  # which a PEFT model passes on
        if untrainable_exits is not None and (sentence := untrainable_exits()):
            raise ValueError(sentence)


class _ExitSchedule(TrainerCallback):
    """Starts new exits, all at once or, with mixed training (Kubaty et al., 2025), the last one first."""

    def __init__(self, trainer: ExitTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs: Any):
        if not any(parameter.requires_grad for parameter in self.trainer.model.parameters()):
            raise ValueError("`model` must have something to train, and all of its parameters are frozen.")
        config = self.trainer.model.config
        if config.ga_mode != "none" and not distillation_pairs(config.distillation, config.exit_layers):
            logger.warning(
                f"`ga_mode={config.ga_mode!r}` aligns nothing: no exit teaches another "
                f"(`distillation={config.distillation!r}`)."
            )
        if self.trainer._given_temperature is None:
            self.trainer._given_temperature = config.kd_temperature
        elif not state.global_step:  # a training before this one did not come to its end
            config.kd_temperature = self.trainer._given_temperature
        if not state.global_step and self.trainer.bare_model.exits_are_new:
            # With mixed training the others start when their time comes, at what the layers tell then.
            self.trainer._start_exits(config.exit_layers[-1:] if config.mixed_training else config.exit_layers)

    def on_step_begin(self, args, state, control, **kwargs: Any):
        trainer, model = self.trainer, self.trainer.bare_model
        model.training_progress = state.global_step / state.max_steps
        first = trainer.first_joint_step
        model.last_exit_alone = state.global_step < first
        if model.last_exit_alone:
            return
        if first and state.global_step == first and model.exits_are_new:
            trainer._start_exits(model.config.exit_layers[:-1])
        model.exits_are_new = False

    def on_step_end(self, args, state, control, **kwargs: Any):
        model = self.trainer.bare_model
        if (confidence := model.teacher_confidence) is None:
            return
        model.teacher_confidence = None
        total, num_rows = self.trainer.accelerator.reduce(confidence, "sum")  # of all ranks, who share the temperature
        if total / num_rows > 0.5:
            model.config.kd_temperature *= model.config.kd_temperature_growth

    def on_train_end(self, args, state, control, **kwargs: Any):
        if self.trainer.bare_model.last_exit_alone:
            logger.warning(
                f"The training ended at step {state.global_step} of {state.max_steps}, where `mixed_training="
                f"{self.trainer.model.config.mixed_training}` still had the last exit learn alone: the others are not "
                "trained."
            )
        getattr(self.trainer.model, "new_exit_weights", set()).clear()
        # Grown, it is in the checkpoints alone, for a resume: another training begins where this one did.
        self.trainer.model.config.kd_temperature = self.trainer._given_temperature
        self.trainer._given_temperature = None
