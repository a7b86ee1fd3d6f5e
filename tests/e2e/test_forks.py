"""Forks: by users at any settled message, by models alone and beside other tools."""

import json

import pytest
from e2ekit import MODEL, program, refused, script, texts, until_there, use

TALK = program()
FORK = program("fork", "bash", "exit", "read_fd")


def common(one: str, other: str) -> str:
    """What two bodies begin with, cache markers apart."""
    mark = ',"cache_control":{"type":"ephemeral"}'
    one, other = one.replace(mark, ""), other.replace(mark, "")
    pairs = enumerate(zip(one, other, strict=False))
    shorter = min(len(one), len(other))
    return one[: next((number for number, (mine, theirs) in pairs if mine != theirs), shorter)]


# --- by a user --------------------------------------------------------------------------------------


@pytest.fixture
def talked(client):
    """A process that has had two exchanges and ended: messages 1 to 4 of its own."""
    pid = client.spawn(TALK, interactive=True)
    client.run(pid, "!say one")
    client.run(pid, "!say two")
    client.call("proc.send", pid=pid, close=True)
    client.wait(pid)
    return pid


def test_a_child_goes_on_from_the_parents_head(client, talked):
    """Each prompt makes one child with the whole history; the parent is as it was."""
    before = client.get(talked)
    children = client.call("proc.fork", pid=talked, prompts=["!say left", "!say right"])["pids"]
    rows = client.wait(*children)
    assert [row["message"] for row in rows] == ["left", "right"]
    for child, word in zip(children, ["left", "right"], strict=True):
        assert texts(client.history(child)) == ["!say one", "one", "!say two", "two", f"!say {word}", word]
        assert client.get(child)["ppid"] == 1
        assert client.get(child)["birth"] == talked
    after = client.get(talked)
    assert after.pop("cost_usd") > before.pop("cost_usd"), "what children spend is counted for their parent"
    assert after == before


def test_without_a_prompt_the_child_rests_with_fd_0_open(client, talked, strict):
    """It makes no call until it is given a message."""
    (child,) = client.call("proc.fork", pid=talked)["pids"]
    assert client.rests(child)["interactive"] is True
    assert len(strict.requests()) == 2
    assert client.run(child, "!say three")["message"] == "three"


def test_messages_are_shared_and_not_copied(client, talked):
    """The same ids up to the fork, new ones after it."""
    (child,) = client.call("proc.fork", pid=talked, prompts=["!say three"])["pids"]
    client.wait(child)
    parents = [row["id"] for row in client.history(talked)]
    childs = [row["id"] for row in client.history(child)]
    assert childs[:4] == parents
    assert len(set(childs)) == 6


@pytest.mark.parametrize(("index", "said"), [(0, ["!say one"]), (1, ["!say one", "one"])])
def test_a_fork_at_an_earlier_message(client, talked, index, said):
    """`at` names any settled message, of either role."""
    at = client.history(talked)[index]["id"]
    (child,) = client.call("proc.fork", pid=talked, prompts=["!say branch"], at=at)["pids"]
    assert client.wait(child)["message"] == "branch"
    assert texts(client.history(child)) == [*said, "!say branch", "branch"]


def test_a_fork_at_a_message_that_is_not_its_own_is_enoent(client, talked):
    """Another process's messages are out of reach."""
    other, _ = client.finish(TALK, "!say other")
    foreign = client.history(other)[0]["id"]
    with refused("ENOENT", foreign):
        client.call("proc.fork", pid=talked, at=foreign)
    with refused("EINVAL"):
        client.call("proc.fork", pid=talked, at="twelve")


def test_while_tools_run_the_plain_form_is_ebusy_and_last_is_the_nearest(client):
    """Else the child would run them a second time."""
    pid = client.spawn(FORK, "!bash echo a\n!bash sleep 60\n!say done")
    client.until(pid, lambda row: row["turns"] == 2)
    client.until_wchan(pid, "tool:bash")
    with refused("EBUSY"):
        client.call("proc.fork", pid=pid, prompts=["!say x"])
    unsettled = client.history(pid)[-1]["id"]
    with refused("EBUSY"):
        client.call("proc.fork", pid=pid, prompts=["!say x"], at=unsettled)
    (child,) = client.call("proc.fork", pid=pid, prompts=["!say at last"], at="last")["pids"]
    assert client.wait(child)["message"] == "at last"
    assert client.results(child) == ["a\n[exit 0]"]


