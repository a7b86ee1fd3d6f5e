"""Finding, reading, linking and checking program files."""

import os
import time
import tomllib
from pathlib import Path

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from llmprocd.abi.errno import Errno, KernelError
from llmprocd.abi.types import Access
from llmprocd.kernel.state import Limit, Link, Offer, Paging
from llmprocd.program import load, schema

ADMIN = ("fork", "spawn", "kill")
WRITE = ("send", "fd_to_file", "write_file", "edit_file", "bash")
READ = (
    "wait",
    "goto",
    "exit",
    "read_fd",
    "read_file",
    "list_dir",
    "glob",
    "grep",
    "calculator",
    "write_stderr",
)
SHAPE = b'{"type":"object","properties":{"command":{"type":"string"}}}'
CATALOG = {
    name: Offer(name, f"The {name} tool.", SHAPE, level)
    for level, names in ((Access.ADMIN, ADMIN), (Access.WRITE, WRITE), (Access.READ, READ))
    for name in names
}
MODEL = '[model]\nname = "m"\nprovider = "anthropic"\n'


@pytest.fixture
def folder(tmp_path):
    return str(tmp_path)


def write(folder, text, name="p.toml"):
    path = Path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def program(folder, text, name="p.toml"):
    write(folder, text, name)
    return load.load(name, folder, CATALOG)[0]


def refusal(folder, text):
    """The sentences with which a file is refused."""
    write(folder, text)
    with pytest.raises(KernelError) as caught:
        load.load("p.toml", folder, CATALOG)
    assert caught.value.errno is Errno.ENOEXEC
    return caught.value.text.split("\n")


def warnings(folder, text):
    write(folder, text)
    return list(load.load("p.toml", folder, CATALOG)[1])


# --- what loads -------------------------------------------------------------------------------------


def test_a_file_with_a_model_is_a_program(folder):
    """Everything but the model's name and provider has a default."""
    found = program(folder, MODEL, "small.toml")
    assert (found.name, found.path) == ("small", f"{folder}/small.toml")
    assert (found.model, found.provider) == ("m", "anthropic")
    assert found.parameters == {"max_tokens": 8192}
    assert (found.system, found.user_prompt, found.tools, found.links) == ("", "", (), ())
    assert (found.max_iterations, found.caching, found.child_access) == (10, True, Access.WRITE)
    assert found.paging == Paging()
    assert found.limits == ()


def test_an_executable_file_may_begin_with_an_interpreter_line(folder):
    """The `#!` line is a comment, and the next comment describes the program."""
    text = "#!/usr/bin/env -S llmprocctl run\n\n# reviews a diff\n" + MODEL
    assert program(folder, text).description == "reviews a diff"


def test_a_map_is_a_program(folder):
    """The tables may come without a file; paths in them are relative to the working directory."""
    write(folder, "from a file", "s.md")
    tables = {"model": {"name": "m", "provider": "script"}, "prompt": {"system_prompt_file": "s.md"}}
    found, told = load.load(tables, folder, CATALOG)
    assert (found.name, found.path, found.system, told) == ("inline", "", "from a file", ())


def test_a_link_to_a_program_is_that_program(folder):
    """What it names is found beside the file; its own name is the link's, and so is what HUP reads again."""
    write(folder, "beside the file", "src/s.md")
    write(folder, MODEL, "src/other.toml")
    text = '[prompt]\nsystem_prompt_file = "s.md"\n[preload]\nfiles = ["s.md"]\n'
    write(folder, MODEL + text + '[linked_programs]\na = "other.toml"\n', "src/p.toml")
    Path(folder, "bin").mkdir()
    Path(folder, "bin/review.toml").symlink_to("../src/p.toml")
    found, _ = load.load("bin/review.toml", folder, CATALOG)
    assert (found.name, found.path) == ("review", f"{folder}/bin/review.toml")
    assert (found.system, found.preload) == ("beside the file", (("s.md", "beside the file"),))
    assert found.links == (Link("a", f"{folder}/src/other.toml"),)
    Path(folder, "bin/review.toml").unlink()
    Path(folder, "bin/review.toml").symlink_to("../src/other.toml")
    assert load.load("bin/review.toml", folder, CATALOG)[0].system == ""


