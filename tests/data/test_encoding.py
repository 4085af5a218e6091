"""Which tokens carry loss, over tokenizers that treat spaces and specials differently."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from addax_ds.data.encoding import Cuts, encode, encode_prompts, learnt_ends, padding_token
from addax_ds.data.examples import NO_LOSS
from addax_ds.reading.records import Record, chat, plain_text, prompt_completion
from addax_ds.utils.errors import UserError

CORPUS = ["a great film It was great", "def f():\n    return 1\n        x", "it was terrible"] * 5
SPECIAL = ["<unk>", "<s>", "</s>"]
EOS = 2
CHATML = (
    "<s>{% for m in messages %}{{ m.role }}: {{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def _wrap(backend, **kwargs):
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **kwargs
    )


def _bos(template):
    return processors.TemplateProcessing(
        single=template, special_tokens=[(token, index) for index, token in enumerate(SPECIAL)]
    )


def byte_level(trim_offsets, template=None):
    """Like GPT-2 and Llama 3 (spaces in the offsets) or RoBERTa (spaces trimmed)."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet),
    )
    backend.decoder = decoders.ByteLevel()
    post = [processors.ByteLevel(trim_offsets=trim_offsets)]
    backend.post_processor = processors.Sequence(post + ([_bos(template)] if template else []))
    return _wrap(backend)


