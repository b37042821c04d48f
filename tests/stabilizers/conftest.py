"""The models that a test of `StabilizerCase` runs on are those its class names."""

import pytest


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for fixture, attribute in (("model_name", "models"), ("refused_model_name", "refuses")):
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, getattr(metafunc.cls, attribute))