def test_a_byte_order_mark_is_passed_over(folder):
    """Editors on other systems put one in front; it is no part of the first line."""
    found = program(folder, "\ufeff# marked\n" + MODEL)
    assert (found.model, found.description) == ("m", "marked")
    assert load.listed([folder])[0] == ("p", f"{folder}/p.toml", "marked")
    assert refusal(folder, "\ufeff" + MODEL + "[prompt]\nx = 1\n") == ["p.toml:5: prompt.x: unknown key"]


def test_older_names_of_keys_are_read(folder):
    """Files of LLMProc 0.9 load unchanged."""
    text = (
        '[model]\nname = "m"\nprovider = "anthropic"\nregion = "r"\nproject_id = "i"\nmax_iterations = 3\n'
        '[prompt]\nsystem_prompt = "S"\nuser_prompt = "U"\n'
        '[tools]\nenabled = ["calculator", {name = "bash", param_descriptions = {command = "what"}}]\n'
        '[parameters]\nextra_headers = {"anthropic-beta" = "x"}\n'
        '[demo]\nprompts = ["a"]\npause_between_prompts = false\ndisplay_name = "D"\n'
    )
    found = program(folder, text)
    assert (found.system, found.user_prompt, found.region, found.project_id) == ("S", "U", "r", "i")
    assert [tool.tool for tool in found.tools] == ["calculator", "bash"]
    assert found.tools[1].param_descriptions == {"command": "what"}
    assert found.headers == (("anthropic-beta", "x"),)
    assert "extra_headers" not in found.parameters
    assert found.max_iterations == 3


def test_parameters_are_passed_on_as_they_are(folder):
    """What is not the daemon's own reaches the API unchanged, known or not."""
    text = (
        MODEL + '[parameters]\nmax_tokens = 5\nthinking = {type = "adaptive"}\nbrand_new = [1, {a = "b"}]\n'
    )
    assert program(folder, text).parameters == {
        "max_tokens": 5,
        "thinking": {"type": "adaptive"},
        "brand_new": [1, {"a": "b"}],
    }


def test_sampling_is_left_out_where_it_is_refused(folder):
    """The default endpoint gets no temperature, and the author a warning."""
    text = MODEL + "[parameters]\ntemperature = 0.5\ntop_p = 0.9\ntop_k = 3\n"
    assert program(folder, text).parameters == {"max_tokens": 8192}
    assert warnings(folder, text)[0] == (
        "p.toml:5: parameters.temperature: is refused by the default endpoint and left out"
    )


@pytest.mark.parametrize(
    "where", ['provider = "script"', 'provider = "anthropic"\nbase_url = "http://[::1]:1/v"']
)
def test_sampling_is_sent_elsewhere(folder, where):
    """Other endpoints get what the file says, without a word."""
    text = f'[model]\nname = "m"\n{where}\n[parameters]\ntemperature = 0.5\n'
    assert program(folder, text).parameters == {"temperature": 0.5, "max_tokens": 8192}
    assert warnings(folder, text) == []


def test_the_prompt_file_wins_over_the_text(folder):
    """It is found beside the program, not in the working directory."""
    write(folder, "from the file", "sub/s.md")
    found = program(folder, MODEL + '[prompt]\nsystem = "x"\nsystem_prompt_file = "s.md"\n', "sub/p.toml")
    assert found.system == "from the file"


def test_a_map_may_not_give_two_system_prompts(folder):
    """Without a file nobody can have meant both."""
    write(folder, "x", "s.md")
    tables = {
        "model": {"name": "m", "provider": "script"},
        "prompt": {"system": "x", "system_prompt_file": "s.md"},
    }
    faults, _ = load.check(tables, folder, CATALOG)
    assert [(fault.line, fault.key) for fault in faults] == [(0, "prompt.system_prompt_file")]


def test_tools_can_be_renamed_and_redefined(folder):
    """An entry may be a table with the name, alias, description and access."""
    text = MODEL + (
        '[tools]\nbuiltin = ["bash", {name = "write_stderr", alias = "write_log", description = "D", '
        'access = "admin"}]\nchild_access = "read"\n'
    )
    found = program(folder, text)
    assert found.tools == (
        schema.ToolSpec("bash"),
        schema.ToolSpec("write_stderr", "write_log", "D", Access.ADMIN),
    )
    assert found.child_access is Access.READ