def metaspace():
    """Like Llama 2 and Gemma: spaces become part of the next piece, one more in front."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=80, special_tokens=SPECIAL))
    backend.post_processor = _bos("<s> $A")
    return _wrap(backend)


def word_level(template=None):
    """Words only: spaces belong to no token."""
    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=SPECIAL))
    if template:
        backend.post_processor = _bos(template)
    return _wrap(backend)


TOKENIZERS = {
    "byte_level": byte_level(trim_offsets=False),
    "byte_level_trimmed": byte_level(trim_offsets=True),
    "byte_level_bos": byte_level(trim_offsets=True, template="<s> $A"),
    "metaspace": metaspace(),
    "word_level": word_level(),
    "word_level_bos": word_level("<s> $A"),
    "word_level_two": word_level("<unk> <s> $A"),
}


def encode_one(record, tokenizer, max_length=None, model_positions=None):
    (example,), _ = encode(
        [record], tokenizer, max_length=max_length, model_positions=model_positions
    )
    return example


def learnt_tokens(example, tokenizer):
    return tokenizer.convert_ids_to_tokens(example.input_ids[example.labels != NO_LOSS].tolist())


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(
    ("prompt", "completion"), [("a film It was", " great"), ("a film It was ", "great")]
)
def test_completion_after_a_space(name, prompt, completion):
    """The word "great" is learnt and nothing else, whichever side of the border has the space."""
    tokenizer = TOKENIZERS[name]
    example = encode_one(prompt_completion(prompt, completion, "here", False), tokenizer)
    whole = tokenizer("a film It was great")["input_ids"]
    before = tokenizer("a film It was")["input_ids"]
    assert example.input_ids.tolist() == whole  # tokenised as one text, not as two halves
    assert example.labels.tolist() == [NO_LOSS] * len(before) + whole[len(before) :]
    assert example.target_count == len(whole) - len(before) > 0
    assert example.length == len(whole)


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if "bos" in name or "meta" in name])
def test_a_text_that_begins_with_bos_gets_no_second_one(name):
    """The tokens are those that Transformers makes of the text without adding any."""
    tokenizer = TOKENIZERS[name]
    text, prompt = "<s>a film It was great", "<s>a film It was"
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    for record in (
        plain_text(text, "here", False),
        prompt_completion(prompt, " great", "here", False),
    ):
        example = encode_one(record, tokenizer)
        assert example.input_ids.tolist() == whole
        assert example.input_ids.tolist().count(tokenizer.bos_token_id) == 1
    cut = encode_one(record, tokenizer, max_length=len(whole) - 1)
    assert cut.input_ids.tolist() == [whole[0], *whole[2:]]
    (asked,) = encode_prompts([Record(prompt, (), "here")], tokenizer, max_length=40)
    assert asked.input_ids.tolist() == tokenizer(prompt, add_special_tokens=False)["input_ids"]


def test_a_text_that_ends_in_eos_gets_no_second_one():
    tokenizer = word_level("<s> $A </s>")
    for append_eos in (True, False):
        example = encode_one(prompt_completion("it", " was</s>", "here", append_eos), tokenizer)
        assert example.input_ids.tolist() == tokenizer("it was")["input_ids"]
        assert learnt_tokens(example, tokenizer) == ["was", "</s>"]


def test_the_tokens_that_learnt_parts_end_in():
    tokenizer = TOKENIZERS["word_level"]
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "great film"},
    ] * 2
    tokenizer.chat_template = CHATML
    example = encode_one(chat(messages, tokenizer, "here"), tokenizer)
    cut = encode_one(prompt_completion("a", " film", "here", False), tokenizer)
    film = tokenizer.convert_tokens_to_ids("film")
    assert learnt_ends([example]) == {EOS}
    assert learnt_ends([example, cut]) == {EOS, film}


def test_a_token_that_straddles_the_border_is_learnt():
    tokenizer = TOKENIZERS["byte_level"]
    example = encode_one(prompt_completion("a film It was gr", "eat", "here", False), tokenizer)
    assert learnt_tokens(example, tokenizer) == ["Ġgreat"]


@pytest.mark.parametrize("name", ["byte_level", "byte_level_trimmed", "byte_level_bos"])
def test_whitespace_inside_the_completion_is_learnt(name):
    """Indentation is what code is made of; trimmed offsets report it as covering nothing."""
    tokenizer = TOKENIZERS[name]
    prompt, completion = "def f():", "\n            return 1\n        x  "
    example = encode_one(prompt_completion(prompt, completion, "here", False), tokenizer)
    learnt = example.input_ids[example.labels != NO_LOSS].tolist()
    assert tokenizer.decode(learnt) == completion


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.text("ab \n\u00e9\U0001f600", max_size=5), st.booleans()), max_size=8))
def test_learnt_tokens_are_those_whose_bytes_touch_a_span(parts):
    """Against the bytes that each token stands for, which the offsets have no say in."""
    text, targets, wanted = "start", [], [False] * len(b"start")
    for part, is_target in [*parts, ("end", True)]:
        if is_target and part:
            targets.append((len(text), len(text) + len(part)))
        text += part
        wanted += [is_target] * len(part.encode())
    tokenizer = TOKENIZERS["byte_level"]
    example = encode_one(Record(text, tuple(targets), "here", append_eos=False), tokenizer)
    position = 0
    for token, label in zip(
        tokenizer.convert_ids_to_tokens(example.input_ids.tolist()), example.labels, strict=True
    ):
        end = position + len(token)  # byte-level: a character of the token is a byte of the text
        assert (label != NO_LOSS) == any(wanted[position:end])
        position = end
    assert position == len(wanted)


def test_text_is_learnt_but_for_what_the_tokenizer_added():
    tokenizer = TOKENIZERS["word_level_bos"]
    example = encode_one(plain_text("a great film", "here", append_eos=True), tokenizer)
    assert tokenizer.convert_ids_to_tokens(example.input_ids.tolist()) == (
        ["<s>", "a", "great", "film", "</s>"]
    )
    assert learnt_tokens(example, tokenizer) == ["a", "great", "film", "</s>"]
    assert example.target_count == 4


def test_the_first_token_is_not_counted_as_predicted():
    example = encode_one(plain_text("a great film", "here", False), TOKENIZERS["word_level"])
    assert example.length == 3
    assert example.target_count == 2


@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>"])
def test_eos_comes_once_and_is_learnt(template):
    """Whether we append it, the tokenizer does, or the text ends in it."""
    tokenizer = word_level(template)
    record = prompt_completion("a film It was", " great", "here", append_eos=True)
    example = encode_one(record, tokenizer)
    assert example.input_ids[-3:].tolist()[1:] == [*tokenizer.convert_tokens_to_ids(["great"]), EOS]
    assert learnt_tokens(example, tokenizer) == ["great", "</s>"]
    literal = prompt_completion("a film It was", " great</s>", "here", append_eos=True)
    if template == "<s> $A":
        np.testing.assert_array_equal(encode_one(literal, tokenizer).labels, example.labels)


def test_eos_is_not_learnt_when_the_text_goes_on_after_the_last_target():
    tokenizer = TOKENIZERS["word_level"]
    example = encode_one(Record("a great film", ((2, 7),), "here"), tokenizer)
    assert example.input_ids[-1] == EOS
    assert learnt_tokens(example, tokenizer) == ["great"]


def test_chat_gets_no_second_bos_and_no_second_eos():
    tokenizer = word_level("<s> $A")
    tokenizer.chat_template = CHATML
    messages = [
        {"role": "user", "content": "a film"},
        {"role": "assistant", "content": "It was great"},
        {"role": "user", "content": "it was"},
        {"role": "assistant", "content": "terrible"},
    ]
    example = encode_one(chat(messages, tokenizer, "here"), tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(example.input_ids.tolist())
    assert tokens.count("<s>") == 1
    assert tokens.count("</s>") == 4
    assert learnt_tokens(example, tokenizer) == ["It", "was", "great", "</s>", "terrible", "</s>"]


def test_many_records_keep_their_order():
    """More than a tokenizer call takes, with both kinds of special-token handling mixed."""
    tokenizer = TOKENIZERS["word_level_bos"]
    words = ["a", "great", "film", "It", "was"]
    records = [
        Record(
            f"{words[i % 5]} it",
            ((0, len(words[i % 5]) + 3),),
            f"row:{i}",
            add_special_tokens=i < 1500 or i % 2 == 0,
            append_eos=True,
        )
        for i in range(2500)
    ]
    examples, _ = encode(records, tokenizer, max_length=None, model_positions=8)
    for i, (record, example) in enumerate(zip(records, examples, strict=True)):
        bos = ["<s>"] if record.add_special_tokens else []
        expected = [*bos, words[i % 5], "it", "</s>"]
        assert tokenizer.convert_ids_to_tokens(example.input_ids.tolist()) == expected
        assert example.origin == f"row:{i}"
    assert examples[0].input_ids.dtype == examples[0].labels.dtype == np.int32


PROMPT = "it was a film a great film It was"


@pytest.mark.parametrize(
    ("name", "max_length", "expected"),
    [
        ("word_level_bos", 11, f"<s> {PROMPT} terrible"),
        ("word_level_bos", 6, "<s> great film It was terrible"),
        ("word_level_bos", 2, "<s> terrible"),
        ("word_level_two", 3, "<unk> <s> terrible"),
        ("word_level", 6, "a great film It was terrible"),
        ("word_level", 2, "was terrible"),  # one token stays to predict the target from
    ],
)
def test_truncation_takes_the_prompt_from_the_left(name, max_length, expected):
    tokenizer = TOKENIZERS[name]
    record = prompt_completion(PROMPT, " terrible", "here", append_eos=False)
    example = encode_one(record, tokenizer, max_length, model_positions=100)
    assert tokenizer.convert_ids_to_tokens(example.input_ids.tolist()) == expected.split()
    assert learnt_tokens(example, tokenizer) == ["terrible"]
    assert example.target_count == 1


def test_truncation_keeps_the_bos_that_a_template_wrote():
    tokenizer = word_level()
    tokenizer.chat_template = CHATML
    messages = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": "great"}]
    example = encode_one(chat(messages, tokenizer, "here"), tokenizer, max_length=5)
    tokens = tokenizer.convert_ids_to_tokens(example.input_ids.tolist())
    assert tokens == ["<s>", "<unk>", "<unk>", "great", "</s>"]  # "assistant", ":"


@pytest.mark.parametrize(
    ("name", "needs"), [("word_level_bos", 4), ("word_level", 4), ("byte_level", 4)]
)
def test_targets_that_do_not_fit(name, needs):
    tokenizer = TOKENIZERS[name]
    record = prompt_completion(PROMPT, " great film", "train.jsonl:3", append_eos=True)
    encode_one(record, tokenizer, max_length=needs)
    with pytest.raises(UserError, match=rf"train\.jsonl:3: .*needs {needs} tokens.*max_length 3"):
        encode_one(record, tokenizer, max_length=needs - 1)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(TOKENIZERS)),
    st.integers(1, 40),
    st.integers(2, 12),
    st.booleans(),
)
def test_pieces_of_a_text_make_up_the_whole(name, count, max_length, eos):
    """Every token but the first is predicted once, after those before it or the head."""
    tokenizer = TOKENIZERS[name]
    text = " ".join(["a", "great", "film", "It", "was"][i % 5] for i in range(count))
    record = plain_text(text, "here", eos)
    added = tokenizer(text, return_special_tokens_mask=True)["special_tokens_mask"]
    head = added.index(0)
    if head >= max_length or len(added) + eos < 2:
        return
    whole = encode_one(record, tokenizer)
    pieces, cuts = encode([record], tokenizer, max_length=max_length, model_positions=None)
    assert cuts == Cuts(rows_split=int(whole.length > max_length))
    front, joined, learnt = whole.input_ids[:head].tolist(), [], []
    for index, piece in enumerate(pieces):
        assert 2 <= piece.length <= max_length
        assert piece.origin == "here"
        assert piece.input_ids[:head].tolist() == front
        again = head or min(index, 1)  # what a piece has of the ones before
        joined += piece.input_ids[again:].tolist()
        learnt += (piece.labels[1:] != NO_LOSS).tolist()[max(head - 1, 0) :]
        if index and not head:
            assert piece.input_ids[0] == pieces[index - 1].input_ids[-1]
        assert (piece.input_ids[-1] == EOS and eos) == (eos and index + 1 == len(pieces))
    assert front + joined == whole.input_ids.tolist()
    assert learnt == (whole.labels[1:] != NO_LOSS).tolist()[max(head - 1, 0) :]
    assert sum(piece.target_count for piece in pieces) == whole.target_count
    assert len(pieces) == -(-(whole.length - max(head, 1)) // (max_length - max(head, 1)))


def test_an_end_of_sequence_is_not_a_piece_of_its_own():
    """It would teach the model to end what has not begun."""
    tokenizer = TOKENIZERS["word_level_bos"]
    record = plain_text("a great film It", "here", append_eos=True)
    pieces, _ = encode([record], tokenizer, max_length=3, model_positions=None)
    tokens = [tokenizer.convert_ids_to_tokens(piece.input_ids.tolist()) for piece in pieces]
    assert tokens == [["<s>", "a", "great"], ["<s>", "film"], ["<s>", "It", "</s>"]]


def test_a_head_that_leaves_no_room():
    with pytest.raises(UserError, match=r"here: the tokenizer's first 2 tokens leave no room"):
        encode_one(plain_text("a great film", "here"), TOKENIZERS["word_level_two"], 2)


def test_what_is_cut_and_split_is_counted(caplog):
    tokenizer = TOKENIZERS["word_level"]
    rows = [
        prompt_completion("a " * count, "film", f"row {count}", append_eos=False)
        for count in (2, 5, 9)
    ]
    texts = [plain_text("a " * count, f"text {count}", append_eos=False) for count in (4, 5, 9)]
    examples, cuts = encode([*rows, *texts], tokenizer, max_length=4, model_positions=None)
    assert cuts == Cuts(rows_cut=2, most_tokens_cut=6, rows_split=2)
    assert [example.origin for example in examples].count("text 9") == 3
    assert sum((Cuts(1, 5, 0), Cuts(2, 3, 4)), Cuts()) == Cuts(3, 5, 4)
    with caplog.at_level("INFO", logger="addax_ds"):
        Cuts().log("x", 4)
        cuts.log("rows.jsonl", 4)
    assert caplog.messages == [
        "rows.jsonl: 2 rows are longer than 4 tokens and have lost up to 6 of them on the left",
        "rows.jsonl: 2 rows of text are longer than 4 tokens and are split into sequences",
    ]


def test_longer_than_the_model():
    record = prompt_completion(PROMPT, " great", "train.jsonl:3", append_eos=False)
    tokenizer = TOKENIZERS["word_level"]
    assert encode_one(record, tokenizer, model_positions=10).length == 10
    with pytest.raises(
        UserError, match=r"train\.jsonl:3: 10 tokens, .* model's 9 positions.*--max_length 9"
    ):
        encode_one(record, tokenizer, model_positions=9)
    with pytest.raises(UserError, match="--max_length 12 is more than the model's 10 positions"):
        encode_one(record, tokenizer, max_length=12, model_positions=10)
    with pytest.raises(UserError, match="--max_length 1 leaves nothing"):
        encode_one(record, tokenizer, max_length=1)


@pytest.mark.parametrize(
    "record",
    [
        prompt_completion("a film", "  ", "row:1"),  # words only: spaces make no token
        plain_text("film", "row:1", append_eos=False),  # nothing before it to predict it from
        plain_text(" ", "row:1"),
    ],
)
def test_nothing_to_learn(record):
    with pytest.raises(UserError, match="row:1: no token carries loss"):
        encode_one(record, TOKENIZERS["word_level"])


def test_tokenizers_that_cannot_serve():
    class Slow(PreTrainedTokenizer):
        vocab_size = 1

        def get_vocab(self):
            return {"a": 0}

        def _tokenize(self, text):
            return list(text)

        def _convert_token_to_id(self, token):
            return 0

    with pytest.raises(UserError, match=r"Slow .*fast tokenizer"):
        encode_one(plain_text("aa", "here"), Slow())
    without_eos = PreTrainedTokenizerFast(
        tokenizer_object=TOKENIZERS["metaspace"].backend_tokenizer
    )
    with pytest.raises(UserError, match=r"row:1: .*no EOS token"):
        encode_one(plain_text("a film", "row:1"), without_eos)
    assert encode_one(plain_text("a film", "row:1", append_eos=False), without_eos).length > 1


@pytest.mark.parametrize(
    ("pad", "eos", "embeddings", "chosen"),
    [
        (2, 1, 9, 2),
        (2, 1, None, 2),
        (8, 1, 9, 8),
        (None, 1, 9, 1),
        (None, 9, 9, 0),
        (None, 9, None, 9),
        (None, None, 9, 0),
    ],
)
def test_the_token_to_pad_with(pad, eos, embeddings, chosen):
    tokenizer = SimpleNamespace(pad_token_id=pad, eos_token_id=eos)
    assert padding_token(tokenizer, embeddings) == chosen


def test_a_token_to_pad_with_that_has_no_embedding():
    tokenizer = SimpleNamespace(pad_token_id=9, pad_token="[PAD]", eos_token_id=1)
    with pytest.raises(UserError, match=r"token 9 \('\[PAD\]'\).*embeddings for 9: name another"):
        padding_token(tokenizer, 9)
    assert padding_token(None, 9) == 0
