"""The private names of Trainer that addax_ds relies on; a failure here says which one moved."""

import ast
import importlib
import inspect
import re
from dataclasses import dataclass
from pathlib import Path

import accelerate
import pytest
import transformers
from accelerate import Accelerator
from transformers import Trainer

import addax_ds
from addax_ds.training.baseline import BaselineTrainer
from addax_ds.training.hub import UploadingMixin
from addax_ds.training.likelihood import LikelihoodMixin
from addax_ds.training.mixin import AddaxMixin
from addax_ds.training.resuming import ResumingMixin
from addax_ds.training.saving import SavingMixin
from addax_ds.training.steps import StepMixin
from addax_ds.training.trainer import AddaxTrainer

PACKAGE = Path(addax_ds.__file__).parent
TRAINERS = (
    LikelihoodMixin,
    AddaxMixin,
    StepMixin,
    ResumingMixin,
    SavingMixin,
    UploadingMixin,
    AddaxTrainer,
    BaselineTrainer,
)

OVERRIDDEN = {
    # method: parameters, module
    "_move_model_to_device": ("model device", "steps"),
    "_prepare_for_training": (
        "max_steps train_dataloader resume_from_checkpoint",
        "saving, resuming",
    ),
    "_load_from_checkpoint": ("resume_from_checkpoint model", "saving"),
    "_run_epoch": (
        "model epoch train_dataloader steps_in_epoch num_update_steps_per_epoch trial "
        "ignore_keys_for_eval start_time resume_from_checkpoint epochs_trained "
        "steps_trained_in_current_epoch",
        "saving",
    ),
    "_save_checkpoint": ("model trial", "saving"),
    "_load_best_model": ("", "saving"),
    "_finalize_training": ("trial num_train_samples start_time", "saving"),
    "_push_from_checkpoint": ("checkpoint_folder", "hub"),
    "_finish_current_push": ("", "hub"),
}
CALLED = {
    "_prepare_inputs": ("inputs", "steps, likelihood"),
    "_get_num_items_in_batch": ("batch_samples device", "steps"),
    "_remove_unused_columns": ("dataset description", "steps"),
    "_get_collator_with_removed_columns": ("data_collator description", "steps"),
}
ATTRIBUTES = {
    "_loss_shifts_labels": "likelihood",
    "_tr_loss": "resuming",
    "_globalstep_last_logged": "resuming",
    "_total_loss_scalar": "resuming",
    "_initial_global_step": "resuming",
}


@dataclass(frozen=True)
class Order:
    """Pieces of a method's source that have to follow each other.

    Attributes:
        method: of Trainer.
        module: of addax_ds.training, which relies on them.
        reason: why their order matters.
        texts: the pieces.
    """

    method: str
    module: str
    reason: str
    texts: tuple[str, ...]


ORDERS = (
    Order(
        "__init__",
        "steps",
        "shards of FSDP2 stay where they are, as the override is what moves the model",
        ("if (\n            self.place_model_on_device", "self._move_model_to_device(model, "),
    ),
    Order(
        "train",
        "saving",
        "without DeepSpeed weights would be read before they are sharded",
        ("self._load_from_checkpoint(resume_from_checkpoint)", "self._inner_training_loop,"),
    ),
    Order(
        "_inner_training_loop",
        "resuming",
        "a run resumes between what sets the step and what sets the sums that are logged",
        (
            "self._init_training_state(",
            "self._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)",
            "start_time = time.time()",  # a rehearsal does not count as training
            "self._tr_loss = torch.tensor(0.0",
            "self._total_loss_scalar = 0.0",
            "self._globalstep_last_logged = self.state.global_step",
            "self.callback_handler.on_train_begin(",
            "self._run_epoch(",
            "if self.control.should_training_stop:\n                break",
            "return self._finalize_training(",
        ),
    ),
    Order(
        "_prepare_for_training",
        "saving",
        "without a checkpoint it loads nothing, so that the override does, into a prepared model",
        (
            "self.create_optimizer()",
            "self.create_scheduler(num_training_steps=max_steps)",
            "self.model_wrapped = model",
            "if resume_from_checkpoint is not None:",
            "return model, train_dataloader",
        ),
    ),
    Order(
        "_run_epoch",
        "mixin",
        "gradients are gone when Trainer clips them, and a stopped run has been saved when the "
        "epoch ends",
        (
            "self.training_step(model, inputs, num_items_in_batch)",
            "self._tr_loss += tr_loss_step",
            "self._clip_grad_norm(model)",
            "self._get_grad_norm(model, grad_norm=grad_norm)",
            "self.optimizer.step()",
            "self.callback_handler.on_step_end(",
            "self._maybe_log_save_evaluate(",
            "if self.control.should_epoch_stop or self.control.should_training_stop:",
            "self.callback_handler.on_epoch_end(",
        ),
    ),
    Order(
        "_maybe_log_save_evaluate",
        "mixin",
        "`log` tells a step's values by their loss, and replaces grad_norm and learning_rate",
        (
            "tr_loss -= tr_loss",
            'logs["loss"] = tr_loss_scalar / (self.state.global_step - '
            "self._globalstep_last_logged)",
            'logs["grad_norm"]',
            'logs["learning_rate"]',
            "self.log(logs, start_time)",
            "self._save_checkpoint(model, trial)",
        ),
    ),
    Order(
        "_finalize_training",
        "resuming",
        "the mean loss is over all steps, as what Trainer divides is scaled by what it divides by",
        (
            "self._total_loss_scalar += self._tr_loss.item()",
            "num_steps_trained = self.state.global_step - self._initial_global_step",
            "train_loss = self._total_loss_scalar / max(num_steps_trained, 0.001)",
        ),
    ),
    Order(
        "_finalize_training",
        "mixin",
        "a stopped run keeps its checkpoints as these arguments are read only now",
        (
            "if self.args.load_best_model_at_end",
            "self._load_best_model()",
            "self.args.save_total_limit == 1",
            "self.callback_handler.on_train_end(",
        ),
    ),
    Order(
        "_load_rng_state",
        "saving",
        "the override of `_save_checkpoint` writes this file",
        (
            'f"rng_state_{process_index}.pth"',
            '"rng_state.pth"',
            'checkpoint_rng_state["python"]',
            'checkpoint_rng_state["numpy"]',
            'checkpoint_rng_state["cpu"]',
        ),
    ),
)