@pytest.mark.parametrize(
    ("wall", "limit"),
    [
        ('"10m"', Limit(None, 600.0)),
        ("90", Limit(None, 90.0)),
        ("1.5", Limit(None, 1.5)),
        ('"5m:2h"', Limit(300.0, 7200.0)),
        ('"30s:"', Limit(30.0, None)),
        ('":250ms"', Limit(None, 0.25)),
    ],
)
def test_a_wall_limit_is_a_duration(folder, wall, limit):
    """A number is seconds, a pair is soft and hard."""
    assert program(folder, f"{MODEL}[limits]\nwall = {wall}\n").limits == (("wall", limit),)


@pytest.mark.parametrize(
    "wall", ['"10 parsecs"', "0", "-1", '""', '":"', '"1m:x"', "inf", '"10m:5m"', '"1:2:3"']
)
def test_what_is_no_duration_is_a_fault(folder, wall):
    """Zero, nonsense, and a soft limit above the hard one are refused."""
    assert refusal(folder, f"{MODEL}[limits]\nwall = {wall}\n")[0].startswith("p.toml:5: limits.wall: ")


# --- links ------------------------------------------------------------------------------------------


def test_links_are_relative_to_the_file_and_come_out_absolute(folder):
    """A link is a path, or a path with a description."""
    write(folder, MODEL, "sub/deep/b.toml")
    write(folder, MODEL, "c.toml")
    text = MODEL + '[linked_programs]\nb = "./deep/b.toml"\nc = {path = "../c.toml", description = "sees"}\n'
    assert program(folder, text, "sub/a.toml").links == (
        Link("b", f"{folder}/sub/deep/b.toml"),
        Link("c", f"{folder}/c.toml", "sees"),
    )


def test_programs_may_link_in_a_circle(folder):
    """Each file is checked once, however it is reached."""
    write(folder, MODEL + '[linked_programs]\na = "a.toml"\nme = "b.toml"\n', "b.toml")
    assert program(folder, MODEL + '[linked_programs]\nb = "b.toml"\n', "a.toml").links[0].name == "b"


def test_a_link_to_nothing_is_a_fault_with_a_line(folder):
    """The nearest file is named."""
    write(folder, MODEL, "expert.toml")
    told = refusal(folder, MODEL + '[linked_programs]\nexpert = "exprt.toml"\n')
    near = f"{folder}/expert.toml"
    missing = f"no such program: {folder}/exprt.toml; did you mean {near}?"
    assert told == [f"p.toml:5: linked_programs.expert: {missing}"]


def test_faults_of_a_linked_program_are_told_where_it_is_linked(folder):
    """At any depth, with the file and line where the fault is."""
    write(folder, '[model]\nname = "m"\nprovider = "x"\n', "c.toml")
    write(folder, MODEL + '[linked_programs]\nc = "c.toml"\n', "b.toml")
    told = refusal(folder, MODEL + '[linked_programs]\nb = "b.toml"\n')
    assert told == [f"p.toml:5: linked_programs.b: {folder}/c.toml:3: model.provider: unknown provider 'x'"]


# --- faults -----------------------------------------------------------------------------------------


def test_all_faults_of_a_file_are_told_at_once(folder):
    """One a line, in the order of the file, each with its nearest name."""
    text = """\
#!/usr/bin/env -S llmprocctl run
[model]
nam = "m"
provider = "antropic"
max_iterations = 0
[promt]
system = "x"
[prompt]
system = 3
[tools]
builtin = [
  "bsh",
  {name = "grep", acess = "read"},
]
"""
    assert refusal(folder, text) == [
        "p.toml:2: model.name: is missing",
        "p.toml:3: model.nam: unknown key; did you mean name?",
        "p.toml:4: model.provider: unknown provider 'antropic'; did you mean anthropic?",
        "p.toml:5: model.max_iterations: must be a positive integer",
        "p.toml:6: promt: unknown table; did you mean prompt?",
        "p.toml:9: prompt.system: must be text, not an integer",
        "p.toml:12: tools.builtin[0]: unknown tool 'bsh'; did you mean bash?",
        "p.toml:13: tools.builtin[1].acess: unknown key; did you mean access?",
    ]


def test_a_refusal_carries_its_faults_as_values(folder):
    """A client need not take the text apart."""
    write(folder, '[model]\nname = "m"\n')
    with pytest.raises(KernelError) as caught:
        load.load("p.toml", folder, CATALOG)
    assert caught.value.data == {"faults": [{"line": 1, "key": "model.provider", "text": "is missing"}]}


