"""Partition, schedule, padding, the ranks' shares, and the loader under Trainer itself."""

import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

from addax_ds.data.batches import StepBatches, StepSchedule, permutation, train_dataloader
from addax_ds.data.examples import NO_LOSS, Example
from addax_ds.data.partition import partition
from addax_ds.data.train_rows import EncodedRows, pad
from addax_ds.utils.errors import UserError

PAD = 99
NONE = np.arange(0)


def make_example(index, length=None):
    """Example `index` is recognisable by its first token and has its own number of targets."""
    length = length or 2 + index % 5
    ids = np.full(length, index, np.int32)
    labels = np.where(np.arange(length) >= length - 1 - index % 3, ids, NO_LOSS).astype(np.int32)
    return Example(ids, labels, f"row:{index}")


def count_targets(example):
    return sum(label != NO_LOSS for label in example.labels.tolist()[1:])


# ---------------------------------------------------------------------------------- partition


def test_addax_divides_at_the_threshold():
    lengths = [3, 9, 5, 5, 6, 1]
    divided = partition(lengths, "addax", 5)
    assert divided.zeroth_order.tolist() == [1, 4]  # longer
    assert divided.first_order.tolist() == [0, 2, 3, 5]  # at most 5, itself included
    assert divided.threshold == 5
    assert divided.describe(lengths).splitlines() == [
        "D0 (zeroth-order, longer than L_T = 5): 2 sequences, the longest of 9 tokens",
        "D1 (first-order, at most 5): 4 sequences, the longest of 5 tokens",
    ]


@given(st.lists(st.integers(1, 50), min_size=2).filter(lambda lengths: len(set(lengths)) > 1))
def test_median_leaves_about_half_on_each_side(lengths):
    middle = sorted(lengths)[(len(lengths) - 1) // 2]
    if middle == max(lengths):
        with pytest.raises(UserError, match="D0 is empty"):
            partition(lengths, "addax", "median")
        return
    divided = partition(lengths, "addax", "median")
    assert divided.threshold == middle
    assert sorted([*divided.zeroth_order, *divided.first_order]) == list(range(len(lengths)))
    assert 0 < len(divided.zeroth_order) <= len(lengths) / 2


@pytest.mark.parametrize(
    ("method", "zeroth_order", "first_order"),
    [("addax-wa", [0, 1, 2], [0, 1, 2]), ("mezo", [0, 1, 2], []), ("ip-sgd", [], [0, 1, 2])],
)
def test_methods_without_a_threshold(method, zeroth_order, first_order):
    whole = partition([4, 7, 5], method, None)
    assert whole.zeroth_order.tolist() == zeroth_order
    assert whole.first_order.tolist() == first_order
    assert whole.threshold is None
    sides = [
        "3 sequences, the longest of 7 tokens" if side else "none"
        for side in (zeroth_order, first_order)
    ]
    assert whole.describe([4, 7, 5]) == (
        f"D0 (zeroth-order): {sides[0]}\nD1 (first-order): {sides[1]}"
    )
    if method != "ip-sgd":
        with pytest.raises(UserError, match=f"no effect with --method {method}"):
            partition([4, 7, 5], method, 5)


@pytest.mark.parametrize("threshold", [5, "median"])
def test_first_order_steps_on_short_rows_alone_are_those_of_addax(threshold):
    """Its control: the same batches of D1, and what Addax has in D0 is left out."""
    lengths = [3, 9, 5, 5, 6, 1]
    addax, control = (partition(lengths, m, threshold) for m in ("addax", "ip-sgd"))
    assert control.zeroth_order.tolist() == []
    assert control.left_out.tolist() == addax.zeroth_order.tolist() == [1, 4]
    assert (control.threshold, addax.threshold, len(addax.left_out)) == (5, 5, 0)
    assert control.describe(lengths).splitlines() == [
        "D0 (zeroth-order): none",
        "D1 (first-order, at most 5): 4 sequences, the longest of 5 tokens",
        "Left out, longer than L_T = 5: 2 sequences, the longest of 9 tokens",
    ]
    one, other = (
        StepSchedule(each.zeroth_order, each.first_order, 1, 2, seed=3) for each in (addax, control)
    )
    for step in range(5):
        assert (one.first_order_indices(step) == other.first_order_indices(step)).all()
        assert other.zeroth_order_indices(step) is None


@pytest.mark.parametrize(
    ("lengths", "method", "threshold", "says"),
    [
        ([4, 7], "addax", None, "--method addax needs --length_threshold"),
        ([4, 7], "addax", 7, r"L_T = 7 .*4 to 7.*D0 is empty.*from 4 to 6"),
        ([4, 7], "addax", 3, r"L_T = 3 .*4 to 7.*D1 is empty.*from 4 to 6"),
        ([5, 5], "addax", "median", r"L_T = 5 .*5 to 5.*D0 is empty.*equally long"),
        ([4, 7], "ip-sgd", 7, r"L_T = 7 .*4 to 7.*none would be left out: leave out --length_th"),
        ([4, 7], "ip-sgd", 3, r"L_T = 3 .*4 to 7.*D1 is empty"),
        ([5, 5], "adam", None, "--method adam is unknown"),
        ([], "mezo", None, "no examples"),
    ],
)
def test_partitions_that_cannot_be(lengths, method, threshold, says):
    with pytest.raises(UserError, match=says):
        partition(lengths, method, threshold)


# ----------------------------------------------------------------------------------- schedule


def test_the_permutation_is_written_in_stone():
    """A change of these numbers would make resumed runs see other data."""
    assert permutation(7, 0, 0, 8).tolist() == [4, 1, 6, 3, 2, 7, 5, 0]
    assert permutation(7, 1, 0, 8).tolist() == [0, 5, 3, 1, 6, 4, 7, 2]
    assert permutation(7, 0, 1, 8).tolist() == [2, 5, 7, 1, 3, 4, 0, 6]
    assert permutation(-1, 0, 0, 8).tolist() == permutation(2**64 - 1, 0, 0, 8).tolist()


def test_permutations_are_uniform():
    """Chi-square over the 24 orders of 4 in 4,800 cycles: mean 23, beyond 60 at p = 4e-5."""
    seen = {}
    for cycle in range(4800):
        order = tuple(permutation(0, 1, cycle, 4).tolist())
        seen[order] = seen.get(order, 0) + 1
    assert len(seen) == 24
    assert sum((count - 200) ** 2 / 200 for count in seen.values()) < 60


def test_global_generators_are_left_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    schedule = StepSchedule(np.arange(9), np.arange(9), 2, 2, seed=3)
    batches = StepBatches(EncodedRows([make_example(i) for i in range(9)], PAD), schedule, 0, 1)
    assert len(list(train_dataloader(batches))) == 5
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])


