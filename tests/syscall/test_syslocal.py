"""The local model by call: who may, and what is refused."""

from machinekit import refused

from llmprocd.abi.errno import Errno


async def test_a_tool_cannot_have_it_run(machine):
    """It takes most of a machine: people decide."""
    pid = await machine.spawn(interactive=True)
    for method in ("local.up", "local.down"):
        with refused(Errno.EPERM):
            await machine.call(method, by=machine.caller(pid))


async def test_a_model_that_is_not_known_is_named(machine):
    with refused(Errno.EINVAL, "'70b'", "0.5b, 1.5b"):
        await machine.call("local.up", model="70b")


async def test_weights_are_named_by_an_absolute_path(machine):
    """Relative to what?"""
    with refused(Errno.EINVAL, "absolute"):
        await machine.call("local.up", path="model.gguf")


async def test_a_machine_without_one_says_so(machine):
    with refused(Errno.ENOSYS):
        await machine.call("local.status")
    assert (await machine.call("sys.status")).local is None
