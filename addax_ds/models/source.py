"""Finding a model and loading it onto a back end."""

import contextlib
import logging
import os
import pickle
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import list_repo_files, snapshot_download, try_to_load_from_cache
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import CONFIG_NAME

from addax_ds.checkpoint.weight_files import (
    MODEL_FILE,
    UNSAFE_PICKLE,
    OtherForm,
    WeightFiles,
    read_index,
)
from addax_ds.checkpoint.weights import files_of, local_slices
from addax_ds.config.arguments import ModelArguments
from addax_ds.distributed.collectives import all_gather_object, raise_on_all_ranks
from addax_ds.models import demo, gguf
from addax_ds.models.adapters import Lora, base_slices
from addax_ds.models.empty import empty_model
from addax_ds.sharding.base import Sharding
from addax_ds.sharding.layout import Layout
from addax_ds.sharding.registry import back_end
from addax_ds.utils.errors import UserError
from addax_ds.utils.messages import shown
from addax_ds.utils.model_config import max_positions, vocabulary_size

logger = logging.getLogger(__name__)

# What Transformers reads a model from, in this order. Either may be several files with an index.
_MODEL_FILES = (MODEL_FILE, "pytorch_model.bin")


@dataclass(frozen=True)
class ModelSource:
    """A model's folder or hub name, known to have a configuration.

    Attributes:
        path: folder or hub name; of a GGUF file the folder that it was unpacked into.
        label: what a report calls it.
        config: its configuration.
        options: of every ``from_pretrained``: revision and whether remote code may run.
        attn_implementation: attention kernel, None for the model's own choice.
    """

    path: str
    label: str
    config: PreTrainedConfig
    options: dict[str, Any]
    attn_implementation: str | None

    @classmethod
    def find(cls, model_args: ModelArguments) -> "ModelSource":
        """Find the model that the arguments name, or the demo's.

        Raises:
            UserError: if there is none, or it is no causal language model, or its folder leads out
                of the folder, to code or to an adapter; or a GGUF file cannot be unpacked.
        """
        given = model_args.model_name_or_path
        if given is None:
            path, label = str(demo.model_folder()), demo.MODEL_LABEL
        elif given.endswith(gguf.SUFFIX):
            path, label = _unpacked(Path(given)), f"{given}, dequantised to bf16"
        else:
            path = label = given
        options = {
            "revision": model_args.model_revision,
            "trust_remote_code": model_args.trust_remote_code,
        }
        where = f"--model_name_or_path {path}"
        found = os.path.exists(path)
        with _refused(where if found else f"{where}: there is no such folder, nor a hub's model"):
            _check_folder(Path(path))
            config = AutoConfig.from_pretrained(path, **options)
        with _refused(where):
            _check_causal(config)
            if not model_args.trust_remote_code:
                _check_kernel(config)
        return cls(path, label, config, options, model_args.attn_implementation)

    @property
    def vocabulary_size(self) -> int | None:
        """Number of tokens that the model has embeddings for, if its configuration says it."""
        return vocabulary_size(self.config)

    @property
    def positions(self) -> int | None:
        """Longest sequence that the model takes, if it has a limit."""
        return max_positions(self.config)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer.

        Raises:
            UserError: if there is none.
        """
        with _refused(f"no tokenizer in {self.path}"):
            return AutoTokenizer.from_pretrained(self.path, **self.options)

    def load(
        self,
        dtype: torch.dtype,
        layout: Layout | None = None,
        device: torch.device | str = "cpu",
        *,
        progress: bool = False,
        recomputes: bool = False,
        lora: Lora | None = None,
    ) -> nn.Module:
        """Load the model; every rank has to call it.

        A rank reads its shards from the files, and holds one whole weight besides, or all that
        Transformers makes one of, such as the experts of a layer: from safetensors files, or else
        ``.bin`` files (unpickled with ``weights_only=True``; the larger OPT models come in no other
        form). Others are loaded by Transformers, which needs memory for the whole model, with a
        warning if it is to be sharded: ``.bin`` files of torch before 1.6, quantised weights.

        Args:
            dtype: of the weights.
            layout: of the weights, by default whole on each rank; ZeRO-3 takes the DeepSpeed
                configuration of the live `TrainingArguments`.
            device: where the weights go; under ZeRO-3 that configuration says it.
            progress: whether to show a bar if it takes long.
            recomputes: whether it is to be trained with activation checkpointing.
            lora: adapters that are to be trained alone; or None.

        Raises:
            UserError: on all ranks, if one cannot load it, some of its weights are in no file, or
                it cannot recompute.
        """
        layout, on = layout or Layout(), torch.device(device)
        chosen = back_end(layout.sharding)
        # Not every back end takes these (`Sharding.why_no_replicas`).
        options: dict[str, Any] = {"replicas": layout.replicas} if layout.replicas > 1 else {}
        if layout.cpu_offload:
            options["cpu_offload"] = True
        where = f"cannot load the model from {self.path}"
        other_form: str | None = None
        with raise_on_all_ranks(), _refused(where):
            model = self._empty(dtype)
            if recomputes and not model.supports_gradient_checkpointing:
                raise UserError(
                    f"{type(model).__name__} does not support activation checkpointing: remove "
                    "--activation_checkpointing"
                )
            try:
                files = self._weight_files(model, dtype)
                slices = list(local_slices(model))
                files.check(slices)
                files.check_ties(slices)
            except OtherForm as error:
                other_form = str(error)
        other_form = next(filter(None, all_gather_object(other_form)), None)
        if other_form is not None:
            model = self._load_whole(dtype, chosen, other_form)
        if lora is not None:
            with raise_on_all_ranks(), _refused("cannot add adapters"):
                model = lora.add_to(model)
        if other_form is not None:
            chosen.shard_loaded(model, on, **options)
        else:
            chosen.lay_out(model, on, **options)
            with raise_on_all_ranks(), _refused(where):
                files.fill(base_slices(model), progress)
        if lora is not None:
            lora.fill(model)
        return model

    def _load_whole(self, dtype: torch.dtype, sharding: type[Sharding], why: str) -> nn.Module:
        """Load the model with Transformers, which partitions it on the way under ZeRO-3.

        Raises:
            UserError: see `load`. Under ZeRO-3, which loads with collectives, a rank that alone
                cannot go on leaves the others to ``--ddp_timeout``.
        """
        if sharding.loads_whole_on is not None:
            logger.warning(
                "Loading takes memory for the whole model on %s, because its weights cannot be "
                "read one by one from the files of %s: %s. From safetensors files they can, as "
                "AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder) writes them for "
                "most models",
                sharding.loads_whole_on,
                self.path,
                why,
            )
        together = contextlib.nullcontext if sharding.loads_with_collectives else raise_on_all_ranks
        with together(), _refused(f"cannot load the model from {self.path}"):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                self.path,
                dtype=dtype,
                attn_implementation=self.attn_implementation,
                weights_only=True,
                output_loading_info=True,
                **self.options,
            )
            model, report = loaded
            if missing := sorted(report["missing_keys"]):
                raise UserError(
                    f"its files lack {len(missing)} weights that config.json asks for, such as "
                    f"{missing[0]}; training would start from random ones"
                )
        return model

    def _empty(self, dtype: torch.dtype) -> Any:
        """Build the model with its parameters on the meta device and its buffers as they are."""
        model = empty_model(
            self.config,
            dtype,
            attn_implementation=self.attn_implementation,
            trust_remote_code=self.options["trust_remote_code"],
        )
        if model.can_generate():
            model.generation_config = self._generation_config()
        return model.eval()

    def _generation_config(self) -> GenerationConfig:
        """Read it from its own file, or where that is missing from config.json."""
        revision = self.options["revision"]
        try:
            return GenerationConfig.from_pretrained(self.path, revision=revision)
        except OSError:
            return GenerationConfig.from_pretrained(
                self.path, CONFIG_NAME, revision=revision, _from_model_config=True
            )

    def _weight_files(self, model: Any, dtype: torch.dtype) -> WeightFiles:
        """Find the files of the weights; on the hub, download them.

        Raises:
            OtherForm: if they do not hold the model's weights as they are.
            UserError: if one is damaged.
        """
        if getattr(self.config, "quantization_config", None) is not None:
            raise OtherForm("they are quantised")
        if model._get_dtype_plan(dtype):
            raise OtherForm("Transformers keeps some of them in fp32")
        folder = Path(self.path)
        if not folder.is_dir():
            folder = self._download()
        # As from_pretrained does: what is saved has the form of these files.
        files, model._weight_conversions = files_of(model, folder, _model_file(_files_in(folder)))
        return files

    def _download(self) -> Path:
        """Download the files of the weights from the hub, if they are not in its cache.

        Raises:
            OtherForm: if the hub has none of their kinds.
        """
        revision = self.options["revision"]
        try:
            names = list_repo_files(self.path, revision=revision)
        except Exception:  # offline, or the hub is down: what was downloaded before may do
            cached = try_to_load_from_cache(self.path, CONFIG_NAME, revision=revision)
            if isinstance(cached, str):
                folder = Path(cached).parent
                with contextlib.suppress(OtherForm):
                    _model_file(_files_in(folder))
                    return folder
            raise
        chosen = _model_file(names)
        if chosen in names:
            return self._fetch([chosen])
        index = f"{chosen}.index.json"
        parts = {path.name for path in read_index(self._fetch([index]) / index).values()}
        return self._fetch([index, *sorted(parts)])

    def _fetch(self, names: list[str]) -> Path:
        revision = self.options["revision"]
        return Path(snapshot_download(self.path, revision=revision, allow_patterns=names))


def _unpacked(file: Path) -> str:
    if not file.is_file():
        raise UserError(f"--model_name_or_path {file}: there is no such file")
    return str(gguf.unpacked(file, file.stem))


def _files_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.is_file()]


def _model_file(names: Collection[str]) -> str:
    """Return the first of `_MODEL_FILES` that is among ``names``, as it is or by its index.

    Raises:
        OtherForm: if none is.
    """
    for name in _MODEL_FILES:
        if name in names or f"{name}.index.json" in names:
            return name
    raise OtherForm(f"there is neither {' nor '.join(_MODEL_FILES)}, nor an index of either")


@contextlib.contextmanager
def _refused(what: str) -> Iterator[None]:
    """Make a sentence of what Transformers raises: from files that hold anything, anything.

    Raises:
        UserError: for every other exception.
    """
    try:
        yield
    except pickle.UnpicklingError as error:  # whose message recommends weights_only=False
        raise UserError(f"{what}: a .bin file {UNSAFE_PICKLE}") from error
    except (UserError, OSError, ValueError) as error:
        said = str(error).replace("`trust_remote_code=True`", "--trust_remote_code")
        raise UserError(f"{what}: {said}") from error
    except Exception as error:
        raise UserError(f"{what}: {type(error).__name__}: {error}") from error


def _check_causal(config: PreTrainedConfig) -> None:
    """Raise `UserError` if no causal language model has this configuration."""
    own_code = getattr(config, "auto_map", None) or {}
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and "AutoModelForCausalLM" not in own_code:
        raise UserError(
            f"its type is {config.model_type!r}, of which Transformers has no causal language model"
        )


def _check_kernel(config: PreTrainedConfig) -> None:
    """Raise `UserError` if the configuration asks for code that Transformers would fetch."""
    kernel = str(getattr(config, "_attn_implementation", None))
    if "/" in kernel:
        raise UserError(
            f"config.json asks for the attention kernel {shown(kernel)}, which is code from the "
            "hub: take the entry out, or give --trust_remote_code"
        )


def _check_folder(folder: Path) -> None:
    """Raise `UserError` if a model's folder sends Transformers to other places for weights."""
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            "the folder holds an adapter, not a model alone; merge the two first (merge_and_unload "
            "of PEFT), or take adapter_config.json out"
        )
    for name in _MODEL_FILES:
        if (folder / name).is_file():
            break
        if (folder / f"{name}.index.json").is_file():
            WeightFiles(folder, name)  # refuses files that are not of this folder
            break