FAULTS = {
    "[mcp]\nconfig_path = 'x'": "4: mcp: not supported by this version",
    "[sandbox]\nprofile = 'none'": "4: sandbox: not supported by this version",
    "[tools]\nmcp.github = 'all'": "5: tools.mcp: not supported by this version",
    "[tools]\nfunctions = ['a:b']": "5: tools.functions: not supported by this version",
    "[limits]\nturns = 1.5": "5: limits.turns: 1.5 is no number (they look like 50, 200k)",
    "[limits]\nwal = 5": "5: limits.wal: unknown key; did you mean wall?",
    "[env_info]\ncommands = ['id']": "5: env_info.commands: not supported by this version",
    "[env_info]\nvariables = ['file_map']": (
        "5: env_info.variables: file_map is not supported by this version"
    ),
    "[env_info]\nvariable = 'all'": "5: env_info.variable: unknown key; did you mean variables?",
    "[env_info]\nrole = 3": "5: env_info.role: must be text, not an integer",
    "[file_descriptor]\ndefault_page_size = 0": (
        "5: file_descriptor.default_page_size: must be a positive integer"
    ),
    "[file_descriptor]\nmax_direct_output_chars = -1": (
        "5: file_descriptor.max_direct_output_chars: must be a positive integer"
    ),
    "[file_descriptor]\nmax_input_chars = 1.0": (
        "5: file_descriptor.max_input_chars: must be an integer, not a number"
    ),
    "[file_descriptor]\nenabled = 'yes'": "5: file_descriptor.enabled: must be true or false, not text",
    "[file_descriptor]\nmax_input_chars = 99999999999999999999": (
        "5: file_descriptor.max_input_chars: must be at most 9007199254740992"
    ),
    "[tools]\nbuiltin = 'bash'": "5: tools.builtin: must be a list, not text",
    "[tools]\nbuiltin = [3]": "5: tools.builtin[0]: must be text or a table, not an integer",
    "[tools]\nbuiltin = ['']": "5: tools.builtin[0]: unknown tool ''",
    "[tools]\nbuiltin = [{alias = 'x'}]": "5: tools.builtin[0].name: is missing",
    "[tools]\nenabled = ['bsh']": "5: tools.enabled[0]: unknown tool 'bsh'; did you mean bash?",
    "[tools]\nbuiltin = ['bash', 'bash']": "5: tools.builtin[1]: bash is listed twice",
    "[tools]\nbuiltin = ['bash', {name = 'bash', alias = 'b'}]": "5: tools.builtin[1]: bash is listed twice",
    "[tools]\nbuiltin = [{name = 'bash', alias = 'a b'}]": (
        "5: tools.builtin[0].alias: must be 1 to 64 of the characters a-z A-Z 0-9 _ -"
    ),
    "[tools]\nbuiltin = [{name = 'bash', alias = 'grep'}]": (
        "5: tools.builtin[0].alias: 'grep' is the name of another tool"
    ),
    "[tools]\nbuiltin = [{name = 'bash', alias = 'x'}, {name = 'grep', alias = 'x'}]": (
        "5: tools.builtin[1].alias: 'x' is the name of bash already"
    ),
    "[tools]\nbuiltin = [{name = 'bash', access = 'root'}]": (
        "5: tools.builtin[0].access: 'root' is none of read, write, admin"
    ),
    "[tools]\nbuiltin = [{name = 'bash', param_descriptions = {comand = 'x'}}]": (
        "5: tools.builtin[0].param_descriptions.comand: unknown parameter; did you mean command?"
    ),
    "[tools]\nchild_access = 'wrte'": (
        "5: tools.child_access: 'wrte' is none of read, write, admin; did you mean write?"
    ),
    "[tools]\nbuiltin = []\nenabled = []": (
        "6: tools.enabled: is the older name of builtin, which is given too"
    ),
    "[prompt]\nsystem_prompt_file = 'no.md'": (
        "5: prompt.system_prompt_file: System prompt file not found: no.md (FOLDER/no.md)"
    ),
    "[linked_programs]\nx = 3": "5: linked_programs.x: must be text or a table, not an integer",
    "[linked_programs]\nx = {description = 'd'}": "5: linked_programs.x.path: is missing",
    "[linked_programs]\nx = ''": "5: linked_programs.x.path: must not be empty",
    "[parameters]\nmessages = []": "5: parameters.messages: is written by the daemon and cannot be set",
    "[parameters]\nmax_tokens = 0": "5: parameters.max_tokens: must be a positive integer",
    "[parameters]\nmax_tokens = 1\nmax_completion_tokens = 1": (
        "6: parameters.max_completion_tokens: is the same as max_tokens, which is given too"
    ),
    "[parameters]\nreasoning_effort = 'extreme'": (
        "5: parameters.reasoning_effort: 'extreme' is none of low, medium, high"
    ),
    "[parameters]\nthinking = 3": "5: parameters.thinking: must be a table, not an integer",
    "[parameters]\nthinking = {budget_tokens = -1}": (
        "5: parameters.thinking.budget_tokens: must be a positive integer"
    ),
    "[parameters]\nx = [1979-05-27]": "5: parameters.x: cannot hold a date; write it as text",
    "[parameters]\nx = nan": "5: parameters.x: must be a finite number",
    "[parameters]\nextra_headers = {'a b' = 'x'}": "5: parameters.extra_headers.a b: is no name of a header",
    '[parameters]\nextra_headers = {x = "a\\nb"}': (
        "5: parameters.extra_headers.x: must be printable ASCII text on one line"
    ),
    "[preload]\nrelative_to = 'home'": "5: preload.relative_to: 'home' is none of program, cwd",
    "[preload]\nfiles = ['a', 3]": "5: preload.files[1]: must be text, not an integer",
    "[zzz]": "4: zzz: unknown table",
    '["a\\nb"]': "4: a\\nb: unknown table",
    "[[prompt]]": "4: prompt: must be a table, not a list",
    "x = 1": "4: model.x: unknown key",
    "[parameters]\nextra_headers = {Host = 'x'}": (
        "5: parameters.extra_headers.Host: is written by the daemon and cannot be set"
    ),
    "base_url = 'http://h:99999'": "4: model.base_url: is no address: Port out of range 0-65535",
    "base_url = 'http://h:0'": "4: model.base_url: is an address with port 0",
    "base_url = 'http://[::1'": "4: model.base_url: is no address: Invalid IPv6 URL",
    "base_url = 'http://:80'": "4: model.base_url: is an address without a host",
    "base_url = 'ftp://h'": (
        "4: model.base_url: must be an http:// or https:// address without user, query or fragment"
    ),
    "base_url = 'http://user:pw@h'": (
        "4: model.base_url: must be an http:// or https:// address without user, query or fragment"
    ),
    "api_key_env = 'sk-123'": "4: model.api_key_env: must be the name of an environment variable",
    "x = ": "4: TOML syntax: Invalid value",
    "x = [1,": "4: TOML syntax: Invalid value",
    "name = 'twice'\n": "4: TOML syntax: Cannot overwrite a value, column 15",
    "x = " + "[" * 3000: "1: TOML syntax: nested too deeply",
}  # fmt: skip


