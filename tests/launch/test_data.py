"""Corpora, their split, their order and its shards."""

import math
import re
import sysconfig
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.launch.data import Loader, Stream, open_corpus, split, unigram_entropy
from counterflow.launch.shuffle import shuffled
from counterflow.launch.tokens import DataError, read_tokens, require_ids, write_tokens

SEPARATOR = 99

documents_strategy = st.lists(st.lists(st.integers(0, 98), max_size=12), min_size=1, max_size=8)


def stream_of(documents: list[list[int]], chosen: list[int] | None = None) -> Stream:
    offsets = np.cumsum([0, *map(len, documents)], dtype=np.int64)
    tokens = np.asarray(list(chain.from_iterable(documents)), dtype=np.uint16)
    chosen = list(range(len(documents))) if chosen is None else chosen
    return Stream(tokens, offsets, chosen, separator=SEPARATOR, vocab_size=100)


def flat(documents: list[list[int]]) -> list[int]:
    return [token for document in documents for token in [*document, SEPARATOR]]


@settings(deadline=None)  # other processes share the machine
@given(documents=documents_strategy, data=st.data())
def test_a_stream_is_its_documents_each_followed_by_a_separator(
    documents: list[list[int]], data: st.DataObject
) -> None:
    picks = st.lists(st.integers(0, len(documents) - 1), unique=True).map(sorted)
    chosen = data.draw(picks)
    stream, whole = stream_of(documents, chosen), flat([documents[d] for d in chosen])
    assert len(stream) == len(whole)
    start = data.draw(st.integers(0, len(whole)))
    count = data.draw(st.integers(0, len(whole) - start))
    assert stream.read(start, count).tolist() == whole[start : start + count]


@settings(deadline=None)  # other processes share the machine
@given(documents=documents_strategy, length=st.integers(1, 9))
def test_every_token_but_the_first_and_a_short_end_is_a_target_exactly_once(
    documents: list[list[int]], length: int
) -> None:
    stream, whole = stream_of(documents), flat(documents)
    rows = [stream.sequence(i, length) for i in range(stream.num_sequences(length))]
    targets = [token for row in rows for token in row[1:].tolist()]
    assert targets == whole[1 : 1 + len(targets)]
    assert len(whole) - 1 - len(targets) < length


@settings(deadline=None)  # other processes share the machine
@given(size=st.integers(1, 300), seed=st.integers(0, 2**64), epoch=st.integers(0, 100))
def test_a_shuffle_has_every_place_once(size: int, seed: int, epoch: int) -> None:
    assert sorted(shuffled(i, size, seed, epoch) for i in range(size)) == list(range(size))


