"""From a program to an image: what a model is told before the first message.

Law: pure. The same program, tools, folder and environment give the same image, byte for byte, so that a
provider's prompt cache holds for all processes of one program.
Law: of the environment only what a program names is told, and only from the process's own; the daemon's is
never looked at.

The system prompt is the program's text, then `<env>`, then how descriptors are read, then `<preload>`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from llmprocd.abi.errno import Errno, KernelError
from llmprocd.kernel import file
from llmprocd.kernel.state import Image, Link, Offer, Paging, ToolName
from llmprocd.program import schema
from llmprocd.program.schema import Program, ToolSpec

PrefixMaker = Callable[[str, Mapping[str, Any], str, Sequence[dict[str, Any]], bool], tuple[bytes, bytes]]
"""From model, parameters, system prompt, tools and caching to what stands before and after the messages."""

READER = "read_fd"

DESCRIPTORS = """\
Output longer than {limit} characters is kept in a file that you reach by a descriptor, such as fd:3. You \
then see an fd_result with its first page and its size. To go on, call {read} with the descriptor: by page \
(start=2, count=3), by line (mode="line"), by character (mode="char"), or with grep to find lines. Read only \
what you need. {write}Descriptors of your child processes are written with their process: 7/fd:4."""

USER_INPUT = """\
A user message longer than {limit} characters is kept in a file as well: you see its beginning and a \
descriptor. Read the rest with {read} before you answer anything that depends on it."""

REFERENCES = """\
Put text that shall be used again between <ref id="name"> and </ref>. It can then be read, exactly as it \
stands, as ref:name wherever a descriptor is accepted, by you and by processes you start. A name used twice \
means the last one."""


def image(
    program: Program,
    catalog: Mapping[str, Offer],
    *,
    cwd: str,
    prefix: PrefixMaker,
    env: Mapping[str, str] | None = None,
) -> Image:
    """A program made ready to run.

    Args:
        program: from `load.load`.
        catalog: the tools there are.
        cwd: of the process.
        prefix: encodes what precedes the messages, and what follows them.
        env: of the process; only variables that the program names are told.

    Raises:
        KernelError: ENOEXEC when the provider is one that cannot run here.
    """
    if lacking := schema.lacking(program.provider):
        raise KernelError(Errno.ENOEXEC, f"{program.name}: model.provider: {program.provider} {lacking}")
    specs = offered(program, catalog)
    tools = tuple(_name(spec, catalog) for spec in specs)
    schemas = [_schema(spec, catalog[spec.tool], program.links) for spec in specs]
    system = system_prompt(program, tools, cwd, env or {})
    head, tail = prefix(program.model, program.parameters, system, schemas, program.caching)
    return Image(
        program=program.name,
        path=program.path,
        model=program.model,
        provider=program.provider,
        prefix=head,
        suffix=tail,
        tools=tools,
        links=program.links,
        paging=program.paging,
        base_url=program.base_url,
        api_key_env=program.api_key_env,
        headers=program.headers,
        user_prompt=program.user_prompt,
        max_iterations=program.max_iterations,
        child_access=program.child_access,
        caching=program.caching,
        threads=program.threads,
        limits=program.limits,
        max_tokens=program.parameters.get("max_tokens", schema.MAX_TOKENS),
        least_tokens=_least_tokens(program),
        region=program.region,
        project_id=program.project_id,
    )


def _least_tokens(program: Program) -> int:
    """The least max_tokens that the endpoint takes: more than the model may think."""
    thinking: Mapping[str, Any] = program.parameters.get("thinking") or {}
    budget: Any = thinking.get("budget_tokens")
    return budget + 1 if isinstance(budget, int) else 1


def offered(program: Program, catalog: Mapping[str, Offer]) -> tuple[ToolSpec, ...]:
    """The tools as listed; read_fd comes last where outputs may become files and nobody listed it."""
    listed = {spec.tool for spec in program.tools}
    if program.paging.enabled and READER in catalog and READER not in listed:
        return (*program.tools, ToolSpec(READER))
    return program.tools


def system_prompt(program: Program, tools: Sequence[ToolName], cwd: str, env: Mapping[str, str]) -> str:
    """The whole system prompt; "" when there is nothing to say."""
    parts = [
        program.system,
        _environment(program, cwd, env),
        _descriptors(program.paging, {tool.tool: tool.name for tool in tools}),
        _preload(program.preload),
    ]
    return "\n\n".join(part for part in parts if part)


def _name(spec: ToolSpec, catalog: Mapping[str, Offer]) -> ToolName:
    access = catalog[spec.tool].access if spec.access is None else spec.access
    return ToolName(spec.name or spec.tool, spec.tool, access)


def _schema(spec: ToolSpec, offer: Offer, links: Sequence[Link]) -> dict[str, Any]:
    """A tool as the API is told of it."""
    description = spec.description or offer.description
    if spec.tool == "spawn" and links:
        description += "\n\n## Available Programs:\n" + "\n".join(map(_program_line, links))
    shape: dict[str, Any] = msgspec.json.decode(offer.input_schema)
    for name, text in spec.param_descriptions.items():
        shape["properties"][name]["description"] = text
    return {"name": spec.name or spec.tool, "description": description, "input_schema": shape}


def _program_line(link: Link) -> str:
    return f"- '{link.name}': {link.description}" if link.description else f"- '{link.name}'"


def _environment(program: Program, cwd: str, env: Mapping[str, str]) -> str:
    facts = {**dict(program.facts), "working_directory": cwd}
    lines = [f"{name}: {facts[name]}" for name in program.variables if name in facts]
    lines += [f"{name}: {text}" for name, text in program.literals]
    lines += [f"{label}: {env[name]}" for label, name in program.env_vars if env.get(name)]
    return file.frame("env", {}, "\n".join(lines)) if lines else ""


def _descriptors(paging: Paging, names: Mapping[str, str]) -> str:
    """How descriptors are read, by the names that this program's tools have."""
    if not paging.enabled or READER not in names:
        return ""
    read = names[READER]
    write = f"To save one to a path, call {names['fd_to_file']}. " if "fd_to_file" in names else ""
    main = DESCRIPTORS.format(limit=paging.max_direct_output_chars, read=read, write=write)
    parts = [_block("file_descriptor_instructions", main)]
    if paging.page_user_input:
        text = USER_INPUT.format(limit=paging.max_input_chars, read=read)
        parts.append(_block("fd_user_input_instructions", text))
    if paging.enable_references:
        parts.append(_block("reference_instructions", REFERENCES))
    return "\n\n".join(parts)


def _block(name: str, text: str) -> str:
    return f"<{name}>\n{text}\n</{name}>"


def _preload(files: Sequence[tuple[str, str]]) -> str:
    body = "\n".join(file.frame("file", {"path": label}, text) for label, text in files)
    return file.frame("preload", {}, body) if files else ""
