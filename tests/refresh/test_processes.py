"""One call of the provider for all processes, over HTTP, also if the refreshing process is killed or suspended.

The provider revokes a grant whose refresh token is used twice, so that a race in the store shows in its counters.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

import pytest

from support import refresh_jobs as jobs
from support.broken_backends import fault_named
from support.matrix import Row, each_database
from support.refresh_jobs import Answer, Stop, Terms
from support.workers import Team, Worker
from tokenstore.testing.provider import StrictRotatingProvider

_PROCESSES, _CALLERS = 16, 50
# Seconds; on a busy machine it takes some time from the claim to the point at which a process is stopped.
_TIMEOUT = 4.0
_LEASE = 1.5 * _TIMEOUT
# Seconds; SQLite's clock has a resolution of milliseconds, and the system may adjust its clocks differently.
_CLOCK_ERROR = 0.05
# Seconds after the end of the lease; most of them are for a busy machine.
_PROMPTLY = 1.0 + 5.0


@pytest.fixture(scope="module")
def fleet() -> Iterator[Team]:
    fleet = Team()
    yield fleet
    fleet.close()


@pytest.fixture
def team(fleet: Team) -> Iterator[Team]:
    yield fleet
    fleet.remove_busy_workers()


@pytest.fixture
def provider() -> Iterator[StrictRotatingProvider]:
    with StrictRotatingProvider() as provider:
        yield provider


@pytest.fixture
def terms(row: Row, tmp_path: Path, team: Team, provider: StrictRotatingProvider) -> Terms:
    """A store whose table has one row of the provider, with an expired access token."""
    terms = Terms.at(row.url_for(tmp_path), provider)
    team[0].call(jobs.grant, terms, {"user": provider.new_grant("user")["refresh_token"]})
    return terms


def _tokens(answers: Sequence[Sequence[Answer | None]]) -> set[str | None]:
    """Return the access tokens that the callers of all processes got; an error of a caller fails the test."""
    given = [answer for process in answers for answer in process if answer is not None]
    assert {answer.error for answer in given} <= {None}
    return {answer.token for answer in given}


@each_database
def test_sixteen_processes_refresh_an_expired_token_once(
    terms: Terms, team: Team, provider: StrictRotatingProvider
) -> None:
    """Of 16 processes with 50 callers each, one calls the provider, and all 800 callers get the new token."""
    provider.latency = 0.2
    answers = team.all_at_once(jobs.ask, terms, _CALLERS, count=_PROCESSES)
    stats = provider.stats()
    assert (stats.requests, stats.refreshes, stats.reuses) == (1, 1, 0)
    [token] = _tokens(answers)
    assert token == team[0].call(jobs.stored, terms) != "expired"
    assert sum(map(len, answers)) == _PROCESSES * _CALLERS


@each_database
def test_cancelled_callers_do_not_cancel_refreshes(terms: Terms, team: Team, provider: StrictRotatingProvider) -> None:
    """Callers are cancelled at any point of a refresh; the others get the round's new token."""
    _rounds(terms, team, provider, rounds=5, callers=20)


@pytest.mark.soak
@each_database
def test_cancelled_callers_do_not_cancel_refreshes_in_many_rounds(
    terms: Terms, team: Team, provider: StrictRotatingProvider
) -> None:
    _rounds(terms, team, provider, rounds=200, callers=_CALLERS)


def _rounds(terms: Terms, team: Team, provider: StrictRotatingProvider, *, rounds: int, callers: int) -> None:
    random = Random(rounds)
    workers = team.first(_PROCESSES)
    last = "expired"
    for number in range(1, rounds + 1):
        # In every second round, all callers are cancelled as soon as the provider has the request.
        all_leave = number % 2 == 0
        for worker in workers:
            stays = [None if all_leave or random.random() < 0.5 else _steps(random) for _ in range(callers)]
            worker.start(jobs.come_and_go, terms, stays, all_leave)
        for worker in workers:
            worker.met()
        with ExitStack() as held:
            if all_leave:
                held.enter_context(provider.hold())
            for worker in workers:
                worker.go_on()
            if all_leave:
                provider.wait_for_requests(number)
                for worker in workers:
                    worker.go_on()
                for worker in workers:
                    worker.met()
        tokens = _tokens([worker.result() for worker in workers])
        stats = provider.stats()
        assert (stats.requests, stats.refreshes, stats.reuses) == (number, number, 0)
        token = workers[0].call(jobs.expire, terms)
        assert token != last
        assert tokens == (set() if all_leave else {token})
        last = token


