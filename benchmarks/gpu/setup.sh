# Sourced by part1.sh and part2.sh in the checkout's root; a second time it installs nothing.
: "${OUT:?names the folder for what is measured}"
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export DS_ACCELERATOR=${DS_ACCELERATOR:-cuda} ADDAX_CACHE=/tmp/addax_cache
site=/tmp/gpukit_site
if [ ! -e $site/complete ]; then
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target $site .gpukit/wheels/*.whl || exit 1
  cp -r .gpukit/site/. $site/
  touch $site/complete
fi
export PYTHONPATH=$site:$PWD PATH=$site/bin:$PATH

# part SECONDS NAME COMMAND...: within a time limit; shows the end of what it says, keeps it all.
part() {
  local limit=$1 name=$2 start=$SECONDS
  shift 2
  echo "##### $name (at most $limit s)"
  timeout -k 5 "$limit" "$@" >"$OUT/$name.log" 2>&1
  echo "##### $name: status $?, $((SECONDS - start)) s"
  tail -"${LINES_SHOWN:-25}" "$OUT/$name.log" | cut -c1-200
}

# steps SECONDS SHAPE SHARDING FLAGS...: steps of random weights on one rank, beside the plan.
steps() {
  local limit=$1 shape=$2 sharding=$3
  shift 3
  LINES_SHOWN=40 part "$limit" "${shape}_$sharding" python3 benchmarks/gpu/steps.py \
    --shape "$shape" --sharding "$sharding" --output "$OUT/${shape}_$sharding.json" "$@"
}

# The replies of such machines hold few files: one archive.
keep() {
  tar -C "$OUT" -czf "/tmp/$1.tgz" . && find "$OUT" -mindepth 1 -delete
  mv "/tmp/$1.tgz" "$OUT"
}
