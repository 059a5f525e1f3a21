"""Notes of several ranks, said once."""

from counterflow.comm.profile.notes import listed, merged


def test_notes_that_differ_in_numbers_alone_are_one_with_their_range() -> None:
    notes = ["first", "rank 2: 13.7 % of 9 steps", "rank 0: 4 % of 9 steps", "last"]
    assert merged(notes) == ["first", "ranks 0, 2: 4 to 13.7 % of 9 steps", "last"]


def test_names_with_numbers_are_no_numbers() -> None:
    notes = ["rank 0: 1 actions are not there: 0F3", "rank 1: 2 actions are not there: 0F4"]
    assert merged(notes) == notes
    notes = ["rank 0: left rank3.json", "rank 1: left rank4.json", "of 3 ranks", "of 4 ranks"]
    assert merged(notes) == notes


def test_a_note_that_several_ranks_have_already_is_joined_too() -> None:
    assert merged(["rank 0, rank 1: 3 lost", "rank 2: 5 lost"]) == ["ranks 0 to 2: 3 to 5 lost"]
    assert merged(["rank 7: 3 lost"]) == ["rank 7: 3 lost"]


def test_ranks_are_listed_with_neighbours_together() -> None:
    assert listed(["rank 5", "rank 1", "rank 3", "rank 4"]) == "ranks 1, 3 to 5"
    assert listed(["rank 1", "a.json"]) == "rank 1, a.json"