def _steps(random: Random) -> int:
    return int(2 ** random.uniform(0, 9))


@dataclass
class _Case:
    """A refresh of one row that is interrupted.

    Attributes:
        at: Where the refreshing process is interrupted; None: while the provider delays its response.
        provider: The provider.
        terms: How the other processes open the store.
        worker: The refreshing process.
        other: A process that waits for the lease.
        began: A time before the lease was claimed, by the machine's monotonic clock.
        stood: A time after the lease was claimed.
    """

    at: Stop | None
    provider: StrictRotatingProvider
    terms: Terms
    worker: Worker
    other: Worker
    began: float = 0.0
    stood: float = 0.0
    held: ExitStack = field(default_factory=ExitStack)

    def begin(self) -> None:
        """Begin a refresh with three callers."""
        if self.at is None:
            self.held.enter_context(self.provider.hold())
        # Only this process has a short lease; the others have the usual time limits, for a busy machine.
        self.worker.start(jobs.ask, replace(self.terms, stop=self.at, timeout=_TIMEOUT), 3)
        self.worker.met()
        self.began = time.monotonic()
        self.worker.go_on()

    def freeze(self) -> None:
        """Suspend the process where it is to be interrupted; if the provider delayed its response, it is sent now."""
        if self.at is None:
            self.provider.wait_for_requests(1)
        else:
            self.worker.met()
        self.stood = time.monotonic()
        self.worker.stop()
        self.held.close()

    def wake(self) -> None:
        """Let the suspended process continue."""
        self.worker.resume()
        if self.at is not None:
            self.worker.go_on()

    def let_another_wait(self) -> None:
        """Let two callers of another process read the row, and wait for its lease."""
        self.other.start(jobs.ask, replace(self.terms, stop=Stop.AFTER_A_READ), 2)
        self.other.met()
        self.other.go_on()
        self.other.met()
        self.other.go_on()

    @property
    def counted(self) -> tuple[int, int, int, int]:
        """Return the provider's counts of requests, refreshes, replays and reuses."""
        stats = self.provider.stats()
        return stats.requests, stats.refreshes, stats.replays, stats.reuses


def _all(cases: Sequence[_Case], *steps: Callable[[_Case], None]) -> None:
    """Take each step for all cases, so that the cases wait at the same time."""
    for step in steps:
        for case in cases:
            step(case)


Cases = Callable[..., list[_Case]]


@pytest.fixture
def cases(row: Row, tmp_path: Path, team: Team) -> Iterator[Cases]:
    """Make cases, each with its own provider, row and two processes, so that they can wait at the same time."""
    with ExitStack() as providers:

        def cases(*wanted: tuple[Stop | None, StrictRotatingProvider]) -> list[_Case]:
            url, workers = row.url_for(tmp_path), iter(team.first(2 * len(wanted)))
            made: list[_Case] = []
            for at, provider in wanted:
                user_id = f"user {len(made)}"
                providers.enter_context(provider)
                terms = Terms.at(url, provider, user_id=user_id)
                case = _Case(at, provider, terms, next(workers), next(workers))
                case.other.call(jobs.grant, terms, {user_id: provider.new_grant(user_id)["refresh_token"]})
                case.worker.call(jobs.stored, replace(terms, stop=at, timeout=_TIMEOUT))  # opens the connection
                made.append(case)
            return made

        yield cases


