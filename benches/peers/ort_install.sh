# Sourced by ort_cpu and ort_webgpu: onnxruntime-node under target/peers/ort, and where things are.
ORT=1.30.0
root=$(cd "$here/../.." && pwd)
peers=${CARGO_TARGET_DIR:-$root/target}/peers
mkdir -p "$peers"
PEER_ORT=$(cd "$peers" && pwd)/ort
export PEER_ORT
fail() { echo "$peer: $*" >&2; exit 1; }

command -v node >/dev/null && command -v npm >/dev/null || fail "needs node 20 or later and npm"
node=$(node -p process.execPath)
if [[ $(cat "$PEER_ORT/installed" 2>/dev/null) != "$ORT" ]]; then
  echo "$peer: installing onnxruntime-node $ORT under target/peers/ort (once)" >&2
  rm -rf "$PEER_ORT"
  mkdir -p "$PEER_ORT"
  # Its install script fetches CUDA binaries, which nothing here uses.
  npm install --prefix "$PEER_ORT" --ignore-scripts --no-audit --no-fund --loglevel=error "onnxruntime-node@$ORT" >&2 ||
    fail "npm could not install onnxruntime-node $ORT"
  echo "$ORT" >"$PEER_ORT/installed"
fi