@st.composite
def schedules(draw):
    """Streams over disjoint or shared examples, batches that rarely divide them."""
    size0, size1 = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    return StepSchedule(
        np.arange(100, 100 + size0),
        np.arange(200, 200 + size1),
        draw(st.integers(1, size0)),
        draw(st.integers(1, size1)),
        draw(st.integers(0, 2**64 - 1)),
        draw(st.booleans()),
    )


@settings(deadline=None)
@given(schedules(), st.integers(0, 3))
def test_an_epoch_is_one_pass_over_d1(schedule, epoch):
    size, batch = len(schedule.first_order), schedule.first_order_batch_size
    steps = range(epoch * schedule.steps_per_epoch, (epoch + 1) * schedule.steps_per_epoch)
    rows = [schedule.first_order_indices(step).tolist() for step in steps]
    flat = [index for row in rows for index in row]
    assert all(len(row) == batch for row in rows[:-1])
    if schedule.drop_last:
        assert len(rows[-1]) == batch
        assert len(set(flat)) == len(flat) == size - size % batch
    else:
        assert sorted(flat) == schedule.first_order.tolist()


@settings(deadline=None)
@given(schedules())
def test_d0_cycles_through_permutations_whatever_the_epoch(schedule):
    size, batch = len(schedule.zeroth_order), schedule.zeroth_order_batch_size
    rows = [schedule.zeroth_order_indices(step) for step in range(3 * size)]
    assert all(len(row) == batch for row in rows)
    flat = np.concatenate(rows)
    for cycle in range(3 * batch):
        one_pass = flat[cycle * size : (cycle + 1) * size]
        assert sorted(one_pass.tolist()) == schedule.zeroth_order.tolist()


def test_epochs_cycles_streams_and_seeds_differ():
    def orders(seed):
        schedule = StepSchedule(np.arange(50), np.arange(50), 50, 50, seed)
        assert schedule.steps_per_epoch == 1
        for step in range(4):
            yield tuple(schedule.zeroth_order_indices(step).tolist())
            yield tuple(schedule.first_order_indices(step).tolist())

    assert len({*orders(0), *orders(1)}) == 16