def test_shuffles_of_other_epochs_and_seeds_differ_and_leave_few_neighbours() -> None:
    orders = [
        [shuffled(i, 1000, seed, epoch) for i in range(1000)]
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    for a in range(3):
        neighbours = sum(abs(x - y) == 1 for x, y in zip(orders[a], orders[a][1:], strict=False))
        assert neighbours < 20  # 2 are expected of a random order; a shift or a reversal has 999
        for b in range(a):
            same = sum(x == y for x, y in zip(orders[a], orders[b], strict=True))
            assert same < 12  # 1 is expected


corpus_100 = stream_of([list(range(10)) for _ in range(40)])


@settings(deadline=None)  # other processes share the machine
@given(
    dp=st.sampled_from([1, 2, 3, 4, 6]),
    batches=st.lists(st.sampled_from([12, 24, 36]), min_size=1, max_size=4),
    seed=st.integers(0, 5),
)
def test_the_global_batch_does_not_depend_on_the_number_of_ranks(
    dp: int, batches: list[int], seed: int
) -> None:
    alone = Loader(corpus_100, 7, seed=seed)
    shards = [Loader(corpus_100, 7, dp_rank=r, dp_size=dp, seed=seed) for r in range(dp)]
    for batch in batches:
        inputs, targets = alone.next(batch)
        parts = [shard.next(batch) for shard in shards]
        assert np.array_equal(inputs, np.concatenate([part[0] for part in parts]))
        assert np.array_equal(targets, np.concatenate([part[1] for part in parts]))
        assert np.array_equal(inputs[:, 1:], targets[:, :-1])
        assert all(shard.state() == alone.state() for shard in shards)


def test_an_epoch_reads_every_sequence_once_and_the_next_in_another_order() -> None:
    loader = Loader(corpus_100, 7, seed=3)
    count = loader.num_sequences
    first, second = (loader.next(count)[1].tolist() for _ in range(2))
    expected = [corpus_100.sequence(i, 7)[1:].tolist() for i in range(count)]
    assert sorted(first) == sorted(second) == sorted(expected)
    assert first != second


def test_a_position_is_restored_with_another_number_of_ranks() -> None:
    before = Loader(corpus_100, 7, dp_rank=1, dp_size=2, seed=1)
    before.next(8)
    state = before.state()
    reference = Loader(corpus_100, 7, seed=1)
    reference.next(8)
    after = [Loader(corpus_100, 7, dp_rank=r, dp_size=4, seed=1) for r in range(4)]
    for loader in after:
        loader.restore(state)
    parts = [loader.next(12)[0] for loader in after]
    assert np.array_equal(np.concatenate(parts), reference.next(12)[0])


def test_a_position_of_another_order_is_refused() -> None:
    state = Loader(corpus_100, 7, seed=1).state()
    with pytest.raises(DataError, match="seed=1"):
        Loader(corpus_100, 7, seed=2).restore(state)
    with pytest.raises(DataError, match="sequence_length"):
        Loader(corpus_100, 5, seed=1).restore(state)


def test_a_batch_that_does_not_divide_over_the_ranks_and_a_short_stream_are_refused() -> None:
    with pytest.raises(ValueError, match="5 sequences does not divide over 2 ranks"):
        Loader(corpus_100, 7, dp_size=2).next(5)
    with pytest.raises(DataError, match="too few for one sequence"):
        Loader(stream_of([[1, 2]]), 7)


@settings(deadline=None)  # other processes share the machine
@given(
    lengths=st.lists(st.integers(0, 1000), min_size=2, max_size=50),
    fraction=st.floats(0.01, 0.99),
)
def test_a_split_is_disjoint_complete_and_within_the_fraction(
    lengths: list[int], fraction: float
) -> None:
    names = [f"file{i}.txt" for i in range(len(lengths))]
    sizes = np.asarray(lengths, dtype=np.int64)
    kept, held = split(names, sizes, fraction)
    assert sorted([*kept, *held]) == list(range(len(names)))
    assert len(held) >= 1
    positive = sizes[sizes > 0]
    if len(positive):
        shortest = positive.min()
        assert sizes[held].sum() <= max(fraction * sizes.sum(), shortest)


def test_a_split_depends_on_names_and_not_on_their_order() -> None:
    names = [f"{i}.py" for i in range(50)]
    sizes = np.full(50, 7, dtype=np.int64)
    _, held = split(names, sizes, 0.2)
    _, turned = split(names[::-1], sizes, 0.2)
    assert {names[d] for d in held} == {names[::-1][d] for d in turned}
    assert len(held) == 10


@settings(deadline=None)  # other processes share the machine
@given(documents=documents_strategy)
def test_unigram_entropy_is_the_least_loss_of_a_constant_distribution(
    documents: list[list[int]],
) -> None:
    tokens = flat(documents)
    shares = {t: tokens.count(t) / len(tokens) for t in tokens}
    loss = -sum(math.log(shares[t]) for t in tokens) / len(tokens)
    assert unigram_entropy(stream_of(documents)) == pytest.approx(loss, abs=1e-12)


def test_the_standard_library_is_text_of_this_interpreter_split_by_file() -> None:
    corpus = open_corpus("stdlib")
    again = open_corpus("stdlib")
    size = len(corpus.train) + len(corpus.validation)
    assert size > 5_000_000
    assert 0.09 < len(corpus.validation) / size < 0.101  # separators are not counted in the split
    assert 2.5 < unigram_entropy(corpus.validation) < 4.0
    for part, same in ((corpus.train, again.train), (corpus.validation, again.validation)):
        assert np.array_equal(part.read(0, len(part)), same.read(0, len(same)))
    train, held = (
        bytes(s.read(0, len(s)).astype(np.uint8)) for s in (corpus.train, corpus.validation)
    )
    root = Path(sysconfig.get_path("stdlib"))
    for name in ("argparse.py", "json/decoder.py", "asyncio/tasks.py", "random.py"):
        content = (root / name).read_bytes() + b"\0"
        assert (content in train) != (content in held), name


def test_a_folder_of_text_is_read_by_file_without_hidden_ones(tmp_path: Path) -> None:
    for name, content in (("b.txt", "bb"), ("sub/a.txt", "aaaa"), (".hid", "x"), (".g/c", "y")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "empty.txt").touch()
    corpus = open_corpus("text", tmp_path, 0.4)
    assert corpus.train.read(0, len(corpus.train)).tolist() == [*b"aaaa", 0]
    assert corpus.validation.read(0, len(corpus.validation)).tolist() == [*b"bb", 0]


def test_of_a_single_file_the_end_is_held_out_from_a_line_on(tmp_path: Path) -> None:
    file = tmp_path / "one.txt"
    file.write_text("".join(f"line {i:03d}\n" for i in range(100)))
    corpus = open_corpus("text", file, 0.1)
    held = bytes(corpus.validation.read(0, len(corpus.validation)).astype(np.uint8))
    assert held == b"".join(b"line %03d\n" % i for i in range(91, 100)) + b"\0"
    trained = bytes(corpus.train.read(0, len(corpus.train)).astype(np.uint8))
    assert trained[:-1] + held[:-1] == file.read_bytes()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"text\0text", "is a binary file, not text (a zero byte at offset 4)"),
        (b"caf\xe9\n", "is not UTF-8 text (byte 0xe9 at offset 3)"),
        (b"", "is empty"),
        (None, "no such file or folder"),
        (b"x", "two are needed"),
    ],
)
def test_unusable_text_is_refused_in_one_line_that_names_it(
    tmp_path: Path, content: bytes | None, words: str
) -> None:
    file = tmp_path / "data.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        open_corpus("text", file)
    assert str(caught.value).startswith(f"{file}: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(deadline=None)  # other processes share the machine
@given(
    documents=st.lists(st.lists(st.integers(0, 65535), max_size=20), min_size=1, max_size=9),
    dtype=st.sampled_from([np.uint16, np.uint32]),
)
def test_token_files_round_trip(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], dtype: type
) -> None:
    path = tmp_path_factory.mktemp("tokens") / "corpus.bin"
    size = sum(map(len, documents))
    written = write_tokens(path, iter(documents), dtype, vocab_size=65536, separator=7)
    assert written == size
    assert sorted(p.name for p in path.parent.iterdir()) == ["corpus.bin", "corpus.idx"]
    if not size:
        with pytest.raises(DataError, match="is empty"):
            read_tokens(path)
        return
    file = read_tokens(path)
    assert (file.vocab_size, file.separator, file.tokens.dtype) == (65536, 7, np.dtype(dtype))
    parts = [
        file.tokens[a:b].tolist() for a, b in zip(file.offsets, file.offsets[1:], strict=False)
    ]
    assert parts == documents


