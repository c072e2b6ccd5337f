"""Facts about a run as names and values in text form: what it trained, where, and at what cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignkit.insight.report.numbers import number
from alignkit.insight.report.run_files import Run
from alignkit.runs import sessions
from alignkit.runs.card import place

_GIB = 2**30
_ENVIRONMENT = (
    "device", "gpu", "gpu_memory_bytes", "cuda", "processor", "cores", "threads", "ranks", "precision", "system",
    "python", "alignkit", "alignkit-kernels", "torch", "transformers", "accelerate", "peft", "bitsandbytes", "triton",
)  # fmt: skip
_ENDED = {
    "done": "done",
    "stopped": "stopped by a signal or an alarm",
    "failed": "ended by an error",
    "running": "still running, or killed",
}


def summary(run: Run) -> list[tuple[str, str]]:
    """Return the facts at the top: method, base, data, steps, cost."""
    rows = [("method", run.method), ("base", place(run.settings["model"])), ("data", place(run.settings["data"]))]
    rows.append(("steps", number(run.steps)))
    if not run.sessions:
        return rows
    rows += [(name, value) for name, value in cost(run) if name not in ("ended", "sessions", "preparing")]
    trained, total = (run.sessions[-1]["facts"].get(key, 0) for key in ("trained_parameters", "parameters"))
    rows.append(("trained parameters", f"{count(trained)} of {count(total)}" if trained < total else count(total)))
    return rows


def cost(run: Run) -> list[tuple[str, str]]:
    """Return time, tokens and memory of all sessions together."""
    if not run.sessions:
        return []
    rows = [
        ("time", span(sessions.total(run.sessions, "seconds"))),
        ("preparing", span(sessions.total(run.sessions, "preparing_seconds"))),
        ("tokens", count(int(sessions.total(run.sessions, "tokens")))),
        ("peak memory", memory(max(one.get("peak_memory_bytes", 0) for one in run.sessions))),
        ("sessions", str(len(run.sessions))),
    ]
    return [*rows, ("ended", _ENDED.get(str(run.sessions[-1].get("ended")), "?"))]


def reference(run: Run) -> list[tuple[str, str]]:
    """Return the reference's form and cache hits; empty where the method does not use a reference."""
    last = run.sessions[-1]["facts"].get("reference") if run.sessions else None
    if not last:
        return []
    rows = [("kept as", str(last.get("mode")))]
    if last.get("fingerprint"):
        rows.append(("weights", f"{last['fingerprint']}…"))
    every = [one["facts"].get("reference") or {} for one in run.sessions]
    if "values_read" in last:
        read = sum(one.get("values_read", 0) for one in every)
        computed = sum(one.get("values_computed", 0) for one in every)
        rows += [("completions read from the cache", number(read)), ("completions computed", number(computed))]
    else:
        rows.append(("cache", "not used: completions are sampled anew" if run.answers[0] else "not used"))
    return rows


def environment(run: Run) -> list[tuple[str, str]]:
    """Return versions and hardware of the run's last session."""
    about = run.sessions[-1]["environment"] if run.sessions else {}
    return [(_name(key), _value(key, about)) for key in _ENVIRONMENT if key in about]


def moved(run: Run) -> list[str]:
    """Return the differences between the environments of a resumed run's sessions."""
    each = [one["environment"] for one in run.sessions]
    keys = [key for key in _ENVIRONMENT if len({str(one.get(key)) for one in each}) > 1]
    return [f"{_name(key)}: {', then '.join(dict.fromkeys(_value(key, one) for one in each))}" for key in keys]


def span(seconds: float) -> str:
    """Return a time as text: 42 s, 3 min 05 s, 2 h 07 min."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def memory(n_bytes: float) -> str:
    """Return a size as text, in GiB or, where small, in MiB."""
    return f"{n_bytes / _GIB:.1f} GiB" if n_bytes >= _GIB else f"{n_bytes / 2**20:.0f} MiB"


def count(n: int) -> str:
    """Return a whole number as text, large ones with three digits and a letter: 1.24 B, 61.4 k."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if n >= size:
            scaled = n / (1e3 if letter == "k" else size)
            return f"{scaled:.{max(0, 3 - len(str(int(scaled))))}f} {letter}"
    return number(n)


def _name(key: str) -> str:
    return "GPU memory" if key == "gpu_memory_bytes" else "GPU" if key == "gpu" else key


def _value(key: str, about: Mapping[str, Any]) -> str:
    if key not in about:
        return "-"
    return memory(about[key]) if key == "gpu_memory_bytes" else str(about[key])
