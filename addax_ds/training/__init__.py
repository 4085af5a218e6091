"""Trainers with Addax's step: mixins over a `transformers.Trainer`.

========  =================  =====================================================================
order     mixin              what it adds
========  =================  =====================================================================
1         `LikelihoodMixin`  rows, loss and evaluation of a causal language model
2         `AddaxMixin`       the step, and what it logs
3         `ResumingMixin`    state of optimizer and schedule in checkpoints, and going on from them
4         `StepMixin`        batches of both streams, micro-batches, time and memory
5         `SavingMixin`      checkpoints that are complete or absent, the best model
6         `UploadingMixin`   uploads to the hub, of complete folders
========  =================  =====================================================================

`AddaxMixin` brings 3 to 6 with it, and `AddaxTrainer` has all. `BaselineTrainer` (AdamW, SGD and
the peers of studies) has 1 and 4 to 6. Several extend these methods, in this order, each calling
the next: ``train`` (2, 4, 5), ``evaluation_loop`` (1, 2, 4), ``log`` (2, 4),
``_prepare_for_training`` and ``_finalize_training`` (3, 5), ``_take_time_of`` (4, 5). Others are
replaced: ``_save_optimizer_state`` and ``_free_gathered`` of 5 by 3, the rows and the loss of a
micro-batch of 4 by 1.
"""
