"""Explores the API by its own description: what is generated from it, valid and invalid, and whether answers conform.

    python -m tests.web.explore --examples 200

explores every call with so many examples of each kind; the tests run a slice of the same with a fixed seed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import Failure, FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from busgen_cds import web
from busgen_cds.web.front import Limit
from tests.images import breast_study
from tests.web.practice import Practice, Says
from tests.web.shelf import Room

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
    ignored_auth,
]
# Not `positive_data_acceptance`: a word that changes nothing is refused by a rule that no schema can say.
# What is known of a site makes half of the examples reach further than “there is no such study”.
Known = dict[str, str]


@dataclass
class Explored:
    calls: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    operations: set[str] = field(default_factory=set)
    wrong: dict[str, str] = field(default_factory=dict)  # what is wrong → the first example

    def note(self, case: Any, status: int) -> None:
        self.calls += 1
        self.statuses[status] += 1
        self.operations.add(f"{case.method} {case.operation.path}")

    def complain(self, case: Any, failure: Failure) -> None:
        name = f"{case.method} {case.operation.path}: {failure.title}"
        self.wrong.setdefault(name, f"{failure.message}\n{case.as_curl_command()}"[:1500])


@contextmanager
def practice(folder: Path) -> Iterator[tuple[Room, dict[str, str], Known]]:
    """A site with studies of every outcome, a shelf, and somebody who may do everything."""
    made = Practice(folder)
    made.person("fuzz", "reader", "operator", "physicist", "auditor", "admin")
    outcomes = (Says("4C", findings=2), Says(declines="unlike anything learnt"), Says(None), Says("4B", sent="parked"))
    refs = []
    for number, says in enumerate(outcomes):
        refs.append(made.receives(breast_study(1, seed=7000 + number, patient_id=f"PAT-{number}")))
        made.answers(refs[-1], says)
    owner = made.people.accounts()[0]
    secret, _ = made.people.make_token(owner, "explore", owner.rights, 1)
    uid = made.screen.slides(refs[0])[0].source.sop_instance_uid
    known = {"study_ref": refs[0], "sop_instance_uid": uid, "kind": "DiagnosticReport", "ref": f"{refs[0]}-1"}
    room = Room(made)
    known["digest"] = room.shadowed("2")
    room.read_beside(known["digest"], refs[3], Says("4B"), Says("4A"))
    try:
        yield room, {"Authorization": f"Bearer {secret}"}, known
    finally:
        made.close()


def explore(
    app: FastAPI,
    headers: dict[str, str],
    known: Known,
    *,
    examples: int,
    start: int,
    tell: Callable[[str], None] = lambda line: None,
) -> Explored:
    found = Explored()
    app.state.front.calls = Limit(per_minute=10**9)  # what limits a person would hide everything else
    schema = schemathesis.openapi.from_asgi("/api/v1/openapi.json", app)
    for made in schema.get_all_operations():
        operation = made.ok()
        for strategy in _strategies(operation, headers, known):
            _try(strategy, found, examples, start)
        tell(f"{operation.method.upper():6} {operation.path}: {found.calls} calls so far")
    return found


def _strategies(operation: Any, headers: dict[str, str], known: Known) -> Iterator[Any]:
    names = {each.name for each in operation.path_parameters} - ({"ref"} if "/tokens/" in operation.path else set())
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
        yield operation.as_strategy(generation_mode=mode, headers=headers)
        if reached := {name: known[name] for name in names & set(known)}:
            yield operation.as_strategy(generation_mode=mode, headers=headers, path_parameters=reached)


def _try(strategy: Any, found: Explored, examples: int, start: int) -> None:
    @seed(start)
    @settings(
        max_examples=examples,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(case=strategy)
    def one(case: Any) -> None:
        answer = case.call(timeout=60)
        found.note(case, answer.status_code)
        try:
            case.validate_response(answer, checks=CHECKS)
        except FailureGroup as failures:
            for each in failures.exceptions:
                found.complain(case, each)

    with suppress(Unsatisfiable):  # nothing invalid can be said to a call without parameters
        one()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=200, help="of each kind, for each call")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, practice(Path(folder)) as (made, headers, known):
        app = web.create(made.site())
        found = explore(app, headers, known, examples=chosen.examples, start=chosen.seed, tell=_say)
    statuses = ", ".join(f"{status}: {count}" for status, count in sorted(found.statuses.items()))
    _say(f"{found.calls} calls of {len(found.operations)} in {time.monotonic() - began:.0f} s; answers {statuses}")
    for name, example in found.wrong.items():
        _say(f"WRONG {name}\n{example}\n")
    return 1 if found.wrong else 0


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


if __name__ == "__main__":
    sys.exit(main())
