"""One call of the provider for all processes, over real HTTP; and what the death or sleep of the caller does to others.

The provider revokes a grant whose refresh token comes twice, so that every race of the store shows in its counters.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from signal import SIGCONT, SIGKILL, SIGSTOP

import pytest

from support import refresh_jobs as jobs
from support.broken_backends import fault_named
from support.matrix import Row, each_database
from support.refresh_jobs import Answer, Stop, Terms
from support.workers import Team, Worker
from tokenstore.testing.provider import StrictRotatingProvider

_PROCESSES, _CALLERS = 16, 50
# A busy machine takes its time from the claim to where a process is stopped.
_TIMEOUT = 4.0
_LEASE = 1.5 * _TIMEOUT
# SQLite's clock counts milliseconds, and a machine's clocks may be adjusted against each other.
_CLOCK_ERROR = 0.05
# Beyond the lease's end; most of it is for a machine that is busy with other tests.
_PROMPTLY = 1.0 + 5.0


@pytest.fixture(scope="module")
def fleet() -> Iterator[Team]:
    fleet = Team()
    yield fleet
    fleet.close()


@pytest.fixture
def team(fleet: Team) -> Iterator[Team]:
    yield fleet
    fleet.muster()


@pytest.fixture
def provider() -> Iterator[StrictRotatingProvider]:
    with StrictRotatingProvider() as provider:
        yield provider


@pytest.fixture
def terms(row: Row, tmp_path: Path, team: Team, provider: StrictRotatingProvider) -> Terms:
    """A store whose table holds one row of the provider, with an access token that has expired."""
    terms = Terms.at(row.url_for(tmp_path), provider)
    team[0].call(jobs.grant, terms, {"user": provider.new_grant("user")["refresh_token"]})
    return terms


def _tokens(answers: Sequence[Sequence[Answer | None]]) -> set[str | None]:
    """The access tokens that the callers of all processes got; an error is an error of the test, too."""
    given = [answer for process in answers for answer in process if answer is not None]
    assert {answer.error for answer in given} <= {None}
    return {answer.token for answer in given}


@each_database
def test_a_fleet_refreshes_an_expired_token_once(terms: Terms, team: Team, provider: StrictRotatingProvider) -> None:
    """Of 16 processes with 50 callers each, one calls the provider, and all 800 get the new token."""
    provider.latency = 0.2
    answers = team.all_at_once(jobs.ask, terms, _CALLERS, count=_PROCESSES)
    stats = provider.stats()
    assert (stats.requests, stats.refreshes, stats.reuses) == (1, 1, 0)
    [token] = _tokens(answers)
    assert token == team[0].call(jobs.stored, terms) != "expired"
    assert sum(map(len, answers)) == _PROCESSES * _CALLERS


@each_database
def test_callers_come_and_go(terms: Terms, team: Team, provider: StrictRotatingProvider) -> None:
    """Callers are cancelled anywhere in a refresh, which goes on; who stays gets this round's token."""
    _rounds(terms, team, provider, rounds=5, callers=20)


@pytest.mark.soak
@each_database
def test_callers_come_and_go_for_long(terms: Terms, team: Team, provider: StrictRotatingProvider) -> None:
    _rounds(terms, team, provider, rounds=200, callers=_CALLERS)


def _rounds(terms: Terms, team: Team, provider: StrictRotatingProvider, *, rounds: int, callers: int) -> None:
    random = Random(rounds)
    workers = team.first(_PROCESSES)
    last = "expired"
    for number in range(1, rounds + 1):
        # Every other round, everybody leaves as soon as the provider has the request.
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
    """A refresh that is interrupted, of a row of its own, and what becomes of it.

    Attributes:
        at: Where the refreshing process is interrupted; None: while the provider keeps back its answer.
        provider: Its provider.
        terms: How the others open the store.
        worker: The refreshing process.
        other: A process that has found the row leased.
        began: When the lease had not been claimed yet, by the machine's clock.
        stood: When it had been.
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
        """Begin a refresh for three callers."""
        if self.at is None:
            self.held.enter_context(self.provider.hold())
        # The lease is this process's affair alone; the others have all the time that a busy machine takes.
        self.worker.start(jobs.ask, replace(self.terms, stop=self.at, timeout=_TIMEOUT), 3)
        self.worker.met()
        self.began = time.monotonic()
        self.worker.go_on()

    def freeze(self) -> None:
        """Freeze the process where it is to be interrupted; an answer of the provider that was kept back is sent."""
        if self.at is None:
            self.provider.wait_for_requests(1)
        else:
            self.worker.met()
        self.stood = time.monotonic()
        self.worker.signal(SIGSTOP)
        self.held.close()

    def wake(self) -> None:
        """End the process's sleep."""
        self.worker.signal(SIGCONT)
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
        """The provider's requests, refreshes, replays and reuses."""
        stats = self.provider.stats()
        return stats.requests, stats.refreshes, stats.replays, stats.reuses


