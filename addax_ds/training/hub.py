"""``push_to_hub``: the repository is found before there is a model, and an upload may fail."""

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi

from addax_ds.config.addax_config import AddaxConfig
from addax_ds.config.trials import repository
from addax_ds.distributed.collectives import patient, raise_on_all_ranks
from addax_ds.utils.errors import UserError

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object  # a mixin comes before the trainer

logger = logging.getLogger(__name__)


def reach_hub(args: AddaxConfig) -> None:
    """Make the repository of ``push_to_hub``, as Trainer does when the model has been loaded.

    Every rank has to call it.

    Raises:
        UserError: on all ranks, if there is no such repository and it cannot be made.
    """
    name = repository(args)
    what = f"the repository {name} cannot be reached, so training does not start"
    with raise_on_all_ranks(), _hub_errors(what):
        if args.process_index == 0:
            hub = HfApi(token=args.hub_token)
            hub.create_repo(name, private=args.hub_private_repo, exist_ok=True)


class UploadingMixin(Trainer):
    """Uploads of a trainer, as overrides of Trainer's methods."""

    args: AddaxConfig

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Upload ``output_dir`` with the model in it; every rank has to call it.

        Raises:
            UserError: on all ranks, if it fails.
        """
        what = f"the upload of {self.args.output_dir} has failed; what is on the disk is complete"
        with patient(self.args.ddp_timeout):  # the other ranks wait for the one that uploads
            with raise_on_all_ranks(), _hub_errors(what):
                if self.hub_model_id is None:  # Trainer does it beside collectives of the others
                    given = inspect.signature(super().push_to_hub).bind(*args, **kwargs).arguments
                    self.init_hf_repo(given.get("token"), given.get("private"))
            # Errors in Trainer's collectives reach all ranks; rank 0 is alone after them.
            with raise_on_all_ranks(), _hub_errors(what):
                return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._warn_of_failed_uploads()  # Trainer forgets those that are done
        try:
            with _hub_errors(f"the upload of {checkpoint_folder} has failed"):
                super()._push_from_checkpoint(checkpoint_folder)
        except UserError as error:  # a training goes on without it
            logger.warning("%s", error)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._warn_of_failed_uploads()

    def _warn_of_failed_uploads(self) -> None:
        """Log what uploads of checkpoints, which run in threads, have ended with; each once."""
        uploads = getattr(self, "push_in_progress", None)
        if uploads is None:
            return
        done = [job for job in uploads.jobs if job.done()]
        uploads.jobs = [job for job in uploads.jobs if job not in done]
        for error in filter(None, (job.exception() for job in done)):
            what = f"the upload of a checkpoint in {self.args.output_dir} has failed"
            logger.warning("%s", _said(what, error))


@contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of the hub, of the network, of a model card, for want of a token
        raise UserError(_said(what, error)) from error


def _said(what: str, error: BaseException) -> str:
    return f"--push_to_hub: {what} ({type(error).__name__}: {error})"