def test_a_corpus_of_token_files_is_split_by_document(tmp_path: Path) -> None:
    documents = [[d] * 50 for d in range(100)]
    path = tmp_path / "c.bin"
    write_tokens(path, documents, vocab_size=1000, separator=999)
    corpus = open_corpus("tokens", path, 0.1)
    seen = [set(s.read(0, len(s)).tolist()) - {999} for s in (corpus.train, corpus.validation)]
    assert len(seen[1]) == 10
    assert seen[0] & seen[1] == set()
    assert seen[0] | seen[1] == set(range(100))
    assert corpus.vocab_size == 1000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"documents": [[1, 70000]], "vocab_size": 65536}, "document 0 has ids from 1 to 70000"),
        ({"documents": [[1], [-1]], "vocab_size": 9}, "document 1 has ids from -1"),
        ({"documents": [[0.5]], "vocab_size": 9}, "whole numbers"),
        ({"documents": [[[1]]], "vocab_size": 9}, "one-dimensional"),
        ({"documents": [], "vocab_size": 70000}, "does not fit in uint16"),
        ({"documents": [], "vocab_size": 9, "dtype": np.int64}, "uint16 or uint32, not int64"),
        ({"documents": [], "vocab_size": 9, "separator": 9}, "separator 9"),
    ],
)
def test_documents_that_cannot_be_stored_are_refused_and_leave_no_file(
    tmp_path: Path, arguments: dict, words: str
) -> None:
    with pytest.raises(DataError, match=words):
        write_tokens(tmp_path / "c.bin", **{"separator": 0, **arguments})
    assert list(tmp_path.iterdir()) == []


