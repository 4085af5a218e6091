"""Kills a training again and again, damages what it has saved, and looks whether anything is lost.

    make faults                                 50 kills, then every other fault
    python -m tests.faults --kills 20 --seed 1

A tiny bf16 model with dropout is trained on two CPU ranks by the real launchers: ZeRO-3 by
``deepspeed``, FSDP2 by ``torchrun``, whole models by ``accelerate launch``. It saves every second
step. What has to hold:

- **kills** (`tests.faults.kills`): SIGKILL of one rank, of all ranks, or of the launcher and all
  ranks, while they start, take steps, or save. After each one every process ends, every folder
  ``checkpoint-*`` is complete (``sha256sum --check``), and the newest is no older than before.
  Training is resumed until it is complete. A kill that comes after the end counts as none.
- **damage** (`tests.faults.scenarios`): a file of the newest checkpoint cut off, altered by one
  bit, or missing. A resume says so and goes on from the one before.
- **full disk**: a save into a file system without room ends all ranks with a sentence. The older
  checkpoints stay, and with more room the training goes on. (A tmpfs in a mount namespace of its
  own; where the system allows no such namespace, the scenario is reported as not run.)
- **SIGTERM**, to one rank, to all, or to the launcher: a checkpoint is saved after the current
  step, and all ranks exit with 0.
- **a rank that hangs** (SIGSTOP): the others end after ``--ddp_timeout``.

Each time the resumed training ends in the weights and the log, bit for bit, of one that nothing
interrupted. What is killed, when, and how often is drawn from ``--seed``; where exactly in the
program it strikes is not, of course. Each event is a line on the terminal. Trainings that are
complete are noted in ``--folder``, so the command goes on where it was interrupted;
``report.json`` there holds every event, the versions, and the time.
"""