@pytest.mark.parametrize("text", FAULTS)
def test_a_fault_is_told_with_its_line_and_key(folder, text):
    """What is wrong, in words."""
    assert refusal(folder, MODEL + text)[0] == "p.toml:" + FAULTS[text].replace("FOLDER", folder)


def test_a_number_too_long_to_read_is_a_fault(folder):
    """Python's own limit on digits is not a crash."""
    assert refusal(folder, MODEL + "x = " + "1" * 5000)[0].startswith("p.toml:4: TOML syntax: ")


def test_bytes_that_are_no_text_are_a_fault_on_their_line(folder):
    """The line of the first bad byte."""
    Path(folder, "p.toml").write_bytes(b"# a\r\n# b\r\n# \xff\n")
    faults, _ = load.check("p.toml", folder, CATALOG)
    assert faults == (schema.Fault(3, "", "TOML syntax: not UTF-8 text"),)


def test_carriage_returns_do_not_shift_lines(folder):
    """A file from Windows has the same lines."""
    Path(folder, "p.toml").write_bytes((MODEL + "[promt]\n").replace("\n", "\r\n").encode())
    assert load.check("p.toml", folder, CATALOG)[0][0].line == 4


def test_a_map_is_checked_as_strictly(folder):
    """Keys and values that no file could hold are faults too."""
    tables = {
        "model": {"name": "m", "provider": "script", 3: 4},
        "parameters": {"x": b"bytes", "y": {4: 5}, "z": None},
        "prompt": None,
    }
    assert {fault.key: fault.text for fault in load.check(tables, folder, CATALOG)[0]} == {
        "model": "key 3 must be text",
        "parameters.x": "cannot hold bytes; write it as text",
        "parameters.y": "has a key that is not text",
        "prompt": "must be a table, not nothing",
    }


