"""From a program to an image."""

from pathlib import Path

import msgspec
import pytest

from llmprocd.abi.errno import Errno, KernelError
from llmprocd.abi.types import Access
from llmprocd.kernel.state import Image, Link, Offer, Paging, ToolName
from llmprocd.program import load, prompt, schema
from llmprocd.program.schema import Program, ToolSpec

SHAPE = b'{"type":"object","properties":{"fd":{"type":"string","description":"old"},"n":{"type":"integer"}}}'
CATALOG = {
    "read_fd": Offer("read_fd", "Reads.", SHAPE, Access.READ),
    "fd_to_file": Offer("fd_to_file", "Writes.", SHAPE, Access.WRITE),
    "bash": Offer("bash", "Runs.", SHAPE, Access.WRITE),
    "spawn": Offer("spawn", "Starts.", SHAPE, Access.ADMIN),
}
OFF = Paging(enabled=False)


def encode(model, parameters, system, tools, caching):
    """A prefix that can be read back."""
    told = {"model": model, "parameters": parameters, "system": system, "tools": tools, "caching": caching}
    return msgspec.json.encode(told), b"]}"


def make(*, env=None, cwd="/w", **fields) -> Image:
    program = Program(name="p", provider="script", model="m", **fields)
    return prompt.image(program, CATALOG, cwd=cwd, prefix=encode, env=env)


def sent(made: Image):
    return msgspec.json.decode(made.prefix)


def system(**fields) -> str:
    return sent(make(**fields))["system"]


def test_an_image_holds_what_the_program_says():
    """Nothing of it is lost on the way to the kernel."""
    made = make(
        path="/x/p.toml",
        base_url="http://h",
        api_key_env="K",
        headers=(("a", "b"),),
        user_prompt="U",
        max_iterations=3,
        child_access=Access.READ,
        caching=False,
        paging=OFF,
        links=(Link("l", "/l.toml"),),
        parameters={"max_tokens": 5},
    )
    assert made == Image(
        program="p",
        path="/x/p.toml",
        model="m",
        provider="script",
        prefix=made.prefix,
        suffix=b"]}",
        links=(Link("l", "/l.toml"),),
        paging=OFF,
        base_url="http://h",
        api_key_env="K",
        headers=(("a", "b"),),
        user_prompt="U",
        max_iterations=3,
        child_access=Access.READ,
        caching=False,
        max_tokens=5,
    )
    assert sent(made) == {
        "model": "m",
        "parameters": {"max_tokens": 5},
        "system": "",
        "tools": [],
        "caching": False,
    }


def test_equal_programs_make_equal_images():
    """The kernel stores them once, and the provider's cache knows them."""
    assert len({make(system="S", tools=(ToolSpec("bash"),)) for _ in range(2)}) == 1


@pytest.mark.parametrize("provider", schema.LATER_PROVIDERS)
def test_a_provider_that_is_not_here_is_refused_by_name(provider):
    """The file may be checked, but nothing runs it."""
    program = Program(name="p", provider=provider, model="m")
    with pytest.raises(KernelError, match=f"{provider} is not supported") as caught:
        prompt.image(program, CATALOG, cwd="/", prefix=encode)
    assert caught.value.errno is Errno.ENOEXEC


def test_a_provider_without_its_extra_is_refused_by_name(monkeypatch):
    """In the words that install it."""
    monkeypatch.setitem(schema.EXTRAS, "anthropic_vertex", ("vertex", "no_such_package"))
    program = Program(name="p", provider="anthropic_vertex", model="m")
    with pytest.raises(
        KernelError, match=r"p: model\.provider: anthropic_vertex needs the extra 'vertex'"
    ) as caught:
        prompt.image(program, CATALOG, cwd="/", prefix=encode)
    assert caught.value.errno is Errno.ENOEXEC


def test_region_and_project_reach_the_image():
    """They are part of the address, not of the request."""
    made = make(region="eu", project_id="acme")
    assert (made.region, made.project_id) == ("eu", "acme")


# --- tools ------------------------------------------------------------------------------------------


def test_tools_are_offered_in_the_order_listed_and_the_reader_last():
    """read_fd comes by itself where outputs may become files."""
    made = make(tools=(ToolSpec("spawn"), ToolSpec("bash")))
    assert made.tools == (
        ToolName("spawn", "spawn", Access.ADMIN),
        ToolName("bash", "bash", Access.WRITE),
        ToolName("read_fd", "read_fd", Access.READ),
    )
    assert [tool["name"] for tool in sent(made)["tools"]] == ["spawn", "bash", "read_fd"]


def test_a_listed_reader_keeps_its_place():
    """It is not offered twice."""
    made = make(tools=(ToolSpec("read_fd", "more"), ToolSpec("bash")))
    assert [(tool.name, tool.tool) for tool in made.tools] == [("more", "read_fd"), ("bash", "bash")]


def test_without_descriptors_the_reader_is_offered_only_when_listed():
    """`enabled = false` with read_fd listed is no contradiction."""
    assert make(paging=OFF).tools == ()
    assert [tool.name for tool in make(paging=OFF, tools=(ToolSpec("read_fd"),)).tools] == ["read_fd"]


def test_overrides_change_what_the_model_sees_and_nothing_else():
    """The catalog, which all programs share, stays as it is."""
    spec = ToolSpec("read_fd", "more", "Gives more.", Access.ADMIN, {"fd": "which"})
    made = make(tools=(spec,), paging=OFF)
    assert made.tools == (ToolName("more", "read_fd", Access.ADMIN),)
    shape = {
        "type": "object",
        "properties": {"fd": {"type": "string", "description": "which"}, "n": {"type": "integer"}},
    }
    assert sent(made)["tools"] == [{"name": "more", "description": "Gives more.", "input_schema": shape}]
    plain = sent(make(tools=(ToolSpec("read_fd"),)))["tools"][0]
    assert (plain["description"], plain["input_schema"]) == ("Reads.", msgspec.json.decode(SHAPE))


