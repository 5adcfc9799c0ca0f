"""People who judge: where they find their page, and what they said."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from judges.desk import store_name
from judges.interface import Text
from judges.options import AskOptions

if TYPE_CHECKING:
    from judges.human.table import HumanTable

HUMAN = "human"
LOOK_EVERY = 0.3
"""Seconds between two looks for a page's address."""


@contextmanager
def announced(
    judges: Mapping[str, AskOptions], folder: Path, say: Callable[[str], object]
) -> Iterator[None]:
    """Inside, say once where a page is served on which people judge: a worker's output is unseen.

    ``folder`` is the run's directory, where such a page's queue and address are.
    """
    people = [found for judge in judges.values() for found in people_of(judge)]
    waiting = {_store(judge, folder) for judge in people}
    over = threading.Event()

    def look() -> None:
        while waiting and not over.wait(LOOK_EVERY):
            for store in list(waiting):
                address = store.with_name(f"{store.name}.url")
                if address.is_file() and (url := address.read_text().strip()):
                    say(f"people are asked to judge at {url}")
                    waiting.remove(store)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def human_table_of(
    judges: Mapping[str, AskOptions], folder: Path, pairs: Sequence[tuple[Text, str, str]]
) -> HumanTable | None:
    """Win, tie and loss as people see these (prompt, policy's, starting model's completion).

    None where no judge is human.
    """
    for judge in judges.values():
        if judge.name == HUMAN:
            from judges.human.store import Store
            from judges.human.table import human_table

            raters = judge.args.get("raters_per_item", 1)
            return human_table(Store(_store(judge, folder), raters), pairs)
    return None


def people_of(judge: AskOptions) -> Iterator[AskOptions]:
    """The judge, and its members, as far as they are people."""
    if judge.name == HUMAN:
        yield judge
    members = judge.args.get("members")
    for member in [*(members if isinstance(members, list) else []), judge.args.get("judge")]:
        named = {"name": member} if isinstance(member, str) else member
        if isinstance(named, Mapping):
            known = {n: v for n, v in named.items() if n in ("name", "args", "alias")}
            yield from people_of(AskOptions.model_validate(known))


def _store(judge: AskOptions, folder: Path) -> Path:
    return Path(judge.args.get("store", folder / store_name(judge))).absolute()
