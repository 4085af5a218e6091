"""What ranks of tests import, imported once: they are forked from a process that has it."""

import gc
import importlib

for _name in (
    "accelerate.utils.other",
    "addax_ds.cli.train",
    "addax_ds.integrations.deepspeed_engine",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # which compiles, by what is slow to import
    "peft",
    "tests.support.uncompiled",
    "torch._dynamo",  # of every optimizer
    "torch.distributed.fsdp",
    "torch.testing",
    "torch.utils.cpp_extension",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.opt.modeling_opt",
):
    importlib.import_module(_name)

# DeepSpeed and Accelerate collect garbage at each start, and would go through all of that.
gc.collect()
gc.freeze()
