"""The table of where ranks stand says who holds up whom, in few lines for any number of ranks."""

from __future__ import annotations

from counterflow.launch.life.standing import Standing, ranges, table, waits


def lines(*ranks: Standing) -> list[str]:
    return [line.strip() for line in table("rank 0: no answer", ranks).splitlines()]


def at(rank: int, what: str, host: str = "n1") -> Standing:
    return Standing(rank, host, f"rank {rank}, step 7, {what}")


def test_the_rank_that_others_wait_for_and_that_waits_for_nobody_is_pointed_at() -> None:
    found = lines(
        at(0, "action 1F3, waiting for activations from rank 1"),
        at(1, "action 1F3, waiting for experts' rows from ranks 2, 3"),
        at(2, "action 0B1", "n2"),
        at(3, "action 1F3, waiting for experts' rows from ranks 1, 2", "n2"),
    )
    assert found == [
        "counterflow: error: rank 0: no answer; where each rank stands:",
        "rank 0 (n1): step 7, action 1F3, waiting for activations from rank 1",
        "rank 1 (n1): step 7, action 1F3, waiting for experts' rows from ranks 2-3",
        "rank 2 (n2): step 7, action 0B1",
        "rank 3 (n2): step 7, action 1F3, waiting for experts' rows from ranks 1-2",
        "ranks 1, 3 wait for rank 2, which waits for nobody itself: look there first",
    ]


def test_ranks_that_gave_no_answer_are_named_with_their_host() -> None:
    found = lines(
        at(0, "waiting for the losses from ranks 0, 1, 2, 3"),
        Standing(1, "n1"),
        Standing(2, "n2", gone="was ended by SIGKILL"),
        Standing(3, "n3"),
    )
    assert "ranks 1, 3 (n1, n3): no answer: its process is stopped, gone, or held in C code" in (
        found
    )
    assert "rank 2 (n2): was ended by SIGKILL" in found
    assert found[-1].startswith("rank 0 waits for ranks 1-3, which wait for nobody themselves")


def test_a_circle_of_waits_is_shown() -> None:
    found = lines(
        at(0, "waiting for x from rank 1"),
        at(1, "waiting for x from rank 2"),
        at(2, "waiting for x from rank 1"),
    )
    assert found[-1] == "every one of them waits for another, in a circle: rank 1 -> 2 -> 1"


def test_who_a_failed_rank_waited_for_counts_as_its_wait() -> None:
    failed = Standing(0, "n1", "rank 0, step 7: the connection was closed", peers=(1,))
    found = lines(failed, at(1, "action 0F0"))
    assert found[-1].startswith("rank 0 waits for rank 1")
    assert waits([failed, at(1, "action 0F0")]) == {0: {1}}


def test_a_thousand_ranks_at_one_place_take_one_line() -> None:
    everyone = ", ".join(map(str, range(1000)))
    ranks = [at(r, f"waiting for the losses from ranks {everyone}") for r in range(1000)]
    ranks[517] = at(517, "action 0F0", "n9")
    found = lines(*ranks)
    assert len(found) == 4
    assert found[1] == "ranks 0-516, 518-999 (n1): step 7, waiting for the losses from ranks 0-999"
    assert "wait for rank 517, which waits for nobody itself" in found[-1]


def test_a_thousand_ranks_at_different_places_take_few_lines_and_all_are_counted() -> None:
    pairs = [at(r, f"waiting for activations from rank {r ^ 1}", f"n{r}") for r in range(1000)]
    found = lines(*pairs)
    assert "ranks 0-999 (n0, n1, n2, n3, n4, n5, n6, n7, ...): " in found[1]
    assert "waiting for activations from others" in found[1]
    letters = [
        f"{chr(97 + r % 26)}{chr(97 + r // 26 % 26)}{chr(97 + r // 676)}" for r in range(1000)
    ]
    found = lines(*(at(r, name) for r, name in enumerate(letters)))
    assert len(found) <= 40
    assert found[-1] == "970 more ranks, at 970 more positions"


def test_ranges() -> None:
    assert ranges([3]) == "rank 3"
    assert ranges([7, 0, 1, 2, 2, 9]) == "ranks 0-2, 7, 9"
