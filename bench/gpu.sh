#!/usr/bin/env bash
# Builds, runs the GPU tests and then the benchmarks; all results go to a folder.
#
#   bench/gpu.sh OUT [WHEELS] [COMMIT]
#
# OUT     folder for logs, CSV files and plots
# WHEELS  folder of wheels to install without a network; leave it out (or "-") where all is installed
# COMMIT  what the rows say where this tree is no git checkout
#
# Needs python3 with a CUDA build of PyTorch. Goes on after a failure, so that one broken part costs
# no other, and ends with the number of parts that failed.
set -uo pipefail
[ $# -ge 1 ] || { sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 2; }
out=$(mkdir -p "$1" && cd "$1" && pwd)
wheels=${2:--}
[ "$wheels" = - ] || wheels=$(cd "$wheels" && pwd) || exit 2
commit=(${3:+--commit "$3"})
cd "$(dirname "$0")/.." || exit 2

failed=0
part() { # NAME COMMAND...: runs it, keeps what it prints, counts a failure
  local name=$1
  shift
  echo "== $name: $*"
  "$@" >"$out/$name.log" 2>&1 || { failed=$((failed + 1)); echo "   failed, see $name.log"; }
  tail -n 3 "$out/$name.log"
}

part machine nvidia-smi
if [ "$wheels" != - ]; then
  # --no-deps: nothing here may replace the machine's PyTorch and Triton.
  part install python3 -m pip install --no-index --no-deps "$wheels"/*.whl
fi
# The native CPU library; the Triton kernels compile when they are first called.
if command -v cmake >/dev/null && command -v c++ >/dev/null; then
  part build bash -c 'cmake -S . -B build/gpu -DCMAKE_BUILD_TYPE=Release &&
    cmake --build build/gpu --parallel && cmake --install build/gpu --prefix .'
fi
part packages python3 -m pip list
part gpu_tests python3 -m pytest -m gpu -rs tests

bench=(python3 -m bench.loss_head "${commit[@]}")
part trl "${bench[@]}" --preset trl --csv "$out/loss_head_trl.csv" --plot "$out/loss_head_trl.svg"
# A shape at a time: a run that is cut off keeps the shapes before it.
for shape in 16384,1536,151936 16384,3584,152064 16384,5120,152064; do
  part "gpu_$shape" "${bench[@]}" --preset gpu --shapes "$shape" --append \
    --csv "$out/loss_head_gpu.csv" --plot "$out/loss_head_gpu.svg"
done
part attention python3 -m bench.attention "${commit[@]}" --preset gpu --csv "$out/attention_gpu.csv"
part sequence_parallel python3 -m bench.sequence_parallel --csv "$out/sequence_parallel.csv"
if [ -f "$out/loss_head_gpu.csv" ]; then
  part table "${bench[@]}" --csv "$out/loss_head_gpu.csv" --table
fi
part decode python3 -m bench.paged_attention --device cuda "${commit[@]}" \
  --csv "$out/paged_attention_gpu.csv"
part adamw python3 -m bench.adamw --device cuda "${commit[@]}" --csv "$out/adamw_gpu.csv"
part rope python3 -m bench.qkv_rope --device cuda "${commit[@]}" --csv "$out/qkv_rope_gpu.csv"
echo "== $failed part(s) failed"
exit $((failed > 0))