@each_database
def test_after_the_refreshing_process_was_killed_a_waiting_caller_refreshes(
    cases: Cases, team: Team, request: pytest.FixtureRequest
) -> None:
    """After the lease has expired, one other caller calls the provider.

    The user has to log in again only if the killed process had the only copy of newly issued tokens.
    """
    untouched, lost, replayed, done = "untouched", "lost", "replayed", "done"
    expected: dict[tuple[Stop | None, float], str] = {
        (Stop.BEFORE_THE_CALL, 0.0): untouched,
        (None, 0.0): lost,
        (None, 60.0): replayed,
        (Stop.AFTER_THE_RESPONSE, 0.0): lost,
        (Stop.BEFORE_THE_WRITE, 0.0): lost,
        (Stop.BEFORE_THE_WRITE, 60.0): replayed,
        (Stop.AFTER_THE_WRITE, 0.0): done,
    }
    killed = cases(*((at, StrictRotatingProvider(grace=grace)) for at, grace in expected))
    _all(killed, _Case.begin, _Case.freeze, _Case.let_another_wait)
    for case in killed:
        case.worker.kill()
        team.remove(case.worker)
    for case, fate in zip(killed, expected.values(), strict=True):
        answers: list[Answer] = case.other.result()
        fresh: list[Answer] = team[0].call(jobs.ask, case.terms, 2)
        stored = team[0].call(jobs.stored, case.terms)
        got = {(answer.token, answer.error) for answer in (*answers, *fresh)}
        if fate == lost:
            assert case.counted == (2, 1, 0, 1)
            assert got == {(None, "ReauthorizationRequiredError invalid_grant")}
        else:
            assert case.counted == {untouched: (1, 1, 0, 0), replayed: (2, 1, 1, 0), done: (1, 1, 0, 0)}[fate]
            assert got == {(stored, None)} != {("expired", None)}
        first = min(answer.at for answer in answers)
        if fate != done:
            assert first - case.began > _LEASE - _CLOCK_ERROR
        assert first - case.stood < _LEASE + _PROMPTLY
        where = case.at.name.lower() if case.at else "during_the_call"
        # Not `record_property`, which warns about pytest's default format of JUnit files.
        request.node.user_properties.append((f"{where} ({fate}), seconds to recover", round(first - case.stood, 3)))


@each_database
def test_a_process_suspended_during_its_lease_overwrites_no_newer_tokens(cases: Cases, team: Team) -> None:
    """Another process refreshes meanwhile. The suspended process's callers get the newer tokens."""
    asleep = cases(
        (Stop.BEFORE_THE_CALL, StrictRotatingProvider()),
        # If both processes send the same refresh token, the provider must not revoke the grant for it.
        (None, StrictRotatingProvider(rotate=False)),
        (Stop.AFTER_THE_RESPONSE, StrictRotatingProvider(rotate=False)),
        (Stop.BEFORE_THE_WRITE, StrictRotatingProvider(rotate=False)),
    )
    _all(asleep, _Case.begin, _Case.freeze, _Case.let_another_wait)
    for case in asleep:
        newer = _tokens([case.other.result()])
        case.wake()
        assert _tokens([case.worker.result()]) == newer
        assert {case.other.call(jobs.stored, case.terms)} == newer != {"expired"}
        calls = 1 if case.at is Stop.BEFORE_THE_CALL else 2
        assert case.counted == (calls, calls, 0, 0)


@each_database
def test_late_tokens_of_a_suspended_process_are_stored_if_the_row_is_unchanged(cases: Cases, team: Team) -> None:
    """Its lease has expired, but no other process refreshed: the late write succeeds, and there is no second call."""
    asleep = cases(
        (Stop.AFTER_THE_RESPONSE, StrictRotatingProvider()), (Stop.BEFORE_THE_WRITE, StrictRotatingProvider())
    )
    _all(asleep, _Case.begin, _Case.freeze)
    for case in asleep:
        case.other.call(jobs.outlast, case.terms)
        case.wake()
        late = _tokens([case.worker.result()])
        assert _tokens([case.other.call(jobs.ask, case.terms, 2)]) == late != {"expired"}
        assert case.counted == (1, 1, 0, 0)