@pytest.mark.parametrize("provider", schema.LATER_PROVIDERS)
def test_a_provider_that_is_not_here_yet_loads_with_a_warning(folder, provider):
    """The program can be checked, not spawned."""
    told = warnings(folder, f'[model]\nname = "m"\nprovider = "{provider}"\n')
    later = f"{provider} is not supported by this version: the program loads and cannot be spawned"
    assert told == [f"p.toml:3: model.provider: {later}"]


@pytest.mark.parametrize("provider", schema.EXTRAS)
def test_a_provider_whose_extra_is_not_installed_loads_with_a_warning(folder, provider, monkeypatch):
    """With the words that install it; once it is installed there is nothing to say."""
    extra, _ = schema.EXTRAS[provider]
    monkeypatch.setitem(schema.EXTRAS, provider, (extra, "no_such_package.at_all"))
    told = warnings(folder, f'[model]\nname = "m"\nprovider = "{provider}"\n')
    needs = f"needs the extra '{extra}', which is not installed (pip install 'llmprocd[{extra}]')"
    assert told == [f"p.toml:3: model.provider: {provider} {needs}: the program loads and cannot be spawned"]
    monkeypatch.setitem(schema.EXTRAS, provider, (extra, "json"))
    assert warnings(folder, f'[model]\nname = "m"\nprovider = "{provider}"\n') == []


def test_threads_are_for_one_provider(folder):
    """Elsewhere the key is told of and passed over."""
    assert warnings(folder, MODEL + "threads = true\n") == []
    assert program(folder, MODEL + "threads = true\n").threads
    text = '[model]\nname = "m"\nprovider = "local"\nbase_url = "http://h"\nthreads = true\n'
    assert any("model.threads: is for provider anthropic" in told for told in warnings(folder, text))
    assert not program(folder, text).threads


def test_a_small_thinking_budget_is_a_warning(folder):
    """The API's business in the end, but hardly meant."""
    assert warnings(folder, MODEL + "[parameters.thinking]\nbudget_tokens = 5\n") == [
        "p.toml:5: parameters.thinking.budget_tokens: is below 1024, the least the API takes"
    ]


# --- finding ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("cht", "no such program: cht; did you mean chat?"),
        ("zzzzzz", "no such program: zzzzzz"),
        ("mine", "no such program: mine; did you mean ./mine.toml?"),
        ("./mne.toml", "no such program: ./mne.toml; did you mean ./mine.toml?"),
        ("mne.toml", "no such program: mne.toml; did you mean mine.toml?"),
        ("./mine", "no such program: ./mine; did you mean ./mine.toml?"),
        ("review.toml", "no such program: review.toml"),  # only the ending is alike
        ("mine.toml/x", "no such program: mine.toml/x"),
        ("", "no such program: "),
        ("..", "no such program: .."),
        ("a\0\n.toml", "no such program: a\\x00\\n.toml"),
    ],
)
def test_a_program_that_is_not_there_is_enoent(folder, source, text):
    """The nearest one is named."""
    write(folder, MODEL, "mine.toml")
    with pytest.raises(KernelError) as caught:
        load.load(source, folder, CATALOG)
    assert (caught.value.errno, caught.value.text) == (Errno.ENOENT, text)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x/", "cannot be read: not a regular file"),
        ("./pipe", "cannot be read: not a regular file"),
        ("./big.toml", "cannot be read: larger than 1048576 bytes"),
        ("a.yaml", "YAML is not supported by this version; write the same tables as TOML"),
    ],
)
def test_what_is_no_program_file_is_refused(folder, name, text):
    """Folders, pipes (without waiting for a writer), huge files and YAML."""
    Path(folder, "x").mkdir()
    os.mkfifo(Path(folder, "pipe"))
    write(folder, "#" * (1 << 20) + "\n", "big.toml")
    write(folder, "model: {}", "a.yaml")
    with pytest.raises(KernelError) as caught:
        load.load(name, folder, CATALOG)
    assert (caught.value.errno, caught.value.text) == (Errno.ENOEXEC, f"{name}:1: {text}")


def test_a_refused_pipe_is_closed_again(folder):
    """A daemon that is asked a thousand times still has descriptors."""
    os.mkfifo(Path(folder, "pipe.toml"))
    before = set(Path("/proc/self/fd").iterdir())
    load.check("pipe.toml", folder, CATALOG)
    assert set(Path("/proc/self/fd").iterdir()) <= before