def test_mezo_has_no_first_order_stream():
    schedule = StepSchedule(np.arange(10), NONE, 4, 0, seed=1)
    assert schedule.steps_per_epoch == 3
    assert StepSchedule(np.arange(10), NONE, 4, 0, 1, drop_last=True).steps_per_epoch == 2
    assert schedule.first_order_indices(0) is None
    assert len(schedule.zeroth_order_indices(2)) == 4  # reads on into the next pass


def test_ip_sgd_has_no_zeroth_order_stream():
    schedule = StepSchedule(NONE, np.arange(10), 0, 4, seed=1)
    assert schedule.zeroth_order_indices(0) is None
    assert [len(schedule.first_order_indices(step)) for step in range(4)] == [4, 4, 2, 4]


@pytest.mark.parametrize(
    ("size0", "size1", "batch0", "batch1", "says"),
    [
        (3, 9, 4, 4, r"D0 holds 3 .*batch of 4 \(--per_device_zo_batch_size.*--length_threshold"),
        (9, 3, 4, 4, r"D1 holds 3 .*batch of 4 \(--per_device_train_batch_size.*--length_thresh"),
        (9, 9, 0, 4, "D0 is 0; --per_device_zo_batch_size must be at least 1"),
        (0, 0, 4, 4, "no examples"),
    ],
)
def test_batches_that_cannot_be_filled(size0, size1, batch0, batch1, says):
    with pytest.raises(UserError, match=says):
        StepSchedule(np.arange(size0), np.arange(size1), batch0, batch1, seed=0)


# -------------------------------------------------------------------------- the ranks' shares


def test_pad_by_hand():
    short = Example(np.array([5, 6], np.int32), np.array([NO_LOSS, 6], np.int32), "a")
    long = Example(np.array([7, 8, 9], np.int32), np.array([7, NO_LOSS, 9], np.int32), "b")
    tensors = pad([short, long], PAD)
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "input_ids": [[5, 6, PAD], [7, 8, 9]],
        "labels": [[NO_LOSS, 6, NO_LOSS], [7, NO_LOSS, 9]],
    }
    assert {tensor.dtype for tensor in tensors.values()} == {torch.int64}


