import inspect
import pickle

import pytest
from ray.exceptions import RayTaskError

import adapters.errors
import deployments.errors
from adapters.errors import (
    AdapterChanged,
    AdapterError,
    AdapterIncomplete,
    AdapterRefused,
    BankFull,
    StagingTooLarge,
    StoreUnreachable,
    TaskNotFound,
    VersionNotFound,
)
from deployments.errors import (
    INTERNAL,
    BadInput,
    Conflict,
    Forbidden,
    NoMatch,
    NotReady,
    Overloaded,
    ReplicasLost,
    RequestError,
    Stale,
    TooLarge,
    TooLate,
    Unauthorized,
    Unsure,
    to_problem,
)

# Every error, its status, and the builtin that a handle caller gets.
ERRORS = [
    (TaskNotFound("mood"), 404, LookupError),
    (VersionNotFound("mood", "11111111"), 404, LookupError),
    (AdapterIncomplete("mood", "half of it is missing"), 503, RuntimeError),
    (AdapterChanged("mood", "11111111", "22222222"), 503, RuntimeError),
    (AdapterRefused("mood", ["no head", "no rank"]), 503, RuntimeError),
    (BankFull("mood@11111111", 3), 503, RuntimeError),
    (StagingTooLarge("task.json", 8388608), 413, ValueError),
    (StoreUnreachable("s3://bucket/store", "SlowDown"), 503, RuntimeError),
    (Unauthorized("this route needs a token"), 401, PermissionError),
    (Forbidden("allowed_sources has no such prefix"), 403, PermissionError),
    (NoMatch("no task fits"), 404, LookupError),
    (Conflict("the version has traffic"), 409, ValueError),
    (Stale("the task is at revision 5"), 412, ValueError),
    (BadInput("texts is empty"), 422, ValueError),
    (TooLarge("the body is over 5 bytes"), 413, ValueError),
    (NotReady("no replica runs"), 503, RuntimeError),
    (Overloaded("there are too many texts"), 429, RuntimeError),
    (TooLate("the deadline passed"), 504, TimeoutError),
    (ReplicasLost("the model replica was lost"), 503, RuntimeError),
    (Unsure("the store did not answer"), 503, RuntimeError),
]
RETRIED = (AdapterIncomplete, AdapterChanged, StoreUnreachable, NotReady, Overloaded)

by_name = pytest.mark.parametrize(
    ("error", "status", "builtin"), ERRORS, ids=lambda given: type(given).__name__
)


def test_every_error_of_both_trees_is_here() -> None:
    defined = {
        kind
        for module in (adapters.errors, deployments.errors)
        for kind in vars(module).values()
        if inspect.isclass(kind) and issubclass(kind, (AdapterError, RequestError))
    }
    assert defined - {AdapterError, RequestError} == {type(error) for error, _, _ in ERRORS}


@by_name
def test_it_survives_pickling(error: Exception, status: int, builtin: type) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
    assert vars(error)  # it carries more than its message
    assert copy.args == error.args


@by_name
def test_its_message_names_what_it_is_about(error: Exception, status: int, builtin: type) -> None:
    for said in error.args:
        for part in said if isinstance(said, tuple) else [str(said)]:
            assert part in str(error)


@by_name
def test_the_table_maps_it(error: Exception, status: int, builtin: type[Exception]) -> None:
    problem = to_problem(error)
    assert problem is not None
    assert problem.status == status
    assert problem.detail == str(error)
    assert (problem.retry_after_s is not None) == isinstance(error, RETRIED)
    assert problem.body() == {
        "type": "about:blank",
        "title": problem.title,
        "status": status,
        "detail": str(error),
    }
    raised = problem.exception()
    assert type(raised) is builtin
    assert str(raised) == str(error)


@by_name
def test_the_table_maps_it_when_it_comes_through_a_handle(
    error: Exception, status: int, builtin: type
) -> None:
    through = RayTaskError("describe", "a whole traceback", error).as_instanceof_cause()
    assert str(through) != str(error)
    assert to_problem(through) == to_problem(error)


def test_titles_tell_the_kinds_apart() -> None:
    problems = [to_problem(error) for error, _, _ in ERRORS]
    assert len({problem and problem.title for problem in problems}) == len(ERRORS)


@pytest.mark.parametrize(
    "error",
    [KeyError("secret"), RuntimeError("secret"), Exception("secret"), LookupError("secret")],
)
def test_an_unknown_error_is_not_mapped(error: Exception) -> None:
    assert to_problem(error) is None
    assert to_problem(RayTaskError("f", "trace", error).as_instanceof_cause()) is None


def test_what_is_not_known_is_told_without_its_words() -> None:
    assert INTERNAL.status == 500
    assert type(INTERNAL.exception()) is RuntimeError


def test_who_asks_for_no_task_is_told_how_to_make_one() -> None:
    said = str(TaskNotFound("mood"))
    assert "upload one (PUT /v1/tasks/mood/versions)" in said
    assert "its PEFT folder into the adapter store under that name" in said


def test_who_was_refused_is_told_when_there_may_be_room() -> None:
    problem = to_problem(Overloaded("too many", 7))
    assert problem is not None
    assert problem.retry_after_s == 7
    again = pickle.loads(pickle.dumps(Overloaded("too many", 7)))  # as it comes from a replica
    assert (again.retry_after_s, again.detail) == (7, "too many")