@pytest.mark.parametrize("name", ["chat", "code", "demo"])
def test_the_programs_that_ship_load(folder, name):
    """Without a warning, and with a description."""
    found, told = load.load(name, folder, CATALOG)
    assert (found.name, found.path, told) == (name, "", ())
    assert found.description


def test_the_demo_has_every_tool_and_needs_no_key(folder):
    """It is what a first look and the tests run."""
    found, _ = load.load("demo", folder, CATALOG)
    assert found.provider == "script"
    assert {tool.tool for tool in found.tools} == set(CATALOG)


def test_a_listing_has_the_path_first_and_what_is_built_in_last(folder):
    """The first folder that has a name hides the others; to the daemon a bare name is what is built in."""
    write(folder, "# one\n", "a/x.toml")
    write(folder, "# two\n", "b/x.toml")
    write(folder, "# my chat\n", "b/chat.toml")
    write(folder, "", "b/notes.txt")
    found = load.listed([f"{folder}/a", f"{folder}/b", f"{folder}/none"])
    assert found[:2] == [("x", f"{folder}/a/x.toml", "one"), ("chat", f"{folder}/b/chat.toml", "my chat")]
    assert [name for name, path, _ in found[2:]] == ["chat", "code", "demo", "local"]
    assert not any(path for _, path, _ in found[2:])
    assert load.load("chat", folder, CATALOG)[0].path == ""


# --- preload and environment ------------------------------------------------------------------------


def test_preload_is_relative_to_the_program_or_the_working_directory(folder):
    """And is read at the load, in either case."""
    write(folder, "beside the program", "sub/n.md")
    write(folder, "in the working directory", "n.md")
    text = MODEL + '[preload]\nfiles = ["n.md"]\n'
    assert program(folder, text, "sub/p.toml").preload == (("n.md", "beside the program"),)
    text += 'relative_to = "cwd"\n'
    assert program(folder, text, "sub/q.toml").preload == (("n.md", "in the working directory"),)


def test_a_preload_that_is_missing_is_a_warning(folder):
    """The program loads without it, and with it once it is there."""
    text = MODEL + '[preload]\nfiles = ["n.md"]\n'
    assert warnings(folder, text) == [
        "p.toml:5: preload.files[0]: n.md is left out: No such file or directory"
    ]
    write(folder, "now", "n.md")
    assert load.load("p.toml", folder, CATALOG)[0].preload == (("n.md", "now"),)


@pytest.mark.parametrize("path", ["/proc/self/environ", "/proc/self/status", "link"])
def test_the_daemons_own_memory_and_environment_are_no_files(folder, path):
    """What a program names is read by the daemon, whose /proc/self is not its author's to see."""
    Path(folder, "link").symlink_to("/proc/self/environ")
    assert warnings(folder, MODEL + f'[preload]\nfiles = ["{path}"]\n') == [
        f"p.toml:5: preload.files[0]: {path} is left out: Permission denied"
    ]
    (said,) = refusal(folder, MODEL + f'[prompt]\nsystem_prompt_file = "{path}"\n')
    assert said.endswith(": Permission denied")


def test_preloads_of_one_name_stay_apart(folder):
    """Their labels are the paths then."""
    write(folder, "1", "a/n.md")
    write(folder, "2", "b/n.md")
    found = program(folder, MODEL + '[preload]\nfiles = ["a/n.md", "b/n.md"]\n')
    assert found.preload == (("a/n.md", "1"), ("b/n.md", "2"))


def test_all_variables_are_six(folder):
    """A text may stand for a list, and `all` for every name."""
    assert program(folder, MODEL + '[env_info]\nvariables = "all"\n').variables == schema.VARIABLES
    assert program(folder, MODEL + '[env_info]\nvariables = "date"\n', "q.toml").variables == ("date",)


# --- never stale ------------------------------------------------------------------------------------


def test_an_edit_is_seen_at_once_though_size_and_time_are_the_same(folder):
    """A file may be written twice within one tick of its clock."""
    path = write(folder, MODEL + '[prompt]\nsystem = "a"\n')
    before = load.load("p.toml", folder, CATALOG)[0]
    info = path.stat()
    write(folder, MODEL + '[prompt]\nsystem = "b"\n')
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    after = load.load("p.toml", folder, CATALOG)[0]
    assert (before.system, after.system) == ("a", "b")
    assert not load.fresh(before)


