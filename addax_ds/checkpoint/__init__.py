"""Checkpoints: a folder for ``from_pretrained``, and beside it a few numbers of the run.

The weights are safetensors files (`weights`), those of an adapter likewise. What the optimizer has
is in ``addax_state.json``; the schedule is in ``scheduler.pt``, and the rest is Trainer's own.
Nothing depends on the number of ranks or on the back end, except the states of the random
generators, one file a rank, which dropout draws from. The folder appears when it is complete, with
a checksum for each file (`atomic`); `resume` says which one to go on from.
"""
