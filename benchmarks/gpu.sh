#!/usr/bin/env bash
# Everything that wants a GPU, in one command: versions, tests, kernels, engine, each into files of the given folder.
#
#   benchmarks/gpu.sh OUT [MINUTES]        MINUTES: for all stages together (default 8)
#   QUICK=1 benchmarks/gpu.sh OUT          tiny shapes and models, on a CPU too: does everything run?
#
# The minutes are shared 40 : 35 : 25 among tests, kernels and engine. So few cut much short: three calls, each with
# minutes of its own, measure everything (any list of stages may be named; they share the minutes in that proportion):
#
#   STAGES=tests benchmarks/gpu.sh OUT 8
#   STAGES=kernels benchmarks/gpu.sh OUT 9
#   STAGES=engine benchmarks/gpu.sh OUT 9
#
# Without a GPU the stages are skipped, unless QUICK=1. Runs from a checkout, nothing of it installed. A failing stage
# does not stop the next; the exit code is 1 then.
set -uo pipefail
out=${1:?usage: gpu.sh OUT [MINUTES]}
seconds=$(awk -v minutes="${2:-8}" 'BEGIN { printf "%d", 60 * minutes }')
stages=${STAGES:-tests kernels engine}
for name in $stages; do
  case $name in
    tests | kernels | engine) ;;
    *) echo "no stage '$name'; there are tests, kernels and engine" >&2 && exit 2 ;;
  esac
done
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

# in a script that runs in the background commands ignore the interrupt with which a stage is ended
heeding=(env --default-signal=INT)
"${heeding[@]}" true 2>/dev/null || heeding=(env)

failed=0
# stage NAME SECONDS COMMAND...: run it, keep its output, say how it ended
stage() {
  local name=$1 limit=$2 started=$SECONDS code=0
  shift 2
  case " $stages " in *" $name "*) ;; *) return ;; esac
  echo "== $name, at most $limit s"
  # interrupted, a stage tells what it has by then
  timeout -s INT --kill-after=15 "$limit" "${heeding[@]}" "$@" 2>&1 | tee "$out/$name.log"
  code=${PIPESTATUS[0]}
  if [ "$code" -ne 0 ]; then
    failed=1
    results+=("$name: exit code $code after $((SECONDS - started)) s")
  else
    results+=("$name: done in $((SECONDS - started)) s")
  fi
}

if [ -z "${QUICK:-}" ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "kernels and engine are skipped: torch sees no GPU" | tee -a "$out/versions.txt"
  case " $stages " in *" tests "*) stages=tests ;; *) stages=none ;; esac
fi

declare -A share=([tests]=40 [kernels]=35 [engine]=25)
whole=0
for name in tests kernels engine; do
  case " $stages " in *" $name "*) whole=$((whole + share[$name])) ;; esac
done
# a stage's seconds, and the same in minutes with time left to end in order
part() { echo $((seconds * share[$1] / (whole ? whole : 1))); }
within() { awk -v s="$(part "$1")" 'BEGIN { printf "%.2f", s * 0.8 / 60 }'; }

pytest=(-m gpu -rfEs --durations=15 --continue-on-collection-errors)
kernels=(--json "$out/kernels.json" --png "$out/kernels.png" --minutes "$(within kernels)")
engine=(--json "$out/engine.json" --minutes "$(within engine)" --trl-python "${TRL_PYTHON:-$python}")
if [ -n "${QUICK:-}" ]; then
  kernels+=(--quick)
  engine+=(--tiny --pairs 16)
fi

results=()
stage tests "$(part tests)" "$python" -m pytest "${pytest[@]}" tests/test_gpu.py kernels/tests
stage kernels "$(part kernels)" "$python" benchmarks/kernels.py "${kernels[@]}"
stage engine "$(part engine)" "$python" benchmarks/engine_gpu.py "${engine[@]}"
echo "== ended"
printf '%s\n' ${results[@]+"${results[@]}"} | tee -a "$out/versions.txt"
exit "$failed"