def test_a_fork_during_a_model_call_disturbs_nobody(client, strict):
    """The head is a settled message then."""
    with strict.held():
        pid = client.spawn(TALK, "!say slow")
        client.until_wchan(pid, "api")
        (child,) = client.call("proc.fork", pid=pid, prompts=["!say quick"])["pids"]
    assert client.wait(child)["message"] == "quick"
    assert client.wait(pid)["message"] == "slow"


def test_requests_are_identical_up_to_the_fork(client, strict):
    """Byte for byte: system prompt, tools and messages."""
    pid = client.spawn(program("bash", prompt={"system": "Be brief."}), interactive=True)
    client.run(pid, "!bash echo shared\n!say the fork point")
    (child,) = client.call("proc.fork", pid=pid, prompts=["!say B"])["pids"]
    client.wait(child) if not client.get(child)["interactive"] else client.rests(child)
    client.run(pid, "?A")
    (mine,), (theirs,) = strict.bodies("?A"), strict.bodies("!say B")
    same = common(mine, theirs)
    assert same.endswith(
        'the fork point","citations":null}]},{"role":"user","content":[{"type":"text","text":"'
    )


def test_a_user_fork_is_safe_to_repeat(client, talked):
    """The same request id makes the children once."""
    first = client.call("proc.fork", pid=talked, prompts=["!say x"], request_id="f1")
    assert client.call("proc.fork", pid=talked, prompts=["!say x"], request_id="f1") == first
    with refused("EEXIST"):
        client.call("proc.fork", pid=talked, prompts=["!say y"], request_id="f1")


def test_waiting_mail_is_not_copied(client):
    """fd 0 of the child is its own."""
    pid = client.spawn(TALK, "!sleep 60\n!say x", interactive=True)
    client.send(pid, "!say mail")
    client.until_wchan(pid, "api")
    (child,) = client.call("proc.fork", pid=pid)["pids"]
    assert client.rests(child)["turns"] == 0
    assert client.read(child, 1) == b""


def test_a_childs_fd_0_is_open_if_its_parents_is(client):
    """With a prompt it goes on like the parent would."""
    pid = client.spawn(TALK, interactive=True)
    client.run(pid, "!say one")
    (child,) = client.call("proc.fork", pid=pid, prompts=["!say two"])["pids"]
    client.until(child, lambda row: row["turns"] == 1)
    assert client.run(child, "!say three")["message"] == "three"


def test_a_thousand_children_share_one_history(client, talked):
    """What a fork costs does not depend on the length of the history."""
    children = client.call("proc.fork", pid=talked, prompts=["!say x"] * 100)["pids"]
    assert len(set(children)) == 100
    assert {row["status"] for row in client.wait(*children)} == {0}


# --- by the model -----------------------------------------------------------------------------------


def test_fork_and_wait(client):
    """The parent reads the children's last messages as JSON, in prompt order."""
    pid, row = client.finish(FORK, "!fork !sleep 0.3\\n!say slow | !say fast\n!say joined")
    assert row["message"] == "joined"
    one, two = json.loads(client.result(pid))
    assert (one["id"], one["message"], one["status"]) == (0, "slow", 0)
    assert (two["id"], two["message"], two["status"]) == (1, "fast", 0)
    assert one["pid"] < two["pid"]


def test_what_a_child_reads(client):
    """Its own fork answers with pid 0, and its prompt is a text block after all results."""
    pid, _ = client.finish(FORK, "!fork !say mine | !say other\n!say joined")
    child = json.loads(client.result(pid))[0]["pid"]
    message = client.history(child)[-2]
    result, text = message["content"]
    assert result["content"].startswith("pid 0: you are the child")
    assert text == {"type": "text", "text": "!say mine"}


def test_a_failed_child_is_marked(client):
    """Status and message of each; `error` for one that did not end with 0."""
    pid, _ = client.finish(FORK, '!fork !exit {"status": 9, "message": "no luck"} | !say fine\n!say joined')
    one, two = json.loads(client.result(pid))
    assert (one["status"], one["message"], one["error"]) == (9, "no luck", True)
    assert "error" not in two


def test_fork_without_waiting(client):
    """The pids come back at once."""
    pid = client.spawn(FORK, f"{use('fork', prompts=['!sleep 60', '!sleep 60'], wait=False)}\n!say on my way")
    row = client.wait(pid)
    assert row["message"] == "on my way"
    pids = json.loads(client.result(pid))
    assert [client.get(child)["birth"] for child in pids] == [pid, pid]


def test_fork_beside_other_tools(client, tmp_path):
    """The others end first; children see their results, and they are run once."""
    prompt = script("!bash echo once | tee -a ran", "!& !fork !say {{n}} \\| child", "!say joined")
    pid, _ = client.finish(FORK, prompt, cwd=str(tmp_path))
    ran, forked = client.results(pid)
    assert ran == "once\n[exit 0]"
    child = json.loads(forked)[0]["pid"]
    assert [block["content"] for block in client.history(child)[2]["content"][:1]] == ["once\n[exit 0]"]
    assert (tmp_path / "ran").read_text() == "once\n"


