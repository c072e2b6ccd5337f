#!/usr/bin/env bash
# Everything that wants a GPU, in one command: versions, tests, kernels, engine, each into files of the given folder.
#
#   benchmarks/gpu.sh OUT [MINUTES]        MINUTES: for all stages together (default 8)
#   STAGES="tests kernels" benchmarks/gpu.sh OUT        some of them only
#   QUICK=1 benchmarks/gpu.sh OUT          tiny shapes and models, on a CPU too: does everything run?
#
# Without a GPU the stages are skipped, unless QUICK=1. Runs from a checkout, nothing of it installed. A failing stage
# does not stop the next; the exit code is 1 then.
set -uo pipefail
out=${1:?usage: gpu.sh OUT [MINUTES]}
seconds=$(awk -v minutes="${2:-8}" 'BEGIN { printf "%d", 60 * minutes }')
stages=${STAGES:-tests kernels engine}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
root=$(cd "$(dirname "$0")/.." && pwd) || exit 2
cd "$root" || exit 2
python=${PYTHON:-python3}

# Methods are found by their entry points: those of the checkout, as an installation would leave them.
metadata=$(mktemp -d) || exit 2
trap 'rm -rf "$metadata"' EXIT
"$python" - "$metadata" plugins/*/pyproject.toml <<'PY' || exit 2
import pathlib, sys, tomllib

for path in map(pathlib.Path, sys.argv[2:]):
    project = tomllib.loads(path.read_text())["project"]
    folder = pathlib.Path(sys.argv[1], f"{project['name'].replace('-', '_')}-{project['version']}.dist-info")
    folder.mkdir()
    head = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (folder / "METADATA").write_text(head)
    lines = []
    for group, entries in project.get("entry-points", {}).items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in entries.items())]
    (folder / "entry_points.txt").write_text("\n".join(lines) + "\n")
PY
path=$root:$root/kernels:$metadata
for plugin in "$root"/plugins/*/; do path=$path:${plugin%/}; done
export PYTHONPATH=$path${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1

{
  date -u
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>&1 || echo "no nvidia-smi"
  "$python" --version
  "$python" - <<'PY'
from importlib import metadata

for name in ("torch", "triton", "transformers", "accelerate", "peft", "trl", "liger-kernel", "cut-cross-entropy"):
    try:
        print(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        print(name, "not installed")
PY
} >"$out/versions.txt" 2>&1
cat "$out/versions.txt"

failed=0
# stage NAME SECONDS COMMAND...: run it, keep its output, say how it ended
stage() {
  local name=$1 limit=$2 started=$SECONDS code=0
  shift 2
  case " $stages " in *" $name "*) ;; *) return ;; esac
  echo "== $name, at most $limit s"
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$out/$name.log"
  code=${PIPESTATUS[0]}
  if [ "$code" -ne 0 ]; then
    failed=1
    results+=("$name: exit code $code after $((SECONDS - started)) s")
  else
    results+=("$name: done in $((SECONDS - started)) s")
  fi
}
# seconds of a part of the whole, and the same in minutes with time left to end in order
part() { echo $((seconds * $1 / 100)); }
within() { awk -v s="$(part "$1")" 'BEGIN { printf "%.2f", s * 0.8 / 60 }'; }

kernels=(--json "$out/kernels.json" --png "$out/kernels.png" --minutes "$(within 35)")
engine=(--json "$out/engine.json" --minutes "$(within 40)" --trl-python "${TRL_PYTHON:-$python}")
if [ -n "${QUICK:-}" ]; then
  kernels+=(--quick)
  engine+=(--tiny --pairs 16)
elif ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "kernels and engine are skipped: torch sees no GPU" | tee -a "$out/versions.txt"
  case " $stages " in *" tests "*) stages=tests ;; *) stages=none ;; esac
fi

results=()
stage tests "$(part 25)" "$python" -m pytest -m gpu -rs kernels tests
stage kernels "$(part 35)" "$python" benchmarks/kernels.py "${kernels[@]}"
stage engine "$(part 40)" "$python" benchmarks/engine_gpu.py "${engine[@]}"
echo "== ended"
printf '%s\n' ${results[@]+"${results[@]}"} | tee -a "$out/versions.txt"
exit "$failed"