def _all(cases: Sequence[_Case], *steps: Callable[[_Case], None]) -> None:
    """Take each step for all cases, so that they wait together."""
    for step in steps:
        for case in cases:
            step(case)


Cases = Callable[..., list[_Case]]


@pytest.fixture
def cases(row: Row, tmp_path: Path, team: Team) -> Iterator[Cases]:
    """Cases with a provider, a row and two processes each, so that they can wait for their leases together."""
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
                case.worker.call(jobs.stored, replace(terms, stop=at, timeout=_TIMEOUT))  # connects
                made.append(case)
            return made

        yield cases


@each_database
def test_who_waits_for_a_killed_refresher_recovers(cases: Cases, team: Team, request: pytest.FixtureRequest) -> None:
    """When its lease has expired, one other caller tries again, with what the provider makes of that.

    The user has to log in again only where the provider had issued tokens that went down with the process.
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
        case.worker.signal(SIGKILL)
        team.dismiss(case.worker)
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
        # As `record_property` does, which warns about pytest's own default of JUnit files.
        request.node.user_properties.append((f"{where} ({fate}), seconds to recover", round(first - case.stood, 3)))


@each_database
def test_a_refresher_that_sleeps_through_its_lease_overwrites_nothing(cases: Cases, team: Team) -> None:
    """Another process takes over and stores; the sleeper sends nothing late, and its callers get the newer tokens."""
    asleep = cases(
        (Stop.BEFORE_THE_CALL, StrictRotatingProvider()),
        # Where both have consumed a refresh token, it has to be one that stays good.
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
def test_tokens_of_a_sleeper_that_nobody_replaced_are_not_lost(cases: Cases, team: Team) -> None:
    """Its lease has expired, but the row is as it was: the late write counts, and nobody asks again."""
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
def test_a_sleeper_does_not_undo_a_login(cases: Cases) -> None:
    """The user logs in again while the refresher is frozen, its lease still live: what it brings is void."""
    [case] = cases((Stop.BEFORE_THE_WRITE, StrictRotatingProvider()))
    _all([case], _Case.begin, _Case.freeze)
    login = case.provider.new_grant("user")
    case.other.call(jobs.log_in, case.terms, login)
    case.wake()
    assert _tokens([case.worker.result()]) == {login["access_token"]}
    assert case.other.call(jobs.stored, case.terms) == login["access_token"]


@each_database
def test_clocks_that_differ_by_hours_make_no_further_call(
    terms: Terms, team: Team, provider: StrictRotatingProvider
) -> None:
    """Whether a token has expired is judged by the database's clock, whatever the machines' clocks say."""
    hour = 3600.0
    terms_by_clock = [replace(terms, clock_error=error) for error in (-hour, 0.0, hour, -2 * hour)]
    for _ in range(2):
        answers = team.together([(jobs.ask, by_clock, 20) for by_clock in terms_by_clock])
        assert len(_tokens(answers)) == 1
        assert provider.stats().requests == 1


@each_database
def test_a_refused_grant_is_asked_for_once_and_a_new_login_works_at_once(
    terms: Terms, team: Team, provider: StrictRotatingProvider
) -> None:
    """400 callers in 8 processes learn from one call that the user has to log in again, and later ones from none."""
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
    """Callers that lock the row, as the contract says, and callers of the engine make one call between them.

    In turn all begin at once, or the second half when the provider has the first half's request.
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
def test_processes_that_refresh_what_is_due_share_the_work(
    terms: Terms, team: Team, provider: StrictRotatingProvider
) -> None:
    """Each of 60 rows is refreshed by one of four processes, and the others leave it alone."""
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
    """Of all who revoke a row's tokens one does; who wants a token gets one from before that, or none."""
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
def test_a_lease_that_is_no_compare_and_set_is_found(
    row: Row, terms: Terms, team: Team, provider: StrictRotatingProvider
) -> None:
    """With a seeded fault in the backend, the provider gets a refresh token twice."""
    broken = replace(terms, fault=fault_named("lease checked, then taken", row.mark))
    for _ in range(50):
        team.all_at_once(jobs.ask, broken, 5, count=4)
        if provider.stats().reuses:
            return
        team[0].call(jobs.grant, terms, {"user": provider.new_grant("user")["refresh_token"]})
    pytest.fail("the fault was not found")
