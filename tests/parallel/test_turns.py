"""Programs over several CPU devices run one at a time: two at once may wait for each other for ever."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bmjax.parallel import turns


def slow(x_MK: jax.Array) -> jax.Array:
    """Return a number that every device's rows go into, after some tenths of a second."""
    for _ in range(4):
        x_MK = x_MK @ (x_MK.T @ x_MK / 1e6)
    return x_MK.sum()


def spread(devices: int) -> jax.Array:
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    return jax.device_put(jnp.ones((1024, 1024)), NamedSharding(mesh, PartitionSpec("data")))


def test_results_on_several_devices_are_waited_for() -> None:
    plain, in_turn, x_MK = jax.jit(slow), turns.jit(slow), spread(4)
    expected = float(plain(x_MK))  # both are compiled before they are compared
    assert not plain(x_MK).is_ready(), "the program is too short for this test"
    result = in_turn(x_MK)
    assert result.is_ready() and float(result) == expected


def test_results_of_the_host_and_of_one_device_pass_as_they_are() -> None:
    one = spread(1)
    results = {"array": one, "number": 3, "host": np.ones(2)}
    assert turns.finished(results) is results
    assert turns.finished({}) == {}


def test_a_program_within_another_is_traced() -> None:
    inner = turns.jit(lambda x: {"twice": 2 * x, "static": x.shape})
    gradient = jax.jit(jax.grad(lambda x: inner(x)["twice"] ** 2))
    assert float(gradient(jnp.float32(3.0))) == 24.0
    assert inner.__wrapped__(jnp.ones(2))["static"] == (2,)  # functools.wraps
