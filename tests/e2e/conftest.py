"""What the end-to-end tests share: a strict endpoint, a daemon as a user starts it, and a small client.

Law: every conversation that any test produces is accepted. When a test ends, the endpoint must have refused
nothing, an OpenAPI file that others wrote finds no fault with what was sent, and no process of the test is
left.
"""

import openapi
import pytest
from e2ekit import Daemon, Strict


@pytest.fixture(scope="module")
def strict():
    """A Messages API endpoint over HTTP that refuses what the real one refuses."""
    endpoint = Strict()
    yield endpoint
    endpoint.close()


@pytest.fixture(scope="module")
def house(strict, tmp_path_factory):
    """A daemon for all tests of a module; its default endpoint is the strict one."""
    daemon = Daemon(tmp_path_factory.mktemp("daemon"), strict.url)
    daemon.start()
    yield daemon
    daemon.close()


@pytest.fixture
def daemon(house, strict):
    """The daemon, with no process in it that lives; nothing may have been refused when the test ends."""
    strict.reset()
    yield house
    with house.client() as client:
        house.sweep(client)
    assert strict.refusals() == [], "the endpoint refused what a process sent"
    assert openapi.faults(strict.bodies()) == [], "the API's own description refuses what a process sent"


@pytest.fixture
def client(daemon):
    """A connection to the daemon."""
    with daemon.client() as connection:
        yield connection


@pytest.fixture
def build(strict, tmp_path):
    """Makes daemons of the test's own, to be started by it. Takes the text of a config, and an endpoint."""
    strict.reset()
    made = []

    def build(config="", url=strict.url):
        made.append(Daemon(tmp_path / f"daemon{len(made)}", url))
        if config:
            made[-1].config.write_text(config)
        return made[-1]

    yield build
    for daemon in made:
        daemon.close()


@pytest.fixture
def fresh(build, strict):
    """A daemon of the test's own; the strict endpoint must have refused nothing."""
    yield build()
    assert strict.refusals() == [], "the endpoint refused what a process sent"