def settle():
    """Wait until files that were just written are taken to be at rest."""
    time.sleep(load.SETTLED * 1.5e-9)


def test_an_unchanged_program_is_the_same_value(folder):
    """It is not read again while nothing it was read from has changed."""
    write(folder, MODEL)
    settle()
    first = load.load("p.toml", folder, CATALOG)[0]
    assert load.fresh(first)
    assert load.load("p.toml", folder, CATALOG)[0] is first


@pytest.mark.parametrize("name", ["p.toml", "s.md", "n.md", "b.toml", "c.toml"])
def test_a_change_of_any_file_behind_a_program_is_seen(folder, name):
    """Prompt, preload, and what is linked at any depth."""
    write(folder, "s", "s.md")
    write(folder, "n", "n.md")
    write(folder, MODEL, "c.toml")
    write(folder, MODEL + '[linked_programs]\nc = "c.toml"\n', "b.toml")
    text = MODEL + '[prompt]\nsystem_prompt_file = "s.md"\n[preload]\nfiles = ["n.md"]\n'
    write(folder, text + '[linked_programs]\nb = "b.toml"\n')
    settle()
    first = load.load("p.toml", folder, CATALOG)[0]
    assert load.fresh(first)
    with Path(folder, name).open("a", encoding="utf-8") as opened:
        opened.write("\n[promt]\n")
    assert not load.fresh(first)
    if name.endswith(".toml"):
        with pytest.raises(KernelError, match="promt: unknown table"):
            load.load("p.toml", folder, CATALOG)
    else:
        again = load.load("p.toml", folder, CATALOG)[0]
        assert "[promt]" in (again.system if name == "s.md" else again.preload[0][1])


# --- anything at all --------------------------------------------------------------------------------

WHOLE = (
    MODEL + '[prompt]\nsystem = """x\ny"""\n[parameters]\nmax_tokens = 9\nthinking = {budget_tokens = 2000}\n'
    '[tools]\nbuiltin = ["bash", {name = "grep", alias = "g"}]\n[limits]\nwall = "1m:2m"\n'
    '[env_info]\nvariables = ["date"]\nrole = "r"\n[file_descriptor]\nmax_input_chars = 5\n'
)
PIECES = st.sampled_from(
    [
        "",
        "x",
        "_",
        "7",
        "-",
        "\n",
        '"',
        "[",
        "]",
        "{",
        "}",
        "=",
        ",",
        "#",
        "true",
        "nan",
        "07:32:00",
        "\0",
        "é",
        '"""',
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(WHOLE)), st.integers(0, 3), PIECES), min_size=1, max_size=3))
def test_a_mangled_file_is_refused_with_lines_or_loads(tmp_path_factory, cuts):
    """No text makes anything but a KernelError, and each fault has a line of the file."""
    text = WHOLE
    for start, length, piece in cuts:
        text = text[:start] + piece + text[start + length :]
    folder = str(tmp_path_factory.getbasetemp())
    write(folder, text, "mangled.toml")
    faults, _ = load.check("mangled.toml", folder, CATALOG)
    event("faults" if faults and faults[0].key else "syntax" if faults else "loads")
    assert all(1 <= fault.line <= text.count("\n") + 1 for fault in faults)
    if not faults:
        tomllib.loads(text)
        load.load("mangled.toml", folder, CATALOG)
        return
    with pytest.raises(KernelError) as caught:
        load.load("mangled.toml", folder, CATALOG)
    assert caught.value.errno is Errno.ENOEXEC
    assert len(caught.value.text.split("\n")) == len(faults)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.binary(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)
TABLE_NAMES = st.sampled_from(
    [
        "model",
        "prompt",
        "tools",
        "parameters",
        "file_descriptor",
        "linked_programs",
        "preload",
        "env_info",
        "limits",
    ]
)
KEYS = st.sampled_from(
    [
        "name",
        "provider",
        "system",
        "builtin",
        "thinking",
        "enabled",
        "files",
        "variables",
        "env_vars",
        "wall",
        "path",
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(TABLE_NAMES, JSON | st.dictionaries(KEYS, JSON, max_size=4), max_size=4))
def test_no_map_crashes_the_loader(tables):
    """Whatever comes over the wire is refused in words."""
    faults, _ = load.check(tables, "/nonexistent", CATALOG)
    assert faults
    assert all(fault.text and fault.text.isprintable() for fault in faults)
