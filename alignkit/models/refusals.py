"""What is said where a model cannot be loaded without running a stranger's code: never how to switch safety off."""

from __future__ import annotations

from pathlib import Path

from alignkit.errors import first_line

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def reason(error: Exception, name: str | Path, code: bool = True) -> str:
    """Return why the model `name` was not loaded: first_line of the error, or our words where that invites to risks.

    torch advises to load any file, transformers to run any code. code: whether the caller can allow a model's own code.
    """
    if _of_pickle(error):
        return (
            f"{_files(name)} cannot be read without running the code that a pickle may hold, or it is damaged, so it "
            f"is refused. Use a copy of the model in safetensors, from its author or made by "
            f"https://huggingface.co/spaces/safetensors/convert, which reads it elsewhere"
        )
    if _of_code(error):
        allowed = (
            "Read that code; to run it, add --trust-remote-code (in Python trust_remote_code=True)"
            if code
            else "Use a model of an architecture that transformers has"
        )
        return f"it comes with code of its own{_code(name)}, which is not run unasked. {allowed}"
    return first_line(error)


def cause(error: Exception) -> Exception | None:
    """Return what a traceback may show as the cause: nothing where its text invites to risks."""
    return None if _of_pickle(error) or _of_code(error) else error


def _of_pickle(error: Exception) -> bool:
    return "weights_only" in str(error)


def _of_code(error: Exception) -> bool:
    return "trust_remote_code" in str(error) or "custom code" in str(error)


def _files(name: str | Path) -> str:
    folder = Path(name)
    found = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES) if folder.is_dir() else []
    return ", ".join(found) or "its file of weights"


def _code(name: str | Path) -> str:
    found = sorted(p.name for p in Path(name).glob("*.py")) if Path(name).is_dir() else []
    return f" ({', '.join(found)})" if found else ""
