from collections.abc import Callable, Iterator
from functools import cache, lru_cache

import pytest
import torch
from transformers.utils import logging

from adapters.directory import Directory
from deployments.model.engine import Engine
from tests.parity.bases import Base
from tests.parity.board import Board
from tests.parity.cells import CELLS, Cell
from tests.parity.making import Made, make
from tests.parity.report import Report
from tests.parity.variants import VARIANTS, Variant

FEWEST = 5  # adapters in a mixed batch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    # Two threads on two busy cores mostly wait for each other.
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def quiet() -> None:
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # a new head is what is meant here


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Base, str], str]:
    """Returns the folder of a base in one of its forms."""
    return cache(lambda base, form: base.save(form, tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="session")
def store_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Base], Directory]:
    """Returns the store that holds the adapters of a base."""
    return cache(lambda base: Directory(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="session")
def made(
    base_folder: Callable[[Base, str], str], store_of: Callable[[Base], Directory]
) -> Callable[[Base, Variant], Made | Exception]:
    """Returns what PEFT saved of a variant, or why it could not."""

    @cache
    def make_once(base: Base, variant: Variant) -> Made | Exception:
        folder = store_of(base).root / variant.name
        try:
            return make(
                base, base_folder(base, variant.form), variant, folder, VARIANTS.index(variant)
            )
        except Exception as error:  # whatever PEFT raises is its answer
            return error

    return make_once


@pytest.fixture(scope="session")
def board_of(
    request: pytest.FixtureRequest,
    base_folder: Callable[[Base, str], str],
    store_of: Callable[[Base], Directory],
    made: Callable[[Base, Variant], Made | Exception],
) -> Callable[[Cell], Board]:
    """Returns the board that answers a cell: all cells of its engine that this run asks for."""
    asked = {i.callspec.params.get("cell") for i in request.session.items if hasattr(i, "callspec")}

    @lru_cache(maxsize=4)  # those of one base and quantisation
    def play(base: Base, quantization: str, form: str) -> Board | Exception:
        cells = [c for c in CELLS if (c.base, c.quantization) == (base, quantization)]
        cells = [cell for cell in cells if cell.variant.form == form]
        chosen = [cell for cell in cells if cell in asked]
        spare = [cell for cell in cells if cell not in chosen and cell.is_right]
        missing = max(0, FEWEST - sum(cell.is_right for cell in chosen))
        variants = [cell.variant for cell in (*chosen, *spare[:missing])]
        tasks = [v.name for v in variants if isinstance(made(base, v), Made)]
        try:
            engine = Engine(base_folder(base, form), quantization=quantization, device="cpu")
            return Board.play(base, engine, store_of(base), tasks)
        except Exception as error:  # kept, or each of its cells would wait for it anew
            return error

    def board(cell: Cell) -> Board:
        played = play(cell.base, cell.quantization, cell.variant.form)
        if isinstance(played, Exception):
            raise played
        return played

    return board


@pytest.fixture(scope="session")
def report() -> Iterator[Report]:
    """Takes what was found, and publishes it if that was all of it."""
    report = Report()
    yield report
    if report.is_full():
        report.write()