SAVED_BY_TRAINER = {
    "store_flos",
    "_get_output_dir",
    "save_model",
    "_save_optimizer_and_scheduler",
    "_save_scaler",
    "_save_rng_state",
    "_push_from_checkpoint",
}


def moved(seam: str, module: str) -> str:
    return (
        f"transformers {transformers.__version__}: {seam}; {module} in addax_ds.training needs it"
    )


def private_names() -> set[str]:
    """Names of Trainer with one underscore, attributes of its instances included."""
    names = {*dir(Trainer), *re.findall(r"\bself\.(\w+)", inspect.getsource(Trainer))}
    return {name for name in names if re.match("_[^_]", name)}


@pytest.mark.parametrize("name", [*OVERRIDDEN, *CALLED])
def test_trainer_still_has_the_method(name):
    parameters, module = (OVERRIDDEN | CALLED)[name]
    method = getattr(Trainer, name, None)
    assert method is not None, moved(f"Trainer has no {name} any more", module)
    found = [parameter for parameter in inspect.signature(method).parameters if parameter != "self"]
    assert found == parameters.split(), moved(f"Trainer.{name} has other parameters", module)


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_trainer_still_has_the_attribute(name):
    found = re.search(rf"\bself\.{name} = ", inspect.getsource(Trainer))
    assert found, moved(f"Trainer has no {name} any more", ATTRIBUTES[name])


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_trainer_still_calls_what_is_overridden(name):
    found = f"self.{name}(" in inspect.getsource(Trainer)
    assert found, moved(f"Trainer does not call {name} any more", OVERRIDDEN[name][1])


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.method)
def test_trainer_still_does_it_in_this_order(order):
    method = getattr(Trainer, order.method, None)
    assert method is not None, moved(f"Trainer has no {order.method} any more", order.module)
    source, position, before = inspect.getsource(method), 0, "its beginning"
    for text in order.texts:
        position = source.find(text, position)
        seam = f"Trainer.{order.method} has no {text!r} after {before!r} ({order.reason})"
        assert position >= 0, moved(seam, order.module)
        before = text


def test_trainer_saves_nothing_that_the_override_leaves_out():
    found = set(re.findall(r"\bself\.(\w+)\(", inspect.getsource(Trainer._save_checkpoint)))
    assert found == SAVED_BY_TRAINER, moved("Trainer._save_checkpoint saves other things", "saving")


def test_accelerate_still_leaves_a_prepared_model_alone():
    source = inspect.getsource(Accelerator.prepare_model)
    texts = ('getattr(model, "_is_accelerate_prepared", False)', "DistributedDataParallel(")
    places = [source.find(text) for text in texts]
    assert 0 <= places[0] < places[1], (
        f"accelerate {accelerate.__version__}: prepare_model may wrap a model with "
        "_is_accelerate_prepared; trainer in addax_ds.training needs it not to"
    )


# ---- nothing is left out -----------------------------------------------------------------------


def test_every_private_name_that_is_overridden_is_listed():
    ours = {name for trainer in TRAINERS for name in vars(trainer)}
    wrong = (ours & private_names()) ^ OVERRIDDEN.keys()
    assert not wrong, f"overridden and not listed, or the other way round: {wrong}"


def test_every_trainer_of_the_package_is_looked_at():
    found = set()
    for path in (PACKAGE / "training").glob("*.py"):
        module = importlib.import_module(f"addax_ds.training.{path.stem}")
        classes = [value for value in vars(module).values() if inspect.isclass(value)]
        found |= {value for value in classes if issubclass(value, UploadingMixin | LikelihoodMixin)}
    assert found == set(TRAINERS)


def test_every_private_name_that_is_used_is_listed():
    listed = OVERRIDDEN.keys() | CALLED.keys() | ATTRIBUTES.keys()
    used = set()
    for path in (PACKAGE / "training").glob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text()))
        used |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    unlisted = used & private_names() - listed
    assert not unlisted, f"private names of Trainer without an entry here: {unlisted}"
    assert (CALLED.keys() | ATTRIBUTES.keys()) <= used, "entries here that nothing uses"