def test_several_forks_in_one_turn(client):
    """All are made at once; each child sees the others as its parent's."""
    pid, row = client.finish(FORK, "!fork !say a\n!& !fork !say b\n!say joined")
    assert row["message"] == "joined"
    one, two = (json.loads(result)[0] for result in client.results(pid))
    assert (one["message"], two["message"]) == ("a", "b")
    mine, others, _ = client.history(one["pid"])[2]["content"]
    assert mine["content"].startswith("pid 0")
    assert others["content"] == f"made by your parent: pids {two['pid']}"


def test_nested_forks(client):
    """A child with the right to fork does so; its descriptor numbers are the family's."""
    deep = program("fork", tools={"child_access": "admin"})
    pid, row = client.finish(deep, "!fork !fork !say leaf\\\\n!say twig | !say other\n!say root")
    assert row["message"] == "root"
    assert [one["status"] for one in json.loads(client.result(pid))] == [0, 0]


def test_a_child_may_not_fork_unless_the_program_says_so(client):
    """A child's ceiling is `write`; the list of tools stays the same."""
    pid, _ = client.finish(FORK, "!fork !fork !say leaf\\n!say told\n!say root")
    child = json.loads(client.result(pid))[0]["pid"]
    assert client.result(child) == "Access denied: this tool requires admin access but process has write"
    assert client.get(child)["access"] == "write"


def test_the_models_requests_are_identical_up_to_the_fork(client, strict):
    """Parent and children send the same bytes until the fork's own result."""
    prompt = script("!bash echo before", "!bash echo beside", "!& !fork !say C1 | !say C2", "!say joined")
    client.finish(FORK, prompt)
    parent = strict.bodies()[-1]
    children = strict.bodies("pid 0: you are the child")
    assert len(children) == 2
    for child in children:
        same = common(parent, child)
        assert same.endswith('"content":"'), same[-200:]
        assert "beside" in same
        assert f'"model":"{MODEL}"' in same
    one, two = children
    assert common(one, two).endswith('"text":"!say C')


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompts": []}, "prompts"),
        ({"prompts": ["!say x"] * 11}, "prompts"),
        ({"prompts": [" "]}, "blank"),
        ({}, "prompts"),
        ({"prompts": ["x"], "count": 3}, "count"),
    ],
)
def test_a_fork_that_cannot_be_is_an_error_result(client, arguments, words):
    """It names the argument; no child is made and the run goes on."""
    pid, row = client.finish(FORK, f"{use('fork', **arguments)}\n!say on")
    assert row["message"] == "on"
    assert words in client.result(pid)
    assert client.get(pid)["children"] == []


def test_a_killed_parents_children_live_on(client, tmp_path):
    """They are adopted; a tree signal would have ended them."""
    go = tmp_path / "go"
    pid = client.spawn(FORK, f"!fork !bash {until_there(go)}\\n!say orphan\n!say never")
    (child,) = client.until(pid, lambda row: row["children"])["children"]
    client.signal(pid, "KILL")
    assert client.wait(pid)["status"] == 137
    go.touch()
    row = client.wait(child)
    assert (row["status"], row["message"]) == (0, "orphan")
    assert client.get(child)["ppid"] == 1


def test_int_on_a_waiting_parent_answers_its_fork(client):
    """The children go on; the parent's conversation is valid."""
    pid = client.spawn(FORK, "!fork !sleep 60\n!say never", interactive=True)
    client.until_wchan(pid, "wait")
    client.signal(pid, "INT")
    client.rests(pid)
    assert "nterrupted" in client.result(pid)
    assert client.run(pid, "!say next")["message"] == "next"


# --- spawn ------------------------------------------------------------------------------------------


def linked(tmp_path, text="!say expert"):
    """A program that may spawn `expert`."""
    (tmp_path / "expert.toml").write_text(
        f'[model]\nname = "{MODEL}"\nprovider = "anthropic"\n[tools]\nbuiltin = ["bash", "read_fd"]\n'
    )
    link = {"path": str(tmp_path / "expert.toml"), "description": "knows"}
    return program("spawn", "wait", "kill", "send", "read_fd", "bash", linked_programs={"expert": link})