@each_database
def test_a_suspended_process_does_not_overwrite_the_tokens_of_a_new_login(cases: Cases) -> None:
    """The user logs in again while the process is suspended with a live lease; its own tokens are dropped."""
    [case] = cases((Stop.BEFORE_THE_WRITE, StrictRotatingProvider()))
    _all([case], _Case.begin, _Case.freeze)
    login = case.provider.new_grant("user")
    case.other.call(jobs.log_in, case.terms, login)
    case.wake()
    assert _tokens([case.worker.result()]) == {login["access_token"]}
    assert case.other.call(jobs.stored, case.terms) == login["access_token"]


@each_database
def test_clocks_that_differ_by_hours_cause_no_further_call(
    terms: Terms, team: Team, provider: StrictRotatingProvider
) -> None:
    """The database's clock decides whether a token has expired, not the clocks of the machines."""
    hour = 3600.0
    terms_by_clock = [replace(terms, clock_error=error) for error in (-hour, 0.0, hour, -2 * hour)]
    for _ in range(2):
        answers = team.together([(jobs.ask, by_clock, 20) for by_clock in terms_by_clock])
        assert len(_tokens(answers)) == 1
        assert provider.stats().requests == 1


@each_database
def test_a_refused_refresh_token_is_sent_once_and_a_new_login_works_at_once(
    terms: Terms, team: Team, provider: StrictRotatingProvider
) -> None:
    """400 callers in 8 processes get "log in again" after one call of the provider; later callers cause no call."""
    team[0].call(jobs.grant, terms, {"user": "unknown to the provider"})
    for _ in range(2):
        answers = team.all_at_once(jobs.ask, terms, 50, count=8)
        got = [(answer.token, answer.error) for process in answers for answer in process]
        assert got == [(None, "ReauthorizationRequiredError invalid_grant")] * 400
        assert provider.stats().requests == 1
    login = provider.new_grant("user")
    team[0].call(jobs.log_in, terms, login)
    assert _tokens(team.all_at_once(jobs.ask, terms, 50, count=8)) == {login["access_token"]}
    team[0].call(jobs.expire, terms)
    assert len(_tokens(team.all_at_once(jobs.ask, terms, 50, count=8))) == 1
    assert (provider.stats().requests, provider.stats().refreshes) == (2, 1)


@each_database
def test_row_locks_and_leases_exclude_each_other(terms: Terms, team: Team, provider: StrictRotatingProvider) -> None:
    """Callers that refresh under the row lock and callers of `load_fresh_tokens` together make one call.

    All callers begin at once, or the second half begins when the provider has the first half's request.
    """
    provider.latency = 0.1
    workers = team.first(8)
    lockers, askers = workers[:4], workers[4:]
    for number, (first, second) in enumerate([(lockers, askers), (askers, lockers), (workers, [])] * 2, 1):
        for worker in workers:
            worker.start(*((jobs.lock_and_refresh, terms, 5) if worker in lockers else (jobs.ask, terms, 10)))
        for worker in workers:
            worker.met()
        for worker in first:
            worker.go_on()
        provider.wait_for_requests(number)
        for worker in second:
            worker.go_on()
        tokens = _tokens([worker.result() for worker in workers])
        stats = provider.stats()
        assert (stats.requests, stats.refreshes, stats.reuses) == (number, number, 0)
        assert tokens == {team[0].call(jobs.expire, terms)}


@each_database
def test_each_row_is_refreshed_by_one_of_the_processes_that_call_refresh_due(
    terms: Terms, team: Team, provider: StrictRotatingProvider
) -> None:
    """Four processes call `refresh_due`; each of 60 rows is refreshed once."""
    users = [f"user {number}" for number in range(60)]
    team[0].call(jobs.grant, terms, {user: provider.new_grant(user)["refresh_token"] for user in users})
    outcomes = [outcome for process in team.all_at_once(jobs.refresh_due, terms, count=4) for outcome in process]
    assert {outcome for _, outcome in outcomes} <= {"refreshed", "not_due", "busy"}
    refreshed = [user for user, outcome in outcomes if outcome == "refreshed"]
    assert sorted(refreshed) == sorted([*users, "user"])
    stats = provider.stats()
    assert stats.refreshes_by_user == dict.fromkeys(refreshed, 1)
    assert (stats.requests, stats.reuses) == (61, 0)


