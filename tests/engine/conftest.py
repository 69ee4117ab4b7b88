"""A tiny engine for the tests of one file, and its naive twin."""

import gc

import pytest

from tests.tiny import Naive, make_engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def engine(folder):
    return make_engine(folder)


@pytest.fixture(scope="module")
def naive(engine):
    return Naive(engine)


@pytest.fixture
def no_collection():
    """Only reference counts free anything."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
