#!/usr/bin/env bash
# Everything that needs a GPU, in one command: versions, tests, kernels, engine, online methods, each into files of one
# folder.
#
#   benchmarks/gpu.sh OUT [MINUTES]        MINUTES: for all stages together (default 12); OUT: default $OUT
#   TINY=1 benchmarks/gpu.sh OUT           one test, tiny shapes and models, on a CPU too: does everything run?
#
# The stages tests, kernels, engine and online share the minutes 24 : 26 : 30 : 20, so that none of them has 4 minutes by
# default. What is measured is written at once: a JSON file after every contender, or every case of the kernels, and the
# end of a stage into versions.txt. A machine that is taken away leaves everything except what was running. A shorter
# loan is enough for some of the stages (STAGES lists them; they share the minutes in that proportion):
#
#   STAGES="tests kernels" benchmarks/gpu.sh OUT 6
#   STAGES="engine online" benchmarks/gpu.sh OUT 6
#
# More minutes show more: contenders and cases that have no time left are named as failed or left out.
#
# PYTHON: the interpreter (default python3). TRL_PYTHON: one that has TRL (default: PYTHON when it has it; without one, or
# with "none", TRL does not take part). Without a GPU only tests run, unless TINY=1. Runs from a checkout, nothing of it
# installed, and needs no network. A stage that fails does not stop the next; the exit code is 1 then.
set -uo pipefail
out=${1:-${OUT:-}}
[ -n "$out" ] || { echo "usage: gpu.sh OUT [MINUTES]" >&2 && exit 2; }
seconds=$(awk -v minutes="${2:-12}" 'BEGIN { printf "%d", 60 * minutes }')
stages=${STAGES:-tests kernels engine online}
for name in $stages; do
  case $name in
    tests | kernels | engine | online) ;;
    *) echo "unknown stage '$name'; choose from tests, kernels, engine and online" >&2 && exit 2 ;;
  esac
done
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
root=$(cd "$(dirname "$0")/.." && pwd) || exit 2
cd "$root" || exit 2
python=${PYTHON:-python3}

# Plugins are found by their entry points: write those of the checkout, as an installation would.
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

# commands of a script in the background ignore SIGINT, which ends a stage: restore its default action
interruptible=(env --default-signal=INT)
"${interruptible[@]}" true 2>/dev/null || interruptible=(env)

failed=0
# stage NAME SECONDS COMMAND...: run it, keep its output and how it ended
stage() {
  local name=$1 limit=$2 started=$SECONDS code=0
  shift 2
  case " $stages " in *" $name "*) ;; *) return ;; esac
  echo "== $name, at most $limit s"
  # an interrupted stage reports what it has measured by then
  timeout -s INT --kill-after=15 "$limit" "${interruptible[@]}" "$@" 2>&1 | tee "$out/$name.log"
  code=${PIPESTATUS[0]}
  local result="$name: done in $((SECONDS - started)) s"
  if [ "$code" -ne 0 ]; then
    failed=1
    result="$name: exit code $code after $((SECONDS - started)) s"
  fi
  results+=("$result")
  echo "$result" >>"$out/versions.txt"
}

if [ -z "${TINY:-}" ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "kernels, engine and online are skipped: torch finds no GPU" | tee -a "$out/versions.txt"
  case " $stages " in *" tests "*) stages=tests ;; *) stages=none ;; esac
fi

declare -A share=([tests]=24 [kernels]=26 [engine]=30 [online]=20)
whole=0
for name in "${!share[@]}"; do
  case " $stages " in *" $name "*) whole=$((whole + share[$name])) ;; esac
done
# a stage's seconds, and 80 % of them in minutes: the rest is for an orderly end
part() { echo $((seconds * share[$1] / (whole ? whole : 1))); }
within() { awk -v s="$(part "$1")" 'BEGIN { printf "%.2f", s * 0.8 / 60 }'; }

tests=(-m gpu -vv -rfEs --durations=15 --continue-on-collection-errors tests/test_gpu.py kernels/tests)
kernels=(--json "$out/kernels.json" --minutes "$(within kernels)")
engine=(--json "$out/engine.json" --minutes "$(within engine)")
online=(--json "$out/online.json" --minutes "$(within online)")
if [ -n "${TINY:-}" ]; then
  tests=(kernels/tests/test_bench.py -k both_ways_of_path_4)  # a Triton kernel, interpreted on a CPU
  kernels+=(--tiny --threads 1)
  engine+=(--tiny --threads 1)
  online+=(--tiny --threads 1)
else
  kernels+=(--png "$out/kernels.png")
fi
trl=${TRL_PYTHON:-none}
if [ -z "${TRL_PYTHON:-}" ]; then
  "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("trl") is None)' && trl=$python
fi
if [ "$trl" != none ]; then
  engine+=(--trl-python "$trl")
  online+=(--trl-python "$trl")
fi

results=()
stage tests "$(part tests)" "$python" -m pytest "${tests[@]}"
stage kernels "$(part kernels)" "$python" benchmarks/kernels.py "${kernels[@]}"
stage engine "$(part engine)" "$python" benchmarks/engine_gpu.py "${engine[@]}"
stage online "$(part online)" "$python" benchmarks/online_gpu.py "${online[@]}"
echo "== ended"
printf '%s\n' ${results[@]+"${results[@]}"}
exit "$failed"