def test_damage_of_a_token_file_is_found(tmp_path: Path) -> None:
    path, index = tmp_path / "c.bin", tmp_path / "c.idx"
    write_tokens(path, [[1, 2, 3], [4]], vocab_size=9, separator=0)
    good, good_index = path.read_bytes(), index.read_bytes()

    def damaged(words: str, data: bytes = good, header: bytes = good_index) -> None:
        path.write_bytes(data)
        index.write_bytes(header)
        with pytest.raises(DataError, match=words):
            read_tokens(path)

    damaged("do not belong together", data=good[:-2])
    damaged("do not belong together", data=good + b"\1\0")
    damaged("not the index", header=b"RIFF" + good_index[4:])
    damaged("not the index", header=good_index[:20])
    damaged("version 2", header=good_index[:8] + b"\2" + good_index[9:])
    damaged("header is impossible", header=good_index[:12] + b"\3" + good_index[13:])
    damaged("do not hold 2 documents", header=good_index[:-8])
    swapped = good_index[:32] + good_index[40:48] + good_index[32:40] + good_index[48:]
    damaged("do not belong together", header=swapped)
    index.unlink()
    with pytest.raises(DataError, match=r"c\.idx: no such file"):
        read_tokens(path)
    with pytest.raises(DataError, match=r"ends in \.bin"):
        read_tokens(tmp_path / "c.txt")


def with_wrong_id(path: Path, place: int, wrong: int) -> Path:
    """A token file of 100 documents of 50 tokens, one of them outside the vocabulary of 1000."""
    write_tokens(path, [[d] * 50 for d in range(100)], vocab_size=1000, separator=999)
    tokens = np.memmap(path, dtype="<u2", mode="r+")
    tokens[place] = wrong
    tokens.flush()
    return path


@pytest.mark.parametrize("place", [0, 2500, 4999])
def test_an_id_outside_the_vocabulary_is_found_with_its_place(tmp_path: Path, place: int) -> None:
    path = with_wrong_id(tmp_path / "c.bin", place, 1000)
    message = rf"c\.bin: token {place} has the id 1000, .* below 1000; write the file again"
    with pytest.raises(DataError, match=message):
        require_ids(path)
    require_ids(path, limit=place)  # of a longer file only the beginning is looked at
    corpus = open_corpus("tokens", path, 0.1)
    found = []
    for stream in (corpus.train, corpus.validation):
        try:
            stream.read(0, len(stream))
        except DataError as error:
            found.append(str(error))
    assert len(found) == 1
    assert re.search(message, found[0])


def test_the_largest_of_several_wrong_ids_is_named(tmp_path: Path) -> None:
    path = with_wrong_id(tmp_path / "c.bin", 7, 1000)
    tokens = np.memmap(path, dtype="<u2", mode="r+")
    tokens[30:33] = 1001, 65535, 1002
    with pytest.raises(DataError, match="token 31 has the id 65535"):
        require_ids(path)