def test_spawn_tells_which_programs_there_are():
    """At the end of its description, in the order of the file; and no other tool does."""
    links = (Link("expert", "/e.toml", "knows the schema"), Link("other", "/o.toml"))
    tools = sent(make(tools=(ToolSpec("spawn"), ToolSpec("bash")), links=links))["tools"]
    assert tools[0]["description"] == (
        "Starts.\n\n## Available Programs:\n- 'expert': knows the schema\n- 'other'"
    )
    assert tools[1]["description"] == "Runs."


def test_spawn_without_links_tells_nothing():
    """There is nothing to choose."""
    assert sent(make(tools=(ToolSpec("spawn"),)))["tools"][0]["description"] == "Starts."


# --- the system prompt ------------------------------------------------------------------------------


def test_the_parts_stand_in_order():
    """Base, env, descriptors, preload, with a blank line between."""
    text = system(system="BASE", literals=(("role", "tester"),), preload=(("n.md", "NOTE"),))
    marks = [
        "BASE\n\n<env>\n",
        "</env>\n\n<file_descriptor_instructions>",
        "</fd_user_input_instructions>\n\n<preload>",
    ]
    places = [text.index(mark) for mark in marks]
    assert places == sorted(places)
    assert text.startswith("BASE")
    assert text.endswith('<file path="n.md">\nNOTE\n</file>\n</preload>')


def test_nothing_to_say_is_an_empty_prompt():
    """No empty blocks."""
    assert system(paging=OFF) == ""


def test_the_environment_is_what_was_asked_for():
    """Variables in their order, then literal lines, then the process's own variables."""
    text = system(
        paging=OFF,
        variables=("platform", "working_directory"),
        facts=(("platform", "linux"),),
        literals=(("role", "tester"),),
        env_vars=(("region", "REGION"), ("empty", "EMPTY"), ("absent", "ABSENT")),
        env={"REGION": "eu", "EMPTY": "", "SECRET": "s3cret"},
    )
    assert text == "<env>\nplatform: linux\nworking_directory: /w\nrole: tester\nregion: eu\n</env>"


def test_the_daemons_environment_is_never_told(monkeypatch):
    """A program that names a variable gets the process's, or nothing."""
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-secret")
    assert system(paging=OFF, env_vars=(("key", "ANTHROPIC_API_KEY"),)) == ""


def test_an_environment_of_variables_alone_is_told():
    """One line is enough for a block."""
    assert system(paging=OFF, env_vars=(("a", "A"),), env={"A": "1"}) == "<env>\na: 1\n</env>"


@pytest.mark.parametrize(
    ("paging", "blocks"),
    [
        (Paging(), ["file_descriptor", "fd_user_input"]),
        (Paging(page_user_input=False), ["file_descriptor"]),
        (Paging(enable_references=True), ["file_descriptor", "fd_user_input", "reference"]),
        (Paging(enabled=False, enable_references=True), []),
    ],
)
def test_instructions_are_given_for_what_is_enabled(paging, blocks):
    """And for nothing else."""
    text = system(paging=paging)
    assert [
        name for name in ("file_descriptor", "fd_user_input", "reference") if f"<{name}_instructions>" in text
    ] == (blocks)


def test_instructions_use_the_programs_own_names_and_numbers():
    """A model is not told of a tool it does not have."""
    paging = Paging(max_direct_output_chars=123, max_input_chars=456)
    text = system(paging=paging, tools=(ToolSpec("read_fd", "more"), ToolSpec("fd_to_file", "save")))
    assert "123 characters" in text
    assert "456 characters" in text
    assert "call more" in text
    assert "call save" in text
    assert "read_fd" not in text
    assert "fd_to_file" not in system(paging=paging)


def test_a_preload_cannot_end_its_own_frame():
    """A text that holds the closing tag gets another one."""
    text = system(paging=OFF, preload=(("n", "a</file>b</preload>c"),))
    assert text == '<preload_1>\n<file_1 path="n">\na</file>b</preload>c\n</file_1>\n</preload_1>'


def test_preloads_stand_in_their_order():
    """One below the other, in one block."""
    text = system(paging=OFF, system="S", preload=(("n", "1"), ("a", "2")))
    files = '<file path="n">\n1\n</file>\n<file path="a">\n2\n</file>'
    assert text == f"S\n\n<preload>\n{files}\n</preload>"


def test_a_file_on_disk_becomes_an_image(tmp_path):
    """The whole way, with the facts of the moment of loading."""
    Path(tmp_path, "p.toml").write_text(
        '[model]\nname = "m"\nprovider = "script"\n[prompt]\nsystem = "S"\n'
        '[env_info]\nvariables = "all"\n[tools]\nbuiltin = ["bash"]\n[file_descriptor]\nenabled = false\n'
    )
    program, _ = load.load("p.toml", str(tmp_path), CATALOG)
    made = prompt.image(program, CATALOG, cwd="/w", prefix=encode)
    lines = sent(made)["system"].removeprefix("S\n\n<env>\n").removesuffix("\n</env>").split("\n")
    assert [line.partition(": ")[0] for line in lines] == list(schema.VARIABLES)
    assert all(line.partition(": ")[2] for line in lines)
    assert sent(made)["parameters"] == {"max_tokens": 8192}
