"""Hypothesis's strategy for the programs of `support.generated_programs`."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from support.generated_programs import Action, Program, Step

# How many steps of the event loop a program waits.
_PAUSES = (0, 1, 3, 10, 40)
# The actions of a program. Programs with few kinds of actions reach deeper states than programs with all kinds.
_THEMES: tuple[tuple[Action, ...], ...] = (
    ("store", "load", "update", "update", "delete"),
    ("claim", "claim", "claim", "complete", "release"),
    ("reseal", "reseal", "store", "load", "update"),
    ("store", "load", "update", "update", "delete", "reseal", "claim", "claim", "complete", "release"),
)


def programs(tasks: int = 4, steps: int = 5) -> st.SearchStrategy[Program]:
    """Generate programs of two or more tasks, which use one to three rows."""
    rarely = st.sampled_from((False, False, False, True))
    which = st.integers(0, 2)
    fields: dict[Action, dict[str, st.SearchStrategy[Any]]] = {
        "update": {"deletes": rarely, "rolls_back": rarely, "restarts": rarely},
        "claim": {"brief": st.booleans(), "ends": st.sampled_from((None, "complete", "release")), "fails": rarely},
        "complete": {"which": which},
        "release": {"which": which, "fails": rarely},
    }
    mostly_one = ((0,), (0,), (0,), (0,), (0,), (1,), (2,))

    def step(action: Action) -> st.SearchStrategy[Step]:
        return st.builds(
            Step,
            st.just(action),
            keys=st.sampled_from((*mostly_one, (0, 1), (0, 2)) if action == "update" else mostly_one),
            pause=st.sampled_from(_PAUSES),
            cancel_at=st.none() | st.none() | st.integers(1, 24),
            **fields.get(action, {}),
        )

    def themed(theme: tuple[Action, ...]) -> st.SearchStrategy[Program]:
        task = st.lists(st.sampled_from(theme).flatmap(step), min_size=1, max_size=steps).map(tuple)
        return st.lists(task, min_size=2, max_size=tasks).map(tuple)

    return st.sampled_from(_THEMES).flatmap(themed)