@each_database
def test_tokens_are_revoked_once_and_not_refreshed_meanwhile(
    terms: Terms, team: Team, provider: StrictRotatingProvider
) -> None:
    """Of many callers one revokes the tokens; callers that load a token get the earlier one, or none."""
    for number in range(1, 4):
        answers = team.together([(jobs.revoke, terms, 3)] * 3 + [(jobs.ask, terms, 5)] * 3)
        assert sum(map(sum, answers[:3])) == 1
        assert len(_tokens(answers[3:]) - {None}) <= 1
        assert team[0].call(jobs.stored, terms) is None
        stats = provider.stats()
        assert (stats.revoked_grants, stats.reuses) == (number, 0)
        team[0].call(jobs.grant, terms, {"user": provider.new_grant("user")["refresh_token"]})


@pytest.mark.seeded
@each_database
def test_a_seeded_fault_in_claiming_leases_is_found(
    row: Row, terms: Terms, team: Team, provider: StrictRotatingProvider
) -> None:
    """With a backend that claims leases without compare-and-set, the provider gets a refresh token twice."""
    broken = replace(terms, fault=fault_named("lease checked, then taken", row.mark))
    for _ in range(50):
        team.all_at_once(jobs.ask, broken, 5, count=4)
        if provider.stats().reuses:
            return
        team[0].call(jobs.grant, terms, {"user": provider.new_grant("user")["refresh_token"]})
    pytest.fail("the seeded fault was not found")


@each_database
def test_sixteen_processes_have_a_missing_token_issued_once(row: Row, tmp_path: Path, team: Team) -> None:
    """Of 16 processes with 50 tasks each, one calls the provider, and all 800 tasks get the token."""
    with StrictRotatingProvider(latency=0.2) as provider:
        terms = Terms.at(row.url_for(tmp_path), provider, issues=True)
        team[0].call(jobs.set_up, terms)
        answers = team.all_at_once(jobs.ask, terms, _CALLERS, count=_PROCESSES)
        got = {(answer.token, answer.error) for process in answers for answer in process}
        assert got == {(team[0].call(jobs.stored, terms), None)}
        assert sum(map(len, answers)) == _PROCESSES * _CALLERS
        assert (provider.stats().requests, provider.stats().issues) == (1, 1)


@each_database
def test_after_the_issuing_process_was_killed_one_more_token_is_issued(row: Row, tmp_path: Path, team: Team) -> None:
    """It is killed before the call, during it, or with the response. The next issue waits for the end of its lease.

    Until then no process sees the row. Afterwards all get the one token.
    """
    url = row.url_for(tmp_path)
    stops: tuple[Stop | None, ...] = (Stop.BEFORE_THE_CALL, None, Stop.AFTER_THE_RESPONSE)
    with ExitStack() as stack:
        cases = []
        for number, stop in enumerate(stops):
            provider = stack.enter_context(StrictRotatingProvider())
            terms = Terms.at(url, provider, user_id=f"user {number}", issues=True)
            worker, other = team.first(2 * len(stops))[2 * number : 2 * number + 2]
            other.call(jobs.set_up, terms)
            held = ExitStack()
            if stop is None:
                held.enter_context(provider.hold())
            worker.start(jobs.ask, replace(terms, stop=stop, timeout=_TIMEOUT), 3)
            worker.met()
            worker.go_on()
            if stop is None:
                provider.wait_for_requests(1)
            else:
                worker.met()
            worker.kill()
            killed = time.monotonic()
            team.remove(worker)
            held.close()
            assert other.call(jobs.stored, terms) is None
            other.start(jobs.ask, terms, 20)
            other.met()
            other.go_on()
            cases.append((provider, terms, other, killed, stop))
        for provider, terms, other, killed, stop in cases:
            answers: list[Answer] = other.result()
            assert {(answer.token, answer.error) for answer in answers} == {(other.call(jobs.stored, terms), None)}
            assert provider.stats().issues == (1 if stop is Stop.BEFORE_THE_CALL else 2)
            assert max(answer.at for answer in answers) - killed < _LEASE + _PROMPTLY