@settings(deadline=None, max_examples=60)
@given(schedules(), st.integers(0, 12))
def test_any_number_of_ranks_and_micro_batches_sees_the_same_rows(schedule, step):
    examples = [make_example(index) for index in range(250)]
    expected = {
        "zeroth_order": sorted(schedule.zeroth_order_indices(step).tolist()),
        "first_order": sorted(schedule.first_order_indices(step).tolist()),
    }
    for world_size, micro_batches in itertools.product((1, 2, 3, 4), (1, 2, 3)):
        items = [
            StepBatches(EncodedRows(examples, PAD), schedule, rank, world_size, micro_batches)[step]
            for rank in range(world_size)
        ]
        for stream, indices in expected.items():
            batches = [batch for item in items for batch in item[stream]]
            assert len(batches) == world_size * micro_batches
            rows = [row for batch in batches for row in unpad(batch)]
            real = [row for row in rows if row != ([PAD], [NO_LOSS])]
            assert sorted(ids[0] for ids, _ in real) == indices
            for ids, labels in real:
                assert ids == examples[ids[0]].input_ids.tolist()
                assert labels == examples[ids[0]].labels.tolist()
            sizes = {len(batch["input_ids"]) for batch in batches}
            assert sizes == {-(-len(indices) // len(batches))}  # equally many, at least one
            counts = {item[f"{stream}_targets"] for item in items}
            assert counts == {sum(count_targets(examples[index]) for index in indices)}
            local = sum(int((batch["labels"][:, 1:] != NO_LOSS).sum()) for batch in batches)
            assert counts == {local}


def test_micro_batches_are_the_batches_of_as_many_more_ranks():
    schedule = StepSchedule(np.arange(9), np.arange(9, 30), 8, 8, seed=3)
    examples = [make_example(index) for index in range(30)]
    four = [StepBatches(EncodedRows(examples, PAD), schedule, rank, 4)[1] for rank in range(4)]
    two = [StepBatches(EncodedRows(examples, PAD), schedule, rank, 2, 2)[1] for rank in range(2)]
    for stream in ("zeroth_order", "first_order"):
        separate = [item[stream][0]["input_ids"].tolist() for item in four]
        together = [two[rank][stream][i]["input_ids"].tolist() for i in (0, 1) for rank in (0, 1)]
        assert together == separate


def unpad(tensors):
    """Return (ids, labels) of every row; padding, but for that of a dummy, has no loss."""
    rows = []
    for ids, labels in zip(tensors["input_ids"].tolist(), tensors["labels"].tolist(), strict=True):
        length = max((i + 1 for i, token in enumerate(ids) if token != PAD), default=1)
        assert set(labels[length:]) <= {NO_LOSS}
        rows.append((ids[:length], labels[:length]))
    assert max(len(ids) for ids, _ in rows) == tensors["input_ids"].shape[1]  # local padding
    return rows


def test_a_rank_without_rows_gets_a_dummy_that_adds_nothing():
    schedule = StepSchedule(NONE, np.arange(5), 0, 4, seed=0)
    examples = [make_example(index) for index in range(5)]
    items = [StepBatches(EncodedRows(examples, PAD), schedule, rank, 4)[1] for rank in range(4)]
    assert [item["first_order"][0]["input_ids"].shape[0] for item in items] == [1, 1, 1, 1]
    (dummy,) = items[3]["first_order"]
    assert {name: tensor.tolist() for name, tensor in dummy.items()} == {
        "input_ids": [[PAD]],
        "labels": [[NO_LOSS]],
    }
    # Shifted by one there is no position at all: the sum is 0 and its gradient finite.
    logits = torch.randn(1, 1, 8, requires_grad=True)
    targets = dummy["labels"][:, 1:].flatten()
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum")
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize(
    ("method", "keys"),
    [
        (
            "addax-wa",
            {"zeroth_order", "zeroth_order_targets", "first_order", "first_order_targets"},
        ),
        ("mezo", {"zeroth_order", "zeroth_order_targets"}),
        ("ip-sgd", {"first_order", "first_order_targets"}),
    ],
)
def test_a_stream_that_does_not_exist_has_no_key(method, keys):
    examples = [make_example(index) for index in range(6)]
    parts = partition([example.length for example in examples], method, None)
    schedule = StepSchedule(parts.zeroth_order, parts.first_order, 2, 2, seed=0)
    assert StepBatches(EncodedRows(examples, PAD), schedule, 0, 1)[0].keys() == keys


# --------------------------------------------------------------------------------- the loader


def make_batches():
    """13 examples in first-order batches of 4: 4 steps an epoch."""
    examples = [make_example(index) for index in range(20)]
    schedule = StepSchedule(np.arange(7), np.arange(7, 20), 4, 4, seed=5)
    return StepBatches(EncodedRows(examples, PAD), schedule, 0, 1)


def plain(item):
    """Return an item with lists for tensors, so that == compares values."""
    return {
        key: [{name: tensor.tolist() for name, tensor in batch.items()} for batch in value]
        if isinstance(value, list)
        else value
        for key, value in item.items()
    }


class Recorder(Trainer):
    """Notes what it is given, and trains nothing."""

    def __init__(self, output_dir, options):
        arguments = TrainingArguments(
            str(output_dir),
            num_train_epochs=3,
            save_steps=1,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        super().__init__(torch.nn.Linear(1, 1), arguments)
        self.options = options
        self.seen = []

    def get_train_dataloader(self):
        return train_dataloader(make_batches(), **self.options)

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.seen.append(plain(inputs))
        return torch.zeros(())


@pytest.mark.parametrize(
    "options",
    [{}, {"num_workers": 2, "prefetch_factor": 2, "persistent_workers": True}],
    ids=["in process", "2 workers"],
)
@pytest.mark.slow
def test_trainer_sees_every_step_in_order_and_resumes_anywhere(tmp_path, options):
    batches = make_batches()
    steps = [plain(batches[step]) for step in range(12)]
    assert len({str(step) for step in steps}) == 12
    trainer = Recorder(tmp_path, options)
    trainer.train()
    assert trainer.seen == steps
    for done in (4, 5, 7):  # at an epoch's start, after its first step, before its last
        resumed = Recorder(tmp_path, options)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{done}"))
        assert resumed.seen == steps[done:]


def test_step_batches_travel_to_spawned_workers():
    batches = make_batches()
    assert plain(pickle.loads(pickle.dumps(batches))[3]) == plain(batches[3])