def test_spawn_hands_back_the_last_message(client, tmp_path):
    """A fresh process that knows nothing of the conversation."""
    call = use("spawn", prompt="!say from the expert", program_name="expert")
    pid, row = client.finish(linked(tmp_path), f"{call}\n!say heard {{{{result}}}}")
    assert row["message"] == "heard from the expert"
    (child,) = client.get(pid)["children"] or [client.call("proc.list", all=True)["procs"][-1]["pid"]]
    assert texts(client.history(child)) == ["!say from the expert", "from the expert"]
    assert client.get(child)["program"] == "expert"


def test_spawn_of_its_own_program(client):
    """A blank name is the process's own program."""
    _, row = client.finish(program("spawn"), "!spawn !say twin\n!say heard {{result}}")
    assert row["message"] == "heard twin"


def test_spawn_of_an_unknown_program_names_the_known(client, tmp_path):
    """An error result, and the run goes on."""
    call = use("spawn", prompt="x", program_name="expret")
    pid, row = client.finish(linked(tmp_path), f"{call}\n!say on")
    assert row["message"] == "on"
    assert "'expert': knows" in client.result(pid)


def test_spawn_tells_of_a_failed_child(client):
    """Its status and why."""
    pid, _ = client.finish(program("spawn"), "!spawn !fail 400 invalid_request_error\n!say on")
    assert "status 1" in client.result(pid)


def test_spawn_with_preloaded_files(client, tmp_path):
    """Their text is put before the prompt; one that is not there is an error."""
    (tmp_path / "note").write_text("remember")
    call = use("spawn", prompt="!say ok", additional_preload_files=["note"])
    pid, _ = client.finish(program("spawn"), f"{call}\n!say on", cwd=str(tmp_path))
    child = client.call("proc.list", all=True)["procs"][-1]["pid"]
    assert "remember" in texts(client.history(child))[0]
    call = use("spawn", prompt="!say ok", additional_preload_files=["gone"])
    pid, _ = client.finish(program("spawn"), f"{call}\n!say on", cwd=str(tmp_path))
    assert "gone" in client.result(pid)


def test_spawn_passes_descriptors(client, tmp_path):
    """Those named, by the same numbers; the child reads them and no others."""
    make = script("!bash seq 5000", "!bash seq 5001 9999")
    give = use(
        "spawn", prompt="!read_fd fd:3\n!read_fd fd:4\n!say {{result}}", program_name="expert", fds=["fd:3"]
    )
    pid, _ = client.finish(linked(tmp_path), f"{make}\n{give}\n!say on")
    child = client.call("proc.list", all=True)["procs"][-1]["pid"]
    page, missing = client.results(child)
    assert page.startswith('<fd_content fd="fd:3" page="1"')
    assert "no fd:4" in missing
    assert client.read(child, 3) == client.read(pid, 3)


def test_spawn_with_notify(client):
    """The child's end puts one line into this process's fd 0, which stays open until then."""
    call = use("spawn", prompt="!sleep 0.3\n!say done", wait=False, notify=True)
    pid, row = client.finish(program("spawn"), f"{call}\n!say waiting")
    child = int(client.result(pid))
    assert row["status"] == 0
    assert any(f"Process {child} has ended with status 0" in text for text in texts(client.history(pid)))


def test_wait_kill_and_send_reach_descendants_only(client):
    """Others are EPERM, also for a process's own parent."""
    other = client.spawn(TALK, interactive=True)
    tools = program("spawn", "wait", "kill", "send", tools={"child_access": "admin"})
    prompt = script(
        use("kill", pid=other, signal="TERM"),
        use("send", pid=other, message="hello"),
        use("wait", pids=[other]),
        "!say on",
    )
    pid, _ = client.finish(tools, prompt)
    for result in client.results(pid):
        assert result.startswith("EPERM"), result
    assert client.get(other)["status"] is None


def test_a_model_waits_for_signals_and_talks_to_its_child(client):
    """spawn without waiting, send, wait, kill."""
    tools = program("spawn", "wait", "kill", "send")
    prompt = script(
        use("spawn", prompt="!sleep 60", wait=False),
        '!kill {"pid": {{result:[0-9]+}}, "signal": "TERM"}',
        "!wait {{result:process ([0-9]+)}}",
        "!say {{result}}",
    )
    _, row = client.finish(tools, prompt)
    (told,) = json.loads(row["message"])
    assert (told["status"], told["error"]) == (143, True)


def test_wait_with_a_timeout_tells_who_still_runs(client):
    """No error: it is news."""
    tools = program("spawn", "wait")
    prompt = script(use("spawn", prompt="!sleep 60", wait=False), use("wait", timeout_s=0.1), "!say on")
    pid, _ = client.finish(tools, prompt)
    (told,) = json.loads(client.result(pid))
    assert (told["status"], told["message"]) == (None, "still running")
